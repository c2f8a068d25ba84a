"""The click model: how likely is a user to respond to an item, given what they responded to before.

In:  an `ExampleBatch`.  Out: its logits and their binary cross entropy.
Knows nothing of where batches come from. Rows come from TorchRec tables, summed a feature, sharded or not.

    user row ─┐
    item row ─┼─ concatenated ─▶ Linear ─ ReLU ─ … ─▶ logit      deep part of Wide & Deep, Cheng et al., DLRS 2016
    Σ history ┘

The pointwise model for impressions without number: it is what `recloop train` fits to an examples folder.
Shapes: B examples, D dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from cluster.errors import ConfigError
from embeddings.examples import FEATURES, ExampleBatch
from embeddings.tables import TablesConfig, build_bags, shard

if TYPE_CHECKING:
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.sparse.jagged_tensor import KeyedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ClickConfig:
    """Shape of the click model's dense part."""

    hidden: tuple[int, ...] = (64,)
    """Widths of its layers."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the dense part computes in; weights and rows stay float32."""

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1:
            raise ConfigError(f"click.hidden={list(self.hidden)}: must be widths from 1; try [64]")


class ClickLosses(NamedTuple):
    """Of one batch."""

    total: torch.Tensor
    """This worker's summed cross entropy · workers / examples of the step: DDP's mean over workers is the batch's."""
    logit_B: torch.Tensor
    """Predictions made before the batch was learned."""


class ClickDense(nn.Module):
    """Everything of the model but its tables."""

    def __init__(self, config: ClickConfig, dim: int) -> None:
        super().__init__()
        widths = [dim * sum(len(features) for features in FEATURES.values()), *config.hidden]
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.dtype = getattr(torch, config.dtype)

    def forward(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 [B], from the features' vectors side by side."""
        with torch.autocast(pooled_BD.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.layers(pooled_BD).squeeze(1).float()


class ClickModel(nn.Module):
    """Tables and dense part; once sharded, `tables` is distributed and `dense` is replicated."""

    def __init__(self, tables: nn.Module, dense: ClickDense) -> None:
        super().__init__()
        self.tables = tables
        self.dense = dense

    def forward(self, batch: ExampleBatch) -> ClickLosses:
        """Collective. Look the batch's rows up, sum them a feature, predict and compare."""
        # Collective: ids go to the workers that hold their rows, sums come back.
        pooled: KeyedTensor = self.tables(batch.lookup)
        logit_B = self.dense(_side_by_side(pooled))
        summed = functional.binary_cross_entropy_with_logits(logit_B, batch.label_B, reduction="sum")
        workers = dist.get_world_size() if dist.is_initialized() else 1
        return ClickLosses(summed * (workers / max(batch.global_examples, 1)), logit_B)


def _side_by_side(pooled: "KeyedTensor") -> torch.Tensor:
    """Return the vectors in the order of `FEATURES`, [B, D · features]; a plan may bring them in another one."""
    order = [feature for features in FEATURES.values() for feature in features]
    if pooled.keys() == order:
        return pooled.values()
    return torch.cat([pooled[feature] for feature in order], dim=1)


def build_click_model(
    tables: TablesConfig,
    model: ClickConfig,
    rows: Mapping[str, int],
    *,
    batch_examples: int,
    device: torch.device,
    seed: int,
    pooling: Mapping[str, float] | None = None,
) -> "DistributedModelParallel":
    """Collective. Return the sharded model, initialised alike for any number of workers.

    `batch_examples` is the whole batch, over all workers; `pooling` is feature to ids an example, for the planner.
    """
    torch.manual_seed(seed)
    dense = ClickDense(model, tables.dim).to(device)
    bags = build_bags(rows, FEATURES, tables.dim, tables.learning_rate)
    share = -(-batch_examples // dist.get_world_size())
    sharded = shard(ClickModel(bags, dense), tables, device, batch_examples=share, pooling=pooling)
    torch.manual_seed(seed + 1 + dist.get_rank())
    return sharded
