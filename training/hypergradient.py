"""A learning rate that follows its own gradient: raised while steps keep one way, lowered when they go to and fro.

In:  parameters with gradients, their optimiser.  Out: the optimiser's rate times a factor that is kept within bounds.
Knows nothing of models or losses.

The loss of step t falls with the rate of step t − 1 by ⟨g_t, u_{t−1}⟩, u being the step's direction: Baydin et al.
2018, "Online Learning Rate Adaptation with Hypergradient Descent", the multiplicative rule. Of that product the cosine
alone is followed, so that `strength` has no unit.
"""

import math
from collections.abc import Sequence

import torch

MOST = 10.0
"""By how much at most the rate leaves the one it started from, upwards or downwards."""


class HypergradientRate:
    """The factor on an optimiser's learning rate."""

    def __init__(self, optimizer: torch.optim.Optimizer, strength: float) -> None:
        """Start from the optimiser's own rate; a cosine of 1 multiplies it by e^`strength`, one of −1 divides it."""
        self.factor = 1.0
        self._optimizer, self._strength = optimizer, strength
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        self._parameters: list[torch.Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._last: list[torch.Tensor] = []
        """By how much the last step lowered each parameter."""

    @torch.no_grad()
    def step(self) -> None:
        """Follow the gradients that are there, then take the optimiser's step at that rate.

        Workers whose gradients and parameters are the same follow the same rate.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        if self._last:
            norms = _norm(gradients) * _norm(self._last)
            cosine = float(_dot(gradients, self._last) / norms) if norms > 0 else 0.0
            if math.isfinite(cosine):  # else the step itself is refused by whoever checks what was learned
                self.factor = min(max(self.factor * math.exp(self._strength * cosine), 1 / MOST), MOST)
        for group, rate in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * self.factor
        before = [parameter.clone() for parameter in self._parameters]
        self._optimizer.step()
        self._last = [old - parameter for old, parameter in zip(before, self._parameters, strict=True)]


def _dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return _dot(tensors, tensors).sqrt()
