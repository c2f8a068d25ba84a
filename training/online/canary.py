"""A version on trial is promoted or ended by what came of its slates: a sequential test, looked at whenever one likes.

In:  logged events since the trial began.  Out: a verdict with its reason, or none yet.
Knows nothing of how slates are made. Users of the trial are compared with all others by interactions per impression.

Users are the unit: what one user does hangs together, so the variance is of users' totals (the delta method for a
ratio; Deng et al., KDD 2018). The interval holds at all looks at once, because it is that of a mixture sequential
probability ratio test (Johari et al., "Always valid inference", Operations Research 2022): it may be looked at after
every event, and a verdict is taken as soon as it is there. A user's interactions count up to the user's impressions, so
that few users with endless clicks move little.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.canary import Canary
from cluster.config import EngineConfig, Recipe
from cluster.engine import open_log
from cluster.errors import ConfigError
from cluster.events import INTERACTION_KINDS
from cluster.home import Home
from cluster.log import EventLog, LoggedEvent
from cluster.log.retention import LogConfig
from cluster.manifest import VersionRef
from cluster.registry import Registry

IMPRESSION = "impression"
READ_EVENTS = 10_000
MICROSECONDS_AN_HOUR = 3_600_000_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryConfig:
    """When a version on trial has passed or failed."""

    share: float = 0.05
    """Of users that are served it, unless the trial names another."""
    margin: float = 0.02
    """Share of the present rate by which it may be worse, at most, to pass."""
    alpha: float = 0.05
    """Chance that a version just as good is ever ended as worse, or one worse by the margin ever passes; of both."""
    effect: float = 0.1
    """Share of the present rate that a difference is expected to be: what the test is quickest to find."""
    min_users: int = 50
    """Users with impressions that either side must have before any verdict."""
    max_h: float = 72.0
    """How long a trial may go without a verdict before it is ended."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("share", "margin", "alpha", "effect"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"canary.{name}={getattr(self, name)}: must be above 0 and below 1")
        if self.min_users < 2 or self.max_h <= 0:
            raise ConfigError("canary: min_users must be at least 2 and max_h above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a trial ended."""

    passed: bool
    reason: str


@dataclass(slots=True)
class Side:
    """What users of one side saw and did."""

    totals: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Impressions and interactions by user."""

    def add(self, user_id: str, *, impressions: int, interactions: int) -> None:
        """Count what one user saw and did."""
        before = self.totals.get(user_id, (0, 0))
        self.totals[user_id] = (before[0] + impressions, before[1] + interactions)

    def rate(self) -> tuple[int, float, float]:
        """Return the users with impressions, their interactions per impression, and that rate's variance."""
        shown = [(seen, min(done, seen)) for seen, done in self.totals.values() if seen]
        if len(shown) < 2:
            return len(shown), math.nan, math.nan
        impressions = sum(seen for seen, _ in shown)
        rate = sum(done for _, done in shown) / impressions
        spread = sum((done - rate * seen) ** 2 for seen, done in shown)
        return len(shown), rate, spread / impressions**2 * len(shown) / (len(shown) - 1)


@dataclass(slots=True)
class CanaryTest:
    """One trial's test: events in, a verdict out."""

    canary: Canary
    config: CanaryConfig
    trial: Side = field(default_factory=Side)
    others: Side = field(default_factory=Side)

    def add(self, events: Iterable[LoggedEvent]) -> None:
        """Count events of after the trial's beginning."""
        for logged in events:
            event = logged.event
            side = self.trial if self.canary.takes(event.user_id) else self.others
            if event.kind == IMPRESSION:
                side.add(event.user_id, impressions=1, interactions=0)
            elif event.kind in INTERACTION_KINDS:
                side.add(event.user_id, impressions=0, interactions=1)

    def verdict(self, now_us: int) -> Verdict | None:
        """Return how the trial ends, or none while it goes on."""
        trial_users, trial_rate, trial_variance = self.trial.rate()
        other_users, other_rate, other_variance = self.others.rate()
        users = f"{trial_users:,} users on trial and {other_users:,} others"
        if min(trial_users, other_users) >= self.config.min_users:
            low, high = confidence_sequence(
                trial_rate - other_rate,
                trial_variance + other_variance,
                expected=self.config.effect * other_rate,
                alpha=self.config.alpha,
            )
            found = (
                f"{trial_rate:.4f} interactions an impression against {other_rate:.4f} "
                f"(difference from {low:+.4f} to {high:+.4f}, {users})"
            )
            if high < 0:
                return Verdict(passed=False, reason=f"worse: {found}")
            if low > -self.config.margin * other_rate:
                return Verdict(passed=True, reason=f"not worse: {found}")
        else:
            found = users
        if now_us - self.canary.started_us > self.config.max_h * MICROSECONDS_AN_HOUR:
            return Verdict(passed=False, reason=f"no verdict within {self.config.max_h:g} h: {found}")
        return None


def begin_canary(registry: Registry, recipe: Recipe, home: Home, ref: VersionRef, share: float | None) -> Canary:
    """Serve a version to a share of users from now on; raises `RegistryError` where that cannot be."""
    from_seq = 0
    if home.log.exists():
        with open_log(recipe.section(EngineConfig), recipe.section(LogConfig), home.log) as log:
            from_seq = log.head_seq()
    return registry.start_canary(ref, share or recipe.section(CanaryConfig).share, from_seq)


class CanaryWatch:
    """Judges whatever trial the registry names; what it has counted follows from the log, so it may start anew."""

    def __init__(self, registry: Registry, log: EventLog, config: CanaryConfig) -> None:
        self._registry = registry
        self._log = log
        self._config = config
        self._test: CanaryTest | None = None
        self._seq = 0

    def look(self, now_us: int) -> Verdict | None:
        """Count what has been logged; end the trial if that decides it, and return how it ended."""
        canary = self._registry.readable_canary()
        if canary is None:
            self._test = None
            return None
        if self._test is None or self._test.canary != canary:
            self._test, self._seq = CanaryTest(canary, self._config), canary.from_seq
        while events := self._log.read(self._seq, READ_EVENTS):
            self._test.add(events)
            self._seq = events[-1].seq
        verdict = self._test.verdict(now_us)
        if verdict is not None:
            logger.warning("version %s on trial %s: %s", canary.ref, "passed" if verdict.passed else "failed", verdict)
            self._registry.end_canary(canary, verdict.reason, promote=verdict.passed)
        return verdict


def confidence_sequence(difference: float, variance: float, *, expected: float, alpha: float) -> tuple[float, float]:
    """Return an interval that holds the true difference at every look at once, with probability 1 − `alpha`.

    Of the mixture test with a normal prior of standard deviation `expected`, for an estimate that is normal with this
    variance (Johari et al., 2022, eq. 7). All is open where the variance is 0: then nothing has varied yet.
    """
    prior = expected**2
    if variance <= 0 or prior <= 0:
        return -math.inf, math.inf
    width = math.sqrt(
        variance * (variance + prior) / prior * (2 * math.log(1 / alpha) + math.log((variance + prior) / variance))
    )
    return difference - width, difference + width
