"""SQLite's write-ahead log as bytes: which of its frames hold, which do not.

In:  the database's path.  Out: frames, each with its own verdict; the damage that SQLite would pass over in silence.
Knows nothing of tables.
Source: https://www.sqlite.org/fileformat2.html#the_write_ahead_log

    header  magic version page_size checkpoint salt-1 salt-2 checksum-1 checksum-2
    frame   page_number size_at_commit salt-1 salt-2 checksum-1 checksum-2 │ page        each checksum goes on
    frame   …                                                                           from the one before

SQLite reads up to the first frame whose checksum does not hold. Here each frame is held against the checksum that the
frame before it states, so whole frames behind a damaged one are known to be whole.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24
MAGIC = 0x377F0682  # the lowest bit says that checksums are of big-endian words
HASHED_OF_HEADER = 24
HASHED_OF_FRAME_HEADER = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One page as some transaction wrote it."""

    page_number: int
    commits: bool
    """The last frame of its transaction."""
    whole: bool
    """Its checksum holds."""
    page: bytes


def read_frames(path: Path, default_page_bytes: int = 4096) -> list[Frame]:
    """Return the frames of a database's present write-ahead log, in order; those left of an earlier one are not its."""
    journal = path.with_name(f"{path.name}-wal")
    data = journal.read_bytes() if journal.exists() else b""
    if len(data) < HEADER_BYTES:
        return []
    header = np.frombuffer(data[:HEADER_BYTES], ">u4")
    order = ">u4" if header[0] & 1 else "<u4"
    header_holds = header[0] | 1 == MAGIC | 1 and tuple(header[6:]) == _hash_one(data[:HASHED_OF_HEADER], order)
    page_bytes = int(header[2]) if header_holds else default_page_bytes
    frame_bytes = FRAME_HEADER_BYTES + page_bytes
    count = (len(data) - HEADER_BYTES) // frame_bytes
    if count == 0:
        return []
    raw = np.frombuffer(data, np.uint8, count * frame_bytes, HEADER_BYTES).reshape(count, frame_bytes)
    fields = np.ascontiguousarray(raw[:, :FRAME_HEADER_BYTES]).view(">u4").astype(np.uint32)
    stated = np.vstack([header[6:].astype(np.uint32), fields[:, 4:]])
    hashed = np.hstack([raw[:, :HASHED_OF_FRAME_HEADER], raw[:, FRAME_HEADER_BYTES:]])
    salts = header[4:6].astype(np.uint32) if header_holds else fields[0, 2:4]
    ours = (fields[:, 2:4] == salts).all(axis=1)
    whole = ours & (_hash(hashed, stated[:-1], order if header_holds else "<u4") == stated[1:]).all(axis=1)
    newest = int(np.flatnonzero(ours)[-1]) + 1 if ours.any() else 0
    return [
        Frame(
            page_number=int(fields[i, 0]),
            commits=bool(fields[i, 1]),
            whole=bool(whole[i]) and (i > 0 or header_holds),
            page=raw[i, FRAME_HEADER_BYTES:].tobytes(),
        )
        for i in range(newest)
    ]


def describe_damage(path: Path) -> str:
    """Say which frame is damaged in front of whole, committed ones; empty where SQLite will read all there is."""
    frames = read_frames(path)
    committed = [place for place, frame in enumerate(frames) if frame.whole and frame.commits]
    torn = [place for place, frame in enumerate(frames) if not frame.whole]
    if not (committed and torn and torn[0] < committed[-1]):
        return ""
    behind = len(committed) - sum(place < torn[0] for place in committed)
    return f"{path}-wal: frame {torn[0] + 1} of {len(frames)} is damaged and {behind} whole commits follow it"


def _hash_one(data: bytes, order: str) -> tuple[int, int]:
    rows = np.frombuffer(data, np.uint8).reshape(1, -1)
    first, second = _hash(rows, np.zeros((1, 2), np.uint32), order)[0]
    return int(first), int(second)


def _hash(rows: np.ndarray, seeds: np.ndarray, order: str) -> np.ndarray:
    """Return the two running sums of each row of bytes, from its own seed.

    For each pair of words, s1 += x0 + s2 and s2 += x1 + s1: linear mod 2^32, so a row's sums are dot products.
    """
    words = np.ascontiguousarray(rows).view(order).astype(np.uint32).reshape(len(rows), -1, 2)
    even, both = words[:, :, 0], words[:, :, 0] + words[:, :, 1]
    a, b, c, d = _powers(words.shape[1])
    first = even @ a[:-1] + both @ b[:-1] + seeds[:, 0] * a[-1] + seeds[:, 1] * b[-1]
    second = even @ c[:-1] + both @ d[:-1] + seeds[:, 0] * c[-1] + seeds[:, 1] * d[-1]
    return np.stack([first, second], axis=1)


@functools.cache
def _powers(pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the four entries of the map's powers: what is left to apply after each pair, then to the seed."""
    powers = [(1, 0, 0, 1)]
    for _ in range(pairs):
        a, b, c, d = powers[-1]
        powers.append(tuple(entry % 2**32 for entry in (a + c, b + d, a + 2 * c, b + 2 * d)))
    ordered = np.array([*powers[:-1][::-1], powers[-1]], np.uint32)
    return ordered[:, 0].copy(), ordered[:, 1].copy(), ordered[:, 2].copy(), ordered[:, 3].copy()
