"""Events that are not what was expected of users: a corrupted batch looks like that before anything else shows it.

In:  the loss of each event under weights that have not learned from it.  Out: a verdict on the newest events.
Knows nothing of models or of what becomes of the events. Whether learned weights predict better than those they grew
from says nothing here: they learn corrupted labels as well as any. What the base thinks of the newest events, against
what it thought of those before, does.

A world that has changed for good looks the same at first; after `patience_events` in a row it is what is expected.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import ConfigError

EXPECTED = "expected_loss"
"""Metric of a delta: events, mean and variance of what is expected."""
_SURE_SIGMAS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SurpriseConfig:
    """How unexpected events must be to be set aside."""

    enabled: bool = True
    newest_events: int = 200
    """Events that are held against those before."""
    min_events: int = 100
    """Newest events below which nothing is said."""
    expected_events: int = 2_000
    """Events over which what is expected is averaged."""
    max_increase: float = 1.5
    """Mean log loss of the newest events above what is expected, in nats."""
    patience_events: int = 5_000
    """Surprising events in a row after which they are what is expected."""

    def __post_init__(self) -> None:
        if not 2 <= self.min_events <= self.newest_events <= self.expected_events:
            raise ConfigError(
                f"surprise.newest_events={self.newest_events}: must be from surprise.min_events={self.min_events}, "
                f"which is 2 or more, to surprise.expected_events={self.expected_events}"
            )
        if self.max_increase <= 0 or self.patience_events < 1:
            raise ConfigError("surprise: max_increase must be above 0 and patience_events at least 1")


class Surprise:
    """Holds the newest losses against an average of those before them."""

    def __init__(self, config: SurpriseConfig) -> None:
        self.config = config
        self._newest: deque[float] = deque()
        self._events, self._mean, self._variance = 0, 0.0, 0.0
        self._discarded = 0

    def restore(self, metrics: Mapping[str, Any]) -> None:  # Any: whatever JSON holds
        """Expect what a delta's metrics state, if they do."""
        if EXPECTED in metrics:
            stated = metrics[EXPECTED]
            self._events, self._mean, self._variance = stated["events"], stated["mean"], stated["variance"]

    def metrics(self) -> dict[str, Any]:  # Any: whatever JSON holds
        """Return what is expected, as a delta's metric; nothing before there is any."""
        if not self._events:
            return {}
        return {EXPECTED: {"events": self._events, "mean": self._mean, "variance": self._variance}}

    def record(self, base_loss_P: np.ndarray) -> None:
        """Add the losses of events in order."""
        for loss in base_loss_P[np.isfinite(base_loss_P)].tolist():
            self._newest.append(loss)
            if len(self._newest) > self.config.newest_events:
                self._expect(self._newest.popleft())
                self._discarded = 0

    def objection(self) -> str | None:
        """Return why the newest events are not to be learned from, or none."""
        config = self.config
        if not config.enabled or self._events < config.newest_events or len(self._newest) < config.min_events:
            return None
        newest = np.asarray(self._newest)
        increase = newest.mean() - self._mean
        error = math.sqrt(newest.var(ddof=1) / len(newest) + self._variance / self._events)
        if increase - _SURE_SIGMAS * error <= 0 or increase <= config.max_increase:
            return None
        return (
            f"the newest {len(newest)} events are not like those before: log loss {newest.mean():.3f} nats before "
            f"learning, expected {self._mean:.3f}; at most {config.max_increase} above"
        )

    def discard(self) -> int:
        """Forget the newest events, which are not learned from, and return how many.

        Too many in a row are what is expected from now on.
        """
        discarded = len(self._newest)
        self._discarded += discarded
        if self._discarded >= self.config.patience_events:
            self._events = 0
            for loss in self._newest:
                self._expect(loss)
            self._discarded = 0
        self._newest.clear()
        return discarded

    def _expect(self, loss: float) -> None:
        """Take a loss into an average that forgets exponentially once it is over enough events."""
        self._events = min(self._events + 1, self.config.expected_events)
        step = 1 / self._events
        before = self._mean
        self._mean += step * (loss - before)
        self._variance += step * ((loss - before) * (loss - self._mean) - self._variance)
