"""Vectors on disk, many at a time."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from embeddings.encoders.vector_cache import KEYS_A_QUERY, VectorCache


def _keys(count: int) -> list[bytes]:
    return [n.to_bytes(32) for n in range(count)]


def test_what_is_written_is_read_again_by_another(tmp_path: Path) -> None:
    keys, vectors = _keys(3 * KEYS_A_QUERY), np.random.default_rng(0).random((3 * KEYS_A_QUERY, 4), np.float32)
    with VectorCache(tmp_path / "folder" / "vectors.db", 4) as cache:
        cache.write(keys[:700], vectors[:700])
        cache.write(keys[700:], vectors[700:])
    with VectorCache(tmp_path / "folder" / "vectors.db", 4) as cache:
        read = dict(cache.read([*keys, b"of nothing"]))
    np.testing.assert_array_equal(np.stack([read[key] for key in keys]), vectors)
    assert len(read) == len(keys)


def test_what_was_written_before_an_error_is_kept(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with VectorCache(tmp_path / "vectors.db", 2) as cache:
            cache.write([b"k"], np.ones((1, 2), np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    with VectorCache(tmp_path / "vectors.db", 2) as cache:
        assert [key for key, _ in cache.read([b"k"])] == [b"k"]


def test_a_row_of_another_length_than_a_vector_is_none(tmp_path: Path) -> None:
    with VectorCache(tmp_path / "vectors.db", 2) as cache:
        cache.write([b"k"], np.ones((1, 2), np.float32))
    with sqlite3.connect(tmp_path / "vectors.db") as damaged:
        damaged.execute("UPDATE vectors SET vector = x'00'")
    with VectorCache(tmp_path / "vectors.db", 2) as cache:
        assert list(cache.read([b"k"])) == []


def test_without_a_file_nothing_is_kept() -> None:
    with VectorCache(None, 2) as cache:
        cache.write([b"k"], np.ones((1, 2), np.float32))
        assert list(cache.read([b"k"])) == []
