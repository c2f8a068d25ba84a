"""A catalogue's texts encoded by workers of a Ray cluster.

In:  an encoder, texts.  Out: the vectors of a few hundred texts at a time, as workers finish them.
Knows nothing of caches: whoever asks keeps each part as it comes, so that a run that is killed goes on where it was.

    driver   texts of like length, 256 a part ──▶ at most two parts a worker in flight ──▶ vectors, in no order
    worker   one model, `threads` CPUs; one that dies is started again and its parts are encoded again
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import EngineError

if TYPE_CHECKING:
    from embeddings.text_encoder import TextEncoder

PART_TEXTS = 256
PARTS_IN_FLIGHT = 2
"""Of each worker: one that it encodes and one that waits, so that it never does."""
RESTARTS = 3


class EncodingWorker:
    """What runs on a worker: an encoder of its own."""

    def __init__(self, encoder: "TextEncoder") -> None:
        self._encoder = encoder

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return one vector a text, float32 [n, E]."""
        vectors_NE = np.empty((len(texts), self._encoder.dim), np.float32)
        for indices, vectors in self._encoder.forward(texts):
            vectors_NE[indices] = vectors
        return vectors_NE


def pays_on_ray(encoder: "TextEncoder", texts: int) -> bool:
    """Whether the recipe asks for workers, this process is connected to a Ray, and there is work for more than one."""
    if encoder.config.workers == 1 or texts <= PART_TEXTS:
        return False
    import ray

    return ray.is_initialized()


def forward_on_ray(encoder: "TextEncoder", texts: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield the vectors of texts, none of them empty: indices and float32 [b, E].

    As many workers as the recipe says or as the cluster has CPUs for, one at least. Raises `EngineError` when they
    cannot load the model, or die more often than `RESTARTS`.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    threads = encoder.config.threads or 1
    count = pool_size(encoder.config.workers, threads, ray.cluster_resources().get("CPU", 1), len(texts))
    elsewhere = encoder.unloaded(replace(encoder.config, threads=threads, workers=1))
    actor = ray.remote(num_cpus=threads, max_restarts=RESTARTS, max_task_retries=RESTARTS)(EncodingWorker)
    # Any: Ray's handles have no type of their own.
    workers: list[Any] = [actor.remote(elsewhere) for _ in range(count)]
    try:
        parts = _parts(texts)
        asked: dict[Any, tuple[Any, list[int]]] = {}

        def ask(worker: Any) -> None:  # noqa: ANN401
            indices = next(parts, None)
            if indices is not None:
                asked[worker.encode.remote([texts[i] for i in indices])] = (worker, indices)

        for worker in workers * PARTS_IN_FLIGHT:
            ask(worker)
        while asked:
            (answer, *_), _ = ray.wait(list(asked), num_returns=1)
            worker, indices = asked.pop(answer)
            try:
                vectors = ray.get(answer)
            except RayTaskError as error:
                raise (
                    error.cause
                    if isinstance(error.cause, EngineError)
                    else EngineError(f"encoding workers: {error.cause!r}")
                ) from error
            except RayActorError as error:
                raise EngineError(f"an encoding worker died {RESTARTS + 1} times: {error}") from error
            ask(worker)
            yield indices, vectors
    finally:
        for worker in workers:
            ray.kill(worker)


def pool_size(wanted: int, threads: int, cpus: float, texts: int) -> int:
    """Return how many workers to start: no more than fit into the cluster or have a part to encode, one at least."""
    return max(1, min(wanted, int(cpus // threads), -(-texts // PART_TEXTS)))


def _parts(texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield indices of texts, longest first: the last parts, which some workers wait out, are the short ones."""
    ordered = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for first in range(0, len(ordered), PART_TEXTS):
        yield ordered[first : first + PART_TEXTS]
