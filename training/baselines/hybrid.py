"""A hybrid: several systems' scores, each standardised over a user's items, added up by weights chosen on validation.

In:  systems and weights.  Out: scores.
Knows nothing of how weights are chosen (training/evaluation/classical.py tries some).
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
from scipy import sparse

from cluster.errors import ConfigError
from training.baselines.content import Content
from training.baselines.interface import IntArray, Recommender, Scores


class Hybrid:
    """A weighted sum."""

    def __init__(self, parts: Sequence[Recommender], weights: Sequence[float]) -> None:
        if not parts or len(parts) != len(weights):
            raise ConfigError(f"hybrid: {len(parts)} systems and {len(weights)} weights; each system needs one")
        self.parts, self.weights = list(parts), list(weights)

    def fit(self, seen_UI: sparse.csr_array) -> Self:
        """Fit every part."""
        for part in self.parts:
            part.fit(seen_UI)
        return self._count()

    def scores(self, seen_BI: sparse.csr_array, user_row_B: IntArray) -> Scores:
        """Add up the parts' standardised scores; of an item that it does not know, a part says 0, which is its mean."""
        items = max(len(part.popularity_I) for part in self.parts)
        parts = zip(self.parts, self.weights, strict=True)
        return np.stack([weight * known_scores(part, seen_BI, user_row_B, items) for part, weight in parts]).sum(0)

    def placed(self, vector_IE: np.ndarray) -> "Hybrid":
        """Return it for a catalogue told so, as `Content.placed`."""
        return Hybrid([placed(part, vector_IE) for part in self.parts], self.weights)._count()

    def _count(self) -> Self:
        self.popularity_I = max((part.popularity_I for part in self.parts), key=len)
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """Return every part's arrays, numbered."""
        named = {f"{n}.{name}": array for n, part in enumerate(self.parts) for name, array in part.arrays().items()}
        return named | {"weights": np.array(self.weights)}

    def restore(self, arrays: dict[str, np.ndarray]) -> Self:
        """Take up every part's arrays."""
        self.weights = arrays["weights"].tolist()
        for number, part in enumerate(self.parts):
            prefix = f"{number}."
            part.restore({name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)})
        return self._count()


def placed(system: Recommender, vector_IE: np.ndarray) -> Recommender:
    """Return a system for a catalogue told so, as far as it places items by what is told; else as it is."""
    return system.placed(vector_IE) if isinstance(system, Content | Hybrid) else system


def known_scores(system: Recommender, seen_BI: sparse.csr_array, user_row_B: IntArray, items: int) -> Scores:
    """Return standardised scores of so many items, the first of which the system knows; 0 of those it does not."""
    known = len(system.popularity_I)
    scores_BI = standardised(system.scores(seen_BI[:, :known], user_row_B))
    return np.pad(scores_BI, ((0, 0), (0, items - known)))


def standardised(scores_BI: Scores) -> Scores:
    """Return each user's scores with mean 0 and spread 1; 0 where all are equal."""
    centred_BI = scores_BI - scores_BI.mean(axis=1, keepdims=True)
    spread_B1 = centred_BI.std(axis=1, keepdims=True)
    return np.divide(centred_BI, spread_B1, out=np.zeros_like(centred_BI), where=spread_B1 > 0)
