"""The next basket of somebody who buys again what they bought: personal frequency, and TIFU-KNN.

In:  purchases in order of time: user row, item row, day.  Out: scores, users × items; repeats are to be recommended.
Knows nothing of ids or metrics. A basket is what a user bought at one time.

Personal frequency: how often a user bought an item, a purchase counting half after `half_life_days`; of items that they
never bought, what everyone buys. TIFU-KNN (Hu et al., SIGIR 2020): a user is the mean of their baskets, those of a
group fading with `within_decay` each and groups with `group_decay`; the score is that, mixed with the mean of the users
nearest to it.

Shapes: N purchases, U users, I items, K neighbours.
"""

from typing import Self

import numpy as np
from scipy import sparse

from training.baselines.interface import IntArray, Scores
from training.baskets.purchases import Purchases

BLOCK = 256
"""Users whose nearest are looked for at once."""


class PersonalFrequency:
    """What a user buys most often."""

    def __init__(self, half_life_days: float | None = None) -> None:
        self.half_life_days = half_life_days

    def fit(self, bought: Purchases) -> Self:
        """Count; the newest purchase of all is the present."""
        weight_N = np.ones(len(bought.ts_s))
        if self.half_life_days is not None:
            days_N = (bought.ts_s.max(initial=0) - bought.ts_s) / 86_400
            weight_N = 0.5 ** (days_N / self.half_life_days)
        self._own_UI = bought.summed(weight_N)
        self._popular_I = np.bincount(bought.item_row, weights=weight_N, minlength=bought.items)
        return self

    def scores(self, user_row_B: IntArray) -> Scores:
        """Score every item, [B, I]: a user's own by weight first; of equal ones, and of the others, the popular.

        Popularity fills half of the room between a weight and the user's next larger one, so that it decides nothing
        else, and scores are the same whoever else is asked about.
        """
        own = self._own_UI[user_row_B].tocoo()
        weight_N = own.data.astype(np.float32).astype(np.float64)  # what differs as scores do
        order = np.lexsort((weight_N, own.row))
        user_N, item_N, weight_N = own.row[order], own.col[order], weight_N[order]
        opens = np.r_[True, (user_N[1:] != user_N[:-1]) | (weight_N[1:] != weight_N[:-1])][: len(order)]
        first_G = np.flatnonzero(opens)  # of each user's purchases of equal weight
        user_G, weight_G = user_N[first_G], weight_N[first_G]
        is_followed = user_G[1:] == user_G[:-1]
        above_G = 2 * weight_G
        above_G[:-1][is_followed] = weight_G[1:][is_followed]
        room_N = (above_G - weight_G)[np.cumsum(opens) - 1]
        share_I = self._popular_I / (2 * max(self._popular_I.max(initial=0.0), 1e-12))
        least_B = np.ones(len(user_row_B))
        np.minimum.at(least_B, user_N, weight_N)
        score_BI = least_B[:, None] * share_I
        score_BI[user_N, item_N] = weight_N + room_N * share_I[item_N]
        return score_BI.astype(np.float32)


class TifuKnn:
    """Fading personal frequency, and that of those who buy alike."""

    def __init__(
        self,
        *,
        group_baskets: int = 7,
        within_decay: float = 0.9,
        group_decay: float = 0.7,
        neighbours: int = 300,
        own_share: float = 0.7,
    ) -> None:
        self.group_baskets, self.within_decay, self.group_decay = group_baskets, within_decay, group_decay
        self.neighbours, self.own_share = neighbours, own_share

    def fit(self, bought: Purchases) -> Self:
        """Work out what each user is made of."""
        age_N = bought.ages()
        group_N, within_N = np.divmod(age_N, self.group_baskets)
        own_UI = bought.summed(self.group_decay**group_N * self.within_decay**within_N)
        baskets_U = np.zeros(bought.users)
        np.maximum.at(baskets_U, bought.user_row, age_N + 1)
        self._own_UI = sparse.csr_array(sparse.diags_array(1 / np.maximum(baskets_U, 1)) @ own_UI)
        self._popular_I = np.bincount(bought.item_row, minlength=bought.items) / max(len(bought.item_row), 1)
        length_U = np.sqrt(self._own_UI.power(2).sum(axis=1))
        self._unit_UI = sparse.csr_array(sparse.diags_array(1 / np.where(length_U > 0, length_U, 1.0)) @ self._own_UI)
        return self

    def scores(self, user_row_B: IntArray) -> Scores:
        """Score every item, [B, I]; who bought nothing yet is nearest to nobody and gets what is popular."""
        blocks = [self._scores(user_row_B[start : start + BLOCK]) for start in range(0, len(user_row_B), BLOCK)]
        return np.concatenate(blocks) if blocks else np.empty((0, len(self._popular_I)), np.float32)

    def _scores(self, user_row_B: IntArray) -> Scores:
        alike_BU = sparse.csr_array(self._unit_UI[user_row_B] @ self._unit_UI.T).toarray()
        alike_BU[np.arange(len(user_row_B)), user_row_B] = -1.0  # nobody is their own neighbour
        kept = min(self.neighbours, alike_BU.shape[1] - 1)
        nearest_BK = (
            np.argpartition(-alike_BU, kept - 1, axis=1)[:, :kept] if kept else np.empty((len(alike_BU), 0), int)
        )
        who_BU = sparse.csr_array(
            (
                np.full(nearest_BK.size, 1 / max(kept, 1)),
                nearest_BK.ravel(),
                np.arange(len(nearest_BK) + 1) * kept,
            ),
            shape=alike_BU.shape,
        )
        own_BI = self._own_UI[user_row_B].toarray()
        theirs_BI = sparse.csr_array(who_BU @ self._own_UI).toarray()
        mixed_BI = self.own_share * own_BI + (1 - self.own_share) * theirs_BI
        return (mixed_BI + 1e-6 * self._popular_I).astype(np.float32)
