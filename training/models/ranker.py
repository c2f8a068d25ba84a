"""Rank candidates: one network, one head for each kind of feedback.

In:  user and candidate vectors, the retrieval score.  Out: a logit or estimate a head and candidate.
Knows nothing of how candidates were found.

The `click` head starts as the retrieval score and learns a correction to it, so an untrained ranker changes nothing.
Interactions: `mlp` over [u, v, u⊙v]; `dcn`, a cross network over [u, v] (Wang et al., WWW 2021); `bilinear`, uWv;
`deepfm`, [u, v] alone (Guo et al., IJCAI 2017): its factorisation machine is the score that the click head corrects,
its deep part reads the same vectors.

Shapes: leading dimensions are free (…); D dimension, T heads.
"""

from collections.abc import Callable

import torch
from torch import nn

CLICK = "click"
RATING = "rating"
HEADS = (CLICK, RATING)
"""`click`: binary cross entropy, "was this the item chosen". `rating`: squared error on the stated value."""

RATING_CENTRE = 3.0
"""Untrained rating estimate, in stars."""


class Ranker(nn.Module):
    """Scores (user, candidate) pairs for every head."""

    def __init__(self, dim: int, hidden: int, interaction: str, dropout: float) -> None:
        super().__init__()
        self.interaction = build_interaction(interaction, dim)
        width = self.interaction.width
        self.trunk = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout))
        self.heads = nn.Linear(hidden, len(HEADS))
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def forward(self, user_D: torch.Tensor, item_D: torch.Tensor, score: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `click` logits and `rating` estimates in stars, shaped as `score`."""
        output_T = self.heads(self.trunk(self.interaction(user_D, item_D)))
        return {CLICK: score + output_T[..., 0], RATING: RATING_CENTRE + output_T[..., 1]}


class ConcatInteraction(nn.Module):
    """[u, v, u⊙v]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = 3 * dim

    def forward(self, user_D: torch.Tensor, item_D: torch.Tensor) -> torch.Tensor:
        """Return [u, v, u⊙v], […, 3D]."""
        return torch.cat([user_D, item_D, user_D * item_D], dim=-1)


class CrossInteraction(nn.Module):
    """Two cross layers: x₀ ⊙ (W x + b) + x."""

    def __init__(self, dim: int, layers: int = 2) -> None:
        super().__init__()
        self.width = 2 * dim
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(layers))

    def forward(self, user_D: torch.Tensor, item_D: torch.Tensor) -> torch.Tensor:
        """Return the crossed features, […, 2D]."""
        first = crossed = torch.cat([user_D, item_D], dim=-1)
        for layer in self.layers:
            crossed = first * layer(crossed) + crossed
        return crossed


class BilinearInteraction(nn.Module):
    """(W u) ⊙ v."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = dim
        self.weight = nn.Linear(dim, dim, bias=False)

    def forward(self, user_D: torch.Tensor, item_D: torch.Tensor) -> torch.Tensor:
        """Return (W u) ⊙ v, […, D]."""
        return self.weight(user_D) * item_D


class DeepInteraction(nn.Module):
    """[u, v]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = 2 * dim

    def forward(self, user_D: torch.Tensor, item_D: torch.Tensor) -> torch.Tensor:
        """Return both vectors, […, 2D]."""
        return torch.cat([user_D, item_D], dim=-1)


Interaction = ConcatInteraction | CrossInteraction | BilinearInteraction | DeepInteraction
INTERACTIONS: dict[str, Callable[[int], Interaction]] = {
    "mlp": ConcatInteraction,
    "dcn": CrossInteraction,
    "bilinear": BilinearInteraction,
    "deepfm": DeepInteraction,
}


def build_interaction(name: str, dim: int) -> Interaction:
    """Return the interaction layer of that name; its `width` is the length of its output."""
    return INTERACTIONS[name](dim)
