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
from cluster.registry import Registry
from serving.batching import Embedded, Text, UnreadableTextError
from serving.config import ServeConfig
from serving.encoders import VersionEncoders, parts_of

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
    """The language model of each version that is served, in one thread each."""

    def __init__(self, cache_folder: Path, serve_config: ServeConfig, registry_uri: str) -> None:
        self._encoders = VersionEncoders(cache_folder, serve_config, Registry(registry_uri))

    async def encode(self, texts: list[str], version: int | None = None) -> np.ndarray:
        """Return one vector an item's text, float32 [n, E]."""
        encoder = await asyncio.to_thread(self._encoders.of, version)
        return await asyncio.wrap_future(encoder.encode_items(texts))

    async def embed(self, texts: list[Text], first: bool, version: int | None = None) -> Embedded | UnreadableTextError:
        """Return what became of texts; what cannot be read is returned, since what is raised arrives as Ray's."""
        encoder = await asyncio.to_thread(self._encoders.of, version)
        try:
            return await asyncio.wrap_future(encoder.embed(texts, first=first))
        except UnreadableTextError as error:
            return error


class RemoteEncoder:
    """Asks the encoder deployment."""

    def __init__(self, handle: DeploymentHandle, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._handle = handle
        self._loop = loop
        self._timeout_s = timeout_s

    def encode(self, texts: Sequence[str], version: int | None = None) -> np.ndarray:
        """Return one vector an item's text, float32 [n, E]; blocks, so not for the event loop's thread.

        Raises `EngineError` when none comes in time.
        """
        # A copy: what Ray hands out is shared memory, read-only in name alone.
        return np.concatenate([self._wait_for(part, version) for part in parts_of(texts)])

    def _wait_for(self, texts: list[str], version: int | None) -> np.ndarray:
        answer = asyncio.run_coroutine_threadsafe(self._ask(texts, version), self._loop)
        try:
            return answer.result(self._timeout_s)
        except (TimeoutError, RayError, RayServeException) as error:
            answer.cancel()
            raise EngineError(f"the text encoder does not answer ({error!r:.300})") from error

    async def embed(
        self, texts: Sequence[Text], *, first: bool, timeout_s: float, version: int | None = None
    ) -> Embedded:
        """Return what becomes of texts. Raises `UnreadableTextError`, or `EngineError` when nothing comes in time."""
        try:
            embedded = await asyncio.wait_for(self._embed(list(texts), first, version), timeout_s)
        except (TimeoutError, RayError, RayServeException) as error:
            raise EngineError(f"the text encoder does not answer ({error!r:.300})") from error
        if isinstance(embedded, UnreadableTextError):
            raise embedded
        return embedded

    async def _ask(self, texts: list[str], version: int | None) -> np.ndarray:
        return await self._handle.encode.remote(texts, version)

    async def _embed(self, texts: list[Text], first: bool, version: int | None) -> Embedded | UnreadableTextError:
        return await self._handle.embed.remote(texts, first, version)
