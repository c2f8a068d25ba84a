"""Embedding tables: built on the meta device, planned, sharded, updated by a fused optimiser inside backward.

In:  table sizes, a module that holds the tables.  Out: a DistributedModelParallel module; rows in, rows out.
Knows nothing of the model around the tables. TorchRec is imported on use: Ray drivers and servers never need it.

Rows start at zero: an item is first what its text says, and its row learns the difference.
The optimiser is row-wise Adagrad (one accumulator a row, `momentum`), the fused one that CPU and CUDA share. Split by
columns, a row has one accumulator a part, and another number of parts is another optimiser: from there on each part
goes on from the mean of those before (`one_a_row`).
"""

import contextlib
import importlib.metadata
import socket
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from cluster.errors import ConfigError, RecloopError
from cluster.memory import free_memory
from embeddings.plan import SHARDING_TYPES, TablePlan, plan_tables, sharders

if TYPE_CHECKING:
    from torch.distributed._shard.metadata import ShardMetadata
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

ITEM = "item"
USER = "user"
MOMENTUM = ".momentum"
"""What follows a table's name in the name of its accumulators."""


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
    sharding: tuple[str, ...] = ("row_wise", "table_wise")
    """What the planner may choose among (`embeddings/plan.py`); `column_wise` splits rows too, which then adapt in
    parts."""

    def __post_init__(self) -> None:
        if self.dim < 4 or self.dim % 4:
            raise ConfigError(f"tables.dim={self.dim}: must be a multiple of 4; try {self.dim + -self.dim % 4 or 4}")
        if self.learning_rate <= 0:
            raise ConfigError(f"tables.learning_rate={self.learning_rate}: must be above 0")
        if self.spare_rows < 0:
            raise ConfigError(f"tables.spare_rows={self.spare_rows}: must be 0 or more")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"tables.memory_fraction={self.memory_fraction}: must be in (0, 1]")
        if not self.sharding or not set(self.sharding) <= set(SHARDING_TYPES):
            raise ConfigError(f"tables.sharding={list(self.sharding)}: must be some of {', '.join(SHARDING_TYPES)}")


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


def build_bag_lookup(lists: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> "KeyedJaggedTensor":
    """Return what to look up for B examples: of each feature the rows end to end, and how many each example has."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    return KeyedJaggedTensor(
        keys=list(lists),
        values=torch.from_numpy(np.concatenate([rows for rows, _ in lists.values()])),
        lengths=torch.from_numpy(np.concatenate([length_B for _, length_B in lists.values()]).astype(np.int32)),
    )


def shard(
    module: nn.Module,
    config: TablesConfig,
    device: torch.device,
    *,
    batch_examples: int = 1,
    pooling: Mapping[str, float] | None = None,
) -> "DistributedModelParallel":
    """Collective. Plan and shard the module's tables over the default process group; the rest becomes DDP.

    `batch_examples` is a worker's share of a batch and `pooling` feature to ids an example (1 where it is silent): what
    the planner's estimates of time and memory start from.

    Raises `ConfigError` where no sharding type is possible, `EngineError` where the tables do not fit.
    """
    from torchrec.distributed.model_parallel import DistributedModelParallel

    plan = _plan_together(module, config, device, batch_examples, pooling)
    with warnings.catch_warnings():
        # torchrec 1.8 passes DDP an argument that torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return DistributedModelParallel(module, device=device, plan=plan.sharding, sharders=sharders())


def _plan_together(
    module: nn.Module,
    config: TablesConfig,
    device: torch.device,
    batch_examples: int,
    pooling: Mapping[str, float] | None,
) -> TablePlan:
    """Collective. The first worker plans, for machines of the least memory a worker, and tells the others."""
    workers = dist.get_world_size()
    hbm_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    everyone = [("", 0, 0)] * workers
    # Collective: who is where, and with how much memory.
    dist.all_gather_object(everyone, (socket.gethostname(), free_memory(), hbm_bytes))
    workers_on = Counter(host for host, _, _ in everyone)
    workers_a_node = max(workers_on.values())
    decided: list[TablePlan | RecloopError | None] = [None]
    if dist.get_rank() == 0:
        try:
            decided[0] = plan_tables(
                module,
                config,
                workers=workers,
                workers_a_node=workers_a_node,
                device=device.type,
                batch_examples=batch_examples,
                pooling=pooling,
                free_bytes=min(free // workers_on[host] for host, free, _ in everyone) * workers_a_node,
                hbm_bytes=min(hbm for _, _, hbm in everyone),
            )
        except RecloopError as error:  # for everyone
            decided[0] = error
    dist.broadcast_object_list(decided)  # collective: all shard by the same plan, or all raise
    plan = decided[0]
    if isinstance(plan, RecloopError):
        raise plan
    assert plan is not None  # the first worker has decided
    return plan


class Piece(NamedTuple):
    """One worker's part of a table or of its accumulators."""

    first_row: int
    values: torch.Tensor
    """[rows, columns]; of accumulators [rows], or [rows, 1] where the table is split by columns. Shares memory."""
    first_column: int
    """Of a table: its first column. Of accumulators: which part of the columns they belong to."""


def table_state(sharded: "DistributedModelParallel") -> dict[str, torch.Tensor]:
    """Return every table and its accumulators as `TABLE` and `TABLE.momentum`: sharded tensors that share memory.

    Accumulators are [rows], or [rows, parts] where the table is split by columns: each part of a row adapts by itself.
    """
    names = {f"{name}.weight": name for name in _table_names(sharded)}
    state = {}
    for key, value in sharded.state_dict().items():
        if (table := names.get(".".join(key.split(".")[-2:]))) is not None:
            state[table] = value
    for key, accumulators in sharded.fused_optimizer.state_dict()["state"].items():
        table = names[".".join(key.split(".")[-2:])]
        state[f"{table}{MOMENTUM}"] = _by_parts(next(iter(accumulators.values())), state[table])
    return state


def local_shards(sharded: "DistributedModelParallel") -> dict[str, list[Piece]]:
    """Return this worker's part of every table and accumulator. Writing into a piece's values writes the table."""
    return {name: _pieces(value) for name, value in table_state(sharded).items()}


@torch.no_grad()
def gather_tables(sharded: "DistributedModelParallel", names: list[str]) -> dict[str, torch.Tensor]:
    """Collective. Return whole tables (or accumulators, one a row) by name, on the CPU of every worker."""
    pieces = local_shards(sharded)
    mine = {name: [piece._replace(values=piece.values.cpu()) for piece in pieces.get(name, [])] for name in names}
    everyone: list[dict[str, list[Piece]]] = [{} for _ in range(dist.get_world_size())]
    # Collective: every worker's rows travel to every worker.
    dist.all_gather_object(everyone, mine)
    whole = {}
    for name in names:
        columns: dict[int, dict[int, torch.Tensor]] = {}
        for first_row, values, first_column in (piece for rank in everyone for piece in rank[name]):
            if values.numel():
                columns.setdefault(first_column, {})[first_row] = values
        parts = [torch.cat([rows[first] for first in sorted(rows)]) for _, rows in sorted(columns.items())]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        whole[name] = one_a_row(joined) if name.endswith(MOMENTUM) else joined
    return whole


@torch.no_grad()
def load_tables(sharded: "DistributedModelParallel", whole: Mapping[str, torch.Tensor]) -> None:
    """Copy this worker's part out of whole tables (or accumulators); rows beyond a tensor's end stay as they are.

    Where a table is split by columns, every part of a row starts from the row's own accumulator.
    """
    for name, parts in local_shards(sharded).items():
        if name not in whole:
            continue
        for first_row, values, first_column in parts:
            rows = whole[name][first_row : first_row + values.shape[0]]
            if name.endswith(MOMENTUM):
                rows = one_a_row(rows).view(-1, *[1] * (values.dim() - 1))
            else:
                rows = rows[:, first_column : first_column + values.shape[1]]
            values[: rows.shape[0]].copy_(rows)


def one_a_row(accumulators: torch.Tensor) -> torch.Tensor:
    """Return whole accumulators, [rows] or [rows, parts], as one a row: the mean over the row's equal parts.

    From one step's gradient that is what the row, not split, would have gathered: a mean of squares over its columns.
    """
    return accumulators.mean(1) if accumulators.dim() == 2 else accumulators


@torch.no_grad()
def reset_rows(pieces: Mapping[str, list[Piece]], table: str, rows: torch.Tensor) -> None:
    """Make rows start fresh, with their accumulators; `pieces` are this worker's, from `local_shards`."""
    for name in (table, f"{table}{MOMENTUM}"):
        for first_row, values, _ in pieces.get(name, []):
            local = rows[(rows >= first_row) & (rows < first_row + values.shape[0])] - first_row
            values.index_fill_(0, local.to(values.device), 0.0)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _table_names(sharded: nn.Module) -> list[str]:
    from torchrec.distributed.embedding import ShardedEmbeddingCollection
    from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

    kinds = (ShardedEmbeddingCollection, ShardedEmbeddingBagCollection)
    return [name for module in sharded.modules() if isinstance(module, kinds) for name in module._table_names]


def _by_parts(accumulators: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return accumulators as [rows, parts] where TorchRec has laid the parts of the columns out end to end."""
    with _quiet_sharded_tensor():
        from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

        rows = table.shape[0]
        if not isinstance(accumulators, ShardedTensor) or accumulators.shape[0] == rows:
            return accumulators
        described = accumulators.metadata()
        whole = replace(
            described,
            size=torch.Size([rows, accumulators.shape[0] // rows]),
            shards_metadata=[_beside(one, rows) for one in described.shards_metadata],
        )
        shards = [Shard(s.tensor.unsqueeze(1), _beside(s.metadata, rows)) for s in accumulators.local_shards()]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, sharded_tensor_metadata=whole, process_group=accumulators._process_group
        )


def _beside(described: "ShardMetadata", rows: int) -> "ShardMetadata":
    return replace(described, shard_offsets=[0, described.shard_offsets[0] // rows], shard_sizes=[rows, 1])


def _pieces(value: torch.Tensor) -> list[Piece]:
    with _quiet_sharded_tensor():
        from torch.distributed._shard.sharded_tensor import ShardedTensor

        if isinstance(value, ShardedTensor):
            offsets = [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]
            return [Piece(at[0], tensor, at[1] if len(at) > 1 else 0) for at, tensor in offsets]
    return [Piece(0, value, 0)]


@contextlib.contextmanager
def _quiet_sharded_tensor() -> Iterator[None]:
    with warnings.catch_warnings():
        # torchrec 1.8 still shards with ShardedTensor, which torch 2.13 deprecates on every access.
        warnings.simplefilter("ignore", FutureWarning)
        yield
