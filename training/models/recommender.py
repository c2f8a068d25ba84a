"""The two-stage model together with its tables: what batch and online training step.

In:  a `Batch`.  Out: its losses.
Knows nothing of where batches come from. Rows come from TorchRec tables, sharded or not.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from embeddings.batch import Batch
from embeddings.tables import ITEM, USER, TablesConfig, build_lookup, build_tables, shard
from embeddings.vocabulary import Vocabulary
from training.models.ensemble import build_two_stage
from training.models.two_stage import Losses, ModelConfig, TwoStage

if TYPE_CHECKING:
    from torchrec.distributed.model_parallel import DistributedModelParallel


class Recommender(nn.Module):
    """Tables and dense part; once sharded, `tables` is distributed and `dense` is replicated."""

    def __init__(self, tables: nn.Module, dense: TwoStage) -> None:
        super().__init__()
        self.tables = tables
        self.dense = dense

    def forward(self, batch: Batch) -> Losses:
        """Collective. Look the batch's rows up and return its losses."""
        # Collective: rows are exchanged between the workers that hold them and those that need them.
        rows = self.tables(build_lookup({ITEM: batch.item_rows_N, USER: batch.user_row_B}))
        return self.dense(batch, rows[ITEM].values(), rows[USER].values())


def dense_part(model: nn.Module) -> TwoStage:
    """Return the two-stage model inside a sharded, wrapped recommender."""
    return next(module for module in model.modules() if isinstance(module, TwoStage))


def build_recommender(
    tables: TablesConfig,
    model: ModelConfig,
    items: Vocabulary,
    users: Vocabulary,
    *,
    text_dim: int,
    device: torch.device,
    seed: int,
) -> "DistributedModelParallel":
    """Collective. Return the sharded model, initialised alike for any number of workers."""
    torch.manual_seed(seed)
    dense = build_two_stage(model, tables.dim, text_dim).to(device)
    rows = {ITEM: items.capacity, USER: users.capacity}
    sharded = shard(Recommender(build_tables(rows, tables.dim, tables.learning_rate), dense), tables, device)
    torch.manual_seed(seed + 1 + dist.get_rank())  # dropout differs between workers
    return sharded
