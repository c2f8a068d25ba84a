"""What became of slates, by arm and minute, counted from the event log.

In:  the log.  Out: impressions, clicks, and slates that met with approval, for charts.
Knows nothing of replicas: each counts the same from the same log. Bounded: the newest events alone, each read once.

A slate's request id begins with its arm (`live-…`), so an event that names it tells of the arm.
    CTR       clicks and purchases of items of slates, over impressions that clients have logged
    hit rate  slates with at least one click, like, cart, purchase or share, over slates of which any event has come
"""

import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any

from cluster.log import EventLog
from serving.experiments import ARMS

MINUTES = 120
"""Newest minutes with events that are kept."""
MOST_EVENTS = 50_000
"""Read at first, and between two looks."""
READ_EVENTS = 2_000
MOST_SLATES = 20_000
"""In one minute and arm; further ones are not told apart."""
CLICKS = frozenset(("click", "purchase"))
APPROVAL = CLICKS | {"like", "cart", "share"}
MINUTE_US = 60_000_000


@dataclass(slots=True)
class _Minute:
    impressions: int = 0
    clicks: int = 0
    events: int = 0
    slates: set[str] = field(default_factory=set)
    liked: set[str] = field(default_factory=set)


class FeedbackStats:
    """Counts what has come since it was last asked; any thread may ask."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._seq: int | None = None
        self._minutes: OrderedDict[int, defaultdict[str, _Minute]] = OrderedDict()
        self._counting = threading.Lock()

    def describe(self) -> list[dict[str, Any]]:  # Any: JSON
        """Return a row a minute and arm, oldest first."""
        with self._counting:
            self._count()
            return [
                {
                    "minute_us": minute * MINUTE_US,
                    "arm": arm,
                    "events": counted.events,
                    "impressions": counted.impressions,
                    "clicks": counted.clicks,
                    "ctr": counted.clicks / counted.impressions if counted.impressions else None,
                    "slates": len(counted.slates),
                    "hit_rate": len(counted.liked) / len(counted.slates) if counted.slates else None,
                }
                for minute, arms in sorted(self._minutes.items())
                for arm, counted in sorted(arms.items())
            ]

    def _count(self) -> None:
        head_seq = self._log.head_seq()
        seq = max(self._seq or 0, head_seq - MOST_EVENTS)
        while seq < head_seq and (events := self._log.read(seq, READ_EVENTS)):
            for logged in events:
                arm = (logged.event.request_id or "").partition("-")[0]
                if arm in ARMS:
                    self._add(logged.acked_us // MINUTE_US, arm, logged.event.request_id or "", logged.event.kind)
            seq = events[-1].seq
        self._seq = seq

    def _add(self, minute: int, arm: str, request_id: str, kind: str) -> None:
        if minute not in self._minutes:
            self._minutes[minute] = defaultdict(_Minute)
            if len(self._minutes) > MINUTES:
                self._minutes.pop(min(self._minutes))
        counted = self._minutes[minute][arm] if minute in self._minutes else _Minute()
        counted.events += 1
        counted.impressions += kind == "impression"
        counted.clicks += kind in CLICKS
        if len(counted.slates) < MOST_SLATES or request_id in counted.slates:
            counted.slates.add(request_id)
            if kind in APPROVAL:
                counted.liked.add(request_id)
