"""The records on SQLite's pages, read without SQLite: what it refuses as a whole is mostly readable in parts.

In:  the path of a damaged database.  Out: the records of every page that still looks like one, best copies first.
Knows nothing of what the records mean.
Source: https://www.sqlite.org/fileformat2.html

A page has up to three kinds of copies, from best to worst: the newest whole committed one, older ones, and those whose
checksum in the write-ahead log does not hold. What comes after the last commit was never acked and is not read.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.log.wal import read_frames

TABLE_LEAF, INDEX_LEAF, INDEX_INTERIOR = 0x0D, 0x0A, 0x02
FILE_HEADER_BYTES = 100
MIN_PAGE_BYTES = 512
DEFAULT_PAGE_BYTES = 4096
MAX_RECORD_BYTES = 1 << 22
MAX_ROW_STEP = 1 << 20
INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}

Record = tuple[Any, ...]  # Any: whatever a SQLite column holds


@dataclass(frozen=True, slots=True)
class _Copies:
    """Every copy of every page, by rank."""

    newest: dict[int, bytes]
    older: list[tuple[int, bytes]]
    torn: list[tuple[int, bytes]]


def read_records(path: Path) -> Iterator[tuple[int | None, Record]]:
    """Yield each record with its row number (none in an index), those of the best copies first."""
    copies = _read_copies(path)
    for number, page in [*sorted(copies.newest.items()), *copies.older, *copies.torn]:
        yield from _page_records(number, page, copies.newest)


def _read_copies(path: Path) -> _Copies:
    data = path.read_bytes() if path.exists() else b""
    page_bytes = _page_bytes(data)
    frames = read_frames(path, page_bytes)
    last_commit = max((place for place, frame in enumerate(frames) if frame.commits), default=-1)
    newest = {start // page_bytes + 1: data[start : start + page_bytes] for start in range(0, len(data), page_bytes)}
    older: list[tuple[int, bytes]] = []
    torn: list[tuple[int, bytes]] = []
    for frame in frames[: last_commit + 1]:
        if not frame.whole:
            torn.append((frame.page_number, frame.page))
            continue
        if frame.page_number in newest:
            older.append((frame.page_number, newest[frame.page_number]))
        newest[frame.page_number] = frame.page
    return _Copies(newest, older[::-1], torn[::-1])


def _page_bytes(data: bytes) -> int:
    stated = int.from_bytes(data[16:18], "big") if data[:6] == b"SQLite" else 0
    stated = 65_536 if stated == 1 else stated
    return stated if stated >= MIN_PAGE_BYTES and stated & (stated - 1) == 0 else DEFAULT_PAGE_BYTES


def _page_records(number: int, page: bytes, pages: dict[int, bytes]) -> Iterator[tuple[int | None, Record]]:
    start = FILE_HEADER_BYTES if number == 1 else 0
    if len(page) < start + 12 or page[start] not in (TABLE_LEAF, INDEX_LEAF, INDEX_INTERIOR):
        return
    pointers = start + (12 if page[start] == INDEX_INTERIOR else 8)
    before: int | None = None
    for place in range(int.from_bytes(page[start + 3 : start + 5], "big")):
        at = int.from_bytes(page[pointers + 2 * place : pointers + 2 * place + 2], "big")
        try:
            row_number, record = _cell(page, at, page[start], pages)
        except (IndexError, ValueError, KeyError, struct.error):
            continue  # this cell cannot be read; its neighbours may be
        if row_number is not None and before is not None and not before < row_number < before + MAX_ROW_STEP:
            continue  # rows of a page are in order: this one's number is damaged
        before = row_number
        yield row_number, record


def _cell(page: bytes, at: int, kind: int, pages: dict[int, bytes]) -> tuple[int | None, Record]:
    if at == 0:
        raise ValueError("no cell")
    at += 4 if kind == INDEX_INTERIOR else 0
    size, at = _varint(page, at)
    row_number = None
    if kind == TABLE_LEAF:
        row_number, at = _varint(page, at)
    if size > MAX_RECORD_BYTES:
        raise ValueError("no record is that long")
    return row_number, _decode(_payload(page, at, size, kind, pages))


def _payload(page: bytes, at: int, size: int, kind: int, pages: dict[int, bytes]) -> bytes:
    """Return a record's bytes, following it onto overflow pages."""
    usable = len(page)
    least = (usable - 12) * 32 // 255 - 23
    most = usable - 35 if kind == TABLE_LEAF else (usable - 12) * 64 // 255 - 23
    here = size
    if size > most:
        here = least + (size - least) % (usable - 4)
        here = here if here <= most else least
    payload = page[at : at + here]
    following = int.from_bytes(page[at + here : at + here + 4], "big") if size > here else 0
    while len(payload) < size:
        overflow = pages[following]
        following = int.from_bytes(overflow[:4], "big")
        payload += overflow[4 : 4 + size - len(payload)]
        if not overflow[4:]:
            raise ValueError("an overflow page is cut off")
    return payload


def _decode(payload: bytes) -> Record:
    header_bytes, at = _varint(payload, 0)
    values: list[Any] = []
    body = header_bytes
    while at < header_bytes:
        code, at = _varint(payload, at)
        value, body = _value(payload, body, code)
        values.append(value)
    if body != len(payload):
        raise ValueError("the record's length is not what its header says")
    return tuple(values)


def _value(payload: bytes, at: int, code: int) -> tuple[object, int]:
    if code == 0:
        return None, at
    if code in INTEGER_BYTES:
        end = at + INTEGER_BYTES[code]
        return int.from_bytes(payload[at:end], "big", signed=True), end
    if code == 7:
        return struct.unpack_from(">d", payload, at)[0], at + 8
    if code in (8, 9):
        return code - 8, at
    if code < 12:
        raise ValueError("no such type")
    end = at + (code - 12) // 2
    return (payload[at:end].decode() if code % 2 else payload[at:end]), end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for _ in range(8):
        byte = data[at]
        at += 1
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at
    value = value << 8 | data[at]
    return (value - 2**64 if value >= 2**63 else value), at + 1
