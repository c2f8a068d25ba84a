"""What became of slates, by arm and minute, counted from the event log.

In:  the log.  Out: items shown and chosen, slates that met with approval, for charts.
Knows nothing of replicas: each counts the same from the same log, also after a restart. Bounded: the newest events
alone, each read once; of slates the newest, and only so many of their items.

A slate's request id begins with its arm (`live-…`), so an event that names it tells of the arm. Feedback counts for the
minute of the slate's first event, whenever it comes.
    CTR       items of slates that were shown (an impression is logged) and clicked or bought, over those shown
    hit rate  slates with at least one click, like, cart, purchase or share, over slates of which any event has come
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from cluster.events import Event
from cluster.log import EventLog
from serving.experiments import ARMS

MINUTES = 120
"""Newest minutes with slates that are kept."""
MOST_EVENTS = 50_000
"""Read at first, and between two looks."""
READ_EVENTS = 2_000
MOST_ITEMS = 200_000
"""Items of slates that are remembered; the slates seen first are forgotten first; what was counted stays."""
CLICKS = frozenset(("click", "purchase"))
APPROVAL = CLICKS | {"like", "cart", "share"}
MINUTE_US = 60_000_000


@dataclass(slots=True)
class _Counts:
    """Of the slates of one arm whose first event came in one minute."""

    events: int = 0
    slates: int = 0
    hits: int = 0
    impressions: int = 0
    clicks: int = 0


@dataclass(slots=True)
class _Slate:
    """What has come of one slate; items by their hash."""

    counts: _Counts
    is_hit: bool = False
    shown: set[int] = field(default_factory=set)
    clicked: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        return 1 + len(self.shown) + len(self.clicked)


class FeedbackStats:
    """Counts what has come since it was last asked; any thread may ask."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._seq = 0
        self._minutes: dict[int, dict[str, _Counts]] = {}
        self._slates: OrderedDict[str, _Slate] = OrderedDict()
        self._items = 0
        self._counting = threading.Lock()

    def describe(self) -> list[dict[str, Any]]:  # Any: JSON
        """Return a row a minute and arm, oldest first."""
        with self._counting:
            self._count()
            return [
                {
                    "minute_us": minute * MINUTE_US,
                    "arm": arm,
                    "events": counts.events,
                    "impressions": counts.impressions,
                    "clicks": counts.clicks,
                    "ctr": counts.clicks / counts.impressions if counts.impressions else None,
                    "slates": counts.slates,
                    "hit_rate": counts.hits / counts.slates,
                }
                for minute, arms in sorted(self._minutes.items())
                for arm, counts in sorted(arms.items())
            ]

    def _count(self) -> None:
        head_seq = self._log.head_seq()
        self._seq = max(self._seq, head_seq - MOST_EVENTS)
        while self._seq < head_seq and (events := self._log.read(self._seq, READ_EVENTS)):
            for logged in events:
                request_id = logged.event.request_id or ""
                arm, dash, _ = request_id.partition("-")
                if dash and arm in ARMS:
                    slate = self._find(request_id, arm, logged.acked_us // MINUTE_US)
                    self._add(slate, logged.event)
            self._seq = events[-1].seq
            self._forget()

    def _find(self, request_id: str, arm: str, minute: int) -> _Slate:
        slate = self._slates.get(request_id)
        if slate is None:
            counts = self._minutes.setdefault(minute, {}).setdefault(arm, _Counts())
            counts.slates += 1
            slate = self._slates[request_id] = _Slate(counts)
            self._items += slate.size
        return slate

    def _add(self, slate: _Slate, event: Event) -> None:
        counts, item, size = slate.counts, hash(event.item_id), slate.size
        was_clicked = item in slate.shown and item in slate.clicked
        counts.events += 1
        if event.kind == "impression" and item not in slate.shown:
            slate.shown.add(item)
            counts.impressions += 1
        if event.kind in CLICKS:
            slate.clicked.add(item)
        counts.clicks += not was_clicked and item in slate.shown and item in slate.clicked
        if event.kind in APPROVAL and not slate.is_hit:
            slate.is_hit = True
            counts.hits += 1
        self._items += slate.size - size

    def _forget(self) -> None:
        while len(self._minutes) > MINUTES:
            del self._minutes[min(self._minutes)]
        while self._items > MOST_ITEMS:
            self._items -= self._slates.popitem(last=False)[1].size
