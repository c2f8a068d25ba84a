"""What a damaged log still holds: every event, item and imported interaction that can be read.

In:  the path of the log, which nobody else has open.  Out: `Salvaged`.
Knows nothing of where it goes.

SQLite is asked first for the small tables; events are read from the pages themselves, since SQLite stops at the first
page, index entry or frame that does not hold, and what is behind it was acked too.
"""

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.events import KINDS
from cluster.log.pages import read_records
from cluster.log.records import EVENT_COLUMNS, ITEM_COLUMNS, USER_COLUMNS, LoggedEvent, Row, logged_event
from cluster.log.segments import events_of, name_range, segments_folder

SMALL_TABLES = ("offsets", "seeds", "absences", "sealed_ids", "segments")
HISTORY_FIELDS = ("user_id", "seq", "item_id", "kind", "value", "ts_us")


@dataclass(slots=True)
class Salvaged:
    """Rows of the damaged log."""

    events: dict[int, LoggedEvent] = field(default_factory=dict)
    """Live events, by sequence number."""
    history: dict[tuple[str, int], Row] = field(default_factory=dict)
    """Rows of user history, by user and sequence number; those of live events are made anew."""
    history_whole: bool = False
    """SQLite could read the whole table."""
    items: dict[str, Row] = field(default_factory=dict)
    """Item rows at their newest, by item id."""
    users: dict[str, Row] = field(default_factory=dict)
    """What was told of users, at its newest, by user id."""
    tables: dict[str, list[Row]] = field(default_factory=dict)
    """Rows of `SMALL_TABLES`."""
    unreadable: list[str] = field(default_factory=list)
    """What could not be read, in words."""


def salvage(path: Path, copy: Path) -> Salvaged:
    """Read all that can be read; SQLite works on a copy, since opening the original would change it."""
    found = Salvaged()
    for row_number, record in read_records(path):
        _sort_in(found, row_number, record)
    for companion in ("", "-wal"):
        source = path.with_name(f"{path.name}{companion}")
        if source.exists():
            copy.with_name(f"{copy.name}{companion}").write_bytes(source.read_bytes())
    for table in SMALL_TABLES:
        found.tables[table] = _ask(found, copy, table, f"SELECT * FROM {table}") or []
    if (rows := _ask(found, copy, "user_history", f"SELECT {', '.join(HISTORY_FIELDS)} FROM user_history")) is not None:
        found.history = {(row[0], row[1]): row for row in rows}  # without what was deleted but is on the pages still
        found.history_whole = True
    return found


def salvage_segment(path: Path) -> list[LoggedEvent]:
    """Return the events of those parts of a segment file whose checksums hold."""
    events: list[LoggedEvent] = []
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                try:
                    events += events_of(file.read_row_group(group))
                except (OSError, ValueError, pa.ArrowException):
                    continue
    except (OSError, ValueError, pa.ArrowException):
        pass  # not even its footer can be read
    return events


def segment_files(path: Path) -> Iterator[tuple[Path, int, int]]:
    """Yield the segment files that are there with the range that each one's name states."""
    folder = segments_folder(path)
    for file in sorted(folder.glob("*.parquet")) if folder.is_dir() else ():
        if (bounds := name_range(file)) is not None:
            yield file, *bounds


def _ask(found: Salvaged, copy: Path, table: str, statement: str) -> list[Row] | None:
    """Return what SQLite says of a table; none where it cannot, which is noted."""
    try:
        with closing(sqlite3.connect(copy)) as connection:
            return connection.execute(statement).fetchall()
    except sqlite3.Error as error:
        found.unreadable.append(f"table {table}: {error}")
        return None


def _sort_in(found: Salvaged, row_number: int | None, record: tuple[Any, ...]) -> None:
    """Put a record where its shape says; the first copy of a row is its best one."""
    if row_number is not None and len(record) == len(EVENT_COLUMNS) + 2 and record[0] is None:
        event_id, acked_us, *rest = record[1:]
        row = (row_number, acked_us, event_id, *rest)
        if row_number > 0 and row_number not in found.events and _is_event(row):
            found.events[row_number] = logged_event(row)
    elif row_number is not None and len(record) == len(ITEM_COLUMNS) + 1 and record[0] is None:
        item_id = record[1]
        if _has_types(record[1:], (str, str, str, str)) and found.items.get(item_id, (0,))[0] < row_number:
            found.items[item_id] = (row_number, *record[1:])
    elif row_number is not None and len(record) == len(USER_COLUMNS) + 1 and record[0] is None:
        user_id = record[1]
        if _has_types(record[1:], (str, str)) and found.users.get(user_id, (0,))[0] < row_number:
            found.users[user_id] = (row_number, *record[1:])
    elif row_number is None and _is_history(record):
        found.history.setdefault((record[0], record[1]), record)


def _is_history(row: Row) -> bool:
    typed = len(row) == len(HISTORY_FIELDS) and _has_types(row, (str, int, str, str))
    return typed and row[3] in KINDS and isinstance(row[5], int)


def _is_event(row: Row) -> bool:
    """Tell whether a row can be what an append wrote."""
    named = dict(zip(("seq", "acked_us", *EVENT_COLUMNS), row, strict=True))
    texts = ("event_id", "domain", "user_id", "item_id")
    numbers = (named["value"], named["propensity"])
    if not all(isinstance(named[name], str) and named[name] for name in texts) or named["kind"] not in KINDS:
        return False
    if not (isinstance(named["ts_us"], int) and isinstance(named["acked_us"], int)):
        return False
    if not all(number is None or (isinstance(number, int | float) and math.isfinite(number)) for number in numbers):
        return False
    if not all(named[name] is None or isinstance(named[name], str) for name in ("request_id", "version", "context")):
        return False
    if not (named["position"] is None or isinstance(named["position"], int)):
        return False
    try:
        logged_event(row)
    except (ValueError, TypeError):
        return False
    return True


def _has_types(row: Row, types: tuple[type, ...]) -> bool:
    return all(isinstance(value, kind) for value, kind in zip(row, types, strict=False))
