"""Progressive validation: every event is predicted before it is learned, by what learns and by what it started from.

In:  both predictions of each event, made beforehand.  Out: figures, and a verdict: fit to be served, or why not.
Knows nothing of models or the registry. Prequential evaluation after Dawid, JRSS A 1984.

The learned weights must not predict worse than the version they grew from: if over the window their log loss is higher,
or their NDCG@10 lower, by more than the bound, by more than chance explains, the learning is undone by whoever asked.
That holds for all events and for each segment of them that has enough. Nor may they have become surer of themselves
than the events bear out. That takes events; a step that ruins the weights shows at once, in the events it has just
learned.

Several comparisons are made at once: that of the log loss of all events errs in 2.5% of windows at most, all others
together in as many (Bonferroni).
"""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import ConfigError
from training.evaluation.metrics import ndcg_at_k
from training.online.predictions import Predictions

ALL = "all"
RISK = 0.025
"""Probability of objecting by chance: by the log loss of all events, and once more by all other comparisons."""
CUTOFF = 10
"""Of NDCG."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """When learning is not let through."""

    enabled: bool = True
    window_events: int = 500
    """Newest predicted events that are judged."""
    min_events: int = 100
    """Events, in all or in a segment, below which only ruined weights are refused."""
    max_loss_increase: float = 0.1
    """Log loss, in nats an event, that learning may add to the version it grew from."""
    max_ndcg_drop: float = 0.05
    """NDCG@10 that learning may take from it."""
    max_overconfidence: float = 0.1
    """By how much more than its the probability of what is held most likely may exceed how often that was chosen."""
    max_learned_loss_increase: float = 3.0
    """Log loss that may be added on events that have just been learned, whatever their number: more says that the
    weights are ruined."""

    def __post_init__(self) -> None:
        if not 2 <= self.min_events <= self.window_events:
            raise ConfigError(
                f"guard.min_events={self.min_events}: must be from 2 to guard.window_events={self.window_events}"
            )
        for name in ("max_loss_increase", "max_ndcg_drop", "max_overconfidence", "max_learned_loss_increase"):
            if getattr(self, name) < 0:
                raise ConfigError(f"guard.{name}={getattr(self, name)}: must be 0 or more")


@dataclass(frozen=True, slots=True)
class _Judged:
    """Figures of some events as columns."""

    loss: np.ndarray
    base_loss: np.ndarray
    popularity_loss: np.ndarray
    ndcg: np.ndarray
    base_ndcg: np.ndarray
    confidence: np.ndarray
    hit: np.ndarray
    base_excess: np.ndarray
    """The base's confidence less its hits."""

    def take(self, chosen: np.ndarray) -> "_Judged":
        return _Judged(*(getattr(self, name)[chosen] for name in self.__slots__))

    def summary(self) -> dict[str, float]:
        hits = float(self.hit.sum())
        means = {
            "log_loss": self.loss,
            "base_log_loss": self.base_loss,
            "ndcg_at_10": self.ndcg,
            "base_ndcg_at_10": self.base_ndcg,
        }
        found = {"events": float(len(self.loss))} | {name: float(values.mean()) for name, values in means.items()}
        found["ne"] = found["log_loss"] / float(self.popularity_loss.mean())
        return found | ({"calibration": float(self.confidence.sum()) / hits} if hits else {})


class ProgressiveValidation:
    """Predictions made before learning, over a sliding window."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._figures: deque[tuple[float, ...]] = deque(maxlen=config.window_events)
        self._segments: deque[frozenset[str]] = deque(maxlen=config.window_events)
        self.recorded = 0

    @property
    def window_start(self) -> int:
        """Events recorded before the window."""
        return self.recorded - len(self._figures)

    def record(
        self,
        learned: Predictions,
        base: Predictions,
        popularity_loss_P: np.ndarray,
        segments: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add events in order: both predictions, the loss of guessing by popularity, and which segments each is in."""
        columns = _Judged(
            loss=learned.loss_P,
            base_loss=base.loss_P,
            popularity_loss=popularity_loss_P,
            ndcg=ndcg_at_k(learned.rank_P, CUTOFF),
            base_ndcg=ndcg_at_k(base.rank_P, CUTOFF),
            confidence=learned.confidence_P,
            hit=learned.hits,
            base_excess=base.confidence_P - base.hits,
        )
        self._figures.extend(zip(*(getattr(columns, name).tolist() for name in _Judged.__slots__), strict=True))
        for place in range(len(learned.loss_P)):
            self._segments.append(frozenset(name for name, in_P in (segments or {}).items() if in_P[place]))
        self.recorded += len(learned.loss_P)

    def metrics(self) -> dict[str, Any]:  # Any: figures, and under "segments" those of each
        """Return the window's figures; empty before the first event.

        `ne` is the log loss over that of guessing by popularity; `calibration` is how often the item held most likely
        was expected to be chosen over how often it was. Both are at their best at or below 1.
        """
        if not self._figures:
            return {}
        parts = {name: part.summary() for name, part in self._parts()}
        return {**parts.pop(ALL), "segments": parts}

    def objection(self) -> str | None:
        """Return why the learned weights may not be served, or none."""
        if not self.config.enabled or not self._figures:
            return None
        if not all(math.isfinite(figures[0]) for figures in self._figures):
            return "a predicted probability is not finite"
        comparisons = list(self._comparisons())
        for number, (told, change, bound) in enumerate(comparisons):
            risk = RISK / (len(comparisons) - 1) if number else RISK
            certain = change.mean() - _sigmas(risk) * change.std(ddof=1) / math.sqrt(len(change))
            if certain > bound:
                return f"{told.format(change.mean())}, surely by {certain:.3f}; at most {bound}"
        return None

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

    def _comparisons(self) -> Iterator[tuple[str, np.ndarray, float]]:
        """Yield what to say of each comparison, how much worse each event was, and by how much it may be.

        The log loss of all events comes first; none where there are too few.
        """
        for name, part in self._parts():
            if len(part.loss) >= self.config.min_events:
                over = f"over {len(part.loss)} events" + ("" if name == ALL else f" of {name}")
                yield (
                    f"log loss rose by {{:.3f}} nats {over}",
                    part.loss - part.base_loss,
                    self.config.max_loss_increase,
                )
                yield f"NDCG@10 fell by {{:.3f}} {over}", part.base_ndcg - part.ndcg, self.config.max_ndcg_drop
                excess = part.confidence - part.hit - part.base_excess
                yield f"confidence outgrew the hits by {{:.3f}} {over}", excess, self.config.max_overconfidence

    def _parts(self) -> Iterator[tuple[str, _Judged]]:
        """Yield all events of the window and then each segment that has any."""
        whole = _Judged(*np.array(self._figures, np.float64).T)
        yield ALL, whole
        for name in sorted(frozenset().union(*self._segments)):
            yield name, whole.take(np.array([name in segments for segments in self._segments]))


def _sigmas(risk: float) -> float:
    """Return how many standard errors a chance deviation exceeds with this probability."""
    return statistics.NormalDist().inv_cdf(1 - risk)
