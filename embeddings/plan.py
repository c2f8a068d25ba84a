"""The sharding plan: which worker holds which rows and columns of which table, decided without a process group.

In:  a module that holds tables (the meta device will do), the settings, the workers and their memory.
Out: a `TablePlan`: what TorchRec shards by, and what it costs every worker.
Knows nothing of the process group, of the dense part or of files. `tables.shard` and `recloop plan` both ask here.

    row_wise       rows 0…r-1 │ r…2r-1 │ …     a worker each; with `EmbeddingBagCollection` on CUDA only (TorchRec 1.8)
    table_wise     the whole table             one worker
    column_wise    columns 0…c-1 │ c…2c-1 │ …  as many equal parts as there are workers, or fewer, of 4·k columns each

Row-wise Adagrad has one accumulator a row *and part*: split by columns, a row's parts adapt by themselves.

TorchRec's `data_parallel` is not among the types. Such a table is out of the fused optimiser: DDP averages a dense
gradient as large as the table in every step, and the update and its state would be the train step's own.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn

from cluster.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from torchrec.distributed.planner.types import ShardingOption, Topology
    from torchrec.distributed.types import ModuleSharder, ShardingPlan
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

    from embeddings.tables import TablesConfig

SHARDING_TYPES = ("row_wise", "table_wise", "column_wise")
COLUMNS_STEP = 4
"""Fused kernels take columns by fours."""
_VALUE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TableShard:
    """One worker's part of a table."""

    worker: int
    first_row: int
    rows: int
    first_column: int
    columns: int
    lookup_bytes: int
    """The planner's estimate of what a step's ids and vectors take: those it is asked for and those it returns."""
    on_host: bool
    """Whether the worker's host holds it, and not its GPU."""

    @property
    def weight_bytes(self) -> int:
        """Of its float32 weights."""
        return self.rows * self.columns * _VALUE_BYTES

    @property
    def optimizer_bytes(self) -> int:
        """Of its accumulators, one a row."""
        return self.rows * _VALUE_BYTES if self.columns else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTable:
    """A table and where its parts are."""

    name: str
    rows: int
    dim: int
    sharding: str
    """One of `SHARDING_TYPES`."""
    shards: tuple[TableShard, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlan:
    """What the planner decided."""

    workers: int
    tables: tuple[PlannedTable, ...]
    sharding: "ShardingPlan"
    """For TorchRec."""

    def shards_of(self, worker: int) -> list[TableShard]:
        """Return what a worker holds, of all tables."""
        return [shard for table in self.tables for shard in table.shards if shard.worker == worker]


def plan_tables(
    module: nn.Module,
    config: "TablesConfig",
    *,
    workers: int,
    workers_a_node: int,
    device: str,
    batch_examples: int,
    pooling: Mapping[str, float] | None = None,
    free_bytes: int,
    hbm_bytes: int = 0,
) -> TablePlan:
    """Return the plan for the module's tables.

    `batch_examples` is a worker's share of a batch; `pooling` is feature to ids an example, 1 for what it leaves out;
    `free_bytes` is what a machine of `workers_a_node` workers has, `hbm_bytes` what a GPU has (`device="cuda"`). Tables
    may fill `tables.memory_fraction` of either.

    Raises `ConfigError` where none of `tables.sharding` is possible, `EngineError` where the tables do not fit.
    """
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, Stats

    class Record(Stats):
        """Keeps the options that the planner chose: its plan has no sizes."""

        chosen: "Sequence[ShardingOption]" = ()

        def log(self, *_: object, **said: object) -> None:
            self.chosen = cast("list[ShardingOption]", said["best_plan"])

    logging.getLogger("torchrec").setLevel(logging.ERROR)  # it explains itself at length at every plan
    ids_an_example = {table: _pooling_of(features, pooling or {}) for table, features in _features(module)}
    constraints = {
        table: ParameterConstraints(
            sharding_types=types,
            min_partition=columns_a_part(config.dim, workers),
            pooling_factors=ids_an_example[table],
        )
        for table, types in _possible_types(module, config.sharding, device, workers)
    }
    topology = Topology(
        world_size=workers,
        local_world_size=workers_a_node,
        compute_device=device,
        ddr_cap=int(free_bytes * config.memory_fraction) // workers_a_node,
        hbm_cap=int(hbm_bytes * config.memory_fraction),
    )
    record = Record()
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_examples,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),  # a share of a GPU's; taken off above
        constraints=constraints,
        stats=[record],
        debug=False,
    )
    try:
        sharding = planner.plan(module, sharders())
    except PlannerError as error:
        raise EngineError(f"tables do not fit {workers} workers: {_reason(topology, error)}") from error
    return TablePlan(
        workers=workers,
        tables=tuple(_planned(option, device) for option in record.chosen),
        sharding=sharding,
    )


def sharders() -> "list[ModuleSharder[nn.Module]]":
    """Return what shards each kind of tables."""
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    return [
        cast("ModuleSharder[nn.Module]", sharder())  # generic over its own module type
        for sharder in (EmbeddingCollectionSharder, EmbeddingBagCollectionSharder)
    ]


def columns_a_part(dim: int, workers: int) -> int:
    """Return the columns of a part split by columns: as many equal parts as workers, or the next fewer that are equal.

    Equal parts keep one accumulator a row and part worth the same: their mean is the whole row's.
    """
    steps = dim // COLUMNS_STEP
    parts = next(parts for parts in range(min(workers, steps), 0, -1) if steps % parts == 0)
    return dim // parts


def _collections(module: nn.Module) -> "Iterator[EmbeddingCollection | EmbeddingBagCollection]":
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

    for inner in module.modules():
        if isinstance(inner, EmbeddingCollection | EmbeddingBagCollection):
            yield inner


def _features(module: nn.Module) -> list[tuple[str, list[str]]]:
    return [(config.name, config.feature_names) for inner in _collections(module) for config in _configs(inner)]


def _configs(inner: "EmbeddingCollection | EmbeddingBagCollection"):  # noqa: ANN202  (a list of either's config)
    return inner.embedding_bag_configs() if hasattr(inner, "embedding_bag_configs") else inner.embedding_configs()  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]


def _pooling_of(features: Sequence[str], pooling: Mapping[str, float]) -> list[float]:
    return [pooling.get(feature, 1.0) for feature in features]


def _possible_types(
    module: nn.Module, wanted: Sequence[str], device: str, workers: int
) -> Iterator[tuple[str, list[str]]]:
    """Yield each table with those of the wanted types that its collection has on the device."""
    by_module = {sharder.module_type: sharder for sharder in sharders()}
    for inner in _collections(module):
        known = by_module[type(inner)].sharding_types(device)
        types = [one for one in wanted if one in known]
        if not types:
            possible = ", ".join(one for one in SHARDING_TYPES if one in known)
            raise ConfigError(
                f"tables.sharding={list(wanted)}: {type(inner).__name__} on {device} has none of these; try {possible}"
            )
        for config in _configs(inner):
            # To one worker all are the same, but for the detours: rows in buckets, columns side by side.
            yield config.name, ["table_wise"] if workers == 1 and "table_wise" in types else types


def _planned(option: "ShardingOption", device: str) -> PlannedTable:
    rows, dim = option.tensor.shape
    shards = []
    for part in option.shards:
        (height, width), (first_row, first_column) = part.size, part.offset
        assert part.rank is not None  # it is a plan
        assert part.storage is not None
        on_host = device == "cpu" or part.storage.hbm < height * width * _VALUE_BYTES
        estimate = part.storage.ddr if device == "cpu" else part.storage.hbm
        # The planner counts 1/dim of the weights for accumulators, also where a part has fewer columns.
        states = height * width * _VALUE_BYTES + -(-height * width * _VALUE_BYTES // dim)
        shards.append(
            TableShard(
                worker=part.rank,
                first_row=first_row,
                rows=height,
                first_column=first_column,
                columns=width,
                lookup_bytes=max(0, estimate - (0 if on_host and device != "cpu" else states)),
                on_host=on_host,
            )
        )
    return PlannedTable(name=option.name, rows=rows, dim=dim, sharding=option.sharding_type, shards=tuple(shards))


def _reason(topology: "Topology", error: Exception) -> str:
    storage = topology.devices[0].storage
    cap = storage.hbm if topology.compute_device == "cuda" else storage.ddr
    return f"{cap:,} bytes are free for the tables of each; {str(error).splitlines()[0] if str(error) else error!r}"
