"""A user's row learns each of their interactions at once, by the exact gradient.

In:  towers, sequences with targets.  Out: the users' rows, moved.
Knows nothing of tables' optimisers: what everyone shares, items and dense weights, moves in training/step.py, little an
event and by what many agree on. A user's row answers to nobody else, so it may follow each event far further than that:
plain SGD on −log softmax over the whole catalogue, one interaction after the other.

    row += rate / mean |v|² · weight · (v_target − Σ p_i v_i)

so that `rate` is by how much, about, the score of the item chosen rises. No sampled negatives: with them, a rate that
pays is lost in noise.

Shapes: B users, R of them with another target, D dimension, P targets.
"""

import numpy as np
import torch

from embeddings.batch import PAD, Sequences
from training.online.predictions import Towers, as_tensor


@torch.no_grad()
def learn_user_rows(towers: Towers, sequences: Sequences, rate: float) -> None:
    """Move in place the rows of users who have one; a user's sequence is their only one."""
    history_PD = towers.before_targets(sequences)
    step = rate / towers.mean_length_square().clamp(min=torch.finfo(history_PD.dtype).tiny)
    b_P, l_P = np.nonzero(sequences.target_row_BL != PAD)
    turn_P = np.arange(len(b_P)) - np.searchsorted(b_P, b_P)  # a user's first target, second, …
    has_row_P = sequences.user_row_B[b_P] >= 0
    for turn in range(turn_P.max(initial=-1) + 1):
        now_R = np.flatnonzero((turn_P == turn) & has_row_P)
        user_R, place_R = sequences.user_row_B[b_P[now_R]], (b_P[now_R], l_P[now_R])
        weight_R1 = as_tensor(sequences.weight_BL[place_R], history_PD).unsqueeze(1)
        row_RD = towers.user_rows(user_R)
        ascent_RD = towers.ascent(history_PD[now_R] + row_RD, sequences.target_row_BL[place_R])
        towers.write_user_rows(user_R, row_RD + step * weight_R1 * ascent_RD)
