"""How well a classical system names the next item, and the weights of a hybrid that name it best.

In:  a fitted system, a history, which of its interactions to predict.  Out: one rank an interaction; weights.
Knows nothing of files. As training/evaluation/next_item.py ranks the two-stage model: the prediction of an interaction
sees the user's interactions before it, items that the user already has are left out, ties rank in row order.

Shapes: B interactions to predict, I items, H interactions before one.
"""

from collections.abc import Iterator

import numpy as np
from scipy import sparse

from cluster.errors import DataError
from training.baselines.hybrid import Hybrid, standardised
from training.baselines.interface import UNKNOWN, IntArray, Recommender, Scores, seen_matrix
from training.evaluation.holdout import rank_of
from training.evaluation.metrics import ndcg_at_k
from training.stream import History, Windows, windows_before

BATCH = 256
"""Interactions scored at once."""
UNRANKED = 0
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Tried of each further part, the first one having 1."""


class NextItems:
    """Interactions to predict, and what their users have before them."""

    def __init__(
        self, history: History, targets: np.ndarray, fitted_UI: sparse.csr_array, *, items: int, max_history: int
    ) -> None:
        """Targets are indices into the history; `fitted_UI` is what the systems that will be asked are fitted on."""
        self._history = history
        self._windows = windows_before(history, targets, max_history)
        self._starts = history.starts[np.searchsorted(history.starts, targets, side="right") - 1]
        self._is_fitted_U = np.diff(fitted_UI.indptr) > 0
        self._items = items
        self.targets = history.item_row[targets]

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self) -> Iterator[tuple[np.ndarray, sparse.csr_array, IntArray, np.ndarray]]:
        """Yield which interactions, what their users are scored by, the users' rows, and all that they have [B, I]."""
        for start in range(0, len(self), BATCH):
            chosen = np.arange(start, min(start + BATCH, len(self)))
            windows = self._windows.pick(chosen)
            user_B = self._history.user_row[windows.last]
            rows_B = np.where(self._is_fitted_U[user_B], user_B, UNKNOWN)
            everything = Windows(self._starts[chosen], windows.last)
            yield chosen, self._seen(windows), rows_B, self._seen(everything).toarray() > 0

    def ranks(self, system: Recommender) -> IntArray:
        """Return the rank of each target, 1 being best; `UNRANKED` where the user has it already."""
        ranks = np.zeros(len(self), np.int64)
        for chosen, seen_BI, rows_B, had_BI in self.batches():
            scores_BI = np.array(system.scores(seen_BI, rows_B))
            if not np.isfinite(scores_BI).all():
                raise DataError(f"{type(system).__name__}: a score is not finite, so nothing can be ranked")
            ranks[chosen] = rank_targets(scores_BI, had_BI, self.targets[chosen])
        return ranks

    def _seen(self, windows: Windows) -> sparse.csr_array:
        lengths_B = windows.last - windows.first
        offset_N = np.arange(lengths_B.sum()) - np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
        item_N = self._history.item_row[np.repeat(windows.first, lengths_B) + offset_N]
        return seen_matrix(np.repeat(np.arange(len(windows)), lengths_B), item_N, len(windows), self._items)


def rank_targets(scores_BI: Scores, had_BI: np.ndarray, target_B: IntArray) -> IntArray:
    """Return the rank of one item a row among those not had, `UNRANKED` of one that is; overwrites the scores."""
    scores_BI[had_BI] = -np.inf
    has_B = np.take_along_axis(had_BI, target_B[:, None], axis=1)[:, 0]
    return np.where(has_B, UNRANKED, rank_of(scores_BI, target_B))


def choose_weights(hybrid: Hybrid, validation: NextItems) -> None:
    """Give a fitted hybrid the weights with the best NDCG@10: one part after the other, those before it as they are."""
    hybrid.weights = [1.0] + [0.0] * (len(hybrid.parts) - 1)
    for number in range(1, len(hybrid.parts)):
        gain = np.zeros(len(WEIGHTS))
        for chosen, seen_BI, rows_B, had_BI in validation.batches():
            base_BI = hybrid.scores(seen_BI, rows_B)
            added_BI = standardised(hybrid.parts[number].scores(seen_BI, rows_B))
            for tried, weight in enumerate(WEIGHTS):
                ranks_B = rank_targets(
                    (base_BI + weight * added_BI).astype(np.float32), had_BI, validation.targets[chosen]
                )
                gain[tried] += ndcg_at_k(ranks_B, 10).sum()
        hybrid.weights[number] = WEIGHTS[int(gain.argmax())]
