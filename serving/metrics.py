"""What one replica counts, for Prometheus.

In:  observations.  Out: the exposition text of `GET /metrics`, of the replica that answers.
Knows nothing of how requests are answered. Labels are routes, outcomes and status codes only: never a user, an item or
a version, of which there is no end.
"""

import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.manifest import VersionRef

REQUEST_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60)
STAGE_BUCKETS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
FRESHNESS_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 30, 60, 300)
LOOKED_AFTER = frozenset(("/healthz", "/readyz", "/metrics", "/v1/stats", "/v1/explain", "/v1/versions", "/", "other"))
"""Routes of whoever looks after the process: no traffic."""
RECENT_EVENTS = 10_000
"""Newest events whose freshness is kept for exact percentiles."""
FRESHNESS = {
    "state": "requests see it in its user's state (of what this replica took in, at most 100 events a second)",
    "weights": "weights that have learned, or passed over, all up to it answer requests",
    "row": "the row of its item that has learned from it answers requests",
    "dense": "dense weights that have learned from it answer requests",
    "adapter": "an encoder that was tuned with it among the interactions reads texts (of the newest 10,000 of each)",
}
"""Name of each histogram to what it is the time until, from an event's ack."""


SLICE_S = 5
"""Seconds of one slice of traffic."""
SLICES = 120
"""Newest slices that are kept."""
SLICE_LATENCIES = 2_000
"""Newest answers of a slice whose latency is kept for its percentiles."""


class _Slice:
    """What was answered in some seconds."""

    def __init__(self) -> None:
        self.requests = self.refused = self.failed = 0
        self.took_s = deque[float](maxlen=SLICE_LATENCIES)


class Metrics:
    """The counters of one replica."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._replica = secrets.token_hex(4)
        self._slices: OrderedDict[int, _Slice] = OrderedDict()
        self._request_s = Histogram(
            "recloop_request_seconds",
            "Time from a request's arrival at the replica to its answer.",
            ["route", "status"],
            buckets=REQUEST_BUCKETS_S,
            registry=self._registry,
        )
        self._events = Counter(
            "recloop_events", "Feedback events by what became of them.", ["outcome"], registry=self._registry
        )
        self._fallbacks = Counter(
            "recloop_state_fallbacks",
            "Recommendations made from the node's own state because the shared one did not answer.",
            registry=self._registry,
        )
        self._deadline_fallbacks = Counter(
            "recloop_deadline_fallbacks",
            "Answers that were not ready by their request's deadline, by what took their place.",
            ["fallback"],
            registry=self._registry,
        )
        self._stage_s = Histogram(
            "recloop_stage_seconds",
            "Time of a slate's stages: waiting for a thread, the user's state, candidates, the policy's draw.",
            ["stage"],
            buckets=STAGE_BUCKETS_S,
            registry=self._registry,
        )
        self._under_way = Gauge("recloop_requests_under_way", "Requests not yet answered.", registry=self._registry)
        self._kept = Counter(
            "recloop_kept_candidates",
            "Slates of users like everyone, by whether their candidates were kept from before.",
            ["outcome"],
            registry=self._registry,
        )
        self._version = Gauge("recloop_version", "Number of the version served.", registry=self._registry)
        self._delta = Gauge("recloop_delta", "Number of its delta.", registry=self._registry)
        self._swaps = Counter(
            "recloop_version_swaps", "Attempts to follow the promoted version.", ["outcome"], registry=self._registry
        )
        self._learned_seq = Gauge(
            "recloop_learned_seq", "Last event that the weights have learned from.", registry=self._registry
        )
        self._freshness_s = {
            name: Histogram(
                f"recloop_{name}_freshness_seconds",
                f"Time from an event's ack until {reflected}.",
                buckets=FRESHNESS_BUCKETS_S,
                registry=self._registry,
            )
            for name, reflected in FRESHNESS.items()
        }
        self._recent_freshness_us = {name: deque[int](maxlen=RECENT_EVENTS) for name in FRESHNESS}

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self._request_s.labels(route, str(status)).observe(seconds)
        if route in LOOKED_AFTER:
            return
        number = int(time.time()) // SLICE_S
        if (counted := self._slices.get(number)) is None:
            counted = self._slices[number] = _Slice()
            if len(self._slices) > SLICES:
                self._slices.popitem(last=False)
        counted.requests += 1
        counted.refused += status in (429, 503)
        counted.failed += status == 500
        counted.took_s.append(seconds)

    def describe_traffic(self) -> dict[str, Any]:  # Any: JSON
        """Return what this replica has answered lately, slice after slice, without what looks after the process."""
        counted = dict(self._slices)
        now_s = time.time()
        last = int(now_s) // SLICE_S
        first = max(min(counted, default=last), last - SLICES + 1)
        slices = [self._describe_slice(number, counted.get(number), now_s) for number in range(first, last + 1)]
        return {"replica": self._replica, "slices": slices}

    def _describe_slice(self, number: int, counted: _Slice | None, now_s: float) -> dict[str, Any]:  # Any: JSON
        took_s = list(counted.took_s) if counted else []
        p50, p99 = (1e3 * np.percentile(took_s, [50, 99])).tolist() if took_s else (None, None)
        return {
            "at_us": number * SLICE_S * 1_000_000,
            "seconds": min(SLICE_S, max(now_s - number * SLICE_S, 1.0)),  # the newest goes on
            "requests": counted.requests if counted else 0,
            "refused": counted.refused if counted else 0,
            "failed": counted.failed if counted else 0,
            "p50_ms": p50,
            "p99_ms": p99,
        }

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Count the time of one of a slate's stages."""
        self._stage_s.labels(stage).observe(seconds)

    def count_kept(self, *, hit: bool) -> None:
        """Count whether a user's candidates were kept."""
        self._kept.labels("hit" if hit else "miss").inc()

    def set_version(self, ref: VersionRef) -> None:
        """Note what is served."""
        self._version.set(ref.version)
        self._delta.set(ref.delta)

    def count_under_way(self, change: int) -> None:
        """Note that a request has come, or is answered."""
        self._under_way.inc(change)

    def count_events(self, outcome: str, number: int) -> None:
        """Count events that were accepted, duplicate or rejected."""
        if number:
            self._events.labels(outcome).inc(number)

    def count_state_fallback(self) -> None:
        """Count one recommendation without the shared user state."""
        self._fallbacks.inc()

    def count_deadline_fallback(self, fallback: str) -> None:
        """Count one answer that was not ready in time."""
        self._deadline_fallbacks.labels(fallback).inc()

    def count_swap(self, outcome: str) -> None:
        """Count one attempt to follow the promoted version: swapped or refused."""
        self._swaps.labels(outcome).inc()

    def set_learned_seq(self, seq: int) -> None:
        """Note the last event that the weights served have learned from."""
        self._learned_seq.set(seq)

    def observe_freshness(self, name: str, acked_us: Iterable[int], now_us: int) -> None:
        """Count events that are reflected since just now, in one of `FRESHNESS`."""
        for acked in acked_us:
            self._freshness_s[name].observe((now_us - acked) / 1e6)
            self._recent_freshness_us[name].append(now_us - acked)

    def recent_freshness(self, name: str) -> dict[str, float | int | None]:
        """Return p50 and p99 in milliseconds from ack until reflected, over the newest events."""
        recent = list(self._recent_freshness_us[name])
        if not recent:
            return {"events": 0, "p50": None, "p99": None}
        p50, p99 = np.percentile(recent, [50, 99]) / 1e3
        return {"events": len(recent), "p50": float(p50), "p99": float(p99)}

    def render(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self._registry)


class RequestTimer:
    """ASGI middleware that observes each request under its route's template."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and time it until its answer is sent."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        status = 500  # what the client sees when nothing answers

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.count_under_way(1)
        try:
            await self._app(scope, receive, send_and_note)
        finally:
            self._metrics.count_under_way(-1)
            route, took_s = getattr(scope.get("route"), "path", "other"), time.perf_counter() - started_s
            self._metrics.observe_request(route, status, took_s)
