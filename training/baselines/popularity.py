"""What most people have: the recommender for those of whom nothing is known, and the least that others must beat."""

from typing import Self

import numpy as np
from scipy import sparse

from training.baselines.interface import IntArray, Scores


class Popularity:
    """Every item's number of users."""

    def fit(self, seen_UI: sparse.csr_array) -> Self:
        """Count."""
        self.popularity_I = seen_UI.sum(axis=0).astype(np.float32)
        return self

    def scores(self, seen_BI: sparse.csr_array, user_row_B: IntArray) -> Scores:
        """Return the same for everyone."""
        return np.tile(self.popularity_I, (len(user_row_B), 1))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the counts."""
        return {"popularity": self.popularity_I}

    def restore(self, arrays: dict[str, np.ndarray]) -> Self:
        """Take up the counts."""
        self.popularity_I = arrays["popularity"]
        return self
