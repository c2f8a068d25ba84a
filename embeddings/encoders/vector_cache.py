"""Vectors kept on disk under the hash of what they were made of.

In:  keys and vectors, many at a time.  Out: the vectors again, in another run or another process.
Knows nothing of encoders: one file holds one encoder's vectors, and whoever opens it names the file.

A vector is durable within `FLUSH_S` of being written, so that a run that is killed goes on where it was.
"""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

KEYS_A_QUERY = 500
"""SQLite takes 999 parameters at least."""
FLUSH_S = 1.0
FLUSH_VECTORS = 4096


class VectorCache:
    """One file of vectors; without a path it keeps nothing."""

    def __init__(self, path: Path | None, dim: int) -> None:
        """Open the file, making it where there is none."""
        self._connection: sqlite3.Connection | None = None
        self._bytes = 4 * dim
        self._pending: list[tuple[bytes, bytes]] = []
        self._flushed_s = time.monotonic()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=30)
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what was written, also when the run ends by an error, and close."""
        if self._connection is not None:
            self._flush()
            self._connection.close()

    def read(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, np.ndarray]]:
        """Yield those that are known, in no order; a row of another length than a vector's is none."""
        if self._connection is None:
            return
        for first in range(0, len(keys), KEYS_A_QUERY):
            asked = keys[first : first + KEYS_A_QUERY]
            marks = ",".join("?" * len(asked))
            for key, vector in self._connection.execute(
                f"SELECT key, vector FROM vectors WHERE key IN ({marks})", asked
            ):
                if len(vector) == self._bytes:
                    yield key, np.frombuffer(vector, np.float32)

    def write(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Keep vectors, float32 [n, E]."""
        if self._connection is None:
            return
        self._pending += [(key, vector.tobytes()) for key, vector in zip(keys, vectors, strict=True)]
        if len(self._pending) >= FLUSH_VECTORS or time.monotonic() - self._flushed_s >= FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        assert self._connection is not None
        with self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", self._pending)
        self._pending.clear()
        self._flushed_s = time.monotonic()
