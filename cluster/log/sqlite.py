"""The embedded event log: one SQLite file that several processes may append to and read.

In:  events, past interactions, items, users, consumers' offsets.  Out: sequence numbers, events in order, user state.
Knows nothing of HTTP, models or training.

An ack (a returned `Appended`) means that the event survives a crash of any process and a power loss. Sequence numbers
start at 1 and have no gaps; an `event_id` has one place in the log for ever (or `log.dedupe_events`). User history is
written in the event's own transaction, so it always equals the fold of the log over `INTERACTION_KINDS`, after the
imported past (seq <= 0). Older events are sealed to Parquet (sealing.py); reading does not show where an event is.
"""

import itertools
import json
import secrets
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from cluster.catalogue import Item, User
from cluster.errors import EngineError
from cluster.events import Event
from cluster.log import schema, verification
from cluster.log.checkpoints import MOST_WAL_PAGES, Checkpointer
from cluster.log.commit import GroupCommit
from cluster.log.records import (
    EVENT_COLUMNS,
    ITEM_COLUMNS,
    USER_COLUMNS,
    Appended,
    LoggedEvent,
    Row,
    UserState,
    VerifyReport,
    event_row,
    item_from,
    item_row,
    logged_event,
    user_from,
    user_row,
)
from cluster.log.retention import SEGMENT_COLUMNS, LogConfig, segment_from
from cluster.log.sealing import HEAD, Sealer, hash_id
from cluster.log.seeds import build_seed, count_seeded, is_seeded, write_seed
from cluster.log.segments import Segment, SegmentReader, segments_folder
from cluster.log.state import FileStates, UserStates

if TYPE_CHECKING:
    from cluster.log.redis import RedisStore
    from cluster.log.shared import SharedStates

WRITER_CACHE_BYTES = 64 << 20
READER_CACHE_BYTES = 8 << 20
IDS_AT_ONCE = 500
"""Ids in one question; SQLite takes 32,766 values, and prepares a statement for each number of them."""

HISTORY_COLUMNS = "user_id, seq, item_id, kind, value, ts_us"
INSERT_HISTORY = (
    f"INSERT INTO user_history ({HISTORY_COLUMNS}) SELECT {HISTORY_COLUMNS} FROM events "
    f"WHERE seq > ? AND kind IN ({schema.CHOSEN}) ORDER BY user_id"
)
"""One statement for all of an append's: SQLite lets go of the interpreter once, not at each row."""
INSERT_EVENT = (
    f"INSERT INTO events (seq, acked_us, {', '.join(EVENT_COLUMNS)}) VALUES (?, ?{', ?' * len(EVENT_COLUMNS)})"
)
READ_EVENTS = f"SELECT seq, acked_us, {', '.join(EVENT_COLUMNS)} FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
FIND_SEGMENT = f"SELECT {SEGMENT_COLUMNS} FROM segments WHERE last_seq > ? ORDER BY last_seq LIMIT 1"
LINEAGE = "CREATE TABLE IF NOT EXISTS lineage (name TEXT NOT NULL)"
READ_ITEMS = f"SELECT item_seq, {', '.join(ITEM_COLUMNS)} FROM items WHERE item_seq > ? ORDER BY item_seq LIMIT ?"
FIND_ITEM = f"SELECT {', '.join(ITEM_COLUMNS)} FROM items WHERE item_id = ?"
FIND_USER = f"SELECT {', '.join(USER_COLUMNS)} FROM users WHERE user_id = ?"
READ_USERS = f"SELECT user_seq, {', '.join(USER_COLUMNS)} FROM users WHERE user_seq > ? ORDER BY user_seq LIMIT ?"
SHARING_USERS = """
SELECT user_id, sum(item_id IN (SELECT value FROM json_each(:items))) AS shared, count(*) AS items
FROM (SELECT DISTINCT user_id, item_id FROM user_history WHERE user_id <> :user_id)
GROUP BY user_id HAVING shared > 0 ORDER BY 1.0 * shared * shared / items DESC, user_id LIMIT :most
"""


class EventLog:
    """An open log; every method may be called from any thread."""

    _is_sole = True
    """Nobody appends to this log but through this file."""

    def __init__(self, path: str | Path, config: LogConfig | None = None) -> None:
        self.path = Path(path)
        self._readers: deque[sqlite3.Connection] = deque()
        self._segments = SegmentReader(segments_folder(self.path))
        with self._engine_errors():
            self._use = schema.enter(self.path)
            writer = schema.connect(self.path, cache_bytes=WRITER_CACHE_BYTES)
            writer.execute(f"PRAGMA wal_autocheckpoint = {MOST_WAL_PAGES}")
        self._checkpointer = Checkpointer(self.path)
        self._writer = GroupCommit(writer, str(self.path))
        self._sealer = Sealer(self.path, config or LogConfig(), self._reader, self._writer)
        self._sealer.tidy()
        self._states: UserStates
        self._states = self._file_states = FileStates(self._reader)
        self._shared: SharedStates | None = None

    def append(self, events: Sequence[Event]) -> list[Appended]:
        """Write the events and return when they are durable; one whose id is known keeps its first place.

        Raises `EngineError` where nothing was written; appending the same events again is always safe.
        """
        return self.append_async(events).result()

    def append_async(self, events: Sequence[Event]) -> Future[list[Appended]]:
        """Do what `append` does without waiting: the future resolves when the events are durable."""
        return self._acked(self._writer.submit_part(self._append_all, tuple(events)))

    def read(self, after_seq: int, max_events: int) -> list[LoggedEvent]:
        """Return the next events after a sequence number, in order; empty at the head.

        What retention has dropped is passed over. Raises `EngineError` where a sealed event cannot be read.
        """
        events: list[LoggedEvent] = []
        while len(events) < max_events:
            segment, rows = self._look(after_seq, max_events - len(events))
            if segment is None:
                return events + [logged_event(row) for row in rows]
            try:
                events += self._segments.read(segment, after_seq, max_events - len(events))
            except FileNotFoundError as error:
                if self._look(after_seq, 1)[0] == segment:  # not dropped meanwhile: it is gone
                    raise EngineError(
                        f"{self._segments.folder / segment.file_name}: is missing; restore it, or "
                        "`recloop events verify --repair` goes on without it"
                    ) from error
                continue
            after_seq = events[-1].seq if len(events) == max_events else segment.last_seq
        return events

    def catch_up(self, patience_s: float) -> None:
        """Return once this file holds all that the log does, which it always does where nobody else has the log."""

    def seal(self) -> list[Segment]:
        """Seal all but the newest `log.seal_after_events` events, and drop what retention says."""
        return self._sealer.seal(whole_only=False)

    def head_seq(self) -> int:
        """Return the newest sequence number; 0 for an empty log."""
        return self._file_states.head_seq()

    def commit_offset(self, consumer: str, seq: int) -> None:
        """Remember durably how far a consumer has come."""
        statement = "INSERT INTO offsets VALUES (?, ?) ON CONFLICT (consumer) DO UPDATE SET seq = excluded.seq"
        self._writer.submit(lambda connection: connection.execute(statement, (consumer, seq)).rowcount).result()

    def committed_offset(self, consumer: str) -> int:
        """Return how far a consumer has come; 0 for one that never committed."""
        rows = self._rows("SELECT seq FROM offsets WHERE consumer = ?", (consumer,))
        return rows[0][0] if rows else 0

    def user_state(self, user_id: str, max_history: int, before_seq: int | None = None) -> UserState:
        """Return the user's last interactions and newest event, as they were before `before_seq` if that is given.

        Where `before_seq` is among sealed events, the newest event is the newest interaction.
        """
        return self._states.user_state(user_id, max_history, before_seq)

    def seen_items(self, user_id: str, before_seq: int | None = None) -> frozenset[str]:
        """Return every item the user has interacted with."""
        return self._states.seen_items(user_id, before_seq)

    def share_state(self, open_store: "Callable[[str], RedisStore]") -> None:
        """Keep user state in the store that is opened for this log's name, and answer from there.

        Acks wait for it from now on. Raises `EngineError` where it does not answer.
        """
        from cluster.log.shared import SharedStates  # needs Redis's client

        store = open_store(self._lineage())
        self._states = self._shared = SharedStates(self._file_states, self.read, store, sole=self._is_sole)

    @property
    def state_problem(self) -> str | None:
        """Return why user state is answered from this file though it is shared."""
        return self._shared.problem if self._shared is not None else None

    def is_seeded(self, kind: str, source: str) -> bool:
        """Whether past interactions of a kind are imported and come from this source."""
        with self._reader() as connection:
            return is_seeded(connection, kind, source)

    def seed_history(self, kind: str, events: pa.Table, source: str = "") -> int:
        """Import past interactions and return how many entered user history: 0 where the same are there already.

        The same are those from the same source, which names what it holds such as a checksum; or else of equal content.

        They come before every event of the log, ordered by time, and are never returned by `read`. Others of that kind
        are replaced, together with what was imported after them, in one transaction; live history stays as it is.
        """
        seed = build_seed(kind, events, source)
        return self._writer.submit(lambda connection: write_seed(connection, seed)).result()

    def count_seeded(self, kind: str) -> int:
        """Return how many past interactions of a kind are imported."""
        with self._reader() as connection:
            return count_seeded(connection, kind)

    def put_items(self, items: Sequence[Item]) -> int:
        """Write items, replacing those of the same id, and return the last one's number."""
        rows = [item_row(item) for item in items]
        return self._writer.submit(lambda connection: _put_items(connection, rows)).result()

    def read_items(self, after_item_seq: int, max_items: int) -> list[tuple[int, Item]]:
        """Return items written after a number, each once, at its newest."""
        return [(row[0], item_from(row[1:])) for row in self._rows(READ_ITEMS, (after_item_seq, max_items))]

    def find_item(self, item_id: str) -> Item | None:
        """Return the item as it was put last, or deleted; none where it never was."""
        rows = self._rows(FIND_ITEM, (item_id,))
        return item_from(rows[0]) if rows else None

    def put_users(self, users: Sequence[User]) -> None:
        """Write what is told of users, replacing what was told of the same ones before."""
        rows = [user_row(user) for user in users]
        self._writer.submit(lambda connection: _put_users(connection, rows)).result()

    def find_user(self, user_id: str) -> User | None:
        """Return what was told of a user; none where nothing was."""
        rows = self._rows(FIND_USER, (user_id,))
        return user_from(rows[0]) if rows else None

    def read_users(self, after_user_seq: int, max_users: int) -> list[tuple[int, User]]:
        """Return users told of after a number, each once, at the newest."""
        return [(row[0], user_from(row[1:])) for row in self._rows(READ_USERS, (after_user_seq, max_users))]

    def users_sharing(self, user_id: str, item_ids: Iterable[str], most: int) -> list[tuple[str, int, int]]:
        """Return the users whose items are nearest to these by cosine: id, items shared, items in all.

        Reads the whole of user history, in this node's file.
        """
        values = {"user_id": user_id, "items": json.dumps(list(item_ids)), "most": most}
        return [(other_id, shared, items) for other_id, shared, items in self._rows(SHARING_USERS, values)]

    def verify(self) -> VerifyReport:
        """Check the whole log against itself and its file; reads everything."""
        with self._snapshot() as connection:
            return verification.verify(connection, self._segments)

    def close(self) -> None:
        """Finish what is queued and close the file; further appends raise `EngineError`."""
        self._sealer.close()
        self._writer.close()
        if self._shared is not None:
            self._shared.close()
        self._checkpointer.close()
        while self._readers:
            self._readers.pop().close()
        self._use.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lineage(self) -> str:
        """Return what tells this log from every other one; a repaired log is another one."""

        def name(connection: sqlite3.Connection) -> str:
            connection.execute(LINEAGE)
            if (found := connection.execute("SELECT name FROM lineage").fetchone()) is None:
                found = (f"sqlite:{secrets.token_hex(8)}",)
                connection.execute("INSERT INTO lineage VALUES (?)", found)
            return found[0]

        return self._writer.submit(name).result()

    def _acked(self, written: Future[list[Appended]]) -> Future[list[Appended]]:
        return written if self._shared is None else self._shared.acked(written)

    def _append_all(self, connection: sqlite3.Connection, calls: Sequence[Sequence[Event]]) -> list[list[Appended]]:
        """Write what several calls append, as one."""
        appended = iter(self._append(connection, list(itertools.chain.from_iterable(calls))))
        return [list(itertools.islice(appended, len(events))) for events in calls]

    def _append(self, connection: sqlite3.Connection, events: Sequence[Event]) -> list[Appended]:
        appended = _append(connection, events)
        self._checkpointer.note(connection.total_changes)
        if appended and appended[-1].seq >= self._sealer.next_seq:
            self._sealer.wake()
        return appended

    def _look(self, after_seq: int, max_events: int) -> tuple[Segment | None, list[Row]]:
        """Return the segment that holds the next event, or the next rows where it is not sealed."""
        with self._snapshot() as connection:
            found = connection.execute(FIND_SEGMENT, (after_seq,)).fetchone()
            if found is not None:
                return segment_from(found), []
            return None, connection.execute(READ_EVENTS, (after_seq, max_events)).fetchall()

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection on which everything is as it is at the first look."""
        with self._reader() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("COMMIT")

    def _rows(self, statement: str, values: Row | dict[str, Any] = ()) -> list[Row]:
        with self._reader() as connection:
            return connection.execute(statement, values).fetchall()

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection that no other thread uses meanwhile."""
        with self._engine_errors():
            try:
                connection = self._readers.pop()
            except IndexError:
                connection = schema.connect(self.path, cache_bytes=READER_CACHE_BYTES)
            try:
                yield connection
            finally:
                self._readers.append(connection)

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise EngineError(f"{self.path}: the event log cannot be used ({error})") from error


def _append(connection: sqlite3.Connection, events: Sequence[Event]) -> list[Appended]:
    acked_us = time.time_ns() // 1_000
    known = _find_known(connection, [event.event_id for event in events])
    head = connection.execute(HEAD).fetchone()[0]  # SQLite would count from 1 again after the last row is sealed
    appended, fresh = [], []
    for event in events:
        first_seq = known.get(event.event_id)
        if first_seq is None:
            first_seq = known[event.event_id] = head + len(fresh) + 1
            fresh.append((first_seq, event))
            appended.append(Appended(event.event_id, first_seq, duplicate=False))
        else:
            appended.append(Appended(event.event_id, first_seq, duplicate=True))
    connection.executemany(INSERT_EVENT, [(seq, acked_us, *event_row(event)) for seq, event in fresh])
    connection.execute(INSERT_HISTORY, (head,))
    return appended


def _find_known(connection: sqlite3.Connection, event_ids: Sequence[str]) -> dict[str, int]:
    """Return the places of those ids that are in the log."""
    known: dict[str, int] = {}
    sealed = connection.execute("SELECT 1 FROM sealed_ids LIMIT 1").fetchone() is not None
    for start in range(0, len(event_ids), IDS_AT_ONCE):
        asked = event_ids[start : start + IDS_AT_ONCE]
        marks = ", ".join("?" * len(asked))
        known |= connection.execute(f"SELECT event_id, seq FROM events WHERE event_id IN ({marks})", asked).fetchall()
        if sealed:
            hashes = {hash_id(event_id): event_id for event_id in asked}
            found = f"SELECT id_hash, seq FROM sealed_ids WHERE id_hash IN ({marks})"
            hashed = [*hashes, *[None] * (len(asked) - len(hashes))]
            known |= ((hashes[id_hash], seq) for id_hash, seq in connection.execute(found, hashed))
    return known


def _put_items(connection: sqlite3.Connection, rows: Sequence[Row]) -> int:
    return _put(connection, "item", ITEM_COLUMNS, rows)


def _put_users(connection: sqlite3.Connection, rows: Sequence[Row]) -> int:
    return _put(connection, "user", USER_COLUMNS, rows)


def _put(connection: sqlite3.Connection, kind: str, columns: Sequence[str], rows: Sequence[Row]) -> int:
    """Write rows, of which the first column is the id, as the newest of their kind; return the last one's number."""
    head = connection.execute(f"SELECT coalesce(max({kind}_seq), 0) FROM {kind}s").fetchone()[0]
    statement = (
        f"INSERT INTO {kind}s ({kind}_seq, {', '.join(columns)}) VALUES (?{', ?' * len(columns)}) "
        f"ON CONFLICT ({columns[0]}) DO UPDATE SET {kind}_seq = excluded.{kind}_seq, "
        + ", ".join(f"{column} = excluded.{column}" for column in columns[1:])
    )
    connection.executemany(statement, ((number, *row) for number, row in enumerate(rows, head + 1)))
    return head + len(rows)
