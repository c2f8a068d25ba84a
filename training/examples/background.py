"""Threads that work ahead of the training step, and give way to it.

In:  an iterator to run.  Out: its items, a bounded number of them ahead.
Knows nothing of what the items are.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

READER_NICENESS = 10
EXIT_PATIENCE_S = 10.0
"""How long leaving waits for a thread: one that waits for another worker may wait for ever, and must not hold the error
back that made this one leave. It is a daemon: it ends with the process."""

Item = TypeVar("Item")
_END = object()


def yield_to_steps() -> None:
    """Lower this thread's priority below the process's: reading ahead is for moments when the step waits."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        niceness = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + READER_NICENESS, 19)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


class Background(Generic[Item]):
    """Runs an iterator on a thread, a bounded number of items ahead; its error is raised where the item was due."""

    def __init__(self, start: Callable[[], Iterator[Item]], *, depth: int) -> None:
        self._start = start
        self._ready: queue.Queue[object] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def __enter__(self) -> "Background[Item]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        give_up_s = time.monotonic() + EXIT_PATIENCE_S
        while self._thread.is_alive() and time.monotonic() < give_up_s:
            with contextlib.suppress(queue.Empty):  # it may be waiting to hand over what nobody wants any more
                self._ready.get(timeout=0.05)

    def __iter__(self) -> Iterator[Item]:
        while (item := self._ready.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item  # pyright: ignore[reportReturnType]  # what `start` yields

    def _run(self) -> None:
        items: Iterator[Item] = iter(())
        try:
            yield_to_steps()
            items = self._start()
            for item in items:
                self._ready.put(item)
                if self._stopped.is_set():
                    return
            self._ready.put(_END)
        except BaseException as error:  # for whoever iterates
            self._ready.put(error)
        finally:
            if (close := getattr(items, "close", None)) is not None:
                close()
