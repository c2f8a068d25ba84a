"""How long events stay in SQLite, how long they stay at all, how long their ids are known.

In:  the recipe's `[log]`, a connection inside a transaction.  Out: segments to drop, ranges recorded as absent.
Knows nothing of files or threads.

An event is dropped only when every consumer that ever committed an offset has passed it; a log without a consumer
drops nothing. User history is kept whole unless `log.keep_history` says otherwise: it says what a user must not be
offered again.
"""

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.log.segments import Segment

DAY_US = 86_400 * 1_000_000
DROPPED = "dropped"
DAMAGED = "damaged"
SEGMENT_COLUMNS = "first_seq, last_seq, rows, sha256, size_bytes, last_acked_us"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """The recipe's `[log]`."""

    seal_after_events: int = 1_000_000
    """The newest events, which stay in SQLite; older ones are sealed in the background."""
    segment_events: int = 10_000
    """Events in a segment; appends wait while as many rows leave SQLite, about 5 us an event."""
    keep_days: float | None = None
    """Drop sealed events acked longer ago; none keeps all."""
    keep_bytes: int | None = None
    """Drop the oldest segments beyond this total; none keeps all."""
    keep_history: int | None = None
    """Of what a user did in events that are dropped, only what is among the user's newest so many interactions stays;
    none keeps all. What does not stay may be recommended to the user again. Redis holds so many of each user at most;
    who has more is looked up in the log's file."""
    dedupe_events: int | None = None
    """Sealed events whose ids are still known, at about 45 bytes each; none keeps every id for ever."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("seal_after_events", "segment_events", "keep_days", "keep_bytes", "keep_history", "dedupe_events"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"log.{name}={value}: must be above 0; leave it out for the default")


def find_segments(connection: sqlite3.Connection) -> list[Segment]:
    """Return the segments, in order."""
    rows = connection.execute(f"SELECT {SEGMENT_COLUMNS} FROM segments ORDER BY first_seq")
    return [segment_from(row) for row in rows]


def segment_from(row: tuple[int, int, int, str, int, int]) -> Segment:
    """Read a row of `SEGMENT_COLUMNS`."""
    first_seq, last_seq, rows, sha256, size_bytes, last_acked_us = row
    return Segment(
        first_seq=first_seq,
        last_seq=last_seq,
        rows=rows,
        sha256=sha256,
        size_bytes=size_bytes,
        last_acked_us=last_acked_us,
    )


def drop_passed(connection: sqlite3.Connection, config: LogConfig, now_us: int | None = None) -> list[Segment]:
    """Forget the oldest segments that retention allows; their files are the caller's to delete after the commit."""
    now_us = now_us if now_us is not None else time.time_ns() // 1_000
    passed = connection.execute("SELECT coalesce(min(seq), 0) FROM offsets").fetchone()[0]
    segments = find_segments(connection)
    left_bytes = sum(segment.size_bytes for segment in segments)
    dropped = []
    for segment in segments:
        old = config.keep_days is not None and segment.last_acked_us < now_us - config.keep_days * DAY_US
        large = config.keep_bytes is not None and left_bytes > config.keep_bytes
        if segment.last_seq > passed or not (old or large):
            break
        connection.execute("DELETE FROM segments WHERE first_seq = ?", (segment.first_seq,))
        record_absence(connection, segment.first_seq, segment.last_seq, DROPPED)
        left_bytes -= segment.size_bytes
        dropped.append(segment)
    return dropped


def trim_history(connection: sqlite3.Connection, segment: Segment, user_ids: Sequence[str], keep: int) -> None:
    """Forget what these users did in a dropped segment, but for each user's newest interactions."""
    statement = (
        "DELETE FROM user_history WHERE user_id = ?1 AND seq BETWEEN ?2 AND ?3 AND seq <= "
        "(SELECT seq FROM user_history WHERE user_id = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?4)"
    )
    connection.executemany(statement, [(user_id, segment.first_seq, segment.last_seq, keep) for user_id in user_ids])


def record_absence(connection: sqlite3.Connection, first_seq: int, last_seq: int, reason: str) -> None:
    """Note that the log holds none of these on purpose; a range that continues the one before it is joined to it."""
    joined = connection.execute(
        "UPDATE absences SET last_seq = ? WHERE last_seq = ? AND reason = ?", (last_seq, first_seq - 1, reason)
    ).rowcount
    if not joined:
        connection.execute("INSERT INTO absences VALUES (?, ?, ?)", (first_seq, last_seq, reason))
