"""Towers of which every worker holds a part: a block of the catalogue and of the users' rows, all of the dense weights.

In:  sequences, of which each worker encodes its own.  Out: what `Towers` returns, the same on every worker.
All workers call a method together, with the same arguments.

    each its users' histories ─▶ all of them to everyone ─▶ each its part of the catalogue ─▶ softmax over the whole

Of P predictions over I items by N workers, one worker scores P · I / N pairs, and P vectors and a few sums of each
prediction travel.

Shapes as in training/online/predictions.py, with I for the local part; W workers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist

from embeddings.batch import Sequences
from embeddings.tables import ITEM, USER, Piece
from training.models.two_stage import TwoStage
from training.online.predictions import Towers, as_tensor, encode_histories
from training.online.shared_rows import collect_rows, own_rows, owns


@dataclass(frozen=True, slots=True)
class SharedTowers(Towers):
    """One set of weights; `item_ID` and `user_UD` are this worker's part."""

    first_item: int
    first_user: int
    worker_B: np.ndarray
    """Who encodes each sequence."""

    @staticmethod
    @torch.no_grad()
    def build_part(dense: TwoStage, pieces: Mapping[str, Piece], text_IE: torch.Tensor) -> "SharedTowers":
        """Work out this worker's part of the catalogue's vectors; `text_IE` is of all known items."""
        items, users = pieces[ITEM], pieces[USER]
        text_IE = text_IE[items.first_row : items.first_row + len(items.values)].to(items.values.device)
        item_ID = dense.item_vectors(items.values[: len(text_IE)], text_IE)
        return SharedTowers(dense, item_ID, users.values, items.first_row, users.first_row, np.empty(0, np.int64))

    def histories_at(self, sequences: Sequences, at_BL: np.ndarray) -> torch.Tensor:
        """Collective. Encode this worker's sequences; return what all workers have encoded, [P, D]."""
        found_PD = self._own_histories_at(sequences, at_BL)
        dist.all_reduce(found_PD)  # collective: of each, one worker has it, and all others zeros
        return found_PD

    def users_at(self, sequences: Sequences, at_BL: np.ndarray) -> torch.Tensor:
        """Collective. Return users after these interactions, with their rows, [P, D]."""
        user_row_P = as_tensor(sequences.user_row_B[np.nonzero(at_BL)[0]], self.user_UD)
        found_PD = self._own_histories_at(sequences, at_BL) + own_rows(self._users, user_row_P)
        dist.all_reduce(found_PD)  # collective: one worker has the history, one the row
        return found_PD

    def _own_histories_at(self, sequences: Sequences, at_BL: np.ndarray) -> torch.Tensor:
        """Collective. Return what `histories_at` does, with zeros for the sequences of other workers."""
        item_row_N, position_BL = np.unique(np.maximum(sequences.item_row_BL, 0), return_inverse=True)
        item_ND = self.item_vectors(item_row_N)
        mine_B = self.worker_B == dist.get_rank()
        found_PD = item_ND.new_zeros(int(at_BL.sum()), item_ND.shape[1])
        if mine_B.any():
            own, first = _without_padding(sequences, mine_B)
            position_BL = as_tensor(position_BL.reshape(at_BL.shape)[mine_B, first:], item_ND)
            own_BLD = encode_histories(self.dense, own, item_ND[position_BL])
            mine_P = np.broadcast_to(mine_B[:, np.newaxis], at_BL.shape)[at_BL]
            found_PD[as_tensor(mine_P, item_ND)] = own_BLD[as_tensor(at_BL[mine_B, first:], item_ND)]
        return found_PD

    def user_rows(self, user_row: np.ndarray) -> torch.Tensor:
        """Collective. Return rows of users, zeros for those who have none."""
        return collect_rows(self._users, as_tensor(user_row, self.user_UD))

    def write_user_rows(self, user_row_R: np.ndarray, rows_RD: torch.Tensor) -> None:
        """Write those of the users' rows that this worker holds."""
        row_R = as_tensor(user_row_R, self.user_UD)
        own_R = owns(self._users, row_R)
        self.user_UD[row_R[own_R] - self.first_user] = rows_RD[own_R]

    def item_vectors(self, item_row_K: np.ndarray) -> torch.Tensor:
        """Collective. Return items' vectors, [K, D]."""
        return collect_rows(self._items, as_tensor(item_row_K, self.item_ID))

    def choices(self, user_PD: torch.Tensor, target_row_P: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Collective. Return log p of what was chosen, its rank, and the greatest p of all items, each [P]."""
        score_PI = user_PD @ self.item_ID.T
        target_P = as_tensor(target_row_P, self.item_ID)
        own_P = owns(self._items, target_P)
        target_score_P = score_PI.new_zeros(len(target_P))
        target_score_P[own_P] = score_PI[own_P, target_P[own_P] - self.first_item]
        parts_W3P = _everyones(torch.stack([score_PI.logsumexp(1), _greatest(score_PI), target_score_P]))
        log_z_P, greatest_P = parts_W3P[:, 0].logsumexp(0), parts_W3P[:, 1].amax(0)
        target_score_P = parts_W3P[:, 2].sum(0)
        rank_P = (score_PI >= target_score_P.unsqueeze(1)).sum(1)
        dist.all_reduce(rank_P)  # collective
        return target_score_P - log_z_P, rank_P, (greatest_P - log_z_P).exp()

    def log_z(self, user_BD: torch.Tensor) -> torch.Tensor:
        """Collective. Return the log of the sum of all items' exponentiated scores, [B]."""
        return _everyones((user_BD @ self.item_ID.T).logsumexp(1)).logsumexp(0)

    def ascent(self, user_RD: torch.Tensor, target_row_R: np.ndarray) -> torch.Tensor:
        """Collective. Return the gradient of what was chosen's log p for its user, [R, D]."""
        score_RI = user_RD @ self.item_ID.T
        greatest_R = _greatest(score_RI)
        weight_RI = (score_RI - greatest_R.unsqueeze(1)).exp()
        target_RD = own_rows(self._items, as_tensor(target_row_R, self.item_ID))
        sums = [target_RD, weight_RI @ self.item_ID, weight_RI.sum(1, keepdim=True), greatest_R.unsqueeze(1)]
        dim = user_RD.shape[1]
        target_WRD, sum_WRD, total_WR1, greatest_WR1 = _everyones(torch.cat(sums, 1)).split([dim, dim, 1, 1], 2)
        scale_WR1 = (greatest_WR1 - greatest_WR1.amax(0)).exp()
        return target_WRD.sum(0) - (scale_WR1 * sum_WRD).sum(0) / (scale_WR1 * total_WR1).sum(0)

    def mean_length_square(self) -> torch.Tensor:
        """Collective. Return the mean of the item vectors' squared lengths."""
        sums = torch.stack([self.item_ID.square().sum(), self.item_ID.new_tensor(len(self.item_ID))])
        dist.all_reduce(sums)  # collective
        return sums[0] / sums[1]

    def mean_square(self) -> torch.Tensor:
        """Collective. Return the mean square of what item vectors consist of."""
        return self.mean_length_square() / self.item_ID.shape[1]

    @property
    def _items(self) -> Piece:
        return Piece(self.first_item, self.item_ID, 0)

    @property
    def _users(self) -> Piece:
        return Piece(self.first_user, self.user_UD, 0)


def _without_padding(sequences: Sequences, mine_B: np.ndarray) -> tuple[Sequences, int]:
    """Return this worker's sequences from the first position on that any of them has, and which position that is."""
    first = int((sequences.item_row_BL[mine_B] >= 0).any(0).argmax())
    arrays = {f.name: getattr(sequences, f.name)[mine_B] for f in fields(Sequences)}
    return replace(sequences, **{name: a if a.ndim == 1 else a[:, first:] for name, a in arrays.items()}), first


def _greatest(score_PI: torch.Tensor) -> torch.Tensor:
    """Return each row's greatest score; of no items at all, one that is below any."""
    return score_PI.amax(1) if score_PI.shape[1] else score_PI.new_full((len(score_PI),), torch.finfo().min)


def _everyones(part: torch.Tensor) -> torch.Tensor:
    """Collective. Return what each worker gave, [W, …]."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)  # collective
    return torch.stack(parts)
