"""What weights said of interactions beforehand: how likely each was, where it ranked, how sure they were.

In:  the dense part, whole tables, sequences with targets.  Out: `Predictions`, one entry a target.
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


@torch.inference_mode()
def predict(
    dense: TwoStage, rows: Mapping[str, torch.Tensor], text_IE: torch.Tensor, sequences: Sequences
) -> Predictions:
    """Predict every target of the sequences among the items that have a text vector."""
    item_ID = catalogue_vectors(dense, rows, text_IE)
    has_target_BL = sequences.target_row_BL >= 0
    user_row_P = torch.from_numpy(sequences.user_row_B).to(item_ID.device)[np.nonzero(has_target_BL)[0]]
    user_row_PD = rows[USER][user_row_P.clamp(min=0)] * (user_row_P >= 0).unsqueeze(1)
    user_PD = history_vectors(dense, item_ID, sequences) + user_row_PD
    target_P1 = torch.from_numpy(sequences.target_row_BL[has_target_BL]).to(item_ID.device).unsqueeze(1)
    log_p_PI = (user_PD @ item_ID.T).log_softmax(1)
    log_p_P1 = log_p_PI.gather(1, target_P1)
    return Predictions(
        loss_P=-log_p_P1.squeeze(1).cpu().numpy(),
        rank_P=(log_p_PI >= log_p_P1).sum(1).cpu().numpy(),
        confidence_P=log_p_PI.amax(1).exp().cpu().numpy(),
    )


def catalogue_vectors(dense: TwoStage, rows: Mapping[str, torch.Tensor], text_IE: torch.Tensor) -> torch.Tensor:
    """Return the vectors of the items that have a text vector, [I, D]."""
    return dense.item_vectors(rows[ITEM][: len(text_IE)], text_IE)


@torch.inference_mode()
def predict_shown(
    dense: TwoStage,
    rows: Mapping[str, torch.Tensor],
    text_IE: torch.Tensor,
    sequences: Sequences,
    sequence_K: np.ndarray,
    item_row_K: np.ndarray,
) -> ShownPairs:
    """Return what the towers and the click head make of items, each shown after all of a sequence."""
    item_ID = catalogue_vectors(dense, rows, text_IE)
    user_row_B = torch.from_numpy(sequences.user_row_B).to(item_ID.device)
    user_BD = _vectors(dense, item_ID, sequences)[:, -1]
    user_BD = user_BD + rows[USER][user_row_B.clamp(min=0)] * (user_row_B >= 0).unsqueeze(1)
    log_z_B = (user_BD @ item_ID.T).logsumexp(1)
    user_KD, item_KD = user_BD[sequence_K], item_ID[item_row_K]
    log_p_K = (user_KD * item_KD).sum(1) - log_z_B[sequence_K]
    logit_K = dense.ranker(user_KD, item_KD, log_p_K)[CLICK]
    return ShownPairs(user_KD.cpu(), item_KD.cpu(), logit_K.cpu())


def history_vectors(dense: TwoStage, item_ID: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Return what the history before each target makes of its user, the user's own row left out, [P, D]."""
    has_target_BL = torch.from_numpy(sequences.target_row_BL >= 0).to(item_ID.device)
    return _vectors(dense, item_ID, sequences)[has_target_BL]


def _vectors(dense: TwoStage, item_ID: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Return what each interaction and those before it make of their user, the user's own row left out, [B, L, D]."""
    device = item_ID.device
    return dense.user_vectors(
        item_ID[torch.from_numpy(sequences.item_row_BL).to(device).clamp(min=0)],
        torch.from_numpy(sequences.kind_BL).to(device),
        torch.from_numpy(sequences.value_BL).to(device),
        torch.from_numpy(sequences.ts_BL).to(device),
        torch.from_numpy(sequences.item_row_BL >= 0).to(device),
        item_ID.new_zeros(len(sequences.user_row_B), item_ID.shape[1]),
    )
