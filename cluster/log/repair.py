"""Repair: a fresh log of everything that the damaged one still holds; nothing readable is dropped.

In:  the path of a log that nobody has open.  Out: the repaired log in its place, a `RepairReport`, the old files aside.
Knows nothing of how rows are read from damaged files.

    segments whose checksum holds        stay as they are
    segments with damage                 written anew with the parts that can be read
    every live event that can be read    into a fresh database, at its own sequence number
    user history                         made anew from the events, after the imported past
    numbers that nobody can read         recorded as absent, and never given again
"""

import itertools
import json
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import EngineError
from cluster.events import INTERACTION_KINDS
from cluster.log import schema
from cluster.log.records import EVENT_COLUMNS, ITEM_COLUMNS, USER_COLUMNS, LoggedEvent, Row, event_row
from cluster.log.retention import DAMAGED, DROPPED, SEGMENT_COLUMNS, segment_from
from cluster.log.salvage import Salvaged, salvage, salvage_segment, segment_files
from cluster.log.sealing import NOTE_ID, NOTE_USER, RECORD, hash_id
from cluster.log.segments import Segment, hash_file, segments_folder, write_segment
from cluster.log.swap import swap

CACHE_BYTES = 64 << 20
NEAR = 100
"""A number read from a damaged table is believed where another one is that near: a flipped bit makes it jump."""
Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What a repair found."""

    events: int
    """Events in the repaired log."""
    segments: int
    rewritten_segments: int
    """Those that were damaged in part, or written anew."""
    lost: tuple[Range, ...]
    """Ranges of sequence numbers of which nothing can be read."""
    unreadable: tuple[str, ...]
    """What SQLite could not read, in its own words."""
    forgotten_seeds: tuple[str, ...]
    """Imported pasts that are incomplete: they are imported anew when serving starts."""
    kept: str
    """The folder with the files there were."""


@dataclass(slots=True)
class _Repaired:
    """The log that is being put together."""

    segments: list[Segment] = field(default_factory=list)
    rewritten: int = 0
    sealed: dict[int, LoggedEvent] = field(default_factory=dict)
    live: dict[int, LoggedEvent] = field(default_factory=dict)


def repair_log(path: Path) -> RepairReport:
    """Put a sound log in the place of a damaged one. Raises `EngineError` where it is in use or nothing can be read."""
    scratch = path.with_name(f"{path.name}.salvage")
    with schema.alone(path):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            found = salvage(path, scratch / "copy.db")
            repaired = _collect(path, found)
            if not (repaired.sealed or repaired.live or found.history or found.items or found.users):
                raise EngineError(f"{path}: holds nothing that can be read as an event log; nothing was changed")
            fresh = scratch / path.name
            lost, forgotten = _write(fresh, found, repaired)
            finished = path.with_name(f"{path.name}.repaired")
            fresh.replace(finished)
            kept = swap(path, finished)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return RepairReport(
        events=len(repaired.sealed) + len(repaired.live),
        segments=len(repaired.segments),
        rewritten_segments=repaired.rewritten,
        lost=tuple(lost),
        unreadable=tuple(found.unreadable),
        forgotten_seeds=tuple(forgotten),
        kept=str(kept),
    )


def _collect(path: Path, found: Salvaged) -> _Repaired:
    """Take the segments as they are or as far as they go, then the live events that no segment has."""
    repaired = _Repaired()
    stated = {segment.file_name: segment for segment in map(segment_from, found.tables["segments"])}
    dropped = _ranges(found, DROPPED)
    left = {seq: event for seq, event in found.events.items() if not _within(seq, dropped)}
    for file, first_seq, last_seq in segment_files(path):
        taken_up_to = repaired.segments[-1].last_seq if repaired.segments else 0
        if _within(last_seq, dropped) or first_seq <= taken_up_to:
            continue
        _take_between(path, repaired, left, taken_up_to, first_seq)
        _take_segment(path, repaired, file, stated.get(file.name) or _described(file), left, (first_seq, last_seq))
    highest = max((segment.last_seq for segment in stated.values()), default=0)  # of files that are gone, too
    _take_between(path, repaired, left, repaired.segments[-1].last_seq if repaired.segments else 0, highest + 1)
    ids = {logged.event.event_id for logged in repaired.sealed.values()}
    for seq in sorted(left):
        if left[seq].event.event_id not in ids:
            ids.add(left[seq].event.event_id)
            repaired.live[seq] = left[seq]
    return repaired


def _take_segment(
    path: Path, repaired: _Repaired, file: Path, stated: Segment | None, left: dict[int, LoggedEvent], bounds: Range
) -> None:
    """Adopt a segment that holds; of another one, write anew what can be read of it or is still on SQLite's pages."""
    rows = {logged.seq: logged for logged in salvage_segment(file)}
    whole = stated is not None and len(rows) == stated.rows and hash_file(file) == stated.sha256
    inside = [seq for seq in left if bounds[0] <= seq <= bounds[1]]
    for seq in inside:
        event = left.pop(seq)
        if not whole:
            rows.setdefault(seq, event)
    if whole and stated is not None:
        repaired.segments.append(stated)
        repaired.sealed |= rows
        return
    file.replace(file.with_suffix(".damaged"))
    if rows:
        _write_rows(path, repaired, rows)


def _take_between(
    path: Path, repaired: _Repaired, left: dict[int, LoggedEvent], after_seq: int, before_seq: int
) -> None:
    """Seal again the events of a segment whose file is gone, as far as they are still on SQLite's pages."""
    rows = {seq: left.pop(seq) for seq in sorted(left) if after_seq < seq < before_seq}
    if rows:
        _write_rows(path, repaired, rows)


def _write_rows(path: Path, repaired: _Repaired, rows: Mapping[int, LoggedEvent]) -> None:
    repaired.segments.append(write_segment(segments_folder(path), [rows[seq] for seq in sorted(rows)]))
    repaired.sealed |= rows
    repaired.rewritten += 1


def _described(file: Path) -> Segment | None:
    """Return what the description beside a segment says; none where there is none to be read."""
    try:
        return Segment(**json.loads(file.with_suffix(".json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(fresh: Path, found: Salvaged, repaired: _Repaired) -> tuple[list[Range], list[str]]:
    """Write the fresh database; return what is lost, and the imported pasts that are not whole."""
    schema.create(fresh)
    with closing(schema.connect(fresh, cache_bytes=CACHE_BYTES)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        seeds, forgotten = _whole_seeds(found)
        _insert(connection, "seeds (name, first_seq, rows)", seeds)
        _insert(connection, "offsets", found.tables["offsets"])
        _insert(connection, f"items (item_seq, {', '.join(ITEM_COLUMNS)})", found.items.values())
        _insert(connection, f"users (user_seq, {', '.join(USER_COLUMNS)})", found.users.values())
        _write_events(connection, repaired)
        _write_sealed(connection, found, repaired)
        _write_history(connection, found, repaired, seeds)
        absent = [(first, last, DROPPED) for first, last in _ranges(found, DROPPED)]
        lost = _lost(found, repaired)
        _insert(connection, "absences", sorted([*absent, *((first, last, DAMAGED) for first, last in lost)]))
        connection.execute("COMMIT")
    return lost, forgotten


def _write_events(connection: sqlite3.Connection, repaired: _Repaired) -> None:
    rows = ((seq, logged.acked_us, *event_row(logged.event)) for seq, logged in sorted(repaired.live.items()))
    _insert(connection, f"events (seq, acked_us, {', '.join(EVENT_COLUMNS)})", rows)


def _write_sealed(connection: sqlite3.Connection, found: Salvaged, repaired: _Repaired) -> None:
    sealed = sorted(repaired.sealed.items())
    connection.executemany(NOTE_ID, [(hash_id(logged.event.event_id), seq) for seq, logged in sealed])
    connection.executemany(NOTE_ID, found.tables["sealed_ids"])  # those of dropped events, too
    newest = {logged.event.user_id: seq for seq, logged in sealed}
    connection.executemany(NOTE_USER, newest.items())
    for segment in repaired.segments:
        connection.execute(RECORD, tuple(getattr(segment, column) for column in SEGMENT_COLUMNS.split(", ")))


def _write_history(connection: sqlite3.Connection, found: Salvaged, repaired: _Repaired, seeds: list[Row]) -> None:
    dropped = _ranges(found, DROPPED)
    imported = [(first, first + rows - 1) for _, first, rows in seeds]
    columns = "user_history (user_id, seq, item_id, kind, value, ts_us)"
    kept = (row for row in found.history.values() if _within(row[1], imported if row[1] <= 0 else dropped))
    _insert(connection, columns, kept)
    for events in (repaired.sealed, repaired.live):
        _insert(connection, columns, (_history_row(logged) for logged in events.values() if _is_chosen(logged)))


def _is_chosen(logged: LoggedEvent) -> bool:
    return logged.event.kind in INTERACTION_KINDS


def _history_row(logged: LoggedEvent) -> Row:
    event = logged.event
    return (event.user_id, logged.seq, event.item_id, event.kind, event.value, event.ts_us)


def _whole_seeds(found: Salvaged) -> tuple[list[Row], list[str]]:
    """Return the imported pasts of which every row is there, up to the first that is not, and the others' names."""
    seqs = [seq for _, seq in found.history if seq <= 0]
    for place, (_, first, rows) in enumerate(found.tables["seeds"]):
        if sum(first <= seq < first + rows for seq in seqs) != rows:
            return found.tables["seeds"][:place], [name for name, _, _ in found.tables["seeds"][place:]]
    return found.tables["seeds"], []


def _lost(found: Salvaged, repaired: _Repaired) -> list[Range]:
    """Return the ranges up to the last number ever given of which there is nothing."""
    known = sorted([*repaired.sealed, *repaired.live])
    ends = [last for _, last in _ranges(found, DROPPED)] + [last for _, last in _ranges(found, DAMAGED)]
    ends += [last_seq for _, last_seq, *_ in found.tables["segments"]] + [seq for _, seq in found.tables["offsets"]]
    written = sorted(seq for _, seq in found.history)
    believed = (seq for before, seq in itertools.pairwise(written) if found.history_whole or seq - before < NEAR)
    ends.append(max(believed, default=0))
    head = max([0, *known[-1:], *ends])
    present = sorted([*((seq, seq) for seq in known), *_ranges(found, DROPPED)])
    lost, expected = [], 1
    for first, last in [*present, (head + 1, head + 1)]:
        if first > expected:
            lost.append((expected, first - 1))
        expected = max(expected, last + 1)
    return lost


def _ranges(found: Salvaged, reason: str) -> list[Range]:
    return [(first, last) for first, last, why in found.tables["absences"] if why == reason]


def _within(seq: int, ranges: Iterable[Range]) -> bool:
    return any(first <= seq <= last for first, last in ranges)


def _insert(connection: sqlite3.Connection, target: str, rows: Iterable[Row]) -> None:
    """Insert rows of one width; of two rows with one key the first stays."""
    for row in rows:
        connection.execute(f"INSERT OR IGNORE INTO {target} VALUES ({', '.join('?' * len(row))})", row)
