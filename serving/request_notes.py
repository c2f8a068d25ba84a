"""What is known of a request while it is answered: its id, who asked by which key, what answered.

In:  requests.  Out: an `X-Request-Id` on each answer; a JSON line for each request where that is wanted, and always
for one that fails.
Knows nothing of what routes do. No line holds a user, an item or a key: paths are told by their route's template.
"""

import json
import queue
import re
import secrets
import sys
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
PLAIN = re.compile(rb"[A-Za-z0-9._-]{1,64}")
"""What a client's own id looks like; another is given in the place of one that does not."""
OWN_BYTES = 8
FAILED = 500
"""Statuses from here on are always logged."""
KEPT_LINES = 10_000
"""Lines that wait to be written; further ones are lost, so that a stuck reader of the log holds nobody up."""


@dataclass(slots=True)
class RequestNotes:
    """Of one request; whoever knows something adds it."""

    request_id: str
    key_id: str | None = None
    version: str | None = None
    arm: str | None = None
    fallback: str | None = None
    error: str | None = None
    """Class of what went wrong."""
    stages_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Begin and end of each stage, by `time.perf_counter`."""


NOTES: ContextVar[RequestNotes | None] = ContextVar("request notes", default=None)


def current_request_id() -> str | None:
    """Return the id of the request that is being answered."""
    notes = NOTES.get()
    return notes.request_id if notes is not None else None


class RequestLog:
    """Writes lines from a thread of its own."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue(KEPT_LINES)
        threading.Thread(target=self._run, name="request log", daemon=True).start()

    def write(self, line: dict[str, Any]) -> None:  # Any: whatever JSON holds
        """Have a line written; returns at once."""
        if not self._lines.full():
            self._lines.put(line)

    def _run(self) -> None:
        while True:
            print(json.dumps(self._lines.get()), file=self._stream or sys.stderr, flush=True)


class RequestIds:
    """ASGI middleware that names each request and logs it."""

    def __init__(self, app: ASGIApp, log: RequestLog, *, log_all: bool) -> None:
        self._app = app
        self._log = log
        self._log_all = log_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with notes of its own."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        stated = next((value for name, value in scope["headers"] if name == HEADER), b"")
        notes = RequestNotes(stated.decode() if PLAIN.fullmatch(stated) else secrets.token_hex(OWN_BYTES))
        NOTES.set(notes)  # stays for whatever answers a defect, further out: each request has a context of its own
        status = FAILED

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (HEADER, notes.request_id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            notes.error = type(error).__name__
            raise
        finally:
            if self._log_all or status >= FAILED:
                self._log.write(_line(scope, notes, status, time.perf_counter() - began_s))


def _line(scope: Scope, notes: RequestNotes, status: int, seconds: float) -> dict[str, Any]:
    about = {
        "at_us": time.time_ns() // 1_000,
        "request_id": notes.request_id,
        "route": getattr(scope.get("route"), "path", "other"),
        "method": scope["method"],
        "status": status,
        "ms": round(seconds * 1e3, 3),
    }
    told = {name: getattr(notes, name) for name in ("key_id", "version", "arm", "fallback", "error")}
    return about | {name: value for name, value in told.items() if value is not None}
