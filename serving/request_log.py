"""One JSON object a request, for whoever collects logs; what cannot be written in time is dropped and counted.

In:  what was asked, answered and how long it took.  Out: lines on standard error, by a thread of its own.
Knows nothing of what answers say: no user, item or key is in a line, only the key's id.
"""

import queue
import sys
import threading
import time
from typing import Any, TextIO

import pydantic_core

MOST_WAITING = 10_000


class RequestLog:
    """Writes lines in order; any thread may add one, and none waits."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._waiting: queue.Queue[dict[str, Any]] = queue.Queue(MOST_WAITING)  # Any: JSON
        self._dropped = 0
        threading.Thread(target=self._write, name="request-log", daemon=True).start()

    def add(self, told: dict[str, Any]) -> None:  # Any: JSON
        """Have a line written."""
        try:
            self._waiting.put_nowait({"at": time.time(), **told})
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        while True:
            told = self._waiting.get()
            if self._dropped:
                told["dropped_before"], self._dropped = self._dropped, 0
            self._stream.write(pydantic_core.to_json(told).decode() + "\n")
            if self._waiting.empty():
                self._stream.flush()
