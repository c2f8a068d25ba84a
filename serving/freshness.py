"""How long feedback takes until answers reflect it: in user state, the item's row, the dense weights, the encoder.

In:  events as they are taken in, swaps from one resident model to the next.  Out: observations, from an event's ack on.
Knows nothing of HTTP or of how versions are loaded.

A delta states the events it learned, may hold nothing for some of them (set aside) and may leave rows out until they
have changed enough. So every event learned counts for the dense weights, which a delta always has all of, and for its
item's row once that differs from the one served when it was learned, if there was a history to learn it from; a version
of its own has every row whole. A version with another encoder states up to which event that was tuned.
"""

import time
from collections import deque

import torch

from cluster.events import INTERACTION_KINDS
from cluster.log import EventLog
from cluster.log.records import LoggedEvent
from cluster.manifest import VersionRef
from cluster.registry import Registry
from serving.metrics import RECENT_EVENTS, Metrics
from training.models.resident import Resident
from training.models.version import ITEM_ROWS, TUNED_SEQ, find_set_aside

READ_EVENTS = 1_000


def time_state(log: EventLog, metrics: Metrics, seq: int) -> None:
    """Look, as a request would, for an event that has just been taken in, and observe how long it took to be there."""
    for logged in log.read(seq - 1, 1):
        state = log.user_state(logged.event.user_id, 1)
        if max(state.seq, state.up_to_seq) >= seq:
            metrics.observe_freshness("state", [logged.acked_us], _now_us())


class LearnedEvents:
    """The events on their way into one replica's weights. Not thread-safe: its one caller holds a lock."""

    def __init__(self, registry: Registry, log: EventLog, metrics: Metrics) -> None:
        self._registry = registry
        self._log = log
        self._metrics = metrics
        self._timed_seq = 0
        """Last event whose way into the weights has been timed, or came before this replica."""
        self._unsent: deque[LoggedEvent] = deque(maxlen=RECENT_EVENTS)
        """Learned, but its item's row is not served yet."""
        self._asked_seq = 0
        """Last event of which it is known whether it taught anything."""
        self._tuned_seq = 0
        """Last event whose way into the encoder has been timed, or came before this replica."""

    def start(self) -> None:
        """Time events from here on."""
        self._timed_seq = self._tuned_seq = self._log.head_seq()

    def note_swap(self, before: Resident, after: Resident) -> None:
        """Observe every event that the model now served reflects and the one before did not."""
        now_us = _now_us()
        set_aside = self._set_aside(before, after) if after.learned_seq > self._timed_seq else []
        while self._timed_seq < after.learned_seq and (events := self._log.read(self._timed_seq, READ_EVENTS)):
            reached = [event for event in events if event.seq <= after.learned_seq]
            self._metrics.observe_freshness("weights", [event.acked_us for event in reached], now_us)
            learned = [
                logged
                for logged in reached
                if logged.event.kind in INTERACTION_KINDS and not any(logged.seq in span for span in set_aside)
            ]
            self._metrics.observe_freshness("dense", [event.acked_us for event in learned], now_us)
            self._unsent.extend(learned)
            self._timed_seq = after.learned_seq if len(reached) < len(events) else events[-1].seq
        self._time_rows(before, after, now_us)
        self._time_adapter(before, after, now_us)

    def _time_adapter(self, before: Resident, after: Resident, now_us: int) -> None:
        if after.state.adapter is None or before.state.encoder == after.state.encoder:
            return
        told = self._registry.manifest(VersionRef(VersionRef.parse(after.name).version)).metrics.get("adapter")
        tuned_seq = told.get(TUNED_SEQ, 0) if isinstance(told, dict) else 0  # none of one that was tuned by hand
        seq = max(self._tuned_seq, tuned_seq - RECENT_EVENTS)
        while seq < tuned_seq and (events := self._log.read(seq, READ_EVENTS)):
            reached = [logged for logged in events if logged.seq <= tuned_seq]
            acked_us = [logged.acked_us for logged in reached if logged.event.kind in INTERACTION_KINDS]
            self._metrics.observe_freshness("adapter", acked_us, now_us)
            seq = events[-1].seq
        self._tuned_seq = max(self._tuned_seq, tuned_seq)

    def _time_rows(self, before: Resident, after: Resident, now_us: int) -> None:
        if ITEM_ROWS not in after.state.rows:  # a classical system has none, so they wait for the next that has
            return
        waiting = [logged for logged in self._unsent if logged.event.item_id in after.item_row]
        row_N = torch.tensor([after.item_row[logged.event.item_id] for logged in waiting], dtype=torch.int64)
        sent_N = torch.ones(len(waiting), dtype=torch.bool)
        if VersionRef.parse(before.name).version == VersionRef.parse(after.name).version:
            row_before_N = torch.tensor(
                [before.item_row.get(logged.event.item_id, -1) for logged in waiting], dtype=torch.int64
            )
            rows_ND, rows_before_ND = after.state.rows[ITEM_ROWS][row_N], before.state.rows[ITEM_ROWS][row_before_N]
            sent_N = (row_before_N < 0) | (rows_ND != rows_before_ND).any(1)
        sent = [logged for logged, is_sent in zip(waiting, sent_N.tolist(), strict=True) if is_sent]
        self._metrics.observe_freshness("row", [logged.acked_us for logged in sent], now_us)
        served = {logged.seq for logged in sent}
        unsent = [logged for logged in waiting if logged.seq not in served]
        unsent = [logged for logged in unsent if logged.seq <= self._asked_seq or self._teaches(logged, after)]
        self._asked_seq = self._timed_seq
        self._unsent = deque(unsent, maxlen=RECENT_EVENTS)

    def _teaches(self, logged: LoggedEvent, model: Resident) -> bool:
        """Whether there was a history to learn the event from: a user's first moves nothing, so its row is not due."""
        state = self._log.user_state(logged.event.user_id, model.max_history + 1, before_seq=logged.seq + 1)
        return sum(model.knows(entry.item_id) for entry in state.history) > 1

    def _set_aside(self, before: Resident, after: Resident) -> list[range]:
        """Return the events that the chain from one model to the other has passed over without learning them."""
        start, end = VersionRef.parse(before.name), VersionRef.parse(after.name)
        first = start.delta + 1 if start.version == end.version else 0
        spans = (
            find_set_aside(self._registry.manifest(VersionRef(end.version, number)))
            for number in range(first, end.delta + 1)
        )
        return [span for span in spans if span is not None]


def _now_us() -> int:
    return time.time_ns() // 1_000
