"""What stands on the text vectors while the encoder learns: users by their history, items by their text alone.

In:  text vectors, histories as places among them.  Out: user vectors, item vectors, losses of the objectives.
Knows nothing of the encoder. It is left behind after fine-tuning: versions have the two-stage model instead.

    user_PD = mix(Σ attention · history)      attention by content and by how long ago (pooled, where both are level)
    logit   = user · item + bias(item)        stars: a line in it, or classes

Items have no row of their own here, so that all that can be known of one has to come from its text.
Shapes: P interactions to learn, L history length, N items encoded, I items of the catalogue, E encoder dimension, D the
head's, S star levels.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from training.encoder.config import CLICK, NEXT_ITEM, SEQUENCE, FinetuneConfig

SCALE = 4.0
"""Makes weights on vectors of length 1 learn four times as fast as the others."""
STARS = 5
CENTRE = 3.5


class Candidates(NamedTuple):
    """What a step can choose among."""

    vector_NE: torch.Tensor
    log_q_N: torch.Tensor
    """Log of the odds of each to be among them."""


class TasteHead(nn.Module):
    """Users, items and how well they go together."""

    def __init__(self, text_dim: int, config: FinetuneConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.item = nn.Linear(text_dim, dim, bias=False)
        self.bias = nn.Linear(text_dim, 1, bias=False)
        self.seen = nn.Linear(text_dim, dim, bias=False)
        self.attention = nn.Linear(text_dim, 1, bias=False)
        self.age = nn.Parameter(torch.zeros(config.max_history))
        self.mix = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.line = nn.Parameter(torch.tensor([1.0, CENTRE]))
        self.classes = nn.Linear(dim, STARS)
        for layer in (self.item, self.seen):
            nn.init.normal_(layer.weight, std=0.05)
        for layer in (self.bias, self.attention):
            nn.init.zeros_(layer.weight)

    def users(self, vector_IE: torch.Tensor, history_PL: torch.Tensor) -> torch.Tensor:
        """Return user vectors [P, D] after histories of catalogue places, oldest first, −1 where there is none."""
        present_PL = history_PL >= 0
        place_PL = history_PL.clamp(min=0)
        logit_PL = SCALE * self.attention(vector_IE).squeeze(-1)[place_PL] + self.age[-history_PL.shape[1] :]
        weight_PL = logit_PL.masked_fill(~present_PL, -1e9).softmax(-1) * present_PL
        seen_PD = (weight_PL.unsqueeze(-1) * (SCALE * self.seen(vector_IE))[place_PL]).sum(1)
        return seen_PD + self.mix(seen_PD)

    def scores(self, user_PD: torch.Tensor, vector_NE: torch.Tensor) -> torch.Tensor:
        """Return the logit of each user's choosing each item, [P, N]."""
        return SCALE * (user_PD @ self.item(vector_NE).T + self.bias(vector_NE).squeeze(-1))

    def loss(
        self, user_PD: torch.Tensor, target_P: torch.Tensor, stars_P: torch.Tensor, candidates: Candidates
    ) -> torch.Tensor:
        """Return the mean loss; `target_P` are places among the candidates, stars are NaN where there are none."""
        objective, vector_NE = self.config.objective, candidates.vector_NE
        if objective in (NEXT_ITEM, SEQUENCE):
            logit_PN = self.scores(user_PD, vector_NE) - candidates.log_q_N
            return functional.cross_entropy(logit_PN, target_P)
        if objective == CLICK:
            logit_PN = self.scores(user_PD, vector_NE)
            chosen_PN = functional.one_hot(target_P, len(vector_NE)).to(logit_PN.dtype)
            # As many drawn ones as chosen, in weight: the logit is that of chosen against drawn.
            weight_PN = chosen_PN + (1 - chosen_PN) / max(len(vector_NE) - 1, 1)
            loss = functional.binary_cross_entropy_with_logits(logit_PN, chosen_PN, weight=weight_PN, reduction="sum")
            return loss / (2 * len(target_P))
        rated_P = stars_P.isfinite()
        return rating_loss(objective, *self.stars(user_PD[rated_P], vector_NE[target_P[rated_P]]), stars_P[rated_P])

    def stars(self, user_PD: torch.Tensor, vector_PE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return of each pair the stars [P] and the logits of the star classes [P, S]."""
        item_PD = SCALE * self.item(vector_PE)
        score_P = (user_PD * item_PD).sum(-1) + SCALE * self.bias(vector_PE).squeeze(-1)
        return self.line[0] * score_P + self.line[1], self.classes(user_PD * item_PD + item_PD)


def rating_loss(objective: str, stars_P: torch.Tensor, class_PS: torch.Tensor, told_P: torch.Tensor) -> torch.Tensor:
    """Return the squared or absolute error of the stars, or the cross entropy of the classes 1 … 5."""
    if not len(told_P):
        return stars_P.sum() + class_PS.sum()  # nothing to learn: 0, not NaN
    if objective == "rating_mse":
        return functional.mse_loss(stars_P, told_P)
    if objective == "rating_mae":
        return functional.l1_loss(stars_P, told_P)
    return functional.cross_entropy(class_PS, told_P.round().long().clamp(1, STARS) - 1)


def expected_stars(class_PS: torch.Tensor) -> torch.Tensor:
    """Return the mean of the star classes."""
    return class_PS.softmax(-1) @ torch.arange(1.0, STARS + 1, device=class_PS.device)
