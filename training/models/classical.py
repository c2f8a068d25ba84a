"""A version of a classical system resident in memory, ready to answer; and which resident a version becomes.

In:  a user's history and a number.  Out: every item scored by what the user has now; neighbours of an item by text.
Knows nothing of HTTP, logs or policies. Nothing is learned while it serves: a click counts because the next request is
answered from the history with it.

An item put after training is recommended where the system can tell from its text where it belongs: content, and hybrids
with content. In the others it is known, by `similar` too, but nobody has had it, so that it is not recommended.

Shapes: I items, E encoder dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluster.log import Interaction
from cluster.registry import Registry, VersionRef
from training.baselines.config import BASKETS, SystemConfig
from training.models.baskets import ServedBaskets
from training.models.blend import blended
from training.models.fitted import FittedSystem
from training.models.interests import Interests, match_items, weigh
from training.models.resident import (
    Candidates,
    Catalogue,
    Put,
    Resident,
    index_users,
    lay_texts,
    restore_classical,
)
from training.models.served import ServedModel
from training.models.version import COUNT_ROWS, VersionState, grow_rows, log_popularity, read_version


@dataclass(frozen=True, kw_only=True)  # without slots, as its base
class ServedClassical(Catalogue):
    """One version's answers. Build it with `build`, `with_state` and `with_items`."""

    classical: FittedSystem

    @classmethod
    def build(cls, state: VersionState, put: Put, resident: Resident | None = None) -> "ServedClassical":
        """Compute what answering needs from a version's arrays and the items put since."""
        laid = lay_texts(state, put, resident)
        classical = restore_classical(state, laid.text_IE, resident)
        assert classical is not None, "a version without a two-stage model has a classical system"
        return cls(
            state=state,
            put=laid.put,
            item_ids=laid.item_ids,
            index_of=laid.index_of,
            item_row=laid.item_row,
            popularity_I=log_popularity(grow_rows(state.rows[COUNT_ROWS], classical.item_count)),
            classical=classical,
            text_IE=laid.text_IE,
            user_row=index_users(state, resident),
        )

    @property
    def max_history(self) -> int:
        """Interactions it looks back on."""
        return self.classical.max_history

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
        known = self._rows([entry.item_id for entry in history])
        excluded = self.barred(exclude, within_I)
        interest_I = None if interests is None else self.interest_scores(interests)
        if not known:
            return self.popular(k, excluded, interest_I)
        return self.best(self._scores(user_id, known, interest_I), k, excluded, cold_start=False)

    def rank(
        self,
        user_id: str,
        history: Sequence[Interaction],
        item_ids: Sequence[str],
        interests: Interests | None = None,
    ) -> Candidates:
        """Return these items, each of which it can rank, best first."""
        rows, known = self._rows(item_ids), self._rows([entry.item_id for entry in history])
        interest_I = None if interests is None else self.interest_scores(interests)
        if known:
            scores_I = self._scores(user_id, known, interest_I)
        else:
            scores_I = self.popularity_I if interest_I is None else self.told(interest_I)
        return self.sorted_by(item_ids, scores_I[rows], cold_start=not known and interest_I is None)

    def interest_scores(self, interests: Interests) -> torch.Tensor:
        """Return what interests say of each item [I]: what it is to someone who has the popular ones that match."""
        matching = match_items(interests, self.text_IE[: self.item_count].numpy(), self.popularity_I)
        return torch.from_numpy(self.classical.scores(matching.tolist(), None).astype(np.float32))

    def _scores(self, user_id: str, known: Sequence[int], interest_I: torch.Tensor | None) -> np.ndarray:
        scores_I = self.classical.scores(known, self.user_row.get(user_id))
        if interest_I is None:
            return scores_I
        return blended(torch.from_numpy(scores_I), interest_I, weigh(len(known))).numpy()

    def _rows(self, item_ids: Sequence[str] | frozenset[str]) -> list[int]:
        """Return the rows of those items that can be recommended."""
        rows = (self.index_of.get(item_id) for item_id in item_ids)
        return [row for row in rows if row is not None and row < self.item_count]


def build_resident(state: VersionState, put: Put, resident: Resident | None = None) -> Resident:
    """Return the version as a resident of its kind; what the `resident` has of the same content is shared with it."""
    if state.dense:
        return ServedModel.build(state, put, resident)
    kind = ServedBaskets if state.recipe.section(SystemConfig).name == BASKETS else ServedClassical
    return kind.build(state, put, resident)


def load_resident(registry: Registry, ref: VersionRef, resident: Resident | None = None) -> Resident:
    """Read and verify a version with its deltas. Raises `CorruptVersionError` or `RegistryError`."""
    state = read_version(registry, ref, resident=resident.state if resident else None)
    return build_resident(state, {}, resident)
