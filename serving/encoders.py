"""The text encoder of each version: the model that its own recipe names, as fine-tuned by the adapter in it.

In:  a version's number, or none for the promoted one.  Out: the `BatchingEncoder` whose vectors are in its space.
Knows nothing of who asks. Versions with one adapter share one encoder; the newest few stay loaded, so that a version on
trial, a pinned one and the one before a migration are answered in their own spaces.
"""

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from cluster.errors import ConfigError, DataError, EngineError, RecloopError, RegistryError
from cluster.registry import Registry
from embeddings.text_encoder import EncoderConfig, TextEncoder
from serving.batching import BatchingEncoder, Embedded, Text, build_batching
from serving.config import ServeConfig
from training.models.version import StatedEncoder, read_encoder

log = logging.getLogger(__name__)

LOADED = 3
"""Encoders in memory; one that nobody has asked longest gives way."""
KNOWN = 1_000
Space = tuple[EncoderConfig, str]
"""What vectors that may be compared are made by: a model as it is set, and the digest of its adapter."""
WAITED_FOR = 64
"""New items whose vectors are waited for at a time: patience is for what is stuck, not for what is much."""


class VersionEncoders:
    """Encoders by version; from any thread."""

    def __init__(self, cache: Path, serve: ServeConfig, registry: Registry) -> None:
        self._cache, self._serve, self._registry = cache, serve, registry
        self._lock = threading.Lock()
        self._made_by: OrderedDict[int, Space] = OrderedDict()
        self._loaded: OrderedDict[Space, BatchingEncoder] = OrderedDict()
        if serve.warm_encoder:
            try:
                self.of(None)
            except RecloopError as error:  # recommendations go on without; whoever asks for a vector hears of it
                log.error("no text encoder is loaded: %s", error)

    def of(self, version: int | None) -> BatchingEncoder:
        """Return the encoder of a version.

        Raises `RegistryError` where the version cannot be read, `ConfigError`, `DataError` or `EngineError` where this
        machine has no such encoder.
        """
        if version is None:
            version = self._registry.current().version
        with self._lock:
            space = self._made_by.get(version)
            if space is not None and space in self._loaded:
                self._loaded.move_to_end(space)
                return self._loaded[space]
            return self._load(version, read_encoder(self._registry, version))  # a version never changes

    def stop(self) -> None:
        """End all threads."""
        with self._lock:
            while self._loaded:
                self._loaded.popitem()[1].stop()

    def _load(self, version: int, stated: StatedEncoder) -> BatchingEncoder:
        space = stated.config, stated.adapter.digest if stated.adapter is not None else ""
        if space not in self._loaded:
            encoder = TextEncoder(stated.config, self._cache, stated.adapter)
            if stated.fingerprint not in ("", encoder.fingerprint):
                raise EngineError(
                    f"version {version} is of encoder {stated.fingerprint}, and {stated.config.model!r} here is "
                    f"{encoder.fingerprint}; install the model that it was trained with"
                )
            self._loaded[space] = build_batching(encoder, self._serve, warm=self._serve.warm_encoder)
            if len(self._loaded) > LOADED:
                threading.Thread(target=self._loaded.popitem(last=False)[1].stop, daemon=True).start()
        self._made_by[version] = space
        if len(self._made_by) > KNOWN:
            self._made_by.popitem(last=False)
        return self._loaded[space]


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
        try:
            # Looked up for each part: an encoder that nobody asked for long may have ended meanwhile.
            parts = [
                _found(self._encoders, version).encode_items(part).result(self._timeout_s) for part in parts_of(texts)
            ]
        except TimeoutError as error:
            raise EngineError(f"the text encoder does not answer within {self._timeout_s} s") from error
        return np.concatenate(parts)

    async def embed(
        self, texts: Sequence[Text], *, first: bool, timeout_s: float, version: int | None = None
    ) -> Embedded:
        """Return what becomes of texts. Raises `UnreadableTextError`, or `EngineError` when nothing comes in time."""
        try:
            return await asyncio.wait_for(self._embed(texts, first, version), timeout_s)
        except TimeoutError as error:
            raise EngineError(f"the text encoder does not answer within {timeout_s} s") from error

    async def _embed(self, texts: Sequence[Text], first: bool, version: int | None) -> Embedded:
        encoder = await asyncio.to_thread(_found, self._encoders, version)
        return await asyncio.wrap_future(encoder.embed(texts, first=first))


def parts_of(texts: Sequence[str]) -> list[list[str]]:
    """Return texts as they are waited for; one part at least."""
    return [list(texts[first : first + WAITED_FOR]) for first in range(0, max(len(texts), 1), WAITED_FOR)]


def _found(encoders: Encoders, version: int | None) -> BatchingEncoder:
    try:
        return encoders.of(version)
    except (RegistryError, ConfigError, DataError) as error:
        raise EngineError(f"the text encoder of the version cannot be had: {error}") from error
