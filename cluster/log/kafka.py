"""The event log on Kafka: the topic is the log, this node's SQLite file what it folds to.

In:  events to append; a broker and a topic of one partition.  Out: what `EventLog` gives, alike on every node.
Knows nothing of HTTP, models or training.

    append ─▶ topic (idempotent producer, acks=all) ─▶ follower ─▶ SQLite: events, user history, next offset
                                                                   one transaction a batch

An ack means that the brokers have the event (as many as `acks=all` with the topic's `min.insync.replicas` asks for) and
that this node has folded it. Sequence numbers, duplicates and user state follow from the topic alone, so nodes agree on
them without asking each other, and a node that lost its file folds the topic again. Of a node's processes one follows
the topic, whoever holds the lock; the others see what it wrote. Other producers may write events to the topic, as JSON
objects like those of `POST /v1/feedback`; what is none is passed over, counted and logged.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from cluster.catalogue import Item, User
from cluster.errors import EngineError, InvalidEventError
from cluster.events import Event, parse_event
from cluster.log.records import ITEM_COLUMNS, USER_COLUMNS, Appended, item_row, user_row
from cluster.log.retention import LogConfig
from cluster.log.sqlite import EventLog, _put_items, _put_users

BATCH_MESSAGES = 1_000
POLL_S = 0.02
DELIVERY_S = 30.0
"""How long an append waits for the brokers."""
OFFSETS_KEPT = 100_000
"""Newest offsets whose sequence numbers are kept, for the processes that wait for them."""

TABLE = (
    "CREATE TABLE IF NOT EXISTS kafka (offset INTEGER PRIMARY KEY, seq INTEGER NOT NULL, duplicate INTEGER NOT NULL)"
)
Headers = list[tuple[str, str | bytes | None]]
ITEM_HEADER = ("recloop", b"item")
USER_HEADER = ("recloop", b"user")

log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Waiter:
    """An append whose messages the brokers have, until they are folded."""

    offsets: list[int]
    events: Sequence[Event]
    future: "Future[Any]"  # Any: what the caller appended tells


class KafkaLog(EventLog):
    """A topic and this node's fold of it; every method may be called from any thread."""

    _is_sole = False

    def __init__(self, path: str | Path, *, servers: str, topic: str, config: LogConfig | None = None) -> None:
        """Open the fold at `path` and follow `topic` at `servers` (host:port, …), which is made where it is missing.

        Raises `EngineError` where no broker answers or the topic has several partitions.
        """
        super().__init__(path, config)
        self._servers, self.topic = servers, topic
        self._writer.submit(lambda connection: connection.execute(TABLE).rowcount).result()
        _ensure_topic(servers, topic)
        self._producer = Producer(
            {"bootstrap.servers": servers, "enable.idempotence": True, "acks": "all", "linger.ms": 1}
            | {"message.timeout.ms": int(DELIVERY_S * 1e3), "compression.type": "none"},
            logger=log,
        )
        self._waiting: list[_Waiter] = []
        self._changing = threading.Lock()
        self._stopping = threading.Event()
        self._failure: str | None = None
        self._threads = [
            threading.Thread(target=target, name=f"kafka {name}", daemon=True)
            for name, target in (("deliveries", self._poll_deliveries), ("follower", self._follow))
        ]
        for thread in self._threads:
            thread.start()

    def append_async(self, events: Sequence[Event]) -> Future[list[Appended]]:
        """Write the events to the topic; the future resolves once the brokers have them and this node folded them."""
        values = [_event_value(event) for event in events]
        return self._acked(self._produce([event.user_id for event in events], values, [], tuple(events)))

    def catch_up(self, patience_s: float) -> None:
        """Return once this node has folded what the topic holds now; raises `EngineError` where it has not in time."""
        deadline_s = time.monotonic() + patience_s
        settings = {"bootstrap.servers": self._servers, "group.id": f"recloop-{self.topic}-look"}
        consumer = Consumer(settings, logger=log)
        try:
            _, end = consumer.get_watermark_offsets(TopicPartition(self.topic, 0), timeout=patience_s)
        except KafkaException as error:
            raise EngineError(f"{self._servers}: does not say where {self.topic!r} ends ({error})") from error
        finally:
            consumer.close()
        while (folded := self.committed_offset(self._name)) < end:
            if self._failure is not None or time.monotonic() > deadline_s:
                reason = self._failure or f"{folded:,} of {end:,} messages within {patience_s:.0f} s"
                raise EngineError(f"{self.topic}: this node has not caught up ({reason})")
            time.sleep(POLL_S)

    def put_items(self, items: Sequence[Item]) -> int:
        """Write items to the topic, replacing those of the same id; return the last one's number on this node."""
        values = [json.dumps(dict(zip(ITEM_COLUMNS, item_row(item), strict=True))).encode() for item in items]
        self._produce([item.item_id for item in items], values, [ITEM_HEADER], ()).result()
        return self._rows("SELECT coalesce(max(item_seq), 0) FROM items")[0][0]

    def put_users(self, users: Sequence[User]) -> None:
        """Write what is told of users to the topic; returns once this node has folded it."""
        values = [json.dumps(dict(zip(USER_COLUMNS, user_row(user), strict=True))).encode() for user in users]
        self._produce([user.user_id for user in users], values, [USER_HEADER], ()).result()

    def close(self) -> None:
        """Hand over what is queued, stop following and close the file."""
        self._producer.flush(DELIVERY_S)
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._fail_waiting("the event log is closed")
        super().close()

    def _lineage(self) -> str:
        """Return the topic's name and the id by which the brokers tell it from one of that name before it."""
        admin = AdminClient({"bootstrap.servers": self._servers}, logger=log)
        try:
            described = admin.describe_topics(TopicCollection([self.topic]))[self.topic].result(DELIVERY_S)
        except KafkaException as error:
            raise EngineError(f"{self._servers}: does not describe {self.topic!r} ({error})") from error
        return f"kafka:{self.topic}:{described.topic_id}"

    def _produce(
        self, keys: Sequence[str], values: Sequence[bytes], headers: Headers, events: Sequence[Event]
    ) -> "Future[Any]":
        if self._stopping.is_set():
            raise EngineError(f"{self.topic}: the event log is closed")
        if self._failure is not None:
            raise EngineError(f"{self.topic}: not followed any more ({self._failure})")
        waiter = _Waiter([], events, Future())
        waiter.future.set_running_or_notify_cancel()  # what the brokers get cannot be called off
        if not values:
            waiter.future.set_result([])
        for key, value in zip(keys, values, strict=True):
            self._send(key.encode(), value, headers, self._delivery(waiter, len(values)))
        return waiter.future

    def _send(self, key: bytes, value: bytes, headers: Headers, delivered: Callable[..., None]) -> None:
        while True:
            try:
                self._producer.produce(self.topic, value, key, 0, on_delivery=delivered, headers=list(headers))
            except BufferError:  # the brokers are slower than the appends
                time.sleep(POLL_S)
            else:
                return

    def _delivery(self, waiter: _Waiter, expected: int) -> Callable[..., None]:
        """Return what is called, on one thread, for each message that the brokers have or refused."""

        def delivered(error: Any, message: Any) -> None:  # noqa: ANN401  (classes of the client's C extension)
            if waiter.future.done():
                return
            if error is not None:
                waiter.future.set_exception(EngineError(f"{self.topic}: not written ({error.str()})"))
                return
            waiter.offsets.append(message.offset())
            if len(waiter.offsets) == expected:
                with self._changing:
                    self._waiting.append(waiter)

        return delivered

    def _poll_deliveries(self) -> None:
        while not self._stopping.is_set():
            self._producer.poll(POLL_S)

    def _follow(self) -> None:
        try:
            with self._lock_or_watch() as is_follower:
                if is_follower:
                    self._fold()
        except Exception as error:  # the boundary of a thread: whoever appends hears of it
            self._failure = str(error)
            log.exception("%s: not followed any more", self.topic)
            self._fail_waiting(self._failure)

    @contextlib.contextmanager
    def _lock_or_watch(self) -> Iterator[bool]:
        """Wait for the node's lock, answering from what its holder folds meanwhile; yields false if stopped before."""
        with self.path.with_name(f"{self.path.name}.kafka.lock").open("ab") as lock:
            while not self._stopping.is_set():
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._answer_waiting()
                    self._stopping.wait(POLL_S / 4 if self._waiting else POLL_S)
                else:
                    yield True
                    return
            yield False

    def _fold(self) -> None:
        consumer = Consumer(
            {"bootstrap.servers": self._servers, "group.id": f"recloop-{self.topic}", "enable.auto.commit": False}
            | {"auto.offset.reset": "error", "isolation.level": "read_committed", "fetch.wait.max.ms": 10},
            logger=log,
        )
        try:
            consumer.assign([TopicPartition(self.topic, 0, self.committed_offset(self._name))])
            while not self._stopping.is_set():
                messages = consumer.consume(BATCH_MESSAGES, POLL_S)
                for message in messages:
                    error = message.error()
                    if error is not None and (error.fatal() or error.code() == KafkaError._AUTO_OFFSET_RESET):
                        raise EngineError(f"{self.topic}: cannot be read on from where this node is ({error.str()})")
                sound = [message for message in messages if message.error() is None]
                if sound:
                    self._writer.submit(lambda connection, sound=sound: self._fold_batch(connection, sound)).result()
                self._answer_waiting()
        finally:
            consumer.close()

    def _fold_batch(self, connection: sqlite3.Connection, messages: Sequence[Any]) -> None:
        """Fold messages in the order of the topic; what another process has folded already is passed over."""
        found = connection.execute("SELECT seq FROM offsets WHERE consumer = ?", (self._name,)).fetchone()
        next_offset = found[0] if found else 0
        for message in messages:
            if message.offset() < next_offset:
                continue
            if ITEM_HEADER in (message.headers() or []):
                named = json.loads(message.value())
                _put_items(connection, [tuple(named[column] for column in ITEM_COLUMNS)])
            elif USER_HEADER in (message.headers() or []):
                named = json.loads(message.value())
                _put_users(connection, [tuple(named[column] for column in USER_COLUMNS)])
            elif (event := self._parse(message)) is not None:
                (appended,) = self._append(connection, [event])
                row = (message.offset(), appended.seq, appended.duplicate)
                connection.execute("INSERT INTO kafka VALUES (?, ?, ?)", row)
            next_offset = message.offset() + 1
        statement = "INSERT INTO offsets VALUES (?, ?) ON CONFLICT (consumer) DO UPDATE SET seq = excluded.seq"
        connection.execute(statement, (self._name, next_offset))
        connection.execute("DELETE FROM kafka WHERE offset < ?", (next_offset - OFFSETS_KEPT,))

    def _parse(self, message: Any) -> Event | None:  # noqa: ANN401  (a class of the client's C extension)
        where = f"{self.topic}: offset {message.offset()}"
        try:
            stated = json.loads(message.value() or b"")
            if not isinstance(stated, dict):
                raise InvalidEventError("", "must be an object")
            stated.setdefault("event_id", f"{self.topic}-{message.offset()}")  # the same on every node
            return parse_event(stated, now_us=message.timestamp()[1] * 1_000)
        except (InvalidEventError, ValueError, UnicodeDecodeError) as error:
            log.warning("%s: passed over, it is no event (%s)", where, error)
            return None

    def _answer_waiting(self) -> None:
        """Resolve the appends that are folded by now."""
        if not self._waiting:
            return
        folded = self.committed_offset(self._name)
        with self._changing:
            ready = [waiter for waiter in self._waiting if max(waiter.offsets) < folded]
            self._waiting = [waiter for waiter in self._waiting if max(waiter.offsets) >= folded]
        for waiter in ready:
            self._answer(waiter)

    def _answer(self, waiter: _Waiter) -> None:
        try:
            appended = [
                self._appended(*pair) for pair in zip(waiter.events, sorted(waiter.offsets), strict=bool(waiter.events))
            ]
        except EngineError as error:
            waiter.future.set_exception(error)
        else:
            waiter.future.set_result(appended)

    def _appended(self, event: Event, offset: int) -> Appended:
        found = self._rows("SELECT seq, duplicate FROM kafka WHERE offset = ?", (offset,))
        if not found:
            raise EngineError(f"{self.topic}: offset {offset} was passed over, it is no event; the log says why")
        return Appended(event.event_id, found[0][0], bool(found[0][1]))

    def _fail_waiting(self, reason: str) -> None:
        with self._changing:
            waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.future.set_exception(
                EngineError(f"{self.topic}: not known to be written ({reason}); append it again")
            )

    @property
    def _name(self) -> str:
        return f"kafka:{self.topic}"


def _ensure_topic(servers: str, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": servers}, logger=log)
    try:
        found = admin.list_topics(timeout=DELIVERY_S).topics.get(topic)
        if found is None:
            admin.create_topics([NewTopic(topic, num_partitions=1)])[topic].result(DELIVERY_S)
            return
    except KafkaException as error:
        raise EngineError(f"{servers}: no Kafka broker that knows {topic!r} ({error})") from error
    if len(found.partitions) != 1:
        raise EngineError(f"{topic}: has {len(found.partitions)} partitions; one log is one order, so it must have 1")


def _event_value(event: Event) -> bytes:
    stated = {name: value for name, value in dataclasses.asdict(event).items() if value is not None}
    return json.dumps(stated | {"context": dict(event.context)}).encode()
