"""Where items with few interactions stand: drawn to where their text says that they belong.

In:  item vectors, text vectors, how often each item was interacted with.  Out: vectors and weights to publish.
Knows nothing of training or files.

    told   W, from text to item vectors, by ridge regression over all items, each counting as often as it was met (as
           CB2CF does with a network: Barkan et al., RecSys 2019)
    drawn  (n · vector + prior · W text) / (n + prior) for an item met n times: the mean of what n interactions and a
           text that counts as `prior` of them say (empirical Bayes)
    new    an item put while serving has met nobody, and stands at W text

A row that few interactions have moved is mostly noise, which a long list of rare items turns into wrong first places.
The larger the ridge the shorter W text, and the less an item is shown before anyone has chosen it. By NDCG over all
interactions alone rare items would best not be shown at all; so of the placings that do not lower it the one is chosen
whose mean of NDCG over interactions with rare items, and over those with others, is best.

Shapes: I items, D dimension, E encoder dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from training.models.two_stage import TEXT_SCALE
from training.models.version import COUNT_ROWS, ITEM_ROWS, TEXT_ROWS, VersionState

PROJECT = "project.weight"
"""The dense weight [D, E] that places an item without a row."""
PRIORS, RIDGES = (2.0, 5.0, 20.0), (0.25, 0.5, 1.0)
RARE = 5
"""Items with fewer interactions in training count as much as all others, where a placing is chosen."""


@dataclass(frozen=True, slots=True)
class Placing:
    """How much an item's text says of where it stands."""

    prior: float
    """Interactions that a text counts for; 0 leaves items where they are."""
    ridge: float
    """Of the regression, as a share of the mean square of what is regressed on."""


LEFT = Placing(0.0, 1.0)
"""Items stay where training left them."""
PLACINGS = (LEFT, *(Placing(prior, ridge) for prior, ridge in product(PRIORS, RIDGES)))
"""Among which validation chooses."""
BLOCK = 65_536
"""Items in double precision at once."""


@dataclass(frozen=True, slots=True)
class Regression:
    """From one set of vectors to another, each pair weighted; summed up once, solved for any ridge."""

    gram_EE: np.ndarray
    both_ED: np.ndarray

    @classmethod
    def of(cls, from_NE: np.ndarray, to_ND: np.ndarray, weight_N: np.ndarray | None) -> "Regression":
        """Sum up, in double precision, some at a time."""
        gram_EE = np.zeros((from_NE.shape[1], from_NE.shape[1]))
        both_ED = np.zeros((from_NE.shape[1], to_ND.shape[1]))
        for start in range(0, len(from_NE), BLOCK):
            x = from_NE[start : start + BLOCK].astype(np.float64)
            weighed = x if weight_N is None else x * weight_N[start : start + BLOCK, None]
            gram_EE += weighed.T @ x
            both_ED += weighed.T @ to_ND[start : start + BLOCK]
        return cls(gram_EE, both_ED)

    def solve(self, share: float) -> np.ndarray:
        """Return W [E, D], float32, that minimises Σ weight · |from · W − to|² + λ|W|².

        λ is a share of the mean square of what is regressed on.
        """
        penalty = share * np.trace(self.gram_EE) / len(self.gram_EE) + 1e-12
        return np.linalg.solve(self.gram_EE + penalty * np.eye(len(self.gram_EE)), self.both_ED).astype(np.float32)


def regress_on_text(vector_ID: torch.Tensor, text_IE: torch.Tensor, count_I: torch.Tensor) -> Regression:
    """Return the regression from texts to item vectors, each item counting as often as it was met."""
    return Regression.of(text_IE.cpu().numpy(), vector_ID.cpu().numpy(), count_I.cpu().numpy())


def draw_to_text(
    vector_ID: torch.Tensor, text_IE: torch.Tensor, count_I: torch.Tensor, placing: Placing, told: Regression
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors, those of items without text as they are, and W [E, D]."""
    if not placing.prior:
        return vector_ID, torch.zeros(text_IE.shape[1], vector_ID.shape[1])
    count_I1 = count_I.to(vector_ID).unsqueeze(1)
    text_ED = torch.from_numpy(told.solve(placing.ridge)).to(vector_ID)
    drawn_ID = (count_I1 * vector_ID + placing.prior * (text_IE @ text_ED)) / (count_I1 + placing.prior)
    return torch.where(text_IE.any(dim=1, keepdim=True), drawn_ID, vector_ID), text_ED


def place_items(state: VersionState, placing: Placing) -> VersionState:
    """Return the state with its items drawn to their texts, and new ones standing where theirs say."""
    if not placing.prior:
        return state
    row_ID, text_IE, project_DE = state.rows[ITEM_ROWS], state.rows[TEXT_ROWS], state.dense[PROJECT]
    vector_ID = row_ID + TEXT_SCALE * text_IE @ project_DE.T
    count_I = state.rows[COUNT_ROWS]
    drawn_ID, text_ED = draw_to_text(vector_ID, text_IE, count_I, placing, regress_on_text(vector_ID, text_IE, count_I))
    return replace(
        state,
        rows={**state.rows, ITEM_ROWS: drawn_ID - text_IE @ text_ED},
        dense={**state.dense, PROJECT: (text_ED.T / TEXT_SCALE).contiguous()},
        optimizer=restart_moments(state.optimizer),
    )


def restart_moments(optimizer: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the optimiser's tensors with what it knew of the old projection's gradients forgotten."""
    return {
        name: torch.zeros_like(tensor) if name.startswith(f"{PROJECT}.") else tensor
        for name, tensor in optimizer.items()
    }
