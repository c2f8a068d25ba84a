"""Group commit: one thread that puts what many threads submit into one durable transaction.

In:  jobs, functions of a connection.  Out: their results, as futures that resolve once the commit is on disk.
Knows nothing of events or tables.

A commit waits for the disk; whatever arrives meanwhile joins the next one, so throughput grows with the number of
submitters while a lone one waits for no timer.
"""

import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from cluster.errors import EngineError

Result = TypeVar("Result")
Job = Callable[[sqlite3.Connection], Result]
Entry = tuple[Job[Any], Future[Any]]  # Any: each job has its own result

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
        future: Future[Result] = Future()
        with self._closing:
            if self._closed:
                raise EngineError(f"{self._name}: the event log is closed")
            self._queue.put((job, future))
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
        started = [(job, future) for job, future in group if future.set_running_or_notify_cancel()]
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            outcomes = [self._attempt(job) for job, _ in started]
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            outcomes = [(None, error)] * len(started)
        for (_, future), (result, error) in zip(started, outcomes, strict=True):
            if isinstance(error, sqlite3.Error):
                future.set_exception(EngineError(f"{self._name}: not written ({error})"))
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

    def _attempt(self, job: Job[Any]) -> tuple[Any, Exception | None]:
        """Run a job inside a savepoint; what it raises goes to its own submitter."""
        self._connection.execute("SAVEPOINT job")
        try:
            result = job(self._connection)
        except Exception as error:
            self._connection.execute("ROLLBACK TO job")
            self._connection.execute("RELEASE job")
            return None, error
        self._connection.execute("RELEASE job")
        return result, None
