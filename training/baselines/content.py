"""Content-based: what is told of items like those that the user has.

In:  an encoder's vector of each item; who has what.  Out: scores: an item's cosine to the mean of what the user has.
Needs nobody else's behaviour, so an item that nobody has yet is recommended like the others.

Shapes: B users, I items, E encoder dimension.
"""

from typing import Self

import numpy as np
from scipy import sparse

from training.baselines.interface import IntArray, Scores, with_popular


class Content:
    """Nearest in text."""

    def __init__(self, vector_IE: np.ndarray) -> None:
        length_I1 = np.linalg.norm(vector_IE, axis=1, keepdims=True)
        self.vector_IE = (vector_IE / np.where(length_I1 > 0, length_I1, 1.0)).astype(np.float32)

    def fit(self, seen_UI: sparse.csr_array) -> Self:
        """Count, for those who have nothing."""
        self.popularity_I = seen_UI.sum(axis=0).astype(np.float32)
        return self

    def placed(self, vector_IE: np.ndarray) -> "Content":
        """Return it for a catalogue told so, in which the items that it knows come first and which may have more."""
        model = Content(vector_IE)
        model.popularity_I = np.pad(self.popularity_I, (0, len(vector_IE) - len(self.popularity_I)))
        return model

    def scores(self, seen_BI: sparse.csr_array, user_row_B: IntArray) -> Scores:
        """Return each item's cosine to the mean of what the user has."""
        profile_BE = seen_BI @ self.vector_IE
        length_B1 = np.linalg.norm(profile_BE, axis=1, keepdims=True)
        scores_BI = (profile_BE / np.where(length_B1 > 0, length_B1, 1.0)) @ self.vector_IE.T
        return with_popular(scores_BI.astype(np.float32), seen_BI, self.popularity_I)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the counts; the vectors are given when it is built."""
        return {"popularity": self.popularity_I}

    def restore(self, arrays: dict[str, np.ndarray]) -> Self:
        """Take up the counts."""
        self.popularity_I = arrays["popularity"]
        return self
