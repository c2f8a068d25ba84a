"""Embedding tables: built on the meta device, planned, sharded, updated by a fused optimiser inside backward.

In:  table sizes, a module that holds the tables.  Out: a DistributedModelParallel module; rows in, rows out.
Knows nothing of the model around the tables. TorchRec is imported on use: Ray drivers and servers never need it.

Rows start at zero: an item is first what its text says, and its row learns the difference.
The optimiser is row-wise Adagrad (one accumulator a row, `momentum`), the fused one that CPU and CUDA share.
"""

import importlib.metadata
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import psutil
import torch
import torch.distributed as dist
from torch import nn

from cluster.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

ITEM = "item"
USER = "user"


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesConfig:
    """Size and learning rate of the embedding tables."""

    dim: int = 64
    """Length of a row; a multiple of 4 for fused kernels."""
    learning_rate: float = 0.015
    """Of fused row-wise Adagrad."""
    spare_rows: int = 4096
    """Rows kept free in each table for ids that appear after training."""
    memory_fraction: float = 0.8
    """Share of the machine's free memory that the planner may fill with tables."""

    def __post_init__(self) -> None:
        if self.dim < 4 or self.dim % 4:
            raise ConfigError(f"tables.dim={self.dim}: must be a multiple of 4; try {self.dim + -self.dim % 4 or 4}")
        if self.learning_rate <= 0:
            raise ConfigError(f"tables.learning_rate={self.learning_rate}: must be above 0")
        if self.spare_rows < 0:
            raise ConfigError(f"tables.spare_rows={self.spare_rows}: must be 0 or more")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"tables.memory_fraction={self.memory_fraction}: must be in (0, 1]")


def device_type() -> str:
    """Return `cuda` where a GPU is present and FBGEMM is its CUDA build (`EXTRA=cuda`), else `cpu`."""
    return "cuda" if torch.cuda.is_available() and _is_installed("fbgemm-gpu") else "cpu"


def build_tables(rows: Mapping[str, int], dim: int, learning_rate: float) -> "EmbeddingCollection":
    """Return one table a name, without memory yet (meta device), to be updated inside backward."""
    from torchrec.modules.embedding_configs import EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    configs = [
        EmbeddingConfig(
            name=name, num_embeddings=count, embedding_dim=dim, feature_names=[name], init_fn=nn.init.zeros_
        )
        for name, count in rows.items()
    ]
    tables = EmbeddingCollection(tables=configs, device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": learning_rate, "eps": 1e-8})
    return tables


def build_bags(
    rows: Mapping[str, int], features: Mapping[str, list[str]], dim: int, learning_rate: float
) -> "EmbeddingBagCollection":
    """Return one table a name, on the meta device, whose rows are summed for each of its features."""
    from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    configs = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=count,
            embedding_dim=dim,
            feature_names=features[name],
            pooling=PoolingType.SUM,
            init_fn=nn.init.zeros_,
        )
        for name, count in rows.items()
    ]
    tables = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": learning_rate, "eps": 1e-8})
    return tables


def build_lookup(rows_by_table: Mapping[str, torch.Tensor]) -> "KeyedJaggedTensor":
    """Return the rows to look up, one list a table, in the form `embeddings/batch.py` draws."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    return KeyedJaggedTensor(
        keys=list(rows_by_table),
        values=torch.cat(list(rows_by_table.values())),
        lengths=torch.tensor([rows.numel() for rows in rows_by_table.values()]).to(
            next(iter(rows_by_table.values())).device
        ),
    )


def shard(
    module: nn.Module, config: TablesConfig, device: torch.device, *, batch_examples: int = 1
) -> "DistributedModelParallel":
    """Collective. Plan and shard the module's tables over the default process group; the rest becomes DDP.

    `batch_examples` is a worker's share of a batch, which the planner's estimates of time and memory start from.

    Raises `EngineError` naming the planner's reason when the tables do not fit.
    """
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
    from torchrec.distributed.types import ModuleSharder, ShardingType

    workers = dist.get_world_size()
    logging.getLogger("torchrec").setLevel(logging.ERROR)  # it explains itself at length at every plan
    free_bytes = psutil.virtual_memory().available
    topology = Topology(
        world_size=workers,
        local_world_size=workers,
        compute_device=device.type,
        ddr_cap=free_bytes // workers,
    )
    sharders = [
        cast("ModuleSharder[nn.Module]", sharder())  # generic over its own module type
        for sharder in (EmbeddingCollectionSharder, EmbeddingBagCollectionSharder)
    ]
    # Whole rows stay together, so that gathering and loading are by row.
    by_row = ParameterConstraints(sharding_types=[ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value])
    constraints = {name: by_row for module in module.modules() for name in _tables_of(module)}
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_examples,
        storage_reservation=FixedPercentageStorageReservation(percentage=1 - config.memory_fraction),
        constraints=constraints,
        debug=False,
    )
    try:
        # Collective: rank 0 plans, the others receive the plan.
        plan = planner.collective_plan(module, sharders, dist.GroupMember.WORLD)
    except PlannerError as error:
        raise EngineError(f"tables do not fit {workers} workers with {free_bytes:,} bytes free: {error}") from error
    with warnings.catch_warnings():
        # torchrec 1.8 passes DDP an argument that torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return DistributedModelParallel(module, device=device, plan=plan, sharders=sharders)


def table_state(sharded: "DistributedModelParallel") -> dict[str, torch.Tensor]:
    """Return every table and its accumulator as `TABLE` and `TABLE.momentum`: sharded tensors that share memory."""
    names = {f"{name}.weight": name for name in _table_names(sharded)}
    state = {}
    for key, value in sharded.state_dict().items():
        if (table := names.get(".".join(key.split(".")[-2:]))) is not None:
            state[table] = value
    for key, accumulators in sharded.fused_optimizer.state_dict()["state"].items():
        state[f"{names['.'.join(key.split('.')[-2:])]}.momentum"] = next(iter(accumulators.values()))
    return state


def local_shards(sharded: "DistributedModelParallel") -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Return this worker's part of every table and accumulator as (first global row, local tensor).

    The tensors are views: writing into them writes the table.
    """
    return {name: _pieces(value) for name, value in table_state(sharded).items()}


@torch.no_grad()
def gather_tables(sharded: "DistributedModelParallel", names: list[str]) -> dict[str, torch.Tensor]:
    """Collective. Return whole tables (or accumulators) by name, on the CPU of every worker."""
    pieces = local_shards(sharded)
    mine = {name: [(first, part.cpu()) for first, part in pieces.get(name, [])] for name in names}
    everyone: list[dict[str, list[tuple[int, torch.Tensor]]]] = [{} for _ in range(dist.get_world_size())]
    # Collective: every worker's rows travel to every worker.
    dist.all_gather_object(everyone, mine)
    whole = {}
    for name in names:
        parts = {first: part for rank in everyone for first, part in rank[name] if part.numel()}
        whole[name] = torch.cat([parts[first] for first in sorted(parts)])
    return whole


@torch.no_grad()
def load_tables(sharded: "DistributedModelParallel", whole: Mapping[str, torch.Tensor]) -> None:
    """Copy this worker's rows out of whole tables (or accumulators); rows beyond a tensor's end stay as they are."""
    for name, parts in local_shards(sharded).items():
        if name in whole:
            for first, part in parts:
                rows = whole[name][first : first + part.shape[0]]
                part[: rows.shape[0]].copy_(rows)


@torch.no_grad()
def reset_rows(pieces: Mapping[str, list[tuple[int, torch.Tensor]]], table: str, rows: torch.Tensor) -> None:
    """Make rows start fresh, with their accumulators; `pieces` are this worker's, from `local_shards`."""
    for name in (table, f"{table}.momentum"):
        for first, part in pieces.get(name, []):
            local = rows[(rows >= first) & (rows < first + part.shape[0])] - first
            part.index_fill_(0, local.to(part.device), 0.0)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _table_names(sharded: nn.Module) -> list[str]:
    return [name for module in sharded.modules() for name in _tables_of(module)]


def _tables_of(module: nn.Module) -> list[str]:
    from torchrec.distributed.embedding import ShardedEmbeddingCollection
    from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

    if isinstance(module, EmbeddingCollection):
        return [config.name for config in module.embedding_configs()]
    if isinstance(module, EmbeddingBagCollection):
        return [config.name for config in module.embedding_bag_configs()]
    if isinstance(module, ShardedEmbeddingCollection | ShardedEmbeddingBagCollection):
        return module._table_names
    return []


def _pieces(value: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    with warnings.catch_warnings():
        # torchrec 1.8 still shards with ShardedTensor, which torch 2.13 deprecates on every access.
        warnings.simplefilter("ignore", FutureWarning)
        from torch.distributed._shard.sharded_tensor import ShardedTensor

        if isinstance(value, ShardedTensor):
            return [(s.metadata.shard_offsets[0], s.tensor) for s in value.local_shards()]
    return [(0, value)]
