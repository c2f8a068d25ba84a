"""Seal: move the oldest events from SQLite to a segment, at any moment either here or there.

In:  a log's connections and its `LogConfig`.  Out: segments; a thread that makes them as the log grows.
Knows nothing of what events mean.

    1  write the segment's file and description, synced to the disk
    2  note the hashes of its ids and its users' newest events, some at a time (early, it does no harm)
    3  in one transaction: record the segment, delete its rows
    4  as retention says: in one transaction forget the oldest segments, then delete their files

A crash before 3 leaves a file whose events are all still in SQLite; a crash in 4 leaves a file of dropped events. Both
are removed when the log is opened; a file that is neither stays.
"""

import fcntl
import hashlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import EngineError, RecloopError
from cluster.log.commit import GroupCommit
from cluster.log.records import EVENT_COLUMNS, LoggedEvent, logged_event
from cluster.log.retention import SEGMENT_COLUMNS, LogConfig, drop_passed, find_segments, trim_history
from cluster.log.segments import Segment, SegmentReader, delete_segment, name_range, segments_folder, write_segment

HASH_BYTES = 16
NOTED_AT_ONCE = 500
"""Ids in one transaction: appends wait for no more than that."""
FORGET_SLICES = 256
NEVER = 2**63

SEALED_HEAD = (
    "SELECT max(coalesce((SELECT max(last_seq) FROM segments), 0), coalesce((SELECT max(last_seq) FROM absences), 0))"
)
HEAD = f"SELECT max(coalesce((SELECT max(seq) FROM events), 0), ({SEALED_HEAD}))"
READ_LIVE = f"SELECT seq, acked_us, {', '.join(EVENT_COLUMNS)} FROM events ORDER BY seq LIMIT ?"
NOTE_ID = "INSERT INTO sealed_ids VALUES (?, ?) ON CONFLICT (id_hash) DO NOTHING"
NOTE_USER = "INSERT INTO sealed_users VALUES (?, ?) ON CONFLICT (user_id) DO UPDATE SET seq = max(seq, excluded.seq)"
RECORD = f"INSERT INTO segments ({SEGMENT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"

Reader = Callable[[], AbstractContextManager[sqlite3.Connection]]

Value = TypeVar("Value")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def hash_id(event_id: str) -> bytes:
    """Return what the index of sealed ids keeps of an id; two ids share one of 2^128 values by accident only."""
    return hashlib.blake2b(event_id.encode(), digest_size=HASH_BYTES).digest()


class Sealer:
    """Seals one log; `wake` does so on a thread that starts when it is first needed."""

    def __init__(self, path: Path, config: LogConfig, reader: Reader, writer: GroupCommit) -> None:
        self._folder = segments_folder(path)
        self._lock_path = path.with_name(f"{path.name}.seal")
        self._config = config
        self._reader = reader
        self._writer = writer
        self._thread: threading.Thread | None = None
        self._changing = threading.Lock()
        self._closing = False
        self._wanted = threading.Event()
        self.next_seq = NEVER
        """Where the head must be before another whole segment can be sealed."""

    def seal(self, *, whole_only: bool) -> list[Segment]:
        """Seal what may be sealed, then drop what retention says; return the new segments. Waits for another sealer."""
        with self._turn():
            sealed = []
            while not self._closing and (segment := self._seal_one(whole_only=whole_only)) is not None:
                sealed.append(segment)
            self._forget_ids()
            self._drop()
            return sealed

    def tidy(self) -> None:
        """Remove what a crash left behind, unless someone is sealing; find out where the next segment is due.

        A damaged log is opened all the same, and then never seals: what can be read of it should be.
        """
        try:
            self._plan()
            if self._folder.is_dir():
                with self._turn(fcntl.LOCK_NB):
                    self._remove_leftovers()
        except BlockingIOError:
            pass
        except (RecloopError, OSError) as error:
            self.next_seq = NEVER
            logger.warning("%s: older events are not sealed: %s", self._folder, error)

    def wake(self) -> None:
        """Seal in the background."""
        with self._changing:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="seal", daemon=True)
                self._thread.start()
        self._wanted.set()

    def close(self) -> None:
        """Finish the segment at hand and end the thread."""
        with self._changing:
            self._closing = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._wanted.wait() and not self._closing:
            self._wanted.clear()
            try:
                self.seal(whole_only=True)
            except (RecloopError, OSError, sqlite3.Error):
                logger.exception("%s: could not seal; the events stay where they are", self._folder)
                self.next_seq += self._config.segment_events

    @contextmanager
    def _turn(self, flags: int = 0) -> Iterator[None]:
        with self._lock_path.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | flags)
            yield

    def _seal_one(self, *, whole_only: bool) -> Segment | None:
        rows = self._due(whole_only=whole_only)
        if not rows:
            return None
        events = [logged_event(row) for row in rows]
        segment = write_segment(self._folder, events)
        for start in range(0, len(events), NOTED_AT_ONCE):
            self._submit(_note, events[start : start + NOTED_AT_ONCE])
        self._submit(_record, segment)
        self._plan()
        return segment

    def _due(self, *, whole_only: bool) -> list[tuple[Any, ...]]:  # Any: whatever a SQLite column holds
        with self._reader() as connection:
            live = connection.execute("SELECT count(*) FROM events").fetchone()[0]
            count = min(live - self._config.seal_after_events, self._config.segment_events)
            if count < (self._config.segment_events if whole_only else 1):
                self._plan()
                return []
            return connection.execute(READ_LIVE, (count,)).fetchall()

    def _plan(self) -> None:
        with self._reader() as connection:
            sealed = connection.execute(SEALED_HEAD).fetchone()[0]
        self.next_seq = sealed + self._config.seal_after_events + self._config.segment_events

    def _drop(self) -> None:
        if self._config.keep_days is None and self._config.keep_bytes is None:
            return
        for segment in self._submit(drop_passed, self._config):
            if (keep := self._config.keep_history) is not None:
                self._trim(segment, keep)
            delete_segment(self._folder, segment.file_name)

    def _trim(self, segment: Segment, keep: int) -> None:
        users = SegmentReader(self._folder).read_table(segment, ["user_id"])["user_id"].unique().to_pylist()
        for start in range(0, len(users), NOTED_AT_ONCE):
            some = users[start : start + NOTED_AT_ONCE]
            self._submit(lambda connection, some: trim_history(connection, segment, some, keep), some)

    def _forget_ids(self) -> None:
        """Forget ids beyond the horizon, a part of the index in each transaction."""
        if self._config.dedupe_events is None:
            return
        with self._reader() as connection:
            horizon = connection.execute(SEALED_HEAD).fetchone()[0] - self._config.dedupe_events
        for first_byte in range(FORGET_SLICES if horizon > 0 else 0):
            self._submit(_forget, (bytes([first_byte]), bytes([first_byte]) + b"\xff" * HASH_BYTES, horizon))

    def _remove_leftovers(self) -> None:
        with self._reader() as connection:
            known = {segment.file_name for segment in find_segments(connection)}
            for path in self._folder.iterdir():
                bounds = name_range(path)
                if path.name.startswith("."):
                    path.unlink()
                elif (
                    bounds and path.suffix == ".parquet" and path.name not in known and _superseded(connection, *bounds)
                ):
                    delete_segment(self._folder, path.name)

    def _submit(self, job: Callable[[sqlite3.Connection, Value], Result], value: Value) -> Result:
        return self._writer.submit(lambda connection: job(connection, value)).result()


def _note(connection: sqlite3.Connection, events: list[LoggedEvent]) -> None:
    connection.executemany(NOTE_ID, sorted((hash_id(logged.event.event_id), logged.seq) for logged in events))
    newest = {logged.event.user_id: logged.seq for logged in events}
    connection.executemany(NOTE_USER, newest.items())


def _record(connection: sqlite3.Connection, segment: Segment) -> None:
    values = (
        segment.first_seq,
        segment.last_seq,
        segment.rows,
        segment.sha256,
        segment.size_bytes,
        segment.last_acked_us,
    )
    connection.execute(RECORD, values)
    deleted = connection.execute("DELETE FROM events WHERE seq <= ?", (segment.last_seq,)).rowcount
    if deleted != segment.rows:
        raise EngineError(f"{segment.file_name}: holds {segment.rows} events, SQLite {deleted}; nothing was sealed")


def _forget(connection: sqlite3.Connection, bounds: tuple[bytes, bytes, int]) -> None:
    connection.execute("DELETE FROM sealed_ids WHERE id_hash >= ? AND id_hash <= ? AND seq <= ?", bounds)


def _superseded(connection: sqlite3.Connection, first_seq: int, last_seq: int) -> bool:
    """Tell whether SQLite still has every event of a range, or retention has dropped them all."""
    live = connection.execute("SELECT count(*) FROM events WHERE seq BETWEEN ? AND ?", (first_seq, last_seq))
    if live.fetchone()[0] == last_seq - first_seq + 1:
        return True
    dropped = "SELECT 1 FROM absences WHERE first_seq <= ? AND last_seq >= ? AND reason = 'dropped'"
    return connection.execute(dropped, (first_seq, last_seq)).fetchone() is not None
