"""A version's classical system, restored: the scores of all items for one user.

In:  a version's arrays, its recipe, the items' text vectors.  Out: scores, by the item rows that the user has.
Knows nothing of ids or of what is shown.

Who was not fitted on is scored by their history like everyone else. Two systems also have something of each user that
they were fitted on: user neighbours, that nobody is their own neighbour; BPR, factors, which move with the history.

Shapes: I items, B users that are scored, of whom there is one here, E encoder dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from training.baselines.config import SystemConfig, build_system
from training.baselines.hybrid import known_scores, placed
from training.baselines.interface import UNKNOWN, Recommender, seen_matrix
from training.models.version import VersionState


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedSystem:
    """Ready to score."""

    fitted: Recommender
    system: Recommender
    """The same, over all items where it can place them by what is told."""
    text_IE: torch.Tensor
    max_history: int

    @classmethod
    def build(cls, state: VersionState, text_IE: torch.Tensor) -> Self:
        """Restore a version's system; `text_IE` tells of the version's items and of those put since."""
        config = state.recipe.section(SystemConfig)
        assert config.classical is not None, "a version with arrays says of which system they are"
        arrays = {name: tensor.numpy() for name, tensor in state.system.items()}
        fitted = build_system(state.recipe, config.classical, text_IE.numpy()).restore(arrays)
        system = placed(fitted, text_IE.numpy())
        return cls(fitted=fitted, system=system, text_IE=text_IE, max_history=config.max_history)

    def over(self, text_IE: torch.Tensor) -> Self:
        """Return it over a catalogue told so."""
        if text_IE is self.text_IE:
            return self
        return replace(self, system=placed(self.fitted, text_IE.numpy()), text_IE=text_IE)

    @property
    def item_count(self) -> int:
        """Items that it scores; they come first in the catalogue."""
        return len(self.system.popularity_I)

    def scores(self, item_rows: Sequence[int], user_row: int | None) -> np.ndarray:
        """Return the score [I] of each item that it scores, for a user with these of them, oldest first."""
        return self.system.scores(*self._of_user(item_rows, user_row, self.item_count))[0]

    def standardised(self, item_rows: Sequence[int], user_row: int | None, items: int) -> np.ndarray:
        """Return scores with mean 0 and spread 1 of so many items, the user having any of them; 0 of the others."""
        return known_scores(self.system, *self._of_user(item_rows, user_row, items), items)[0]

    def _of_user(
        self, item_rows: Sequence[int], user_row: int | None, items: int
    ) -> tuple[sparse.csr_array, npt.NDArray[np.int64]]:
        newest_H = np.array(item_rows[-self.max_history :], np.int64)
        seen_BI = seen_matrix(np.zeros_like(newest_H), newest_H, 1, items)
        return seen_BI, np.array([UNKNOWN if user_row is None else user_row])
