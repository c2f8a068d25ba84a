"""Leave one out: each user's last item is to be named, all items ranked but those the user already had.

In:  interactions in order of time; a recommender.  Out: one rank a user.
Knows nothing of how scores are made. The last of each user is the test, the one before it validation, the rest is
fitted on; the validation item is left out of the ranking as well, and what is scored is the history without it, which
is what RecBole does. No sampled metrics (Krichene and Rendle, KDD 2020): every item ranks.

Shapes: N interactions, U users, B users of a batch, I items.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy import sparse

from cluster.errors import DataError
from training.baselines.interface import IntArray, Recommender, seen_matrix

BATCH = 256
"""Users scored at once."""
NONE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdout:
    """A dataset, split by user."""

    user_ids: list[str]
    item_ids: list[str]
    fitted_UI: sparse.csr_array
    """What is fitted on."""
    validation_U: IntArray
    """Item row of each user's last but one, `NONE` where there is none."""
    test_U: IntArray
    """Item row of each user's last, `NONE` for a user with one item alone."""

    def ranks(self, system: Recommender, *, validation: bool = False) -> IntArray:
        """Return the rank, 1 being best, of each user's held-out item; of equals, those before it count as above it.

        0 for users who have none. `validation` ranks the last but one in place of the last.
        """
        target_U = self.validation_U if validation else self.test_U
        ranks_U = np.zeros(len(target_U), np.int64)
        users = np.flatnonzero(target_U != NONE)
        for start in range(0, len(users), BATCH):
            batch = users[start : start + BATCH]
            seen_BI = self.fitted_UI[batch]
            scores_BI = np.array(system.scores(seen_BI, batch))
            if not np.isfinite(scores_BI).all():
                raise DataError(f"{type(system).__name__}: a score is not finite, so nothing can be ranked")
            known_BI = seen_BI.toarray() > 0
            if not validation:
                had = np.flatnonzero(self.validation_U[batch] != NONE)
                known_BI[had, self.validation_U[batch[had]]] = True
            scores_BI[known_BI] = -np.inf
            ranks_U[batch] = rank_of(scores_BI, target_U[batch])
        return ranks_U


def rank_of(scores_BI: np.ndarray, item_row_B: IntArray) -> IntArray:
    """Return the rank of one item a row; of equal scores those with a lower row are above it."""
    own_B1 = np.take_along_axis(scores_BI, item_row_B[:, None], axis=1)
    before_BI = np.arange(scores_BI.shape[1]) < item_row_B[:, None]
    return 1 + (scores_BI > own_B1).sum(axis=1) + ((scores_BI == own_B1) & before_BI).sum(axis=1)


def leave_one_out(events: pa.Table) -> Holdout:
    """Split interactions (`user_id`, `item_id`, in order of time). An item that a user has again is not held out.

    Raises `DataError` where nobody has two items.
    """
    users, items = (events[name].combine_chunks().dictionary_encode() for name in ("user_id", "item_id"))
    user_N, item_N = (encoded.indices.to_numpy().astype(np.int64) for encoded in (users, items))
    first = np.unique(user_N * len(items.dictionary) + item_N, return_index=True)[1]
    kept = np.sort(first)  # repeats say nothing new
    user_N, item_N = user_N[kept], item_N[kept]
    by_user = np.argsort(user_N, kind="stable")
    user_N, item_N = user_N[by_user], item_N[by_user]
    count_U = np.bincount(user_N, minlength=len(users.dictionary))
    end_U = np.cumsum(count_U)
    test_U = np.where(count_U >= 2, item_N[end_U - 1], NONE)
    validation_U = np.where(count_U >= 3, item_N[np.maximum(end_U - 2, 0)], NONE)
    if (test_U == NONE).all():
        raise DataError("nobody has two items, so none can be held out")
    held = np.concatenate([end_U[count_U >= 2] - 1, end_U[count_U >= 3] - 2])
    fitted = np.setdiff1d(np.arange(len(user_N)), held)
    return Holdout(
        user_ids=users.dictionary.to_pylist(),
        item_ids=items.dictionary.to_pylist(),
        fitted_UI=seen_matrix(user_N[fitted], item_N[fitted], len(count_U), len(items.dictionary)),
        validation_U=validation_U,
        test_U=test_U,
    )
