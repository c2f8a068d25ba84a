"""What classical recommenders have in common: fitted on who has what, they score every item for what someone has.

In:  user × item matrices.  Out: scores, users × items.
Knows nothing of ids, files or metrics.

Shapes: U users that are fitted on, B users that are scored, I items.
"""

from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
from scipy import sparse

IntArray = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

UNKNOWN = -1
"""Row of a user who was not fitted on."""


class Recommender(Protocol):
    """One classical system."""

    popularity_I: np.ndarray
    """How many users have each of the items that it knows, once it is fitted."""

    def fit(self, seen_UI: sparse.csr_array) -> Self:
        """Learn from who has what, forgetting what was learned before."""
        ...

    def scores(self, seen_BI: sparse.csr_array, user_row_B: IntArray) -> Scores:
        """Score every item for users who have these, [B, I]; larger is better. Who has nothing gets what is popular.

        `user_row_B` is each user's row in what was fitted on, `UNKNOWN` for others; who learns something of each user
        looks at it.
        """
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what was learned, for `restore`."""
        ...

    def restore(self, arrays: dict[str, np.ndarray]) -> Self:
        """Take up what `arrays` returned."""
        ...


def seen_matrix(user_row_N: IntArray, item_row_N: IntArray, users: int, items: int) -> sparse.csr_array:
    """Return who has what, [users, items]: 1 where there is any interaction."""
    ones_N = np.ones(len(user_row_N), np.float32)
    seen = sparse.csr_array((ones_N, (user_row_N, item_row_N)), shape=(users, items), dtype=np.float32)
    seen.data[:] = 1.0  # repeats were added up
    return seen


def with_popular(scores_BI: Scores, seen_BI: sparse.csr_array, popularity_I: np.ndarray) -> Scores:
    """Return the scores with popularity for users who have nothing."""
    nothing_B = np.diff(seen_BI.indptr) == 0
    scores_BI[nothing_B] = popularity_I
    return scores_BI


def split_sparse(name: str, matrix: sparse.csr_array) -> dict[str, np.ndarray]:
    """Return a sparse matrix as arrays, named after it."""
    return {f"{name}.data": matrix.data, f"{name}.indices": matrix.indices, f"{name}.indptr": matrix.indptr}


def join_sparse(name: str, arrays: dict[str, np.ndarray], columns: int) -> sparse.csr_array:
    """Return the matrix that `split_sparse` was given."""
    data, indices, indptr = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr"))
    return sparse.csr_array((data, indices, indptr), shape=(len(indptr) - 1, columns))
