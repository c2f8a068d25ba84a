"""What weights said of interactions beforehand: how likely each was, where it ranked, how sure they were.

In:  the dense part, whole tables, sequences with targets.  Out: `Predictions`, one entry a target.
Knows nothing of learning or of what a prediction is held against.

Shapes: I items, P targets in row-major order of the sequences, D dimension, E encoder dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from embeddings.batch import Sequences
from embeddings.tables import ITEM, USER
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


@torch.inference_mode()
def predict(
    dense: TwoStage, rows: Mapping[str, torch.Tensor], text_IE: torch.Tensor, sequences: Sequences
) -> Predictions:
    """Predict every target of the sequences among the items that have a text vector."""
    device = text_IE.device
    item_ID = dense.item_vectors(rows[ITEM][: len(text_IE)], text_IE)
    present_BL = torch.from_numpy(sequences.item_row_BL >= 0).to(device)
    user_row_B = torch.from_numpy(sequences.user_row_B).to(device)
    user_row_BD = rows[USER][user_row_B.clamp(min=0)] * (user_row_B >= 0).unsqueeze(1)
    user_BLD = dense.user_vectors(
        item_ID[torch.from_numpy(sequences.item_row_BL).to(device).clamp(min=0)],
        torch.from_numpy(sequences.kind_BL).to(device),
        torch.from_numpy(sequences.value_BL).to(device),
        torch.from_numpy(sequences.ts_BL).to(device),
        present_BL,
        user_row_BD,
    )
    target_BL = torch.from_numpy(sequences.target_row_BL).to(device)
    learned_BL = target_BL >= 0
    log_p_PI = (user_BLD[learned_BL] @ item_ID.T).log_softmax(1)
    log_p_P1 = log_p_PI.gather(1, target_BL[learned_BL].unsqueeze(1))
    return Predictions(
        loss_P=-log_p_P1.squeeze(1).cpu().numpy(),
        rank_P=(log_p_PI >= log_p_P1).sum(1).cpu().numpy(),
        confidence_P=log_p_PI.amax(1).exp().cpu().numpy(),
    )
