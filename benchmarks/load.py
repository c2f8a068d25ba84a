"""Open-loop HTTP load: requests are sent when they are due, whether or not earlier ones have been answered.

In:  an address, request bodies, rates.  Out: what became of every request, and how long after it was due.
Knows nothing of what is served. One process, plain sockets: on two cores the generator must cost little.

Coordinated omission does not arise: a late answer delays no other request, and late is counted from when it was due.
"""

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import numpy as np
import uvloop

CONNECTIONS = 512
"""Most at a time; a request that is due and finds none waits, and that counts."""
PATIENCE_S = 10.0
"""How long answers are waited for after the last request; what has none by then has failed."""
TICK_S = 0.001
FAILED = 0
"""The status of a request whose connection broke, or which nobody answered."""


@dataclass(slots=True)
class Answered:
    """What became of the requests, in the order of their answers."""

    due_s: list[float] = field(default_factory=list)
    """Since the start."""
    took_s: list[float] = field(default_factory=list)
    """From when it was due."""
    status: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def statuses(self) -> dict[str, int]:
        """Return how many requests got each status."""
        return {str(status): number for status, number in sorted(Counter(self.status).items())}

    def share(self, *statuses: int) -> float:
        """Return the share of requests that got one of these."""
        return sum(status in statuses for status in self.status) / max(len(self.status), 1)

    def ms(self, status: int = 200, after_s: float = 0.0, before_s: float = float("inf")) -> np.ndarray:
        """Return how long answers of a status took, of the requests that were due in a time."""
        due_s, took_s, found = np.array(self.due_s), np.array(self.took_s), np.array(self.status)
        return 1e3 * took_s[(found == status) & (due_s >= after_s) & (due_s < before_s)]

    def refused(self, after_s: float = 0.0, before_s: float = float("inf")) -> int:
        """Return how many requests that were due in a time were not answered 200."""
        due_s, found = np.array(self.due_s), np.array(self.status)
        return int(((found != 200) & (due_s >= after_s) & (due_s < before_s)).sum())

    def p(self, percent: float, **which: float) -> float:
        """Return a percentile of how long, in milliseconds; infinite where there is none."""
        ms = self.ms(200, **which)
        return float(np.percentile(ms, percent)) if len(ms) else float("inf")


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked, and where."""

    url: str
    bodies: Sequence[bytes]
    """Asked in turn."""
    headers: str = ""

    def requests(self) -> list[bytes]:
        """Return the requests as they go over the wire."""
        parts = urlsplit(self.url)
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n{self.headers}"
        return [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in self.bodies]


def offer(
    target: Target, phases: Iterable[tuple[float, float]], *, until: Callable[[], bool] | None = None
) -> Answered:
    """Send so many requests a second for so many seconds, phase after phase, or until told."""
    return uvloop.run(_Load(target, until).run(list(phases)))


class _Load:
    def __init__(self, target: Target, until: Callable[[], bool] | None) -> None:
        parts = urlsplit(target.url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._requests = itertools.cycle(target.requests())
        self._until = until
        self._idle: list[_Connection] = []
        self._open = 0
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._sent = 0
        self._found = Answered()
        self._opening: set[asyncio.Task[None]] = set()

    async def run(self, phases: Sequence[tuple[float, float]]) -> Answered:
        """Offer the load and return what came of it."""
        self._start_s = begin_s = time.perf_counter()
        for rate, seconds in phases:
            schedule = deque(begin_s + number / rate for number in range(round(rate * seconds)))
            begin_s += seconds
            while schedule and not (self._until and self._until()):
                while schedule and schedule[0] <= time.perf_counter():
                    self._waiting.append((schedule.popleft(), next(self._requests)))
                    self._sent += 1
                self._send()
                await asyncio.sleep(TICK_S)
        self._found.seconds = time.perf_counter() - self._start_s
        give_up_s = time.perf_counter() + PATIENCE_S
        while len(self._found.status) < self._sent and time.perf_counter() < give_up_s:
            await asyncio.sleep(TICK_S)
        for connection in [*self._idle]:
            connection.close()
        for _ in range(self._sent - len(self._found.status)):
            self._note(time.perf_counter() - PATIENCE_S, FAILED)
        return self._found

    def answered(self, connection: "_Connection | None", due_s: float, status: int) -> None:
        """Take an answer, and the connection, where it stays, for the next request."""
        self._note(due_s, status)
        if connection is not None:
            self._idle.append(connection)
        if self._waiting:
            self._send()

    def lost(self, connection: "_Connection", due_s: float | None) -> None:
        """Take note that a connection is gone, with the request that was under way."""
        self._open -= 1
        if due_s is not None:
            self._note(due_s, FAILED)
        elif connection in self._idle:
            self._idle.remove(connection)

    def _note(self, due_s: float, status: int) -> None:
        self._found.due_s.append(due_s - self._start_s)
        self._found.took_s.append(time.perf_counter() - due_s)
        self._found.status.append(status)

    def _send(self) -> None:
        while self._waiting and self._idle:
            self._idle.pop().send(*self._waiting.popleft())
        for _ in range(min(len(self._waiting) - len(self._opening), CONNECTIONS - self._open)):
            self._open += 1
            task = asyncio.ensure_future(self._connect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _connect(self) -> None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self), *self._address
            )
        except OSError:
            self._open -= 1
            if self._waiting:
                self._note(self._waiting.popleft()[0], FAILED)
            return
        self._idle.append(connection)
        self._send()


class _Connection(asyncio.Protocol):
    """One request after the other."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._due_s: float | None = None
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def send(self, due_s: float, request: bytes) -> None:
        """Send a request; there is none under way."""
        self._due_s, self._data = due_s, b""
        self._transport.write(request)

    def close(self) -> None:
        """End the connection."""
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found or self._due_s is None:
            return
        lower = head.lower()
        _, is_sized, rest = lower.partition(b"content-length:")
        if len(body) < int(rest.split(b"\r\n", 1)[0]) if is_sized else not body.endswith(b"0\r\n\r\n"):
            return
        due_s, self._due_s = self._due_s, None
        stays = b"connection: close" not in lower
        self._load.answered(self if stays else None, due_s, int(head[9:12]))
        if not stays:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.lost(self, self._due_s)
        self._due_s = None
