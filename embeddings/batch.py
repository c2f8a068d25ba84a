"""One batch: sequences of interactions, with every table row it needs listed once.

In:  padded sequences of table rows.  Out: a `Batch` whose positions index into the batch's distinct rows.
Knows nothing of files, losses or HTTP.

Rows are looked up once a batch however often they occur, so the tables exchange each row once between workers:

    item rows in the batch     history 7 3 7 9 · targets 3 7 9 4 · sampled negatives 4 8 7
    distinct, sorted           item_rows_N = [3 4 7 8 9]
    KeyedJaggedTensor          keys      item        user
                               lengths   5           2          one "example" a batch: stride 1
                               values    3 4 7 8 9   20 41
    positions into them        history_BL = 2 0 2 4    target_BL = 0 2 4 1    negative_S = 1 3 2

Sequences are right-aligned, so the newest interaction is the last column and padding (-1) comes first.
Shapes: B sequences, L positions, N distinct item rows, S sampled negatives, E encoder dimension.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

PAD = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Right-aligned interactions in host memory, padded with `PAD`; all arrays [B, L] unless said."""

    user_row_B: np.ndarray
    """int64; `PAD` for a user without a row."""
    item_row_BL: np.ndarray
    """int64: the interactions seen, oldest first."""
    kind_BL: np.ndarray
    """int64: index into `cluster.events.KINDS`."""
    value_BL: np.ndarray
    """float32: the feedback's value (stars); NaN where there is none."""
    ts_BL: np.ndarray
    """int64, seconds UTC; 0 where padded."""
    target_row_BL: np.ndarray
    """int64: the item interacted with next, `PAD` where nothing is to be learned."""
    target_rating_BL: np.ndarray
    """float32: its rating; NaN where the next interaction is none."""
    weight_BL: np.ndarray
    """float32: how much each target counts; 1 is fully."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one train step consumes, as tensors on one device."""

    item_rows_N: torch.Tensor
    """int64, sorted: each distinct item row of the batch."""
    text_NE: torch.Tensor
    """float32: the encoder's vector of each of these items; zeros where there is no text."""
    log_q_N: torch.Tensor
    """float32: log of the probability with which the negative sampler draws each of these items."""
    user_row_B: torch.Tensor
    has_user_B: torch.Tensor
    """bool: False where the user has no row and `user_row_B` is a stand-in."""
    history_BL: torch.Tensor
    """int64 into `item_rows_N`; padding points at 0 and is masked by `present_BL`."""
    present_BL: torch.Tensor
    kind_BL: torch.Tensor
    value_BL: torch.Tensor
    ts_BL: torch.Tensor
    target_BL: torch.Tensor
    """int64 into `item_rows_N`, `PAD` where nothing is to be learned."""
    target_rating_BL: torch.Tensor
    weight_BL: torch.Tensor
    """float32: how much each target counts."""
    negative_S: torch.Tensor
    """int64 into `item_rows_N`."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`, without waiting for the copy."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return Batch(**moved)


_OF_SEQUENCES = [f.name for f in fields(Batch) if f.name.endswith(("_B", "_BL"))]


def build_batch(sequences: Sequences, negative_rows_S: np.ndarray, text: np.ndarray, log_q: np.ndarray) -> Batch:
    """List the batch's distinct item rows and express its positions in them.

    `text` [rows, E] and `log_q` [rows] are indexed by item row; `text` may be a memory map.
    """
    history, target = sequences.item_row_BL, sequences.target_row_BL
    shape, cells = history.shape, history.size
    stacked = np.concatenate([history.ravel(), target.ravel(), negative_rows_S])
    item_rows_N, positions = np.unique(np.maximum(stacked, 0), return_inverse=True)
    present_BL = history != PAD
    target_BL = np.where(target != PAD, positions[cells : 2 * cells].reshape(shape), PAD)
    return Batch(
        item_rows_N=torch.from_numpy(item_rows_N),
        text_NE=torch.from_numpy(np.asarray(text[item_rows_N], np.float32)),
        log_q_N=torch.from_numpy(log_q[item_rows_N].astype(np.float32)),
        user_row_B=torch.from_numpy(np.maximum(sequences.user_row_B, 0)),
        has_user_B=torch.from_numpy(sequences.user_row_B != PAD),
        history_BL=torch.from_numpy(positions[:cells].reshape(shape)),
        present_BL=torch.from_numpy(present_BL),
        kind_BL=torch.from_numpy(sequences.kind_BL),
        value_BL=torch.from_numpy(sequences.value_BL.astype(np.float32)),
        ts_BL=torch.from_numpy(sequences.ts_BL),
        target_BL=torch.from_numpy(target_BL),
        target_rating_BL=torch.from_numpy(sequences.target_rating_BL.astype(np.float32)),
        weight_BL=torch.from_numpy(sequences.weight_BL),
        negative_S=torch.from_numpy(positions[2 * cells :]),
    )


def share_of_batch(batch: Batch, mine_B: torch.Tensor, text: np.ndarray) -> Batch:
    """Return the batch of some of its sequences alone, with all negatives; of none, a sequence with nothing to learn.

    `text` [rows, E] is indexed by item row; the batch's own may be left out. Everything is in host memory.
    """
    own = mine_B if mine_B.any() else torch.tensor([0])
    parts = {name: getattr(batch, name)[own] for name in _OF_SEQUENCES}
    if not mine_B.any():
        parts["has_user_B"], parts["present_BL"] = torch.tensor([False]), torch.zeros_like(parts["present_BL"])
        parts["target_BL"] = torch.full_like(parts["target_BL"], PAD)
    # What is padding in all of them is left out.
    first = int(parts["present_BL"].any(0).int().argmax()) if mine_B.any() else -1
    parts = {name: part if part.dim() == 1 else part[:, first:] for name, part in parts.items()}
    history_BL, target_BL = parts["history_BL"], parts["target_BL"]
    stacked = torch.cat([history_BL.flatten(), target_BL.clamp(min=0).flatten(), batch.negative_S])
    used_N, positions = stacked.unique(return_inverse=True)
    parts["history_BL"], target, negative_S = (
        part.reshape(shape)
        for part, shape in zip(
            positions.split([history_BL.numel(), target_BL.numel(), batch.negative_S.numel()]),
            (history_BL.shape, target_BL.shape, batch.negative_S.shape),
            strict=True,
        )
    )
    parts["target_BL"] = torch.where(target_BL == PAD, PAD, target)
    item_rows_N = batch.item_rows_N[used_N]
    return Batch(
        item_rows_N=item_rows_N,
        text_NE=torch.from_numpy(np.asarray(text[item_rows_N.numpy()], np.float32)),
        log_q_N=batch.log_q_N[used_N],
        negative_S=negative_S,
        **parts,
    )
