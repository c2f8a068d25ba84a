"""Who bought what when, and when they come again.

In:  rows of users and items, times.  Out: the same before a time, by user and item, by basket; the visits after it.
Knows nothing of ids, features or models. A basket is what a user bought at one time.

Shapes: N purchases, U users, I items.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy import sparse

from training.baselines.interface import IntArray

FloatArray = npt.NDArray[np.float64]
PURCHASE = "purchase"
"""The kind of event whose value is what was paid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Purchases:
    """Who bought what when, in order of time; all [N]."""

    user_row: IntArray
    item_row: IntArray
    ts_s: IntArray
    users: int
    items: int
    paid: FloatArray | None = None
    """What each cost, in any currency; NaN where it is not known."""
    place: IntArray | None = None
    """Where each was bought; below 0 where it is not known."""
    besides: Mapping[str, FloatArray] = field(default_factory=dict)
    """What else is known of each, such as the share of its price that was saved, by name; [N] each, NaN where not."""

    def before(self, ts_s: int) -> "Purchases":
        """Return the purchases before a time."""
        return self.where(self.ts_s < ts_s)

    def where(self, is_kept: npt.NDArray[np.bool_]) -> "Purchases":
        """Return some of the purchases, [N]."""
        return replace(
            self,
            user_row=self.user_row[is_kept],
            item_row=self.item_row[is_kept],
            ts_s=self.ts_s[is_kept],
            paid=None if self.paid is None else self.paid[is_kept],
            place=None if self.place is None else self.place[is_kept],
            besides={name: value_N[is_kept] for name, value_N in self.besides.items()},
        )

    def newest(self, most: int) -> "Purchases":
        """Return the newest purchases of each user, so many at most."""
        by_user = np.argsort(self.user_row, kind="stable")  # of each user in order of time
        count_U = np.bincount(self.user_row, minlength=self.users)
        after_N = np.cumsum(count_U)[self.user_row[by_user]] - 1 - np.arange(len(by_user))
        is_kept = np.empty(len(by_user), np.bool_)
        is_kept[by_user] = after_N < most
        return self.where(is_kept)

    def summed(self, weight_N: FloatArray) -> sparse.csr_array:
        """Return the weights added up by user and item, [U, I]."""
        shape = (self.users, self.items)
        return sparse.csr_array(sparse.coo_array((weight_N, (self.user_row, self.item_row)), shape=shape))

    def usual_places(self) -> IntArray:
        """Return where each user bought most often, [U]; −1 where that is not known."""
        place_U = np.full(self.users, -1)
        if self.place is None or not (is_told := self.place >= 0).any():
            return place_U
        places = int(self.place.max()) + 1
        pair_P, count_P = np.unique(self.user_row[is_told] * places + self.place[is_told], return_counts=True)
        rising = np.argsort(count_P, kind="stable")  # of equal users the last assignment stays
        place_U[pair_P[rising] // places] = pair_P[rising] % places
        return place_U

    def ages(self) -> IntArray:
        """Return how many of the same user's baskets come after the one of each purchase, [N]."""
        order = np.lexsort((self.ts_s, self.user_row))
        user, ts = self.user_row[order], self.ts_s[order]
        opens = np.r_[True, (user[1:] != user[:-1]) | (ts[1:] != ts[:-1])]
        number = np.cumsum(opens)
        last_U = np.zeros(self.users, np.int64)
        last_U[user] = number  # of equal users the last assignment stays
        ages = np.empty(len(order), np.int64)
        ages[order] = last_U[user] - number
        return ages


@dataclass(frozen=True, slots=True, kw_only=True)
class Visits:
    """Users' first visits after a time, and what was bought before it."""

    known: Purchases
    users: IntArray
    """Rows of those who bought something before it and come again, ascending."""
    at_s: IntArray
    """When each of them does."""
    user_row: IntArray
    """Of each purchase of these visits."""
    item_row: IntArray

    def some(self, most: int, seed: int) -> "Visits":
        """Return the visits of so many users at most, drawn at random."""
        if len(self.users) <= most:
            return self
        users = np.sort(np.random.default_rng(seed).choice(self.users, most, replace=False))
        is_kept = np.isin(self.user_row, users)
        return replace(
            self,
            users=users,
            at_s=self.at_s_of(users),
            user_row=self.user_row[is_kept],
            item_row=self.item_row[is_kept],
        )

    def at_s_of(self, user_row_B: IntArray) -> IntArray:
        """Return when some of these users visit, [B]: known as they ask."""
        return self.at_s[np.searchsorted(self.users, user_row_B)]

    @classmethod
    def after(cls, bought: Purchases, cut_s: int, until_s: int) -> "Visits":
        """Return the first visits from one time on, before another."""
        known = bought.before(cut_s)
        later = (bought.ts_s >= cut_s) & (bought.ts_s < until_s)
        user, item, ts = bought.user_row[later], bought.item_row[later], bought.ts_s[later]
        first_U = np.full(bought.users, np.iinfo(np.int64).max)
        np.minimum.at(first_U, user, ts)
        is_known_U = np.bincount(known.user_row, minlength=bought.users) > 0
        chosen = (ts == first_U[user]) & is_known_U[user]
        users = np.unique(user[chosen])
        return cls(known=known, users=users, at_s=first_U[users], user_row=user[chosen], item_row=item[chosen])
