"""A version of the ranker of baskets resident in memory: what somebody who buys again will buy on this visit.

In:  a user's history and a number.  Out: items that the user buys again, and popular ones, best first.
Knows nothing of HTTP, logs or policies. Nothing is learned while it serves: a purchase counts because the next request
is answered from the history with it. What is popular is what was when it was fitted.

What no candidate is (training/baskets/features.py) comes behind all candidates, by popularity: a user's candidates are
what the user bought and what everyone buys. An item put after training is known, and not recommended.

Shapes: I items, C candidates, E encoder dimension.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from cluster.events import INTERACTION_KINDS
from cluster.log import Interaction
from training.baselines.config import SystemConfig
from training.baskets.purchases import PURCHASE, Purchases
from training.baskets.ranker import USER_PLACE, BasketConfig, BasketRanker
from training.models.blend import blended
from training.models.interests import Interests, match_items, weigh
from training.models.resident import Candidates, Catalogue, Put, Resident, index_users, lay_texts
from training.models.version import COUNT_ROWS, VersionState, log_popularity


@dataclass(frozen=True, kw_only=True)  # without slots, as its base
class ServedBaskets(Catalogue):
    """One version's answers. Build it with `build`, `with_state` and `with_items`."""

    ranker: BasketRanker
    max_history: int
    """Interactions it looks back on."""
    now_s: Callable[[], float] = field(default=time.time)

    @classmethod
    def build(cls, state: VersionState, put: Put, resident: Resident | None = None) -> "ServedBaskets":
        """Compute what answering needs from a version's arrays and the items put since."""
        laid = lay_texts(state, put, resident)
        newest = state.recipe.section(SystemConfig).max_history
        held = resident if isinstance(resident, ServedBaskets) and resident.state.recipe == state.recipe else None
        if held is not None and held.state.system is state.system:
            ranker = held.ranker
        else:
            arrays = {name: tensor.numpy() for name, tensor in state.system.items()}
            ranker = BasketRanker.restore(arrays, state.recipe.section(BasketConfig), newest=newest)
        return cls(
            state=state,
            put=laid.put,
            item_ids=laid.item_ids,
            index_of=laid.index_of,
            item_row=laid.item_row,
            user_row=index_users(state, resident),
            classical=None,
            popularity_I=log_popularity(state.rows[COUNT_ROWS]),
            text_IE=laid.text_IE,
            ranker=ranker,
            max_history=newest,
        )

    @property
    def repeats(self) -> bool:
        """Whether users are offered what they have."""
        return True

    def recommend(
        self,
        user_id: str,
        history: Sequence[Interaction],
        k: int,
        exclude: frozenset[str] = frozenset(),
        interests: Interests | None = None,
        within_I: npt.NDArray[np.bool_] | None = None,
    ) -> Candidates:
        """Return up to `k` items, best first, without those excluded; of those within alone, where that is given."""
        bought = self._bought(user_id, history)
        excluded = self.barred(exclude, within_I)
        interest_I = None if interests is None else self.interest_scores(interests)
        if not len(bought.item_row):
            return self.popular(k, excluded, interest_I)
        return self.best(self._scores(bought, interest_I), k, excluded, cold_start=False)

    def rank(
        self,
        user_id: str,
        history: Sequence[Interaction],
        item_ids: Sequence[str],
        interests: Interests | None = None,
    ) -> Candidates:
        """Return these items, each of which it can rank, best first."""
        bought, rows = self._bought(user_id, history), [self.index_of[item_id] for item_id in item_ids]
        interest_I = None if interests is None else self.interest_scores(interests)
        if len(bought.item_row):
            scores_I = self._scores(bought, interest_I)
        else:
            scores_I = self.popularity_I if interest_I is None else self.told(interest_I)
        return self.sorted_by(item_ids, scores_I[rows], cold_start=not len(bought.item_row) and interest_I is None)

    def interest_scores(self, interests: Interests) -> torch.Tensor:
        """Return what interests say of each item [I]: 1 of the popular ones that match."""
        matching = match_items(interests, self.text_IE[: self.item_count].numpy(), self.popularity_I)
        said_I = torch.zeros(self.item_count)
        said_I[matching.tolist()] = 1.0
        return said_I

    @cached_property
    def _behind(self) -> np.ndarray:
        """How far behind the last candidate each other item is."""
        return self.popularity_I - self.popularity_I.max(initial=0.0) - 1.0

    def _scores(self, bought: Purchases, interest_I: torch.Tensor | None) -> np.ndarray:
        found, score_C = self.ranker.candidates(bought, np.zeros(1, np.int64), np.array([self._at_s(bought)]))
        scores_I = (score_C.min(initial=0.0) + self._behind).astype(np.float32)
        scores_I[found.item_C] = score_C
        if interest_I is None:
            return scores_I
        return blended(torch.from_numpy(scores_I), interest_I, weigh(len(bought.item_row))).numpy()

    def _at_s(self, bought: Purchases) -> int:
        """Return the time of the visit; nobody visits before what they bought."""
        if self.ranker.config.clock == "events":
            return max(self.ranker.fitted_until_s, int(bought.ts_s[-1]))
        return max(int(self.now_s()), int(bought.ts_s[-1]))

    def _bought(self, user_id: str, history: Sequence[Interaction]) -> Purchases:
        """Return what the user of one row did with items that can be recommended, in order of time."""
        told = [
            (row, entry.ts_us // 1_000_000, entry.value if entry.kind == PURCHASE else None)
            for entry in history
            if entry.kind in INTERACTION_KINDS and (row := self._row(entry.item_id)) is not None
        ]
        told.sort(key=lambda one: one[1])
        user_row = self.user_row.get(user_id)
        place = -1 if user_row is None else int(self.state.system[USER_PLACE][user_row])
        return Purchases(
            user_row=np.zeros(len(told), np.int64),
            item_row=np.array([row for row, _, _ in told], np.int64),
            ts_s=np.array([ts_s for _, ts_s, _ in told], np.int64),
            users=1,
            items=self.item_count,
            paid=np.array([np.nan if paid is None else paid for _, _, paid in told], np.float64),
            place=np.full(len(told), place),
        )

    def _row(self, item_id: str) -> int | None:
        """Return the row of an item that can be recommended."""
        row = self.index_of.get(item_id)
        return row if row is not None and row < self.item_count else None
