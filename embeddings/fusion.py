"""An item's text, picture and sound become one vector of the model's dimension.

In:  vectors of each modality side by side.  Out: their sum, each projected and let through as far as it helps.
Knows nothing of encoders or items.

    content_NW   [ text │ image │ audio ]      a modality that an item lacks is all zeros
    fused_ND     Σ  gate_m(content) · W_m part_m

A gate is 1 at first and learns to open and close with what the item has; of what is missing it is exactly 0, and so is
its product, whatever the gate. With text alone there is nothing to weigh: no gate, and the sum is a `Linear`.

Shapes: N items, W all modalities' widths, M modalities, D dimension.
"""

from collections.abc import Sequence

import torch
from torch import nn

from cluster.errors import ConfigError


class GatedFusion(nn.Module):
    """A projection a modality, and a gate a modality where there are several."""

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        """`widths` are the modalities' in the order in which they come; the first is text."""
        super().__init__()
        if not widths or min(widths) < 1:
            raise ConfigError(f"modalities of widths {list(widths)}: each must be at least 1, and one must be there")
        self.widths = list(widths)
        # One weight over all of them: with text alone its name, shape and value are those of nn.Linear without a bias.
        self.weight = nn.Parameter(torch.empty(dim, sum(widths)))
        nn.init.normal_(self.weight, std=0.01)
        self.gate = nn.Linear(sum(widths), len(widths)) if len(widths) > 1 else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, content_NW: torch.Tensor) -> torch.Tensor:
        """Return [N, D]; an item without any modality has the zero vector."""
        if self.gate is None:
            return nn.functional.linear(content_NW, self.weight)
        gated = self.gates(content_NW).unbind(-1)
        parts = zip(content_NW.split(self.widths, -1), self.weight.split(self.widths, 1), gated, strict=True)
        return sum(
            (gate.unsqueeze(-1) * nn.functional.linear(part, weight) for part, weight, gate in parts),
            start=content_NW.new_zeros(()),
        )

    def gates(self, content_NW: torch.Tensor) -> torch.Tensor:
        """Return how far each modality is let through, from 0 to 2, [N, M]; exactly 0 for one that is missing."""
        if self.gate is None:
            return self._present(content_NW)
        return 2 * self.gate(content_NW).sigmoid() * self._present(content_NW)

    def _present(self, content_NW: torch.Tensor) -> torch.Tensor:
        parts = content_NW.split(self.widths, -1)
        return torch.stack([(part != 0).any(-1).to(content_NW.dtype) for part in parts], dim=-1)
