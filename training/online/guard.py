"""Progressive validation: every event is predicted before it is learned, by what learns and by what it started from.

In:  the losses of both on each event, predicted beforehand.  Out: a verdict: fit to be served, or why not.
Knows nothing of models or the registry. Prequential evaluation after Dawid, JRSS A 1984.

The learned weights must not predict worse than the version they grew from: if over the window their log loss is
higher by more than the bound, by more than chance explains, the learning is undone by whoever asked. That takes events;
a step that ruins the weights shows at once, in the events it has just learned.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """When learning is not let through."""

    enabled: bool = True
    window_events: int = 500
    """Newest predicted events that are judged."""
    min_events: int = 100
    """Events below which only ruined weights are refused."""
    max_loss_increase: float = 0.1
    """Log loss, in nats an event, that learning may add to the version it grew from."""
    max_learned_loss_increase: float = 3.0
    """The same for events that have just been learned, whatever their number: more says that the weights are ruined."""

    def __post_init__(self) -> None:
        if not 2 <= self.min_events <= self.window_events:
            raise ConfigError(
                f"guard.min_events={self.min_events}: must be from 2 to guard.window_events={self.window_events}"
            )
        for name in ("max_loss_increase", "max_learned_loss_increase"):
            if getattr(self, name) < 0:
                raise ConfigError(f"guard.{name}={getattr(self, name)}: must be 0 or more")


class ProgressiveValidation:
    """Predict-then-learn log losses over a sliding window."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._learned: deque[float] = deque(maxlen=config.window_events)
        self._base: deque[float] = deque(maxlen=config.window_events)
        self.recorded = 0

    @property
    def window_start(self) -> int:
        """Events recorded before the window."""
        return self.recorded - len(self._learned)

    def record(self, learned_loss_P: np.ndarray, base_loss_P: np.ndarray) -> None:
        """Add events in order; both arrays hold one loss an event, in nats."""
        self._learned.extend(learned_loss_P.tolist())
        self._base.extend(base_loss_P.tolist())
        self.recorded += len(learned_loss_P)

    def metrics(self) -> dict[str, float]:
        """Return the window's mean log losses; empty before the first event."""
        if not self._learned:
            return {}
        return {
            "events": float(len(self._learned)),
            "log_loss": float(np.mean(self._learned)),
            "base_log_loss": float(np.mean(self._base)),
        }

    def objection(self) -> str | None:
        """Return why the learned weights may not be served, or none."""
        if not self.config.enabled or not self._learned:
            return None
        if not all(map(math.isfinite, self._learned)):
            return "a predicted probability is not finite"
        if len(self._learned) < self.config.min_events:
            return None
        increase = np.asarray(self._learned) - np.asarray(self._base)
        certain = increase.mean() - 2 * increase.std(ddof=1) / math.sqrt(len(increase))
        if certain <= self.config.max_loss_increase:
            return None
        return (
            f"log loss rose by {increase.mean():.3f} nats over {len(increase)} events, surely by {certain:.3f}; "
            f"at most {self.config.max_loss_increase}"
        )

    def damage(self, learned_loss_P: np.ndarray, base_loss_P: np.ndarray) -> str | None:
        """Return why weights that have just learned these events are ruined, or none."""
        if not self.config.enabled or not len(learned_loss_P):
            return None
        increase = float(np.mean(learned_loss_P - base_loss_P))
        if increase <= self.config.max_learned_loss_increase:
            return None
        return (
            f"log loss of events just learned is {increase:.3f} nats above the base; "
            f"at most {self.config.max_learned_loss_increase}"
        )
