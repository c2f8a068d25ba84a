"""Matrix factorisation, by the library `implicit`: alternating least squares and Bayesian personalised ranking.

In:  who has what.  Out: scores: the product of a user's and an item's factors.
ALS (Hu, Koren and Volinsky, ICDM 2008) finds a user's factors anew from what the user has: strangers are served.
BPR (Rendle et al., UAI 2009) has factors of those it was fitted on; a stranger counts as the mean of what they have,
and someone known who has more by now has moved by as much as that mean has.

Shapes: U users that are fitted on, B users that are scored, I items, F factors.
"""

from typing import Self

import numpy as np
from scipy import sparse

from training.baselines.interface import UNKNOWN, IntArray, Scores, with_popular


class AlternatingLeastSquares:
    """Weighted matrix factorisation; `alpha` is how much more an interaction counts than its absence."""

    def __init__(
        self, factors: int = 64, regularization: float = 0.05, alpha: float = 10.0, iterations: int = 15, seed: int = 0
    ) -> None:
        self.factors, self.regularization, self.alpha = factors, regularization, alpha
        self.iterations, self.seed = iterations, seed

    def fit(self, seen_UI: sparse.csr_array) -> Self:
        """Find factors of items; those of users are found when they are scored."""
        from implicit.cpu.als import AlternatingLeastSquares as Model

        model = Model(
            factors=self.factors,
            regularization=self.regularization,
            alpha=self.alpha,
            iterations=self.iterations,
            random_state=self.seed,
            num_threads=1,
        )
        model.fit(sparse.csr_matrix(seen_UI), show_progress=False)
        self.popularity_I = seen_UI.sum(axis=0).astype(np.float32)
        return self._take(np.asarray(model.item_factors))

    def scores(self, seen_BI: sparse.csr_array, user_row_B: IntArray) -> Scores:
        """Solve for each user's factors, and multiply."""
        user_BF = np.zeros((len(user_row_B), self.item_IF.shape[1]), np.float32)
        for user in range(len(user_row_B)):
            had_HF = self.item_IF[seen_BI.indices[seen_BI.indptr[user] : seen_BI.indptr[user + 1]]]
            # Weights are alpha for what the user has and 1 for the rest; the preference is 1 or 0.
            user_BF[user] = np.linalg.solve(
                self._gram_FF + (self.alpha - 1) * had_HF.T @ had_HF, self.alpha * had_HF.sum(0)
            )
        return with_popular(user_BF @ self.item_IF.T, seen_BI, self.popularity_I)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the items' factors."""
        return {"item": self.item_IF, "popularity": self.popularity_I}

    def restore(self, arrays: dict[str, np.ndarray]) -> Self:
        """Take up the items' factors."""
        self.popularity_I = arrays["popularity"]
        return self._take(arrays["item"])

    def _take(self, item_IF: np.ndarray) -> Self:
        self.item_IF = item_IF
        self._gram_FF = item_IF.T @ item_IF + self.regularization * np.eye(item_IF.shape[1], dtype=np.float32)
        return self


class BayesianRanking:
    """Pairwise ranking by stochastic gradient descent."""

    def __init__(
        self,
        factors: int = 64,
        learning_rate: float = 0.03,
        regularization: float = 0.01,
        iterations: int = 150,
        seed: int = 0,
    ) -> None:
        self.factors, self.learning_rate, self.regularization = factors, learning_rate, regularization
        self.iterations, self.seed = iterations, seed

    def fit(self, seen_UI: sparse.csr_array) -> Self:
        """Find factors of users and items."""
        from implicit.cpu.bpr import BayesianPersonalizedRanking as Model

        model = Model(
            factors=self.factors,
            learning_rate=self.learning_rate,
            regularization=self.regularization,
            iterations=self.iterations,
            random_state=self.seed,
            num_threads=1,
        )
        model.fit(sparse.csr_matrix(seen_UI), show_progress=False)
        self.user_UF, self.item_IF = np.asarray(model.user_factors), np.asarray(model.item_factors)
        self.fitted_UF = self._mean_of(seen_UI)
        self.popularity_I = seen_UI.sum(axis=0).astype(np.float32)
        return self

    def scores(self, seen_BI: sparse.csr_array, user_row_B: IntArray) -> Scores:
        """Multiply factors."""
        user_BF = self._mean_of(seen_BI)
        known_B = user_row_B != UNKNOWN
        rows = user_row_B[known_B]
        user_BF[known_B] += self.user_UF[rows] - self.fitted_UF[rows]
        user_BF[:, -1] = 1.0  # by which the library multiplies an item's bias
        return with_popular((user_BF @ self.item_IF.T).astype(np.float32), seen_BI, self.popularity_I)

    def _mean_of(self, seen_BI: sparse.csr_array) -> np.ndarray:
        """Return the mean factors of what users have, [B, F]."""
        return (seen_BI @ self.item_IF) / np.maximum(np.diff(seen_BI.indptr), 1).astype(np.float32)[:, None]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the factors."""
        fitted = {"user": self.user_UF, "fitted": self.fitted_UF}
        return fitted | {"item": self.item_IF, "popularity": self.popularity_I}

    def restore(self, arrays: dict[str, np.ndarray]) -> Self:
        """Take up the factors."""
        self.user_UF, self.fitted_UF = arrays["user"], arrays["fitted"]
        self.item_IF, self.popularity_I = arrays["item"], arrays["popularity"]
        return self
