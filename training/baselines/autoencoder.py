"""EASE among the classical systems: who has what, at once for many users. The closed form is ease.py's."""

from typing import Self

import numpy as np
from scipy import sparse

from training.baselines.ease import L2, Ease
from training.baselines.interface import IntArray, Scores, with_popular


class Autoencoder:
    """Item-to-item weights in closed form; memory and time grow with the square and the cube of the items."""

    def __init__(self, l2: float = L2) -> None:
        self.l2 = l2

    def fit(self, seen_UI: sparse.csr_array) -> Self:
        """Invert the Gram matrix."""
        ease = Ease((seen_UI.T @ seen_UI).toarray().astype(np.float64), self.l2)
        self.weights_II, self.popularity_I = ease.weights_II.astype(np.float32), ease.popularity_I.astype(np.float32)
        return self

    def scores(self, seen_BI: sparse.csr_array, user_row_B: IntArray) -> Scores:
        """Add up the weights of what the user has."""
        return with_popular(np.asarray(seen_BI @ self.weights_II, np.float32), seen_BI, self.popularity_I)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the weights."""
        return {"weights": self.weights_II, "popularity": self.popularity_I}

    def restore(self, arrays: dict[str, np.ndarray]) -> Self:
        """Take up the weights."""
        self.weights_II, self.popularity_I = arrays["weights"], arrays["popularity"]
        return self
