"""Several two-stage models in one, from different starts, whose scores are averaged.

In:  what a two-stage model takes.  Out: the same; each member has its own loss.
Knows nothing of tables: a member has its share of every row, so that tables, deltas and serving see one model with
wide rows. Members see the same batches; they differ in where they start, in dropout and in the pairs that their rankers
are trained on (deep ensembles: Lakshminarayanan et al., NeurIPS 2017).

    score = 1/M Σ uₘᵀvₘ = uᵀv      u = [u₁ … u_M], v = [v₁ … v_M] / M

Shapes: as in two_stage.py; M members, D of all of them together.
"""

import torch
from torch import nn

from cluster.errors import ConfigError
from embeddings.batch import Batch
from training.models.two_stage import Losses, ModelConfig, Stages, TwoStage


class Ensemble(TwoStage):
    """A two-stage model that is the mean of its members."""

    def _build(self, dim: int) -> None:
        members = self.config.members
        if dim % members:
            raise ConfigError(f"model.members={members}: must divide tables.dim={dim}; each has its share of every row")
        self.members = nn.ModuleList(Stages(self.config, dim // members) for _ in range(members))

    def item_vectors(self, row_ND: torch.Tensor, text_NE: torch.Tensor) -> torch.Tensor:
        """Return item vectors, [N, D], whose products with user vectors are the members' mean scores."""
        return super().item_vectors(row_ND, text_NE) / len(self.members)

    def heads(self, user_D: torch.Tensor, item_D: torch.Tensor, score: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the mean of what the members' rankers make of pairs, shaped as their retrieval scores."""
        parts = zip(self._stages(), self._split(user_D), self._own(item_D), strict=True)
        found = [member.heads(user, item, score) for member, user, item in parts]
        return {name: torch.stack([heads[name] for heads in found]).mean(0) for name in found[0]}

    def losses(self, batch: Batch, item_ND: torch.Tensor, user_row_BD: torch.Tensor) -> Losses:
        """Return the means of the members' losses; the optimisers take steps of the same length for a share."""
        found = []
        for member, item, user_row in zip(self._stages(), self._own(item_ND), self._split(user_row_BD), strict=True):
            member.ranked_positions = self.ranked_positions
            found.append(member.losses(batch, item, user_row))
        return Losses(*(torch.stack(losses).mean() for losses in zip(*found, strict=True)))

    def encode(
        self,
        present_BL: torch.Tensor,
        item_BLD: torch.Tensor,
        kind_BL: torch.Tensor,
        value_BL: torch.Tensor,
        ts_BL: torch.Tensor,
    ) -> torch.Tensor:
        """Return what the members make of each interaction and those before it, one beside the other, [B, L, D]."""
        parts = zip(self._stages(), self._own(item_BLD), strict=True)
        encoded = [member.encode(present_BL, item, kind_BL, value_BL, ts_BL) for member, item in parts]
        return torch.cat(encoded, dim=-1)

    def _stages(self) -> list[Stages]:
        return [member for member in self.members if isinstance(member, Stages)]

    def _own(self, item_D: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return each member's own item vectors."""
        return self._split(item_D * len(self.members))

    def _split(self, vector_D: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return vector_D.chunk(len(self.members), dim=-1)


def build_two_stage(config: ModelConfig, dim: int, text_dim: int) -> TwoStage:
    """Return the model that the recipe describes, freshly drawn."""
    return (TwoStage if config.members == 1 else Ensemble)(config, dim, text_dim)
