"""What serving asks of a version resident in memory, whatever recommends in it, and what such versions have in common.

In:  a version's state and the items put since.  Out: its catalogue: ids, texts, what is popular.
Knows nothing of how users' candidates are found: served.py does that with the two-stage model, classical.py with a
classical system. Immutable: a delta or a new item makes another one, and whoever serves swaps one reference.

Shapes: I items, N items put, E encoder dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol, Self, cast

import numpy as np
import numpy.typing as npt
import torch

from cluster.log import Interaction
from training.models.blend import blended
from training.models.fitted import FittedSystem
from training.models.interests import Interests, is_buried, weigh
from training.models.tags import PutTags
from training.models.version import TEXT_ROWS, VersionState, grow_rows

WITH_TEXT = 100
"""If none of so many items has a text, none has."""

POPULAR_KEPT = 20_000
"""Most popular items whose order is kept."""

Put = Mapping[str, tuple[str, np.ndarray]]
"""Items put while serving: id to text and encoder vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Items for a user, best first."""

    item_ids: list[str]
    scores: np.ndarray
    """Click logits or a system's own scores, or log popularity for a cold start."""
    cold_start: bool
    """Whether nothing the user did could be used."""


class Resident(Protocol):
    """A version that answers."""

    @property
    def state(self) -> VersionState:
        """What it was read from."""
        ...

    @property
    def classical(self) -> FittedSystem | None:
        """The classical system that recommends, alone or beside the two-stage model."""
        ...

    @property
    def repeats(self) -> bool:
        """Whether users are offered what they have."""
        ...

    @property
    def name(self) -> str:
        """The version with its delta, such as 1.37."""
        ...

    @property
    def learned_seq(self) -> int:
        """Newest event of the log that it has learned."""
        ...

    @property
    def max_history(self) -> int:
        """Interactions it looks back on."""
        ...

    @property
    def item_count(self) -> int:
        """Items it can recommend."""
        ...

    @property
    def item_row(self) -> dict[str, int]:
        """Row of each item that the version holds, without those put since."""
        ...

    @property
    def index_of(self) -> dict[str, int]:
        """Row of each item that it knows."""
        ...

    @property
    def user_row(self) -> dict[str, int]:
        """Row of each user that the version holds."""
        ...

    def knows(self, item_id: str) -> bool:
        """Whether it was trained on the item, or the item was put since."""
        ...

    def text_of(self, item_id: str) -> str | None:
        """Return the item's text, or none for an unknown item."""
        ...

    def recommend(
        self,
        user_id: str,
        history: Sequence[Interaction],
        k: int,
        exclude: frozenset[str] = frozenset(),
        interests: Interests | None = None,
        within_I: npt.NDArray[np.bool_] | None = None,
    ) -> Candidates:
        """Return up to `k` items, best first, without those excluded; of those within alone, where that is given."""
        ...

    def within(self, categories: Sequence[str], domain: str | None, put: PutTags) -> npt.NDArray[np.bool_]:
        """Return which of its items are of any of the categories, where some are given, and of the domain."""
        ...

    def can_rank(self, item_id: str) -> bool:
        """Whether it has a score for the item."""
        ...

    def rank(
        self,
        user_id: str,
        history: Sequence[Interaction],
        item_ids: Sequence[str],
        interests: Interests | None = None,
    ) -> Candidates:
        """Return these items, each of which it can rank, best first."""
        ...

    @property
    def has_texts(self) -> bool:
        """Whether its items have texts, which interests are compared to."""
        ...

    def bury(self, candidates: Candidates, interests: Interests) -> Candidates:
        """Return the candidates with those most like something disliked behind the others."""
        ...

    def similar(self, item_id: str, k: int) -> list[tuple[str, float]]:
        """Return the `k` nearest items, best first. Raises `KeyError` for an unknown item."""
        ...

    def with_state(self, state: VersionState) -> "Resident":
        """Return it in another state, such as after deltas; items put since stay."""
        ...

    def with_items(self, items: Sequence[tuple[str, str]], vectors_NE: np.ndarray) -> "Resident":
        """Return it with these (id, text) items known, or read anew where it knows them."""
        ...


@dataclass(frozen=True, kw_only=True)  # without slots, which leave no room for what is computed when it is asked for
class Catalogue(ABC):
    """A version's items, with those put since laid over."""

    state: VersionState
    put: Put
    """Items put that the version does not hold so; those without a row come last, in this order."""
    item_ids: list[str]
    index_of: dict[str, int]
    item_row: dict[str, int]
    """`index_of` less what was put."""
    user_row: dict[str, int]
    classical: FittedSystem | None
    popularity_I: np.ndarray
    text_IE: torch.Tensor
    """Encoder vectors of all items."""

    @classmethod
    @abstractmethod
    def build(cls, state: VersionState, put: Put, resident: "Resident | None" = None) -> Self:
        """Compute what answering needs; what the `resident` has of the same content is shared with it."""

    def with_state(self, state: VersionState) -> Self:
        """Return it in another state, such as after deltas; items put since stay."""
        return self.build(state, self.put, cast("Resident", self))

    def with_items(self, items: Sequence[tuple[str, str]], vectors_NE: np.ndarray) -> Self:
        """Return it with these (id, text) items known, or read anew where it knows them."""
        new = {item_id: (text, vector) for (item_id, text), vector in zip(items, vectors_NE, strict=True)}
        return self.build(self.state, {**self.put, **new}, cast("Resident", self))

    @property
    def repeats(self) -> bool:
        """Whether users are offered what they have."""
        return False

    @property
    def name(self) -> str:
        """The version with its delta, such as 1.37."""
        return str(self.state.ref)

    @property
    def learned_seq(self) -> int:
        """Newest event of the log that the weights have learned."""
        return self.state.learned_seq

    @property
    def item_count(self) -> int:
        """Items it can recommend."""
        return len(self.popularity_I)

    def knows(self, item_id: str) -> bool:
        """Whether it was trained on the item, or the item was put since."""
        return item_id in self.index_of

    def can_rank(self, item_id: str) -> bool:
        """Whether it has a score for the item."""
        return self.index_of.get(item_id, self.item_count) < self.item_count

    def sorted_by(self, item_ids: Sequence[str], scores_K: np.ndarray, *, cold_start: bool) -> Candidates:
        """Return the items by score, best first, of equals the first."""
        order = np.argsort(-scores_K, kind="stable")
        places: list[int] = order.tolist()
        in_order = [item_ids[place] for place in places]
        return Candidates(item_ids=in_order, scores=scores_K[order], cold_start=cold_start)

    def text_of(self, item_id: str) -> str | None:
        """Return the item's text, or none for an unknown item."""
        if item_id in self.put:
            return self.put[item_id][0]
        index = self.index_of.get(item_id)
        return self.state.item_texts[index] if index is not None else None

    def popular(
        self, k: int, excluded: Sequence[int] | npt.NDArray[np.int64], interest_I: torch.Tensor | None = None
    ) -> Candidates:
        """Return what a user without history is shown: what is popular, with what interests say of each item [I]."""
        if interest_I is None and len(excluded) + k <= len(self.most_popular):
            barred = set(excluded)
            rows = [row for row in self.most_popular[: len(excluded) + k].tolist() if row not in barred][:k]
            item_ids = [self.item_ids[row] for row in rows]
            return Candidates(item_ids=item_ids, scores=self.popularity_I[rows], cold_start=True)
        scores_I = self.popularity_I.copy() if interest_I is None else self.told(interest_I)
        return self.best(scores_I, k, excluded, cold_start=interest_I is None)

    @cached_property
    def most_popular(self) -> npt.NDArray[np.int64]:
        """Rows of the most popular items, of equals the first, for users of whom nothing is known."""
        return np.argsort(-self.popularity_I, kind="stable")[:POPULAR_KEPT]

    def told(self, interest_I: torch.Tensor) -> np.ndarray:
        """Return the score of each item for a user of whom interests alone are known."""
        return blended(torch.from_numpy(self.popularity_I), interest_I, weigh(0)).numpy()

    def within(self, categories: Sequence[str], domain: str | None, put: PutTags) -> npt.NDArray[np.bool_]:
        """Return which of its items are of any of the categories, where some are given, and of the domain."""
        told = self.state.tags
        is_within_I = np.zeros(len(self.item_ids), np.bool_)
        if told is not None:
            is_within_I = told.mask(categories, domain, len(self.item_ids))
        for item_ids, is_one in ((put.item_ids, False), (put.within(categories, domain), True)):
            is_within_I[[self.index_of[item_id] for item_id in item_ids if item_id in self.index_of]] = is_one
        return is_within_I

    def barred(
        self, exclude: frozenset[str], within_I: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.int64] | list[int]:
        """Return the rows, each once, of items that can be recommended and may not be."""
        excluded = [self.index_of[item_id] for item_id in exclude if self.can_rank(item_id)]
        if within_I is None:
            return excluded
        is_barred_I = ~within_I[: self.item_count]
        is_barred_I[excluded] = True
        return np.flatnonzero(is_barred_I)

    @property
    def has_texts(self) -> bool:
        """Whether its items have texts, which interests are compared to."""
        return bool(self.text_IE[:WITH_TEXT].any())

    def bury(self, candidates: Candidates, interests: Interests) -> Candidates:
        """Return the candidates with those most like something disliked behind the others."""
        rows = [self.index_of[item_id] for item_id in candidates.item_ids]
        text_IE = self.text_IE[:, : interests.disliked_NE.shape[1]].numpy()
        order = np.argsort(is_buried(interests, text_IE[rows], text_IE), kind="stable")
        item_ids = [candidates.item_ids[place] for place in order]
        return replace(candidates, item_ids=item_ids, scores=candidates.scores[order])

    def best(
        self, scores_I: np.ndarray, k: int, excluded: Sequence[int] | npt.NDArray[np.int64], *, cold_start: bool
    ) -> Candidates:
        """Return the `k` items with the highest scores, of equals the first; overwrites the scores."""
        scores_I[excluded] = -np.inf
        chosen = np.arange(len(scores_I))
        if k < len(scores_I):
            chosen = np.flatnonzero(scores_I >= np.partition(scores_I, -k)[-k])
        best = chosen[np.argsort(-scores_I[chosen], kind="stable")[:k]]
        best = best[np.isfinite(scores_I[best])]
        return Candidates(item_ids=[self.item_ids[i] for i in best], scores=scores_I[best], cold_start=cold_start)

    @cached_property
    def unit_vectors(self) -> torch.Tensor:
        """Text vectors [I, E] of length 1, computed when neighbours are first asked for."""
        return torch.nn.functional.normalize(self.text_IE, dim=1)

    def similar(self, item_id: str, k: int) -> list[tuple[str, float]]:
        """Return the `k` items nearest by cosine, best first. Raises `KeyError` for an unknown item."""
        index = self.index_of[item_id]
        return self.nearest((self.unit_vectors @ self.unit_vectors[index]).numpy(), index, k)

    def nearest(self, cosine_I: np.ndarray, index: int, k: int) -> list[tuple[str, float]]:
        """Return the `k` items with the highest cosines, without the one of this index; overwrites the cosines."""
        found = self.best(cosine_I, k, [index], cold_start=False)
        return list(zip(found.item_ids, found.scores.tolist(), strict=True))


class LaidOver(NamedTuple):
    """A version's items with those put since."""

    put: Put
    item_ids: list[str]
    index_of: dict[str, int]
    item_row: dict[str, int]
    text_IE: torch.Tensor


def lay_texts(state: VersionState, put: Put, resident: Resident | None) -> LaidOver:
    """Return the version's items with those put that it does not hold so, and the vectors of all their texts."""
    item_row = index_items(state, resident)
    put, item_ids, index_of = lay_over(state, item_row, put)
    text_IE = state.rows[TEXT_ROWS]
    if put:
        text_IE = grow_rows(text_IE, len(item_ids))
        for item_id, (_, vector) in put.items():
            text_IE[index_of[item_id], : len(vector)] = torch.tensor(vector)
    return LaidOver(put, item_ids, index_of, item_row, text_IE)


def index_items(state: VersionState, resident: Resident | None) -> dict[str, int]:
    """Return the row of each of the version's items."""
    return _index(state.item_ids, (resident.state.item_ids, resident.item_row) if resident else None)


def index_users(state: VersionState, resident: Resident | None) -> dict[str, int]:
    """Return the row of each of the version's users."""
    return _index(state.user_ids, (resident.state.user_ids, resident.user_row) if resident else None)


def lay_over(state: VersionState, item_row: dict[str, int], put: Put) -> tuple[Put, list[str], dict[str, int]]:
    """Return what was put and the version does not hold so, all ids, and each one's place."""
    put = {item_id: item for item_id, item in put.items() if not _is_held(state, item_row.get(item_id), *item)}
    new_ids = [item_id for item_id in put if item_id not in item_row]
    if not new_ids:
        return put, state.item_ids, item_row
    places = {item_id: len(item_row) + position for position, item_id in enumerate(new_ids)}
    return put, [*state.item_ids, *new_ids], item_row | places


def restore_classical(state: VersionState, text_IE: torch.Tensor, resident: Resident | None) -> FittedSystem | None:
    """Return the version's classical system over a catalogue told so; none where it has none."""
    if not state.system:
        return None
    held = resident.classical if resident and resident.state.system is state.system else None
    if resident is not None and held is not None and resident.state.recipe == state.recipe:
        return held.over(text_IE)
    return FittedSystem.build(state, text_IE)


def _index(ids: list[str], resident: tuple[list[str], dict[str, int]] | None) -> dict[str, int]:
    """Return each id's place in the list; of a resident list and its index, that index with what differs made good."""
    if resident is None or len(ids) < len(resident[0]):
        return {item_id: place for place, item_id in enumerate(ids)}
    before, index = resident
    if ids == before:
        return index
    changed = [place for place, (one, other) in enumerate(zip(before, ids, strict=False)) if one != other]
    index = index.copy()
    for place in changed:
        del index[before[place]]
    for place in (*changed, *range(len(before), len(ids))):
        index[ids[place]] = place
    return index


def _is_held(state: VersionState, row: int | None, text: str, vector: np.ndarray) -> bool:
    """Whether the version has learned of an item all that was put."""
    if row is None or state.item_texts[row] != text:
        return False
    return np.array_equal(state.rows[TEXT_ROWS][row, : len(vector)].numpy(), vector)
