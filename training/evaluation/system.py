"""What can be evaluated: whatever scores items for someone, given what that user did before.

In:  interactions to be named.  Out: batches of them, and every system's scores for each.
Knows nothing of metrics. `System` is all that a kind of recommender has to be to stand on the scoreboard.

Shapes: N interactions to be named, B of a batch, I items.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from scipy import sparse

from embeddings.vocabulary import UNKNOWN_ROW
from training.evaluation.classical import NextItems, items_in
from training.evaluation.lists import IntArray
from training.evaluation.metrics import FloatArray
from training.evaluation.next_item import (
    NOT_SHOWN,
    Beside,
    Catalogue,
    list_next_items,
    predict_next_items,
    rank_next_items,
    rate_next_items,
)
from training.models.classical import ServedClassical
from training.models.served import ServedModel
from training.models.version import TEXT_ROWS, USER_ROWS
from training.online.predictions import Predictions
from training.stream import History, Windows

SCORES_AT_ONCE = 16_000_000
"""Of one batch: 64 MB a system."""
MOST_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)  # without slots, which leave no room for what is computed when it is asked for
class Batch:
    """Some interactions to be named."""

    history: History
    targets: IntArray
    """Their indices into the history."""
    items: int

    @cached_property
    def seen(self) -> sparse.csr_array:
        """Return what each one's user had before it, [B, I]: 1 an item."""
        return items_in(self.history, Windows(self.history.first_of(self.targets), self.targets), self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """Interactions to be named, each from what its user did before it."""

    history: History
    targets: IntArray
    """Their indices into the history."""
    user_ids: pa.Array
    """By `history.user_row`."""
    item_ids: Sequence[str]
    """By `history.item_row`."""

    @property
    def at_once(self) -> int:
        """How many interactions there is room for the scores of."""
        return max(1, min(MOST_AT_ONCE, SCORES_AT_ONCE // len(self.item_ids)))

    def batches(self) -> Iterator[Batch]:
        """Yield the interactions in order, as many at once as there is room for their scores."""
        for targets in _in_parts(self.targets, self.at_once):
            yield Batch(history=self.history, targets=targets, items=len(self.item_ids))

    def user_rows(self, known_ids: Sequence[str]) -> IntArray:
        """Return the row that a system has each user in, by `history.user_row`; `UNKNOWN_ROW` where it knows none."""
        rows = pc.index_in(self.user_ids, pa.array(known_ids, pa.string()))  # pyright: ignore[reportAttributeAccessIssue]
        return rows.fill_null(UNKNOWN_ROW).to_numpy(zero_copy_only=False).astype(np.int64)


class System(Protocol):
    """What can be evaluated."""

    item_ids: Sequence[str]
    """What it can recommend, by row."""
    text_IE: npt.NDArray[np.floating] | None
    """What it knows of the items' content, for the diversity of lists; none where it knows nothing."""

    def scores(self, cases: Cases) -> Iterator[npt.NDArray[np.float32]]:
        """Yield scores [B, I] for each of `cases.batches()`, in order; larger is better, −∞ is not to be shown.

        It may look at the history before a target, and never at the target. What the user has already is left out by
        whoever asks.
        """
        ...


@runtime_checkable
class RatingSystem(Protocol):
    """A system that says also how an item would be rated."""

    def ratings(self, cases: Cases) -> FloatArray:
        """Return the rating [N] that each target's item would get of its user; NaN where nothing can be said.

        It may look at the target's item and the history before it, and never at the target's value.
        """
        ...


@runtime_checkable
class ChoiceSystem(Protocol):
    """A system that says also how likely it holds each item to be chosen."""

    def choices(self, cases: Cases) -> Predictions:
        """Return what it makes of each target [N] among all items; a loss of NaN where nothing can be said.

        It may look at the history before a target.
        """
        ...


class VersionSystem:
    """A published version of the two-stage model, as it would be served."""

    def __init__(self, model: ServedModel) -> None:
        self.item_ids: Sequence[str] = model.item_ids
        self.text_IE: npt.NDArray[np.floating] | None = model.state.rows[TEXT_ROWS].numpy()
        self._model = model

    def scores(self, cases: Cases) -> Iterator[npt.NDArray[np.float32]]:
        """Yield minus the place at which each candidate would be shown; popularity where a user has no history."""
        model, catalogue = self._model, self._catalogue(cases)
        for batch in cases.batches():
            first_B = np.isin(batch.targets, cases.history.starts)
            score_BI = np.empty((len(batch.targets), batch.items), np.float32)
            score_BI[first_B] = model.popularity_I
            if not first_B.all():
                later = batch.targets[~first_B]
                score_BI[~first_B] = _by_place(
                    list_next_items(model.dense, catalogue, cases.history, later), batch.items
                )
            yield score_BI

    def ranks(self, cases: Cases) -> IntArray:
        """Return the place [N] at which each target would be shown; 0 where it would not be. None is a user's first."""
        return rank_next_items(self._model.dense, self._catalogue(cases), cases.history, cases.targets)

    def ratings(self, cases: Cases) -> FloatArray:
        """Return the rating head's estimates; NaN for a user's first interaction."""
        model, catalogue = self._model, self._catalogue(cases)
        rating_N = np.full(len(cases.targets), np.nan)
        for chosen in _in_parts(_later(cases)):
            rating_N[chosen] = rate_next_items(model.dense, catalogue, cases.history, cases.targets[chosen])
        return rating_N

    def choices(self, cases: Cases) -> Predictions:
        """Return retrieval's predictions; a loss of NaN for a user's first interaction."""
        model, catalogue = self._model, self._catalogue(cases)
        count = len(cases.targets)
        whole = Predictions(
            loss_P=np.full(count, np.nan), rank_P=np.zeros(count, np.int64), confidence_P=np.full(count, np.nan)
        )
        for chosen in _in_parts(_later(cases), cases.at_once):
            found = predict_next_items(model.dense, catalogue, cases.history, cases.targets[chosen])
            for name in ("loss_P", "rank_P", "confidence_P"):
                getattr(whole, name)[chosen] = getattr(found, name)
        return whole

    def _catalogue(self, cases: Cases) -> Catalogue:
        """Return the tables, with a row for each of the cases' users; nothing in it for those it does not know."""
        model = self._model
        row_U = torch.from_numpy(cases.user_rows(model.state.user_ids))
        user_UD = model.state.rows[USER_ROWS].new_zeros(len(row_U), model.item_ID.shape[1])
        user_UD[row_U != UNKNOWN_ROW] = model.state.rows[USER_ROWS][row_U[row_U != UNKNOWN_ROW]]
        return Catalogue(item_ID=model.item_ID, user_UD=user_UD, beside=Beside.of(model))


class ClassicalSystem:
    """A published version of a classical system, as it would be served."""

    def __init__(self, model: ServedClassical) -> None:
        self.item_ids: Sequence[str] = model.item_ids
        self.text_IE: npt.NDArray[np.floating] | None = model.text_IE.numpy()
        self._fitted, self._user_ids = model.classical, model.state.user_ids

    def scores(self, cases: Cases) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the system's scores by the newest of what each user had before the target."""
        row_U = cases.user_rows(self._user_ids)
        for batch in cases.batches():
            asked = NextItems(batch.history, batch.targets, items=batch.items, max_history=self._fitted.max_history)
            seen_BI = asked.seen(np.arange(len(asked)))
            yield self._fitted.system.scores(seen_BI, row_U[batch.history.user_row[batch.targets]])


def _later(cases: Cases) -> IntArray:
    """Return the places of the targets that are not their user's first interaction."""
    return np.flatnonzero(~np.isin(cases.targets, cases.history.starts))


def _in_parts(places: IntArray, at_once: int = MOST_AT_ONCE) -> Iterator[IntArray]:
    for start in range(0, len(places), at_once):
        yield places[start : start + at_once]


def _by_place(shown_BK: IntArray, items: int) -> npt.NDArray[np.float32]:
    score_BI = np.full((len(shown_BK), items), -np.inf, np.float32)
    row_N, place_N = np.nonzero(shown_BK != NOT_SHOWN)
    score_BI[row_N, shown_BK[row_N, place_N]] = -place_N
    return score_BI
