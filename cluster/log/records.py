"""What goes in and out of the event log, and how events and items become rows.

In:  `Event` and `Item` objects, SQLite rows.  Out: the other of the two.
Knows nothing of connections, transactions or threads.
"""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from cluster.catalogue import Item, User
from cluster.events import Event

EVENT_COLUMNS = (
    "event_id",
    "ts_us",
    "domain",
    "user_id",
    "item_id",
    "kind",
    "value",
    "request_id",
    "position",
    "propensity",
    "version",
    "context",
)
USER_COLUMNS = ("user_id", "attributes")
ITEM_COLUMNS = ("item_id", "domain", "text", "categories", "available_from_us", "available_until_us")

Row = tuple[Any, ...]  # Any: whatever a SQLite column holds


class Appended(NamedTuple):
    """Where an event stands in the log."""

    event_id: str
    seq: int
    duplicate: bool
    """The id was there already; `seq` is the first one's."""


class LoggedEvent(NamedTuple):
    """An event as the log has it."""

    seq: int
    event: Event
    acked_us: int


class Interaction(NamedTuple):
    """One entry of a user's history."""

    item_id: str
    kind: str
    value: float | None
    ts_us: int
    seq: int
    """Position in the log; 0 or less for what was imported from before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserState:
    """What the log knows of one user."""

    history: tuple[Interaction, ...]
    """Oldest first."""
    seq: int
    """The user's newest event reflected here, of any kind; 0 where there is none."""
    up_to_seq: int = 0
    """Everybody's events up to it are reflected, if Redis answered: other nodes may be further than this one's log."""
    fallback: bool = False
    """Whether the log's file answered because Redis did not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The log checked against itself; a sound one has no gaps, duplicates or mismatches."""

    events: int
    first_seq: int
    last_seq: int
    gaps: int
    """Sequence numbers missing from 1 to `last_seq`, besides those dropped by retention or known to be lost."""
    duplicates: int
    """Events beyond the first of their id."""
    state_mismatches: int
    """Entries by which user history differs from what the log's events say."""
    integrity: str
    """SQLite's own check of the file: "ok", or the first thing wrong."""
    segments: int = 0
    """Sealed segments."""
    dropped: int = 0
    """Events that retention has dropped."""
    lost: int = 0
    """Events that an earlier repair found lost to damage."""
    unknown_ids: int = 0
    """Sealed events, within the dedupe horizon, whose id would be taken for a new one."""
    damaged: tuple[str, ...] = ()
    """What is wrong with segments, each with its range of sequence numbers."""

    @property
    def sound(self) -> bool:
        """Tell whether nothing is wrong."""
        wrong = self.gaps or self.duplicates or self.state_mismatches or self.unknown_ids or self.damaged
        return not wrong and self.integrity == "ok"


def event_row(event: Event) -> Row:
    """Return the values of `EVENT_COLUMNS`."""
    return (
        event.event_id,
        event.ts_us,
        event.domain,
        event.user_id,
        event.item_id,
        event.kind,
        event.value,
        event.request_id,
        event.position,
        event.propensity,
        event.version,
        json.dumps(dict(event.context)) if event.context else None,
    )


def logged_event(row: Row) -> LoggedEvent:
    """Read a row of seq, acked_us and `EVENT_COLUMNS`."""
    seq, acked_us, *values = row
    named = dict(zip(EVENT_COLUMNS, values, strict=True))
    named["context"] = json.loads(named["context"]) if named["context"] else {}
    return LoggedEvent(seq, Event(**named), acked_us)


def item_row(item: Item) -> Row:
    """Return the values of `ITEM_COLUMNS`."""
    categories = json.dumps(item.categories)
    return (item.item_id, item.domain, item.text, categories, item.available_from_us, item.available_until_us)


def user_row(user: User) -> Row:
    """Return the values of `USER_COLUMNS`."""
    return (user.user_id, json.dumps(dict(user.attributes)))


def user_from(row: Row) -> User:
    """Read a row of `USER_COLUMNS`."""
    user_id, attributes = row
    return User(user_id=user_id, attributes=json.loads(attributes))


def item_from(row: Row) -> Item:
    """Read a row of `ITEM_COLUMNS`."""
    named = dict(zip(ITEM_COLUMNS, row, strict=True))
    named["categories"] = tuple(json.loads(named["categories"]))
    return Item(**named)
