"""Group commit: one thread that puts what many threads submit into one durable transaction.

In:  jobs, functions of a connection.  Out: their results, as futures that resolve once the commit is on disk.
Knows nothing of events or tables.

A commit waits for the disk; whatever arrives meanwhile joins the next one, so throughput grows with the number of
submitters while a lone one waits for no timer. Neighbours that share a job run as one: SQLite lets go of the
interpreter at each statement's each row, and with a busy event loop beside it waits for it as often.
"""

import itertools
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from cluster.errors import EngineError

Part = TypeVar("Part")
Result = TypeVar("Result")
Job = Callable[[sqlite3.Connection], Result]
SharedJob = Callable[[sqlite3.Connection, Sequence[Part]], Sequence[Result]]
"""Takes the parts of several submitters and returns a result for each."""


class Entry(NamedTuple):
    """What was submitted."""

    job: SharedJob[Any, Any]  # Any: each job has its own parts and results
    part: Any
    future: Future[Any]


MAX_JOBS = 1_024
"""Most jobs in one transaction."""


class GroupCommit:
    """The only writer of one connection."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self._connection = connection
        self._name = name
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"group-commit {name}", daemon=True)
        self._thread.start()

    def submit(self, job: Job[Result]) -> Future[Result]:
        """Queue a job; raises `EngineError` after `close`. A job that raises undoes only itself."""
        return self.submit_part(lambda connection, _: [job(connection)], None)

    def submit_part(self, job: SharedJob[Part, Result], part: Part) -> Future[Result]:
        """Queue a part of a job, which runs once for neighbouring parts; where it raises, for ever fewer of them."""
        future: Future[Result] = Future()
        with self._closing:
            if self._closed:
                raise EngineError(f"{self._name}: the event log is closed")
            self._queue.put(Entry(job, part, future))
        return future

    def close(self) -> None:
        """Commit what is queued, then end the thread and the connection."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            group = [entry]
            while len(group) < MAX_JOBS and not self._queue.empty():
                if (entry := self._queue.get()) is None:
                    self._commit(group)
                    return
                group.append(entry)
            self._commit(group)

    def _commit(self, group: list[Entry]) -> None:
        started = [entry for entry in group if entry.future.set_running_or_notify_cancel()]
        outcomes: list[tuple[Any, Exception | None]] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for job, entries in itertools.groupby(started, key=lambda entry: entry.job):
                outcomes += self._attempt(job, [entry.part for entry in entries])
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            outcomes = [(None, error)] * len(started)
        for (_, _, future), (result, error) in zip(started, outcomes, strict=True):
            if isinstance(error, sqlite3.Error):
                future.set_exception(EngineError(f"{self._name}: not written ({error})"))
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

    def _attempt(self, job: SharedJob[Any, Any], parts: Sequence[Any]) -> list[tuple[Any, Exception | None]]:
        """Run a job inside a savepoint; what it raises goes to the submitter of the part that makes it raise."""
        self._connection.execute("SAVEPOINT job")
        try:
            results = job(self._connection, parts)
        except Exception as error:
            self._connection.execute("ROLLBACK TO job")
            self._connection.execute("RELEASE job")
            if len(parts) == 1:
                return [(None, error)]
            half = len(parts) // 2
            return self._attempt(job, parts[:half]) + self._attempt(job, parts[half:])
        self._connection.execute("RELEASE job")
        return [(result, None) for result in results]
