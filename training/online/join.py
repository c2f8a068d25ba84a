"""Impressions with the feedback that followed them become labelled examples.

In:  logged events, in order of the log.  Out: `Joined` examples, each once, in event time.
Knows nothing of models. What was shown and not chosen is a negative once enough time has passed; a reward that comes
later corrects it (Ktena et al., RecSys 2019: the fake negative was needed to be fresh, and is taken back).

    impression ──wait──▶ negative ──reward within the attribution window──▶ correction
        └──reward────▶ positive                             reward without impression ──▶ organic positive

Events are taken in event time: each is held back until the watermark, the newest time seen less the lateness allowed,
has passed it, so that any order within that gives the same examples. What comes later is taken at once, and counted.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import Recipe
from cluster.errors import ConfigError
from cluster.events import EVENT_SCHEMA, INTERACTION_KINDS, Event
from cluster.log import EventLog, LoggedEvent

IMPRESSION = "impression"
READ_EVENTS = 10_000
MOST_FORGOTTEN = 10_000
STATE_FIELDS = ("user_id", "item_id", "kind", "ts_us", "value", "request_id", "position", "propensity")
STATE_SCHEMA = pa.schema(
    [
        *(EVENT_SCHEMA.field(name) for name in STATE_FIELDS),
        pa.field("seq", pa.int64()),
        pa.field("is_open", pa.bool_()),
        pa.field("label", pa.float64()),
    ]
)
"""Of `Join.state`: what joining needs of an event, and what has become of it."""
NEWEST = b"newest_us"


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinConfig:
    """How feedback finds its impression."""

    attribution_h: float = 24.0
    """How long after an impression feedback on its item is due to it."""
    wait_s: float = 600.0
    """How long after an impression nothing has come of it until it is a negative."""
    lateness_s: float = 60.0
    """By how much events may be out of order."""
    max_open: int = 1_000_000
    """Impressions remembered; the oldest are closed early beyond that."""

    def __post_init__(self) -> None:
        if not 0 <= self.wait_s <= self.attribution_h * 3_600:
            raise ConfigError(f"join.wait_s={self.wait_s}: must be from 0 to join.attribution_h={self.attribution_h} h")
        if self.lateness_s < 0 or self.max_open < 1:
            raise ConfigError("join: lateness_s must be 0 or more and max_open at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """One labelled example."""

    user_id: str
    item_id: str
    label: float
    """1 chosen, 0 not."""
    kind: str
    """Of the feedback; "impression" where there was none."""
    value: float | None
    ts_us: int
    """Of the impression, or of the feedback where there was none."""
    delay_us: int
    """From impression to feedback."""
    request_id: str | None
    position: int | None
    propensity: float | None
    version: str | None
    seq: int
    """Of the impression, or of the feedback where there was none."""
    correction: bool = False
    """Takes back the negative that was made of the same impression before."""
    organic: bool = False
    """There was no impression."""
    repeated: bool = False
    """The impression has such a label already, or was chosen before: nothing new."""


@dataclass(slots=True)
class JoinCounts:
    """What became of events, besides examples."""

    late: int = 0
    repeated_impressions: int = 0
    closed_early: int = 0


@dataclass(slots=True)
class _Shown:
    logged: LoggedEvent
    label: float | None = None
    """What it was last an example of."""


@dataclass(slots=True)
class Join:
    """Joins one stream; bounded memory."""

    config: JoinConfig
    counts: JoinCounts = field(default_factory=JoinCounts)
    _held: list[tuple[int, int, LoggedEvent]] = field(default_factory=list)
    """By time, then number: what the watermark has not passed."""
    _newest_us: int = 0
    _shown: "OrderedDict[tuple[str, str, str | None], _Shown]" = field(default_factory=OrderedDict)
    """By user, item and request; oldest first, but for those that came late."""
    _of_user: dict[str, dict[str, list[tuple[str, str, str | None]]]] = field(default_factory=dict)
    """Keys of a user's impressions by item, oldest first."""
    _forgotten: dict[str, int] = field(default_factory=dict)
    """The last number of each user whose events up to there are forgotten, as long as some are held back."""
    _due: list[tuple[int, int, tuple[str, str, str | None]]] = field(default_factory=list)
    """When to close each impression as a negative, and again when to forget it."""

    def add(self, events: Sequence[LoggedEvent]) -> list[Joined]:
        """Take events; return what has become certain."""
        found: list[Joined] = []
        for logged in events:
            ts_us = logged.event.ts_us
            if ts_us < self._watermark_us():
                self.counts.late += 1
                if not self._is_long_past(logged):
                    found += self._take(logged)
            else:
                heapq.heappush(self._held, (ts_us, logged.seq, logged))
            self._newest_us = max(self._newest_us, ts_us)
            found += self._advance(self._watermark_us())
        return found

    def state(self) -> pa.Table:
        """Return what a later `restored` join needs to go on: what is held back, and what is open with its label."""
        held = [logged for _, _, logged in sorted(self._held) if not self._is_forgotten(logged)]
        entries = [(logged, False, None) for logged in held]
        entries += [(shown.logged, True, shown.label) for shown in self._shown.values()]
        columns: dict[str, list[Any]] = {
            name: [getattr(logged.event, name) for logged, _, _ in entries] for name in STATE_FIELDS
        }
        columns |= {
            "seq": [logged.seq for logged, _, _ in entries],
            "is_open": [is_open for _, is_open, _ in entries],
            "label": [label for _, _, label in entries],
        }
        return pa.table(columns, schema=STATE_SCHEMA.with_metadata({NEWEST: str(self._newest_us)}))

    @classmethod
    def restored(cls, config: JoinConfig, state: pa.Table) -> "Join":
        """Return the join that `state` was taken of; its counts start anew."""
        join = cls(config)
        join._newest_us = int((state.schema.metadata or {})[NEWEST])
        for row in state.to_pylist():
            seq, is_open, label = (row.pop(name) for name in ("seq", "is_open", "label"))
            logged = LoggedEvent(seq, Event(**row, event_id=""), 0)
            if is_open:
                join._open(_Shown(logged, label))
            else:
                heapq.heappush(join._held, (logged.event.ts_us, seq, logged))
        return join

    def flush(self) -> list[Joined]:
        """Return the rest, as if time had gone on: the stream has ended."""
        return list(self._advance(2**62))

    def _watermark_us(self) -> int:
        return self._newest_us - int(self.config.lateness_s * 1e6)

    def _advance(self, watermark_us: int) -> Iterator[Joined]:
        """Take what the watermark has passed, and close impressions, in order of time."""
        while True:
            next_event_us = self._held[0][0] if self._held else 2**63
            next_due_us = self._due[0][0] if self._due else 2**63
            if min(next_event_us, next_due_us) >= watermark_us:
                return
            if next_event_us <= next_due_us:
                yield from self._take(heapq.heappop(self._held)[2])
            else:
                yield from self._close(*heapq.heappop(self._due))

    def _take(self, logged: LoggedEvent) -> list[Joined]:
        event = logged.event
        if self._is_forgotten(logged):
            return []
        if event.kind == IMPRESSION:
            return self._show(logged)
        shown = self._find(logged)
        label = 1.0 if event.kind in INTERACTION_KINDS else 0.0
        if shown is None:
            return [_example(logged, logged, label, organic=True)]
        repeated = shown.label is not None and label <= shown.label
        correction = shown.label is not None and not repeated
        if not repeated:
            shown.label = label
        return [_example(shown.logged, logged, label, correction=correction, repeated=repeated)]

    def _show(self, logged: LoggedEvent) -> list[Joined]:
        event = logged.event
        key = (event.user_id, event.item_id, event.request_id)
        if event.request_id is not None and key in self._shown:
            self.counts.repeated_impressions += 1
            return []
        self._open(_Shown(logged))
        if len(self._shown) <= self.config.max_open:
            return []
        self.counts.closed_early += 1
        oldest = next(iter(self._shown))
        shown = self._forget(oldest)
        return [_example(shown.logged, None, 0.0)] if shown.label is None else []

    def _open(self, shown: _Shown) -> None:
        event = shown.logged.event
        key = (event.user_id, event.item_id, event.request_id)
        if key in self._shown:  # without a request, a later impression of the same is another one
            key = (event.user_id, event.item_id, f"\x00{shown.logged.seq}")
        self._shown[key] = shown
        self._of_user.setdefault(event.user_id, {}).setdefault(event.item_id, []).append(key)
        heapq.heappush(self._due, (event.ts_us + int(self.config.wait_s * 1e6), shown.logged.seq, key))

    def _find(self, logged: LoggedEvent) -> _Shown | None:
        """Return the impression that feedback is due to: its request's, else the user's last of the item before it."""
        event = logged.event
        if event.request_id is not None:
            found = self._shown.get((event.user_id, event.item_id, event.request_id))
            if found is not None:
                return found
        since_us = event.ts_us - self._attribution_us()
        keys = self._of_user.get(event.user_id, {}).get(event.item_id, [])
        within = [key for key in keys if since_us <= self._shown[key].logged.event.ts_us <= event.ts_us]
        if not within:
            return None
        return self._shown[max(within, key=lambda key: self._shown[key].logged.event.ts_us)]

    def _close(self, due_us: int, seq: int, key: tuple[str, str, str | None]) -> list[Joined]:
        shown = self._shown.get(key)
        if shown is None or shown.logged.seq != seq:
            return []  # closed early
        forget_us = shown.logged.event.ts_us + self._attribution_us() + 1
        if due_us >= forget_us:
            self._forget(key)
            return []
        heapq.heappush(self._due, (forget_us, seq, key))
        if shown.label is not None:
            return []
        shown.label = 0.0
        return [_example(shown.logged, None, 0.0)]

    def _is_forgotten(self, logged: LoggedEvent) -> bool:
        return logged.seq <= self._forgotten.get(logged.event.user_id, 0)

    def _is_long_past(self, logged: LoggedEvent) -> bool:
        """Whether it is an impression to which nothing is due any more: one that has been forgotten looks the same."""
        return logged.event.kind == IMPRESSION and logged.event.ts_us < self._watermark_us() - self._attribution_us()

    def forget_user(self, user_id: str, seq: int) -> None:
        """Forget a user's events up to a number: nothing more is to be made of what they were shown."""
        self._forgotten[user_id] = seq
        if len(self._forgotten) > MOST_FORGOTTEN:  # what is not held back any more needs no note
            held_of = {logged.event.user_id for _, _, logged in self._held}
            self._forgotten = {user: last for user, last in self._forgotten.items() if user in held_of}
        for keys in self._of_user.pop(user_id, {}).values():
            for key in keys:
                del self._shown[key]

    def _attribution_us(self) -> int:
        return int(self.config.attribution_h * 3_600e6)

    def _forget(self, key: tuple[str, str, str | None]) -> _Shown:
        of_item = self._of_user[key[0]]
        of_item[key[1]].remove(key)
        if not of_item[key[1]]:
            del of_item[key[1]]
        if not of_item:
            del self._of_user[key[0]]
        return self._shown.pop(key)


def join_log(log: EventLog, recipe: Recipe, path: Path) -> dict[str, Any]:  # Any: JSON
    """Join the whole log by the recipe: `recloop events join`."""
    return write_joined(log, path, recipe.section(JoinConfig))


def write_joined(log: EventLog, path: Path, config: JoinConfig) -> dict[str, Any]:  # Any: JSON
    """Join the whole log into a Parquet file, the watermark's last wait included; return what came of it."""
    join, seq, rows = Join(config), 0, 0
    schema = pa.schema(
        [
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("label", pa.float64()),
            ("kind", pa.string()),
            ("value", pa.float64()),
            ("ts_us", pa.int64()),
            ("delay_us", pa.int64()),
            ("request_id", pa.string()),
            ("position", pa.int32()),
            ("propensity", pa.float64()),
            ("version", pa.string()),
            ("correction", pa.bool_()),
            ("organic", pa.bool_()),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:

        def write(found: list[Joined]) -> int:
            columns = {name: [getattr(example, name) for example in found] for name in schema.names}
            writer.write_table(pa.table(columns, schema=schema))
            return len(found)

        while events := log.read(seq, READ_EVENTS):
            seq = events[-1].seq
            rows += write(join.add(events))
        rows += write(join.flush())
    counts = {name: getattr(join.counts, name) for name in join.counts.__slots__}
    return {"joined": str(path), "events": seq, "examples": rows} | counts


def _example(
    shown: LoggedEvent,
    feedback: LoggedEvent | None,
    label: float,
    *,
    correction: bool = False,
    organic: bool = False,
    repeated: bool = False,
) -> Joined:
    event = shown.event
    return Joined(
        user_id=event.user_id,
        item_id=event.item_id,
        label=label,
        kind=feedback.event.kind if feedback else IMPRESSION,
        value=feedback.event.value if feedback else None,
        ts_us=event.ts_us,
        delay_us=feedback.event.ts_us - event.ts_us if feedback else 0,
        request_id=event.request_id,
        position=event.position,
        propensity=event.propensity,
        version=event.version,
        correction=correction,
        organic=organic,
        repeated=repeated,
        seq=shown.seq,
    )
