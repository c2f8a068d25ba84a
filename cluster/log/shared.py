"""User state in Redis beside the log: who applies events, when an append is acked, who answers meanwhile.

In:  the log's file, a `RedisStore`.  Out: user state; acks that wait until it reflects the event.
Knows nothing of Redis's commands (redis.py) or of how events become durable.

    append ─▶ durable in the log and in its file ─▶ applier ─▶ Redis: live state up to a number ─▶ ack
    request ◀─ live state from Redis + the imported past from the file

Durable is what the log says; Redis only ever holds what can be filled in again from the file. Every process applies the
log's events in order, its own and those that another one left behind, and each counts once (redis.py).

    an ack           comes once Redis reflects the event; while Redis is away or behind, once the event is durable
    a request        is answered from Redis, unless the file knows of a newer event of that user's than Redis does
    Redis away       requests are answered from the file, which says `fallback`; the applier looks again and again
    Redis emptied    likewise, until the applier has filled it from the file
    before_seq       is a question about the log, and answered from the file
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from cluster.errors import EngineError
from cluster.log.records import Appended, LoggedEvent, UserState
from cluster.log.redis import RedisStore, Shared
from cluster.log.state import FileStates, LiveState

BATCH_EVENTS = 500
LOOK_S = 0.2
"""How often to look for events of processes that died, and for a Redis that is back or emptied."""
FIRST_LIVE_SEQ = 1

log = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    """An append that is durable and not acked yet."""

    seq: int
    acked: "Future[list[Appended]]"
    appended: list[Appended]


class SharedStates:
    """User state of one log, in Redis; every method may be called from any thread."""

    def __init__(
        self, file: FileStates, read: Callable[[int, int], list[LoggedEvent]], store: RedisStore, *, sole: bool
    ) -> None:
        """Apply what `read` gives from now on. `sole` says that no other file holds this log.

        Raises `EngineError` where Redis does not answer.
        """
        self._file = file
        self._read = read
        self._store = store
        self._sole = sole
        self._applied_seq = store.applied_seq() or 0
        self._rewound = self._is_rewound(self._applied_seq)
        self._problem: str | None = f"Redis at {store.where}: has not caught up yet"
        self._waiting: list[_Waiting] = []
        self._changing = threading.Lock()
        self._wanted = threading.Event()
        self._stopping = False
        self._wanted.set()
        self._thread = threading.Thread(target=self._run, name="user state", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """Return why requests are not answered from Redis, if they are not."""
        return self._problem

    def user_state(self, user_id: str, max_history: int, before_seq: int | None = None) -> UserState:
        """Answer as `UserStates` says."""
        if before_seq is not None:
            return self._file.user_state(user_id, max_history, before_seq)
        try:
            shared = self._ask(user_id, max_history)
        except EngineError:
            return replace(self._file.user_state(user_id, max_history), fallback=True)
        if shared is None or len(shared.history) == self._store.keep != max_history:
            return self._file.user_state(user_id, max_history)
        past = self._file.history(user_id, max_history - len(shared.history), FIRST_LIVE_SEQ)
        return UserState(history=(*past, *shared.history), seq=shared.seq, up_to_seq=shared.applied_seq)

    def seen_items(self, user_id: str, before_seq: int | None = None) -> frozenset[str]:
        """Answer as `UserStates` says."""
        try:
            shared = self._ask(user_id, None) if before_seq is None else None
        except EngineError:
            shared = None
        if shared is None:
            return self._file.seen_items(user_id, before_seq)
        whole = len(shared.history) != self._store.keep
        others = self._file.seen_items(user_id, FIRST_LIVE_SEQ if whole else None)
        return others.union(entry.item_id for entry in shared.history)

    def acked(self, written: "Future[list[Appended]]") -> "Future[list[Appended]]":
        """Return what resolves as `written` does, once Redis reflects the events too or is not waited for."""
        acked: Future[list[Appended]] = Future()
        acked.set_running_or_notify_cancel()  # what is being written cannot be called off
        written.add_done_callback(lambda done: self._take(done, acked))
        return acked

    def close(self) -> None:
        """Apply what there is, once more, and end the thread."""
        self._stopping = True
        self._wanted.set()
        self._thread.join()
        self._give_up("closed")
        self._store.close()

    def _ask(self, user_id: str, max_history: int | None) -> Shared | None:
        """Return what Redis knows of a user's doings, or none where the file knows more.

        Raises `EngineError` where Redis cannot be asked.
        """
        if self._problem is not None:
            raise EngineError(self._problem)
        own_seq = self._file.newest_seq(user_id)
        try:
            shared = self._store.read(user_id, max_history)
            if shared is None:
                raise EngineError(f"Redis at {self._store.where}: has lost its state")
        except EngineError as error:
            self._give_up(str(error))
            raise
        return shared if shared.applied_seq >= own_seq else None

    def _take(self, written: "Future[list[Appended]]", acked: "Future[list[Appended]]") -> None:
        if (error := written.exception()) is not None:
            acked.set_exception(error)
            return
        appended = written.result()
        seq = max((entry.seq for entry in appended), default=0)
        with self._changing:
            waits = self._problem is None and seq > self._applied_seq
            if waits:
                self._waiting.append(_Waiting(seq, acked, appended))
        if waits:
            self._wanted.set()
        else:
            acked.set_result(appended)

    def _run(self) -> None:
        stopping = False
        while not stopping:
            woken = self._wanted.wait(LOOK_S)
            stopping = self._stopping  # then once more
            self._wanted.clear()
            try:
                if not woken or self._problem is not None:
                    self._look()
                self._catch_up()
            except EngineError as error:
                self._give_up(str(error))
            except Exception as error:  # the boundary of a thread that must outlive whatever Redis answers
                log.exception("user state is not applied")
                self._give_up(repr(error))

    def _look(self) -> None:
        """Find out how far Redis is; fill it where the log's events alone do not lead on from there."""
        applied_seq = self._store.applied_seq()
        if self._must_fill(applied_seq):
            self._give_up(f"Redis at {self._store.where}: is being filled")
            self._store.fill(self._must_fill, self._everyone)
            self._rewound = False
            applied_seq = self._store.applied_seq()
        if applied_seq is None:
            raise EngineError(f"Redis at {self._store.where}: another process is filling it")
        self._note(applied_seq)

    def _must_fill(self, applied_seq: int | None) -> bool:
        if applied_seq is None or self._rewound or applied_seq < self._file.dropped_seq():
            return True
        return self._is_rewound(applied_seq)

    def _is_rewound(self, applied_seq: int) -> bool:
        """Tell whether Redis holds events that the log has not: an older copy of its file was put back."""
        return self._sole and applied_seq > self._file.head_seq()

    @contextmanager
    def _everyone(self) -> Iterator[tuple[int, Iterator[LiveState]]]:
        with self._file.everyone() as (head_seq, states):
            yield head_seq, self._until_stopped(states)

    def _until_stopped(self, states: Iterator[LiveState]) -> Iterator[LiveState]:
        for state in states:
            if self._stopping:
                raise EngineError("the event log is closed")
            yield state

    def _catch_up(self) -> None:
        """Apply all that the log holds and Redis does not."""
        while True:
            after_seq = self._applied_seq
            events = self._read(after_seq, BATCH_EVENTS)
            if not events:
                break
            applied_seq = self._store.apply(after_seq, events)
            if applied_seq is None or applied_seq < after_seq:
                raise EngineError(f"Redis at {self._store.where}: has lost events")
            self._note(applied_seq)
            if len(events) < BATCH_EVENTS and applied_seq >= events[-1].seq:
                break
        if self._problem is not None:
            log.info("user state is answered from Redis at %s", self._store.where)
            self._problem = None

    def _note(self, applied_seq: int) -> None:
        with self._changing:
            self._applied_seq = applied_seq
            ready = [waiting for waiting in self._waiting if waiting.seq <= applied_seq]
            self._waiting = [waiting for waiting in self._waiting if waiting.seq > applied_seq]
        _ack(ready)

    def _give_up(self, problem: str) -> None:
        """Answer from the file and ack what is durable, until the applier has caught up."""
        with self._changing:
            before, self._problem = self._problem, problem
            ready, self._waiting = self._waiting, []
        if problem != before and not self._stopping:
            log.warning("user state is answered from the log's file: %s", problem)
        _ack(ready)


def _ack(ready: list[_Waiting]) -> None:
    for waiting in ready:
        waiting.acked.set_result(waiting.appended)
