"""Turn scored candidates into a slate, and say with which probability each item stood where it stands.

In:  candidates with scores, best first.  Out: a slate of k with propensities.
Knows nothing of models or HTTP. The propensity is that of the item at its position given the items above it: what
an off-policy estimate divides by.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """How a slate is drawn from the candidates."""

    name: str = "greedy"
    """greedy or epsilon_greedy."""
    epsilon: float = 0.05
    """Share of positions that epsilon_greedy fills with a uniformly drawn candidate."""

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise ConfigError(f"policy.name={self.name!r}: is none of {', '.join(POLICIES)}")
        if not 0 <= self.epsilon <= 1:
            raise ConfigError(f"policy.epsilon={self.epsilon}: must be in [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slate:
    """What is shown, top first; three sequences of one length."""

    item_ids: list[str]
    scores: list[float]
    propensities: list[float]


class GreedyPolicy:
    """The k best, always."""

    def slate(self, item_ids: Sequence[str], scores: np.ndarray, k: int) -> Slate:
        """Return the first k candidates, each with propensity 1."""
        shown = min(k, len(item_ids))
        return Slate(item_ids=list(item_ids[:shown]), scores=scores[:shown].tolist(), propensities=[1.0] * shown)


class EpsilonGreedyPolicy:
    """Each position takes the best candidate left, or with probability ε any candidate left."""

    def __init__(self, epsilon: float, seed: int) -> None:
        self.epsilon = epsilon
        self._rng = np.random.default_rng(seed)

    def slate(self, item_ids: Sequence[str], scores: np.ndarray, k: int) -> Slate:
        """Return k candidates; with n left, the best has propensity 1 − ε + ε/n and each other one ε/n."""
        left = list(range(len(item_ids)))
        order: list[int] = []
        propensities: list[float] = []
        for _ in range(min(k, len(item_ids))):
            n = len(left)
            explores = self._rng.random() < self.epsilon
            chosen = int(self._rng.integers(n)) if explores else 0
            propensities.append(self.epsilon / n + (1 - self.epsilon) * (chosen == 0))
            order.append(left.pop(chosen))
        return Slate(
            item_ids=[item_ids[i] for i in order],
            scores=[float(scores[i]) for i in order],
            propensities=propensities,
        )


POLICIES: dict[str, Callable[[PolicyConfig, int], GreedyPolicy | EpsilonGreedyPolicy]] = {
    "greedy": lambda config, seed: GreedyPolicy(),
    "epsilon_greedy": lambda config, seed: EpsilonGreedyPolicy(config.epsilon, seed),
}


def build_policy(config: PolicyConfig, seed: int) -> GreedyPolicy | EpsilonGreedyPolicy:
    """Return the policy that the recipe names."""
    return POLICIES[config.name](config, seed)
