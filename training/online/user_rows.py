"""A user's row learns each of their interactions at once, by the exact gradient.

In:  towers, sequences with targets.  Out: the users' rows, moved.
Knows nothing of tables' optimisers: what everyone shares, items and dense weights, moves in training/step.py, little an
event and by what many agree on. A user's row answers to nobody else, so it may follow each event far further than that:
plain SGD on −log softmax over the whole catalogue, one interaction after the other.

    row += rate / mean |v|² · weight · (v_target − Σ p_i v_i)

so that `rate` is by how much, about, the score of the item chosen rises. No sampled negatives: with them, a rate that
pays is lost in noise.

Shapes: B users, R of them with another target, I items, D dimension, P targets.
"""

import numpy as np
import torch

from embeddings.batch import PAD, Sequences
from training.online.predictions import Towers


@torch.no_grad()
def learn_user_rows(towers: Towers, sequences: Sequences, rate: float) -> None:
    """Move in place the rows of users who have one; a user's sequence is their only one."""
    item_ID, history_PD = towers.item_ID, towers.before_targets(sequences)
    step = rate / item_ID.square().sum(1).mean().clamp(min=torch.finfo(item_ID.dtype).tiny)
    b_P, l_P = np.nonzero(sequences.target_row_BL != PAD)
    turn_P = np.arange(len(b_P)) - np.searchsorted(b_P, b_P)  # a user's first target, second, …
    has_row_P = sequences.user_row_B[b_P] >= 0
    for turn in range(turn_P.max(initial=-1) + 1):
        now_R = np.flatnonzero((turn_P == turn) & has_row_P)
        user_R = torch.from_numpy(sequences.user_row_B[b_P[now_R]]).to(item_ID.device)
        target_R = torch.from_numpy(sequences.target_row_BL[b_P[now_R], l_P[now_R]]).to(item_ID.device)
        weight_R = torch.from_numpy(sequences.weight_BL[b_P[now_R], l_P[now_R]]).to(item_ID.device)
        row_RD = towers.user_UD[user_R]
        expected_RD = ((history_PD[now_R] + row_RD) @ item_ID.T).softmax(1) @ item_ID
        towers.user_UD[user_R] = row_RD + step * weight_R.unsqueeze(1) * (item_ID[target_R] - expected_RD)
