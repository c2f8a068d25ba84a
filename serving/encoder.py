"""The text encoder as a deployment of its own, off the hot path.

In:  texts of new items, of people's interests, of whoever asks for vectors.  Out: their vectors.
Knows nothing of items. New items' vectors are cached on disk by content, so every replica that meets an item after the
first finds its vector made; others' are kept in memory (batching.py).
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.errors import EngineError
from embeddings.text_encoder import EncoderConfig
from serving.batching import Embedded, Text, UnreadableTextError, build_batching
from serving.config import ServeConfig

MAX_ONGOING = 1_000
"""Requests at a time: all but a few wait in here, where batches are made of them."""


# No CPU of its own: it works only while someone waits for a vector.
@serve.deployment(
    name="Encoder",
    ray_actor_options={"num_cpus": 0},
    max_constructor_retry_count=1,
    max_ongoing_requests=MAX_ONGOING,
)
class Encoder:
    """One language model in one thread."""

    def __init__(self, config: EncoderConfig, cache_folder: Path, serve_config: ServeConfig) -> None:
        self._encoder = build_batching(config, cache_folder, serve_config, warm=serve_config.warm_encoder)

    async def encode(self, texts: list[str]) -> np.ndarray:
        """Return one vector an item's text, float32 [n, E]."""
        return await asyncio.wrap_future(self._encoder.encode_items(texts))

    async def embed(self, texts: list[Text], first: bool) -> Embedded | UnreadableTextError:
        """Return what became of texts; what cannot be read is returned, since what is raised arrives as Ray's."""
        try:
            return await asyncio.wrap_future(self._encoder.embed(texts, first=first))
        except UnreadableTextError as error:
            return error


class RemoteEncoder:
    """Asks the encoder deployment."""

    def __init__(self, handle: DeploymentHandle, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._handle = handle
        self._loop = loop
        self._timeout_s = timeout_s

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector an item's text, float32 [n, E]; blocks, so not for the event loop's thread.

        Raises `EngineError` when none comes in time.
        """
        answer = asyncio.run_coroutine_threadsafe(self._ask(list(texts)), self._loop)
        try:
            # A copy: what Ray hands out is shared memory, read-only in name alone.
            return np.array(answer.result(self._timeout_s))
        except (TimeoutError, RayError, RayServeException) as error:
            answer.cancel()
            raise EngineError(f"the text encoder does not answer ({error!r:.300})") from error

    async def embed(self, texts: Sequence[Text], *, first: bool, timeout_s: float) -> Embedded:
        """Return what becomes of texts. Raises `UnreadableTextError`, or `EngineError` when nothing comes in time."""
        try:
            embedded = await asyncio.wait_for(self._embed(list(texts), first), timeout_s)
        except (TimeoutError, RayError, RayServeException) as error:
            raise EngineError(f"the text encoder does not answer ({error!r:.300})") from error
        if isinstance(embedded, UnreadableTextError):
            raise embedded
        return embedded

    async def _ask(self, texts: list[str]) -> np.ndarray:
        return await self._handle.encode.remote(texts)

    async def _embed(self, texts: list[Text], first: bool) -> Embedded | UnreadableTextError:
        return await self._handle.embed.remote(texts, first)
