"""What weights said of interactions beforehand: how likely each was, where it ranked, how sure they were.

In:  towers, sequences with targets or with what was shown after them.  Out: `Predictions`, one entry a target; pairs.
Knows nothing of learning or of what a prediction is held against.

Shapes: I items, B sequences of L interactions, P targets in row-major order of them, K items shown, D dimension,
E encoder dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from embeddings.batch import Sequences
from embeddings.tables import ITEM, USER
from training.models.ranker import CLICK
from training.models.two_stage import TwoStage


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Of P interactions, by one set of weights over the whole catalogue."""

    loss_P: np.ndarray
    """−log p of the item chosen, in nats."""
    rank_P: np.ndarray
    """Its rank, 1 being best; of equals it has the last."""
    confidence_P: np.ndarray
    """p of the item that was held most likely."""

    @property
    def hits(self) -> np.ndarray:
        """1.0 where the item held most likely was the one chosen: its mean is what confidence should be."""
        return (self.rank_P == 1).astype(np.float64)


class ShownPairs(NamedTuple):
    """Users and items shown to them."""

    user_KD: torch.Tensor
    item_KD: torch.Tensor
    logit_K: torch.Tensor
    """The click head's, as if it were the next choice among all items."""


@dataclass(frozen=True, slots=True)
class Towers:
    """One set of weights, with the catalogue's vectors worked out."""

    dense: TwoStage
    item_ID: torch.Tensor
    """Of the items that have a text vector."""
    user_UD: torch.Tensor
    """The table's rows themselves."""

    @classmethod
    @torch.no_grad()
    def build(cls, dense: TwoStage, rows: Mapping[str, torch.Tensor], text_IE: torch.Tensor) -> "Towers":
        """Work out the catalogue's vectors of whole tables."""
        return cls(dense, dense.item_vectors(rows[ITEM][: len(text_IE)], text_IE), rows[USER])

    def histories(self, sequences: Sequences) -> torch.Tensor:
        """Return what each interaction and those before it make of their user, without the user's row, [B, L, D]."""
        device = self.item_ID.device
        return self.dense.user_vectors(
            self.item_ID[torch.from_numpy(sequences.item_row_BL).to(device).clamp(min=0)],
            torch.from_numpy(sequences.kind_BL).to(device),
            torch.from_numpy(sequences.value_BL).to(device),
            torch.from_numpy(sequences.ts_BL).to(device),
            torch.from_numpy(sequences.item_row_BL >= 0).to(device),
            self.item_ID.new_zeros(len(sequences.user_row_B), self.item_ID.shape[1]),
        )

    def before_targets(self, sequences: Sequences) -> torch.Tensor:
        """Return what the history before each target makes of its user, without the user's row, [P, D]."""
        return self.histories(sequences)[torch.from_numpy(sequences.target_row_BL >= 0).to(self.item_ID.device)]

    def user_rows(self, user_row: np.ndarray) -> torch.Tensor:
        """Return rows of users, zeros for those who have none."""
        row = torch.from_numpy(user_row).to(self.item_ID.device)
        return self.user_UD[row.clamp(min=0)] * (row >= 0).unsqueeze(1)


@torch.inference_mode()
def predict(towers: Towers, sequences: Sequences) -> Predictions:
    """Predict every target of the sequences among the items that have a text vector."""
    item_ID = towers.item_ID
    has_target_BL = sequences.target_row_BL >= 0
    user_PD = towers.before_targets(sequences) + towers.user_rows(sequences.user_row_B[np.nonzero(has_target_BL)[0]])
    target_P1 = torch.from_numpy(sequences.target_row_BL[has_target_BL]).to(item_ID.device).unsqueeze(1)
    log_p_PI = (user_PD @ item_ID.T).log_softmax(1)
    log_p_P1 = log_p_PI.gather(1, target_P1)
    return Predictions(
        loss_P=-log_p_P1.squeeze(1).cpu().numpy(),
        rank_P=(log_p_PI >= log_p_P1).sum(1).cpu().numpy(),
        confidence_P=log_p_PI.amax(1).exp().cpu().numpy(),
    )


@torch.inference_mode()
def predict_shown(towers: Towers, sequences: Sequences, sequence_K: np.ndarray, item_row_K: np.ndarray) -> ShownPairs:
    """Return what the towers and the click head make of items, each shown after all of a sequence."""
    user_BD = towers.histories(sequences)[:, -1] + towers.user_rows(sequences.user_row_B)
    log_z_B = (user_BD @ towers.item_ID.T).logsumexp(1)
    user_KD, item_KD = user_BD[sequence_K], towers.item_ID[item_row_K]
    log_p_K = (user_KD * item_KD).sum(1) - log_z_B[sequence_K]
    logit_K = towers.dense.ranker(user_KD, item_KD, log_p_K)[CLICK]
    return ShownPairs(user_KD.cpu(), item_KD.cpu(), logit_K.cpu())
