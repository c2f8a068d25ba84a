"""A learned ranker of the next basket: trees over what tells of repeats, fitted on earlier visits.

In:  purchases in order of time, items' categories, when users visit next.  Out: scores, users × items.
Knows nothing of ids or metrics.

A version keeps what `arrays` returns: the trees, what is known of items and when what is promoted. A user's purchases
come with the question.

    |──── what is known ────|─ the first visit after a cut is learned ─|      … cut after cut, back from the present

Trees are LightGBM's, fitted to NDCG of lists (LambdaMART; Burges, MSR-TR-2010-82).
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal, Self

import numpy as np

from cluster.errors import ConfigError, DataError
from training.baselines.interface import IntArray, Scores
from training.baskets.features import DAY_S, Candidates, ItemFacts, feature_names, find_candidates
from training.baskets.promotions import Promotions
from training.baskets.purchases import FloatArray, Purchases, Visits

TREES, CATEGORY, UNTIL_S, PROMOTED = "trees", "category", "fitted_until_s", "promotions."
"""Names of arrays, the last with a kind and a field after it; those of `ItemFacts` have their own."""
USER_PLACE = "user_place"
"""What a version adds: where each user mostly buys, [U]; −1 where that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BasketConfig:
    """What visits are learned from, and how."""

    cuts: int = 12
    """Times after which each user's first visit is learned."""
    most_visits: int = 50_000
    """Visits after one time that are learned, drawn at random where there are more."""
    days_between_cuts: int = 7
    rounds: int = 300
    """Trees."""
    learning_rate: float = 0.05
    leaves: int = 63
    least_in_leaf: int = 300
    """Candidates a leaf must hold."""
    threads: int = 1
    """Of LightGBM; more than there are idle cores make it slower than one."""
    seed: int = 0
    clock: Literal["wall", "events"] = "wall"
    """What time it is when somebody asks for the next basket: now; or, for data of the past, that of the newest event
    it was fitted on or, if later, of the user's own."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("cuts", "most_visits", "days_between_cuts", "rounds", "least_in_leaf", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"baskets.{name}={getattr(self, name)}: must be at least 1")
        if self.leaves < 2:
            raise ConfigError(f"baskets.leaves={self.leaves}: must be at least 2")
        if self.learning_rate <= 0:
            raise ConfigError(f"baskets.learning_rate={self.learning_rate}: must be above 0")


class BasketRanker:
    """LambdaMART over what tells of the next visit (features.py)."""

    def __init__(
        self,
        category_I: IntArray,
        config: BasketConfig | None = None,
        promotions: Mapping[str, Promotions] | None = None,
        *,
        newest: int | None = None,
    ) -> None:
        """Promotions are those of the past and, as far as they are known, of the visits that will be asked for.

        Of each user's purchases it looks at the `newest` ones, at all where none is given.
        """
        self.config = config or BasketConfig()
        self.newest = newest
        self._category_I = category_I
        self._promotions = promotions or {}

    def fit(self, bought: Purchases) -> Self:
        """Learn from visits before the newest purchase.

        Raises `DataError` where nobody came twice, `ConfigError` where LightGBM is not installed.
        """
        lgb, config = load_lightgbm(), self.config
        end_s = int(bought.ts_s.max(initial=0)) + 1
        features, labels, counts = [], [], []
        for cut_s in (end_s - (1 + n) * config.days_between_cuts * DAY_S for n in range(config.cuts)):
            visits = Visits.after(bought, cut_s, end_s).some(config.most_visits, config.seed)
            if not len(visits.users):
                continue
            facts = ItemFacts.of(visits.known, self._category_I)
            found = self._candidates(visits.known, visits.users, visits.at_s, facts)
            bought_together = visits.user_row * bought.items + visits.item_row
            features.append(found.feature_CF)
            labels.append(np.isin(visits.users[found.user_C] * bought.items + found.item_C, bought_together))
            counts.append(np.bincount(found.user_C, minlength=len(visits.users)))
        if not features:
            raise DataError("no user came again after a purchase, so there is no visit to learn from")
        parameters = {
            "objective": "lambdarank",
            "lambdarank_truncation_level": 15,
            "learning_rate": config.learning_rate,
            "num_leaves": config.leaves,
            "min_data_in_leaf": config.least_in_leaf,
            "feature_fraction": 0.6,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "lambda_l2": 10.0,
            "max_bin": 127,
            "num_threads": config.threads,
            "seed": config.seed,
            "deterministic": True,
            "verbose": -1,
        }
        data = lgb.Dataset(
            np.concatenate(features),
            np.concatenate(labels),
            group=np.concatenate(counts),
            feature_name=feature_names(bought.besides, self._promotions),
        )
        self.trees = lgb.train(parameters, data, num_boost_round=config.rounds)
        self._known, self.facts, self.fitted_until_s = bought, ItemFacts.of(bought, self._category_I), end_s
        return self

    def scores(self, user_row_B: IntArray, at_s_B: IntArray) -> Scores:
        """Score every item, [B, I], for visits of users that it was fitted on; −∞ for what is no candidate."""
        found, score_C = self.candidates(self._known, user_row_B, at_s_B)
        score_BI = np.full((len(user_row_B), self._known.items), -np.inf, np.float32)
        score_BI[found.user_C, found.item_C] = score_C
        return score_BI

    def candidates(self, bought: Purchases, users: IntArray, at_s: IntArray) -> tuple[Candidates, FloatArray]:
        """Return the candidates of some users who visit at these times, by place among them, and their scores."""
        found = self._candidates(bought, users, at_s, self.facts)
        return found, np.asarray(self.trees.predict(found.feature_CF, num_threads=self.config.threads))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what was learned and what is known of items, for `restore`."""
        promoted = {
            f"{PROMOTED}{kind}.{name}": array
            for kind, promotions in self._promotions.items()
            for name, array in promotions.arrays().items()
        }
        trees = np.frombuffer(self.trees.model_to_string().encode(), np.uint8)
        until_s = np.array([self.fitted_until_s])
        return {TREES: trees, CATEGORY: self._category_I, UNTIL_S: until_s} | self.facts.arrays() | promoted

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], config: BasketConfig, *, newest: int | None = None) -> Self:
        """Return what `arrays` were taken of; it answers for purchases that it is given."""
        named: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            if name.startswith(PROMOTED):
                kind, field = name.removeprefix(PROMOTED).rsplit(".", 1)
                named.setdefault(kind, {})[field] = array
        promotions = {kind: Promotions.restore(of_kind) for kind, of_kind in named.items()}
        ranker = cls(arrays[CATEGORY], config, promotions, newest=newest)
        ranker.trees = load_lightgbm().Booster(model_str=arrays[TREES].tobytes().decode())
        ranker.fitted_until_s = int(arrays[UNTIL_S][0])
        ranker.facts = ItemFacts.restore(arrays, arrays[CATEGORY])
        return ranker

    def _candidates(self, bought: Purchases, users: IntArray, at_s: IntArray, facts: ItemFacts) -> Candidates:
        """Return the candidates of some users, by their place among these."""
        place_U = np.full(bought.users, -1)
        place_U[users] = np.arange(len(users))
        theirs = bought.where(place_U[bought.user_row] >= 0)
        own = replace(theirs, user_row=place_U[theirs.user_row], users=len(users))
        if self.newest is not None:
            own = own.newest(self.newest)
        return find_candidates(own, at_s, facts, self._promotions)


def load_lightgbm() -> ModuleType:
    """Return LightGBM. Raises `ConfigError` where it is not installed."""
    if importlib.util.find_spec("lightgbm") is None:
        raise ConfigError("the ranker of baskets needs LightGBM; install recloop[baskets]")
    import lightgbm as lgb

    return lgb
