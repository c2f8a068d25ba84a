"""Take feedback in: check each entry, log what is sound, say what became of every one.

In:  entries as they came from JSON.  Out: a `Receipt`, once what was accepted is durable.
Knows nothing of HTTP or of what is learned from events.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
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


async def take_feedback(log: EventLog, entries: Sequence[object]) -> Receipt:
    """Log the sound entries; returns once they are durable. Raises `EngineError` where nothing was written."""
    events, rejected = parse_all(entries, parse_event)
    appended = await asyncio.wrap_future(log.append_async(events)) if events else []
    return Receipt(appended=appended, rejected=rejected)
