"""Take feedback in: check each entry, log what is sound, say what became of every one.

In:  entries as they came from JSON.  Out: a `Receipt`, once what was accepted is durable.
Knows nothing of HTTP or of what is learned from events.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.errors import InvalidEventError
from cluster.events import parse_event
from cluster.log import Appended, EventLog

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One entry that was refused."""

    index: int
    """Its place in the request, from 0."""
    field: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of a request's events."""

    appended: Sequence[Appended]
    """Those that are in the log now, in the order given."""
    rejected: Sequence[Rejected]

    @property
    def duplicates(self) -> int:
        """Events whose id the log had before."""
        return sum(entry.duplicate for entry in self.appended)

    @property
    def accepted(self) -> int:
        """Events that are new in the log."""
        return len(self.appended) - self.duplicates


def parse_all(
    entries: Sequence[object], parse: Callable[[Mapping[str, Any]], Parsed]
) -> tuple[list[Parsed], list[Rejected]]:
    """Return the sound entries and the refused ones, both in order."""
    sound: list[Parsed] = []
    rejected: list[Rejected] = []
    for index, entry in enumerate(entries):
        try:
            if not isinstance(entry, Mapping):
                raise InvalidEventError("", "must be an object")
            sound.append(parse(entry))
        except InvalidEventError as error:
            rejected.append(Rejected(index=index, field=error.field, reason=error.reason))
    return sound, rejected


class Acks:
    """Hands one event loop what becomes durable on another thread, in one wake-up for all that a commit resolves."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._durable: deque[tuple[Future[list[Appended]], asyncio.Future[list[Appended]]]] = deque()
        self._woken = False

    def wait(self, written: Future[list[Appended]]) -> asyncio.Future[list[Appended]]:
        """Return what resolves in the loop as `written` does; called off, it leaves `written` as it is."""
        acked: asyncio.Future[list[Appended]] = self.loop.create_future()
        written.add_done_callback(lambda written: self._note(written, acked))
        return acked

    def _note(self, written: Future[list[Appended]], acked: asyncio.Future[list[Appended]]) -> None:
        self._durable.append((written, acked))
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        self._woken = False  # first: what is noted from now on wakes the loop again, or is handed over here
        while self._durable:
            written, acked = self._durable.popleft()
            if acked.cancelled():
                continue
            if (error := written.exception()) is not None:
                acked.set_exception(error)
            else:
                acked.set_result(written.result())


class Intake:
    """Takes feedback into one log."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._acks: Acks | None = None

    async def take(self, entries: Sequence[object]) -> Receipt:
        """Log the sound entries; returns once they are durable. Raises `EngineError` where nothing was written."""
        events, rejected = parse_all(entries, parse_event)
        appended = await self._acks_here().wait(self._log.append_async(events)) if events else []
        return Receipt(appended=appended, rejected=rejected)

    def _acks_here(self) -> Acks:
        loop = asyncio.get_running_loop()
        if self._acks is None or self._acks.loop is not loop:
            self._acks = Acks(loop)
        return self._acks
