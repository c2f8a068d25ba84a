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

    def __init__(self, history: History, targets: np.ndarray, *, items: int, max_history: int) -> None:
        """Targets are indices into the history, none of them its user's first."""
        self._history = history
        self._items = items
        self._newest = windows_before(history, targets, max_history)
        self._all = Windows(history.first_of(targets), targets)
        self.targets = history.item_row[targets]
        self.users = history.user_row[targets]

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self) -> Iterator[np.ndarray]:
        """Yield the places of some after the other."""
        for start in range(0, len(self), BATCH):
            yield np.arange(start, min(start + BATCH, len(self)))

    def seen(self, chosen: np.ndarray) -> sparse.csr_array:
        """Return what users are scored by, [B, I]."""
        return items_in(self._history, self._newest.pick(chosen), self._items)

    def had(self, chosen: np.ndarray) -> np.ndarray:
        """Return all that users have, [B, I]."""
        return items_in(self._history, self._all.pick(chosen), self._items).toarray() > 0


def items_in(history: History, windows: Windows, items: int) -> sparse.csr_array:
    """Return which items were had in each window, [B, I]: 1 each."""
    lengths_B = windows.last - windows.first
    offset_N = np.arange(lengths_B.sum()) - np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
    item_N = history.item_row[np.repeat(windows.first, lengths_B) + offset_N]
    return seen_matrix(np.repeat(np.arange(len(windows)), lengths_B), item_N, len(windows), items)


def rank_classical(system: Recommender, asked: NextItems, is_fitted_U: np.ndarray) -> IntArray:
    """Return the rank of each target, 1 being best; `UNRANKED` where the user has it already.

    `is_fitted_U` says of which users the system was fitted on anything.
    """
    ranks = np.zeros(len(asked), np.int64)
    for chosen in asked.batches():
        scores_BI = np.array(system.scores(asked.seen(chosen), _rows(asked, chosen, is_fitted_U)))
        if not np.isfinite(scores_BI).all():
            raise DataError(f"{type(system).__name__}: a score is not finite, so nothing can be ranked")
        ranks[chosen] = rank_targets(scores_BI, asked.had(chosen), asked.targets[chosen])
    return ranks


def rank_targets(scores_BI: Scores, had_BI: np.ndarray, target_B: IntArray) -> IntArray:
    """Return the rank of one item a row among those not had, `UNRANKED` of one that is; overwrites the scores."""
    scores_BI[had_BI] = -np.inf
    has_B = np.take_along_axis(had_BI, target_B[:, None], axis=1)[:, 0]
    return np.where(has_B, UNRANKED, rank_of(scores_BI, target_B))


def choose_weights(hybrid: Hybrid, asked: NextItems, is_fitted_U: np.ndarray) -> None:
    """Give a fitted hybrid the weights with the best NDCG@10: one part after the other, those before it as they are."""
    hybrid.weights = [1.0] + [0.0] * (len(hybrid.parts) - 1)
    for number in range(1, len(hybrid.parts)):
        gain = np.zeros(len(WEIGHTS))
        for chosen in asked.batches():
            seen_BI, rows_B, had_BI = asked.seen(chosen), _rows(asked, chosen, is_fitted_U), asked.had(chosen)
            base_BI = hybrid.scores(seen_BI, rows_B)
            added_BI = standardised(hybrid.parts[number].scores(seen_BI, rows_B))
            for tried, weight in enumerate(WEIGHTS):
                scores_BI = (base_BI + weight * added_BI).astype(np.float32)
                gain[tried] += ndcg_at_k(rank_targets(scores_BI, had_BI, asked.targets[chosen]), 10).sum()
        hybrid.weights[number] = WEIGHTS[int(gain.argmax())]


def _rows(asked: NextItems, chosen: np.ndarray, is_fitted_U: np.ndarray) -> IntArray:
    user_B = asked.users[chosen]
    return np.where(is_fitted_U[user_B], user_B, UNKNOWN)
