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
        self._known: list[int | None] = [None] * len(parts)
        """How many of the items, the first ones, each part knows; none for all."""

    def fit(self, seen_UI: sparse.csr_array) -> Self:
        """Fit every part."""
        for part in self.parts:
            part.fit(seen_UI)
        return self

    def scores(self, seen_BI: sparse.csr_array, user_row_B: IntArray) -> Scores:
        """Add up the parts' standardised scores; of an item that it does not know, a part says 0, which is its mean."""
        parts = zip(self.parts, self.weights, self._known, strict=True)
        weighted = [w * standardised(part.scores(seen_BI[:, :known], user_row_B)) for part, w, known in parts]
        items = max(scores_BI.shape[1] for scores_BI in weighted)
        return np.stack([np.pad(scores, ((0, 0), (0, items - scores.shape[1]))) for scores in weighted]).sum(0)

    def placed(self, vector_IE: np.ndarray) -> "Hybrid | None":
        """Return it for a catalogue told so, as `Content.placed`; none where no part places items by what is told."""
        parts = [part.placed(vector_IE) if isinstance(part, Content) else part for part in self.parts]
        contents = [part for part in self.parts if isinstance(part, Content)]
        if not contents:
            return None
        model = Hybrid(parts, self.weights)
        model._known = [None if isinstance(part, Content) else len(contents[0].popularity_I) for part in parts]
        return model

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
        return self


def standardised(scores_BI: Scores) -> Scores:
    """Return each user's scores with mean 0 and spread 1; 0 where all are equal."""
    centred_BI = scores_BI - scores_BI.mean(axis=1, keepdims=True)
    spread_B1 = centred_BI.std(axis=1, keepdims=True)
    return np.divide(centred_BI, spread_B1, out=np.zeros_like(centred_BI), where=spread_B1 > 0)
