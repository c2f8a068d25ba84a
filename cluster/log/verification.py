"""Check the log against itself: segments, SQLite, user history, ids.

In:  a connection in a read transaction, the segments.  Out: a `VerifyReport`.
Knows nothing of repair.
"""

import sqlite3
from collections.abc import Iterator

import pyarrow as pa

from cluster.log.records import Row, VerifyReport
from cluster.log.retention import DAMAGED, DROPPED, find_segments
from cluster.log.schema import CHOSEN
from cluster.log.sealing import hash_id
from cluster.log.segments import Segment, SegmentReader, hash_file

HISTORY_COLUMNS = "user_id, seq, item_id, kind, value, ts_us"
CHECKED_COLUMNS = ("event_id", "user_id", "seq", "item_id", "kind", "value", "ts_us")
ALL = f"(SELECT {', '.join(CHECKED_COLUMNS)} FROM events UNION ALL SELECT {', '.join(CHECKED_COLUMNS)} FROM checked)"
FOLD = f"SELECT {HISTORY_COLUMNS} FROM {ALL} WHERE kind IN ({CHOSEN})"
LIVE_HISTORY = (
    f"SELECT {HISTORY_COLUMNS} FROM user_history WHERE seq > 0 AND NOT EXISTS "
    f"(SELECT 1 FROM absences WHERE user_history.seq BETWEEN first_seq AND last_seq AND reason = '{DROPPED}')"
)


def verify(connection: sqlite3.Connection, reader: SegmentReader) -> VerifyReport:
    """Read everything there is and compare."""
    connection.execute(f"CREATE TEMP TABLE checked ({', '.join(CHECKED_COLUMNS)}, id_hash BLOB)")
    try:
        damaged = tuple(_check_segments(connection, reader))
        return _compare(connection, damaged)
    finally:
        connection.execute("DROP TABLE checked")


def check_segment(reader: SegmentReader, segment: Segment) -> str:
    """Say what is wrong with a segment's file; empty where nothing is."""
    path = reader.folder / segment.file_name
    if not path.exists():
        return "the file is missing"
    if path.stat().st_size != segment.size_bytes or hash_file(path) != segment.sha256:
        return "the file is not the one that was sealed"
    return ""


def _check_segments(connection: sqlite3.Connection, reader: SegmentReader) -> Iterator[str]:
    for segment in find_segments(connection):
        problem = check_segment(reader, segment)
        try:
            table = reader.read_table(segment, CHECKED_COLUMNS)
        except (OSError, ValueError, pa.ArrowException) as error:
            problem = problem or f"it cannot be read ({error})"
        else:
            _take(connection, table)
            seqs = table["seq"].to_numpy()
            bounds = (segment.rows, segment.first_seq, segment.last_seq)
            if not problem and (len(seqs), seqs[0], seqs[-1]) != bounds:
                problem = "it holds other events than recorded"
        if problem:
            yield f"events {segment.first_seq} to {segment.last_seq}: {segment.file_name}: {problem}"


def _take(connection: sqlite3.Connection, table: pa.Table) -> None:
    columns = [table[name].to_pylist() for name in CHECKED_COLUMNS]
    rows = zip(*columns, map(hash_id, columns[0]), strict=True)
    connection.executemany(f"INSERT INTO checked VALUES (?{', ?' * len(CHECKED_COLUMNS)})", rows)


def _compare(connection: sqlite3.Connection, damaged: tuple[str, ...]) -> VerifyReport:
    def one(statement: str, values: Row = ()) -> Row:
        return connection.execute(statement, values).fetchone()

    def absent(reason: str) -> int:
        return one("SELECT coalesce(sum(last_seq - first_seq + 1), 0) FROM absences WHERE reason = ?", (reason,))[0]

    events, ids, first_seq, last_seq = one(
        f"SELECT count(*), count(DISTINCT event_id), coalesce(min(seq), 0), coalesce(max(seq), 0) FROM {ALL}"
    )
    horizon = one("SELECT coalesce(min(seq), 0) FROM sealed_ids")[0]
    unknown = "SELECT count(*) FROM checked WHERE seq >= ? AND id_hash NOT IN (SELECT id_hash FROM sealed_ids)"
    last_seq = max(last_seq, one("SELECT coalesce(max(last_seq), 0) FROM absences")[0])
    missing = one(f"SELECT count(*) FROM ({FOLD} EXCEPT {LIVE_HISTORY})")[0]
    surplus = one(f"SELECT count(*) FROM ({LIVE_HISTORY} EXCEPT {FOLD})")[0]
    return VerifyReport(
        events=events,
        first_seq=first_seq,
        last_seq=last_seq,
        gaps=last_seq - events - absent(DROPPED) - absent(DAMAGED),
        duplicates=events - ids,
        state_mismatches=missing + surplus,
        integrity=one("PRAGMA integrity_check(1)")[0],
        segments=one("SELECT count(*) FROM segments")[0],
        dropped=absent(DROPPED),
        lost=absent(DAMAGED),
        unknown_ids=one(unknown, (horizon,))[0],
        damaged=damaged,
    )
