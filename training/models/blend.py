"""The two-stage model's scores and a classical system's, added up.

In:  two scores of each of some items.  Out: one.
Knows nothing of where they come from. It is done twice: over the catalogue for what is retrieved, and over that for the
order in which it is shown. Either score is standardised first, so that the weight means the same for all users.

Shapes: leading dimensions are free (…), K items.
"""

import torch


def blended(
    score_K: torch.Tensor, classical_K: torch.Tensor, weight: float, counted_K: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the sum [… K] of one score and `weight` times the other; what is not counted has no say in the others'."""
    return standardised(score_K, counted_K) + weight * standardised(classical_K, counted_K)


def standardised(score_K: torch.Tensor, counted_K: torch.Tensor | None = None) -> torch.Tensor:
    """Return scores with mean 0 and spread 1 over those counted; 0 where all are equal."""
    counted_K = torch.ones_like(score_K, dtype=torch.bool) if counted_K is None else counted_K
    count_1 = counted_K.sum(-1, keepdim=True).clamp(min=1)
    mean_1 = score_K.where(counted_K, 0.0).sum(-1, keepdim=True) / count_1
    centred_K = (score_K - mean_1).where(counted_K, 0.0)
    spread_1 = (centred_K.square().sum(-1, keepdim=True) / count_1).sqrt()
    return torch.where(spread_1 > 0, centred_K / spread_1, 0.0)
