"""The intake guard: which events are learned, how much each weighs, and which go into quarantine, with reasons.

In:  logged events in order; how often items were chosen in the past.  Out: a `Verdict` for each.
Knows nothing of models, or of where quarantined events are kept. All events stay in the log and in their user's state:
the guard only decides what moves the weights.

Three things are looked at, over a window of the newest events:
- an item that is chosen far more often than its past lets expect: a click farm (z-score of a Poisson count);
- a user who repeats an item, acts faster than people do, or with the regularity of a clock, or claims to have dwelt
  longer than has passed since the event before;
- how unlike the others a user acts, scored by half-space trees (Tan, Ting and Liu, IJCAI 2011) as `river` has them:
  what is unusual without breaking a rule is learned with less weight (a robust loss), and nobody weighs more in a
  window than `max_user_share`.

State is bounded and follows from the newest events alone, so that a restart rebuilds it by reading them again.
"""

import itertools
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from river.anomaly import HalfSpaceTrees
from river.stats import Quantile

from cluster.errors import ConfigError
from cluster.events import INTERACTION_KINDS
from cluster.log import LoggedEvent

BURST, REPEATS, TOO_FAST, CLOCKWORK, DWELL = "item burst", "repeats", "too fast", "clockwork", "impossible dwell"
"""Reasons for quarantine."""
_USUAL = 0.95
"""Quantile of the anomaly scores up to which an event weighs 1."""
_FEATURES = ("events", "spread", "regularity", "pace")


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeConfig:
    """What is suspicious."""

    enabled: bool = True
    window_events: int = 1_000
    """Newest interactions that items' bursts and users' shares are counted in."""
    burst_events: int = 8
    """Interactions with an item in the window below which there is no burst."""
    burst_sigmas: float = 6.0
    """Standard deviations above the expected count that are a burst."""
    max_repeats: int = 5
    """Times that a user may choose one item within their newest events."""
    max_per_s: float = 50.0
    """Actions a second, over a user's newest, that are too fast for a person. What has one time, such as a basket, is
    one action."""
    min_gap_variation: float = 0.05
    """Standard deviation of the gaps between a user's actions, over their mean, below which they are a clock's."""
    user_events: int = 30
    """Newest events of a user that are looked at."""
    max_users: int = 100_000
    """Users remembered; who has been away longest is forgotten."""
    max_user_share: float = 0.2
    """Share of a window's weight that one user may have."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("window_events", "burst_events", "max_repeats", "user_events", "max_users"):
            if getattr(self, name) < 1:
                raise ConfigError(f"intake.{name}={getattr(self, name)}: must be at least 1")
        for name in ("burst_sigmas", "max_per_s", "min_gap_variation"):
            if getattr(self, name) < 0:
                raise ConfigError(f"intake.{name}={getattr(self, name)}: must be 0 or more")
        if not 0 < self.max_user_share <= 1:
            raise ConfigError(f"intake.max_user_share={self.max_user_share}: must be in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of an event."""

    seq: int
    weight: float
    """In [0, 1]; 0 in quarantine."""
    reasons: tuple[str, ...] = ()
    """Why it is in quarantine; empty where it is not."""
    score: float = 0.0
    """How unlike the others its user acts, in [0, 1]."""


@dataclass(slots=True)
class _User:
    """A user's newest events."""

    times_us: deque[int]
    items: deque[str]
    repeats: Counter[str] = field(default_factory=Counter)

    def add(self, ts_us: int, item_id: str) -> None:
        if len(self.items) == self.items.maxlen:
            self.repeats[self.items[0]] -= 1
        self.times_us.append(ts_us)
        self.items.append(item_id)
        self.repeats[item_id] += 1

    def gaps_s(self) -> list[float]:
        """Return the seconds between actions: what has one time is one of them."""
        return [(later - earlier) / 1e6 for earlier, later in itertools.pairwise(sorted(set(self.times_us)))]


class IntakeGuard:
    """Judges events in the order of the log."""

    def __init__(self, config: IntakeConfig, past_share: Callable[[str], float]) -> None:
        """`past_share` returns the share of past interactions that were with an item."""
        self.config = config
        self._past_share = past_share
        self._window: deque[tuple[str, str]] = deque()
        self._item_counts: Counter[str] = Counter()
        self._user_counts: Counter[str] = Counter()
        self._users: OrderedDict[str, _User] = OrderedDict()
        self._forest = HalfSpaceTrees(n_trees=15, height=6, window_size=200, seed=config.seed)
        self._usual = Quantile(_USUAL)

    def judge(self, events: Sequence[LoggedEvent]) -> list[Verdict]:
        """Return a verdict an event; other events than interactions pass."""
        return [self._judge(logged) for logged in events]

    def _judge(self, logged: LoggedEvent) -> Verdict:
        event = logged.event
        if not self.config.enabled or event.kind not in INTERACTION_KINDS:
            return Verdict(seq=logged.seq, weight=1.0)
        user = self._remember(event.user_id)
        before_us = max(user.times_us, default=None)
        user.add(event.ts_us, event.item_id)
        self._slide(event.item_id, event.user_id)
        gaps_s = user.gaps_s()
        reasons = [BURST] if self._is_burst(event.item_id) else []
        reasons += self._user_reasons(user, event.item_id, gaps_s)
        if event.kind == "dwell" and event.value is not None and before_us is not None:
            since_s = (event.ts_us - before_us) / 1e6
            reasons += [DWELL] if event.value < 0 or event.value > max(since_s, 0.0) + 1.0 else []
        score = self._score(user, gaps_s)
        if reasons:
            return Verdict(seq=logged.seq, weight=0.0, reasons=tuple(reasons), score=score)
        return Verdict(seq=logged.seq, weight=self._weight(event.user_id, score), score=score)

    def _remember(self, user_id: str) -> _User:
        size = self.config.user_events
        user = self._users.pop(user_id, None) or _User(deque(maxlen=size), deque(maxlen=size))
        self._users[user_id] = user
        if len(self._users) > self.config.max_users:
            self._users.popitem(last=False)
        return user

    def _slide(self, item_id: str, user_id: str) -> None:
        self._window.append((item_id, user_id))
        self._item_counts[item_id] += 1
        self._user_counts[user_id] += 1
        if len(self._window) > self.config.window_events:
            for counts, gone in zip((self._item_counts, self._user_counts), self._window.popleft(), strict=True):
                counts[gone] -= 1
                if not counts[gone]:
                    del counts[gone]

    def _is_burst(self, item_id: str) -> bool:
        count = self._item_counts[item_id]
        if count < self.config.burst_events:
            return False
        expected = max(self.config.window_events * self._past_share(item_id), 0.5)
        return count - expected > self.config.burst_sigmas * math.sqrt(expected)

    def _user_reasons(self, user: _User, item_id: str, gaps_s: Sequence[float]) -> list[str]:
        found = [REPEATS] if user.repeats[item_id] > self.config.max_repeats else []
        if len(gaps_s) + 1 < self.config.user_events // 2:
            return found
        mean_s = sum(gaps_s) / len(gaps_s)
        if mean_s < 1 / self.config.max_per_s:
            return [*found, TOO_FAST]
        spread_s = math.sqrt(sum((gap - mean_s) ** 2 for gap in gaps_s) / len(gaps_s))
        return [*found, CLOCKWORK] if spread_s < self.config.min_gap_variation * mean_s else found

    def _score(self, user: _User, gaps_s: Sequence[float]) -> float:
        """Return how unlike the others the user acts, and learn what is usual from it."""
        size = len(user.items)
        spread = len(set(user.items)) / size
        mean_s = sum(gaps_s) / len(gaps_s) if gaps_s else 0.0
        variation = math.sqrt(sum((gap - mean_s) ** 2 for gap in gaps_s) / len(gaps_s)) / mean_s if mean_s > 0 else 1.0
        values = (
            size / self.config.user_events,
            spread,
            min(1.0, variation / 4),
            min(1.0, math.log1p(mean_s) / 15),
        )
        features: dict[Hashable, float] = dict(zip(_FEATURES, values, strict=True))
        score = self._forest.score_one(features)
        self._forest.learn_one(features)
        self._usual.update(score)
        return float(score)

    def _weight(self, user_id: str, score: float) -> float:
        """Return the weight of an event in order: less for who is unlike the others, or has many in the window."""
        usual = float(self._usual.get() or 1.0)
        robust = min(1.0, (1.0 - score) / (1.0 - usual)) if usual < 1 else 1.0
        allowed = self.config.max_user_share * self.config.window_events
        return robust * min(1.0, allowed / self._user_counts[user_id])
