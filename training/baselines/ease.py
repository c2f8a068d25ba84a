"""EASE, the shallow linear autoencoder that deep recommenders have to beat, and its figures on a live replay.

In:  user and item rows of past interactions.  Out: item scores; `Replay` holds hits and NDCG event by event.
Knows nothing of tables, versions or serving.

Steck: Embarrassingly Shallow Autoencoders for Sparse Data, WWW 2019. With G = XᵀX over the binary user × item matrix X
and P = (G + λI)⁻¹, the weights are B_ij = −P_ij / P_jj with a zero diagonal, and a user's scores are x_u B.

Shapes: I items, H history, N events.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import ConfigError, DataError
from cluster.events import INTERACTION_KINDS
from training.evaluation.metrics import FloatArray, hit_at_k, ndcg_at_k

IntArray = npt.NDArray[np.int64]

L2 = 350.0
"""Regularisation that reaches the published figures on MovieLens-100K."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a recommender did on a stream of events, one entry an event, in the order of the stream."""

    user_ids: list[str]
    ranks: IntArray
    """Rank of the item that came next among the items the user did not have yet; 1 is best, 0 is not ranked."""
    hits: FloatArray
    ndcg: FloatArray
    cold: npt.NDArray[np.bool_]
    """Whether the user had no interaction in the training part."""


class Ease:
    """Item-to-item weights in closed form; a user without history gets the most popular items."""

    def __init__(self, gram_II: FloatArray, l2: float) -> None:
        if not l2 > 0:
            raise ConfigError(f"ease.l2={l2}: must be above 0, or the Gram matrix may have no inverse; try {L2:g}")
        self.popularity_I: FloatArray = np.diag(gram_II).copy()
        inverse_II = np.linalg.inv(gram_II + l2 * np.eye(len(gram_II)))
        self.weights_II: FloatArray = inverse_II / -np.diag(inverse_II)
        np.fill_diagonal(self.weights_II, 0.0)

    @classmethod
    def fit(
        cls, user_rows: Sequence[int] | IntArray, item_rows: Sequence[int] | IntArray, *, n_items: int, l2: float = L2
    ) -> Self:
        """Fit on interactions given as equally long user and item rows; repeats count once."""
        interactions = Interactions(n_items)
        for user_row, item_row in zip(user_rows, item_rows, strict=True):
            interactions.add(int(user_row), int(item_row))
        return cls(interactions.gram_II, l2)

    def scores(self, history_H: Sequence[int] | IntArray) -> FloatArray:
        """Score every item for a user with these item rows in the history; popularity where it is empty."""
        if len(history_H) == 0:
            return self.popularity_I.copy()
        return self.weights_II[np.unique(history_H)].sum(axis=0)


class Interactions:
    """Who has what, with its Gram matrix kept up to date: one event costs the length of the user's history."""

    def __init__(self, n_items: int) -> None:
        self.gram_II: FloatArray = np.zeros((n_items, n_items))
        self._items_by_user: dict[int, list[int]] = {}
        self._known: set[tuple[int, int]] = set()

    def add(self, user_row: int, item_row: int) -> None:
        """Count an interaction; one that is known already changes nothing."""
        if (user_row, item_row) in self._known:
            return
        self._known.add((user_row, item_row))
        items = self._items_by_user.setdefault(user_row, [])
        self.gram_II[item_row, items] += 1.0
        self.gram_II[items, item_row] += 1.0
        self.gram_II[item_row, item_row] += 1.0
        items.append(item_row)

    def items(self, user_row: int) -> list[int]:
        """Return the item rows of a user, oldest first; empty for an unknown one."""
        return self._items_by_user.get(user_row, [])


def replay_ease(
    events: pa.Table, *, train_events: int, l2: float = L2, refit_every: int | None = None, k: int = 10
) -> Replay:
    """Fit on the first `train_events` interactions, then rank each further one before it is known, user state live.

    Items the user already has are excluded; the catalogue is every item of `events`. With `refit_every` the weights
    are fitted anew after that many replayed events, on all events before. Raises `DataError` when nothing is left to
    replay.
    """
    user_ids, user_rows, item_rows, n_items = _interaction_rows(events)
    if not 0 < train_events < len(user_rows):
        raise DataError(f"train_events={train_events}: must lie between 0 and the {len(user_rows):,} interactions")
    interactions = Interactions(n_items)
    for user_row, item_row in zip(user_rows[:train_events], item_rows[:train_events], strict=True):
        interactions.add(user_row, item_row)
    known_users = set(user_rows[:train_events])
    model = Ease(interactions.gram_II, l2)
    stream = list(zip(user_rows[train_events:], item_rows[train_events:], strict=True))
    ranks_N = np.zeros(len(stream), dtype=np.int64)
    for position, (user_row, item_row) in enumerate(stream):
        if refit_every and position and position % refit_every == 0:
            model = Ease(interactions.gram_II, l2)
        owned = interactions.items(user_row)
        ranks_N[position] = _rank(model.scores(owned), item_row, owned)
        interactions.add(user_row, item_row)
    return Replay(
        user_ids=[user_ids[user_row] for user_row, _item_row in stream],
        ranks=ranks_N,
        hits=hit_at_k(ranks_N, k),
        ndcg=ndcg_at_k(ranks_N, k),
        cold=np.array([user_row not in known_users for user_row, _item_row in stream], dtype=np.bool_),
    )


def _rank(scores_I: FloatArray, item_row: int, owned: Sequence[int]) -> int:
    """Rank one item among those not owned, ties to the lower row; 0 when it is owned itself. Overwrites `scores_I`."""
    if item_row in owned:
        return 0
    scores_I[list(owned)] = -np.inf
    score = scores_I[item_row]
    return 1 + int((scores_I > score).sum()) + int((scores_I[:item_row] == score).sum())


def _interaction_rows(events: pa.Table) -> tuple[list[str], list[int], list[int], int]:
    chosen = events.filter(pc.is_in(events["kind"], value_set=pa.array(sorted(INTERACTION_KINDS))))
    users = pc.dictionary_encode(chosen["user_id"].combine_chunks())
    items = pc.dictionary_encode(chosen["item_id"].combine_chunks())
    rows = users.indices.to_pylist(), items.indices.to_pylist()
    return users.dictionary.to_pylist(), *rows, len(items.dictionary)
