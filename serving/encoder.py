"""The text encoder as a deployment of its own, off the hot path.

In:  texts of new items.  Out: their vectors.
Knows nothing of items. Only new items come here; vectors are cached on disk by content, so every replica that meets an
item after the first finds its vector made.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.errors import EngineError
from embeddings.text_encoder import EncoderConfig, TextEncoder


# No CPU of its own: it works only while someone waits for a new item.
@serve.deployment(name="Encoder", ray_actor_options={"num_cpus": 0}, max_constructor_retry_count=1)
class Encoder:
    """One language model in one thread."""

    def __init__(self, config: EncoderConfig, cache_folder: Path) -> None:
        self._encoder = TextEncoder(config, cache_folder)
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def encode(self, texts: list[str]) -> np.ndarray:
        """Return one vector a text, float32 [n, E]."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encoder.encode, texts)


class RemoteEncoder:
    """Asks the encoder deployment from any thread but the event loop's."""

    def __init__(self, handle: DeploymentHandle, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._handle = handle
        self._loop = loop
        self._timeout_s = timeout_s

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector a text, float32 [n, E]; raises `EngineError` when none comes in time."""
        answer = asyncio.run_coroutine_threadsafe(self._ask(list(texts)), self._loop)
        try:
            # A copy: what Ray hands out is shared memory, read-only in name alone.
            return np.array(answer.result(self._timeout_s))
        except (TimeoutError, RayError, RayServeException) as error:
            answer.cancel()
            raise EngineError(f"the text encoder does not answer ({error!r:.300})") from error

    async def _ask(self, texts: list[str]) -> np.ndarray:
        return await self._handle.encode.remote(texts)
