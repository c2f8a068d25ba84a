"""The text encoder of each version: the model that the recipe names, as fine-tuned by the adapter in the version.

In:  a version's number, or none for the promoted one.  Out: the `BatchingEncoder` whose vectors are in its space.
Knows nothing of who asks. Versions with one adapter share one encoder; the newest few stay loaded, so that a version on
trial, a pinned one and the one before a migration are answered in their own spaces.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from cluster.errors import EngineError, RegistryError
from cluster.registry import Registry
from embeddings.adapter import Adapter
from embeddings.text_encoder import EncoderConfig
from serving.batching import BatchingEncoder, Embedded, Text, build_batching
from serving.config import ServeConfig
from training.models.version import read_encoder

LOADED = 3
"""Encoders in memory; one that nobody has asked longest gives way."""
KNOWN = 1_000
WAITED_FOR = 64
"""New items whose vectors are waited for at a time: patience is for what is stuck, not for what is much."""


class VersionEncoders:
    """Encoders by version; from any thread."""

    def __init__(self, config: EncoderConfig, cache: Path, serve: ServeConfig, registry: Registry) -> None:
        self._config, self._cache, self._serve, self._registry = config, cache, serve, registry
        self._lock = threading.Lock()
        self._adapter_of: OrderedDict[int, str] = OrderedDict()
        self._loaded: OrderedDict[str, BatchingEncoder] = OrderedDict()
        if serve.warm_encoder:
            self.of(None)

    def of(self, version: int | None) -> BatchingEncoder:
        """Return the encoder of a version. Raises `RegistryError` where it cannot be read."""
        if version is None:
            version = self._registry.current().version
        with self._lock:
            digest = self._adapter_of.get(version)
            if digest is not None and digest in self._loaded:
                self._loaded.move_to_end(digest)
                return self._loaded[digest]
            _, adapter = read_encoder(self._registry, version)  # a version never changes
            return self._load(version, adapter)

    def stop(self) -> None:
        """End all threads."""
        with self._lock:
            while self._loaded:
                self._loaded.popitem()[1].stop()

    def _load(self, version: int, adapter: Adapter | None) -> BatchingEncoder:
        digest = adapter.digest if adapter is not None else ""
        self._adapter_of[version] = digest
        if len(self._adapter_of) > KNOWN:
            self._adapter_of.popitem(last=False)
        if digest not in self._loaded:
            # What the version holds counts, not a folder of the machine that it was trained on.
            config = replace(self._config, adapter=None)
            self._loaded[digest] = build_batching(
                config, self._cache, self._serve, warm=self._serve.warm_encoder, adapter=adapter
            )
            if len(self._loaded) > LOADED:
                threading.Thread(target=self._loaded.popitem(last=False)[1].stop, daemon=True).start()
        return self._loaded[digest]


class Encoders(Protocol):
    """Encoders by version."""

    def of(self, version: int | None) -> BatchingEncoder:
        """Return the encoder of a version, or of the promoted one."""
        ...


class LocalEncoder:
    """Asks the encoders of the same process."""

    def __init__(self, encoders: Encoders, timeout_s: float) -> None:
        self._encoders = encoders
        self._timeout_s = timeout_s

    def encode(self, texts: Sequence[str], version: int | None = None) -> np.ndarray:
        """Return one vector an item's text, float32 [n, E]; blocks. Raises `EngineError`."""
        encoder = _found(self._encoders, version)
        try:
            parts = [encoder.encode_items(part).result(self._timeout_s) for part in parts_of(texts)]
        except TimeoutError as error:
            raise EngineError(f"the text encoder does not answer within {self._timeout_s} s") from error
        return np.concatenate(parts)

    async def embed(
        self, texts: Sequence[Text], *, first: bool, timeout_s: float, version: int | None = None
    ) -> Embedded:
        """Return what becomes of texts. Raises `UnreadableTextError`, or `EngineError` when nothing comes in time."""
        encoder = await asyncio.to_thread(_found, self._encoders, version)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(encoder.embed(texts, first=first)), timeout_s)
        except TimeoutError as error:
            raise EngineError(f"the text encoder does not answer within {timeout_s} s") from error


def parts_of(texts: Sequence[str]) -> list[list[str]]:
    """Return texts as they are waited for; one part at least."""
    return [list(texts[first : first + WAITED_FOR]) for first in range(0, max(len(texts), 1), WAITED_FOR)]


def _found(encoders: Encoders, version: int | None) -> BatchingEncoder:
    try:
        return encoders.of(version)
    except RegistryError as error:
        raise EngineError(f"the text encoder of the version cannot be read: {error}") from error
