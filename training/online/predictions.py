"""What weights said of interactions beforehand: how likely each was, where it ranked, how sure they were.

In:  towers, sequences with targets or with what was shown after them.  Out: `Predictions`, one entry a target; pairs.
Knows nothing of learning or of what a prediction is held against, nor of who holds the towers
(`training/online/shared_towers.py`: a worker a part of the catalogue).

Shapes: I items, B sequences of L interactions, P targets in row-major order of them, K items shown, D dimension,
E encoder dimension, R users.
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

    def before_targets(self, sequences: Sequences) -> torch.Tensor:
        """Return what the history before each target makes of its user, without the user's row, [P, D]."""
        return self.histories_at(sequences, sequences.target_row_BL >= 0)

    def histories_at(self, sequences: Sequences, at_BL: np.ndarray) -> torch.Tensor:
        """Return what these interactions and those before them make of their users, without the users' rows, [P, D]."""
        item_row_BL = torch.from_numpy(sequences.item_row_BL).to(self.item_ID.device).clamp(min=0)
        return encode_histories(self.dense, sequences, self.item_ID[item_row_BL])[as_tensor(at_BL, self.item_ID)]

    def users_at(self, sequences: Sequences, at_BL: np.ndarray) -> torch.Tensor:
        """Return users after these interactions, with their rows, [P, D]."""
        return self.histories_at(sequences, at_BL) + self.user_rows(sequences.user_row_B[np.nonzero(at_BL)[0]])

    def user_rows(self, user_row: np.ndarray) -> torch.Tensor:
        """Return rows of users, zeros for those who have none."""
        row = as_tensor(user_row, self.item_ID)
        return self.user_UD[row.clamp(min=0)] * (row >= 0).unsqueeze(1)

    def write_user_rows(self, user_row_R: np.ndarray, rows_RD: torch.Tensor) -> None:
        """Write rows of users into the table."""
        self.user_UD[as_tensor(user_row_R, self.item_ID)] = rows_RD

    def item_vectors(self, item_row_K: np.ndarray) -> torch.Tensor:
        """Return items' vectors, [K, D]."""
        return self.item_ID[as_tensor(item_row_K, self.item_ID)]

    def choices(self, user_PD: torch.Tensor, target_row_P: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return log p of what was chosen, its rank, and the greatest p of all items, each [P]."""
        log_p_PI = (user_PD @ self.item_ID.T).log_softmax(1)
        log_p_P1 = log_p_PI.gather(1, as_tensor(target_row_P, self.item_ID).unsqueeze(1))
        return log_p_P1.squeeze(1), (log_p_PI >= log_p_P1).sum(1), log_p_PI.amax(1).exp()

    def log_z(self, user_BD: torch.Tensor) -> torch.Tensor:
        """Return the log of the sum of all items' exponentiated scores, [B]."""
        return (user_BD @ self.item_ID.T).logsumexp(1)

    def ascent(self, user_RD: torch.Tensor, target_row_R: np.ndarray) -> torch.Tensor:
        """Return the gradient of what was chosen's log p for its user: its vector less the expected one, [R, D]."""
        return self.item_vectors(target_row_R) - (user_RD @ self.item_ID.T).softmax(1) @ self.item_ID

    def mean_length_square(self) -> torch.Tensor:
        """Return the mean of the item vectors' squared lengths."""
        return self.item_ID.square().sum(1).mean()

    def mean_square(self) -> torch.Tensor:
        """Return the mean square of what item vectors consist of."""
        return self.item_ID.square().mean()


@torch.inference_mode()
def predict(towers: Towers, sequences: Sequences) -> Predictions:
    """Predict every target of the sequences among the items that have a text vector."""
    has_target_BL = sequences.target_row_BL >= 0
    user_PD = towers.users_at(sequences, has_target_BL)
    log_p_P, rank_P, confidence_P = towers.choices(user_PD, sequences.target_row_BL[has_target_BL])
    return Predictions(
        loss_P=-log_p_P.cpu().numpy(), rank_P=rank_P.cpu().numpy(), confidence_P=confidence_P.cpu().numpy()
    )


@torch.inference_mode()
def predict_shown(towers: Towers, sequences: Sequences, sequence_K: np.ndarray, item_row_K: np.ndarray) -> ShownPairs:
    """Return what the towers and the click head make of items, each shown after all of a sequence."""
    last_BL = np.zeros(sequences.item_row_BL.shape, bool)
    last_BL[:, -1] = True
    user_BD = towers.users_at(sequences, last_BL)
    log_z_B = towers.log_z(user_BD)
    user_KD, item_KD = user_BD[sequence_K], towers.item_vectors(item_row_K)
    log_p_K = (user_KD * item_KD).sum(1) - log_z_B[sequence_K]
    logit_K = towers.dense.heads(user_KD, item_KD, log_p_K)[CLICK]
    return ShownPairs(user_KD.cpu(), item_KD.cpu(), logit_K.cpu())


def encode_histories(dense: TwoStage, sequences: Sequences, item_BLD: torch.Tensor) -> torch.Tensor:
    """Return what each interaction and those before it make of their user, without the user's row, [B, L, D]."""
    return dense.user_vectors(
        item_BLD,
        as_tensor(sequences.kind_BL, item_BLD),
        as_tensor(sequences.value_BL, item_BLD),
        as_tensor(sequences.ts_BL, item_BLD),
        as_tensor(sequences.item_row_BL >= 0, item_BLD),
        item_BLD.new_zeros(item_BLD.shape[0], item_BLD.shape[2]),
    )


def as_tensor(array: np.ndarray, beside: torch.Tensor) -> torch.Tensor:
    """Return the array as a tensor on the device of another."""
    return torch.from_numpy(array).to(beside.device)
