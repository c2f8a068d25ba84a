"""Where tables go and what they cost, and that a step on them is the same wherever they went."""

import subprocess
import sys
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cluster.errors import ConfigError, EngineError
from cluster.ray_session import find_free_port
from embeddings.plan import TablePlan, columns_a_part, plan_tables
from embeddings.tables import TablesConfig, build_bags, build_tables

from .split_program import DIM, Model

PROGRAM = Path(__file__).with_name("split_program.py")
MB = 1_000_000


def bags(**rows: int) -> nn.Module:
    return build_bags(rows, {name: [name] for name in rows}, 32, 0.1)


def plan(
    module: nn.Module,
    *sharding: str,
    workers: int = 2,
    free_bytes: int = 1000 * MB,
    device: str = "cpu",
    pooling: dict[str, float] | None = None,
) -> TablePlan:
    return plan_tables(
        module,
        TablesConfig(dim=32, memory_fraction=0.5, sharding=sharding or ("row_wise", "table_wise")),
        workers=workers,
        workers_a_node=workers,
        device=device,
        batch_examples=100,
        pooling=pooling,
        free_bytes=free_bytes,
    )


def places(planned: TablePlan) -> dict[str, list[tuple[int, int, int, int, int]]]:
    """Table to (worker, first row, rows, first column, columns) of its parts."""
    return {
        table.name: [(s.worker, s.first_row, s.rows, s.first_column, s.columns) for s in table.shards]
        for table in planned.tables
    }


def test_tables_looked_up_one_by_one_are_split_by_rows() -> None:
    planned = plan(build_tables({"item": 1000}, 32, 0.1), "row_wise")
    assert places(planned) == {"item": [(0, 0, 500, 0, 32), (1, 500, 500, 0, 32)]}


def test_bags_on_cpu_stay_whole_and_spread_over_the_workers() -> None:
    planned = plan(bags(user=1000, item=600))
    assert {table.sharding for table in planned.tables} == {"table_wise"}
    assert sorted(part[0][0] for part in places(planned).values()) == [0, 1]


def test_bags_are_split_by_columns_when_asked_for() -> None:
    assert places(plan(bags(user=1000), "column_wise")) == {"user": [(0, 0, 1000, 0, 16), (1, 0, 1000, 16, 16)]}


@pytest.mark.parametrize(
    ("dim", "workers", "columns"), [(32, 2, 16), (32, 3, 16), (32, 8, 4), (32, 100, 4), (12, 2, 12), (64, 1, 64)]
)
def test_parts_by_columns_are_equal_and_whole_fours(dim: int, workers: int, columns: int) -> None:
    assert columns_a_part(dim, workers) == columns


def test_a_part_costs_its_weights_an_accumulator_a_row_and_what_a_step_looks_up() -> None:
    ((shard,),) = (table.shards for table in plan(bags(user=1000), workers=1, pooling={"user": 3.0}).tables)
    assert shard.weight_bytes == 1000 * 32 * 4
    assert shard.optimizer_bytes == 1000 * 4
    assert shard.lookup_bytes == 100 * (3 * 8 + 32 * 4)  # 100 examples: three ids of 8 bytes in, one vector out


def test_split_by_columns_every_part_has_its_own_accumulators() -> None:
    (table,) = plan(bags(user=1000), "column_wise").tables
    assert [(s.weight_bytes, s.optimizer_bytes) for s in table.shards] == [(1000 * 16 * 4, 4000)] * 2


def test_shards_of_a_worker_are_those_it_holds() -> None:
    planned = plan(bags(user=1000, item=600))
    assert sum(shard.rows for worker in range(2) for shard in planned.shards_of(worker)) == 1600


def test_tables_may_fill_their_fraction_of_the_free_memory_and_no_more() -> None:
    tables = build_tables({"item": 1 * MB}, 32, 0.1)  # 128 MB and 4 MB, split in two
    assert plan(tables, "row_wise", free_bytes=270 * MB).workers == 2
    with pytest.raises(EngineError, match=r"do not fit 2 workers: 65,000,000 bytes are free for the tables of each"):
        plan(tables, "row_wise", free_bytes=260 * MB)


def test_a_type_that_the_tables_do_not_have_on_the_device_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"'row_wise'\]: EmbeddingBagCollection on cpu has none .* try table_wise, col"
    ):
        plan(bags(user=1000), "row_wise")


def test_bags_on_a_gpu_can_be_split_by_rows() -> None:
    planned = plan_tables(
        bags(user=1000),
        TablesConfig(dim=32, sharding=("row_wise",)),
        workers=2,
        workers_a_node=2,
        device="cuda",
        batch_examples=100,
        free_bytes=1000 * MB,
        hbm_bytes=1000 * MB,
    )
    assert places(planned) == {"user": [(0, 0, 500, 0, 32), (1, 500, 500, 0, 32)]}
    assert not planned.tables[0].shards[0].on_host


Run = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def run_split(tmp_path: Path) -> Run:
    """Run a group of workers on tables split in one way; return what they hold after a step, or after loading."""

    def run(kind: str, sharding: str, workers: int, loaded_from: str = "") -> dict[str, torch.Tensor]:
        folder = tmp_path / f"{kind}-{sharding}-{workers}{loaded_from and '-loaded'}"
        folder.mkdir()
        port = str(find_free_port())
        words = [str(workers), port, kind, sharding, str(folder)]
        words += [str(tmp_path / loaded_from / "checkpoint")] if loaded_from else []
        running = [
            subprocess.Popen([sys.executable, PROGRAM, str(rank), *words], stderr=subprocess.PIPE, text=True)
            for rank in range(workers)
        ]
        said = [process.communicate(timeout=100)[1] for process in running]
        assert [process.returncode for process in running] == [0] * workers, said
        return load_file(folder / "state.safetensors")

    return run


def parts_on(folder: Path, rank: int) -> list[Any]:  # Any: name, first row, first column, shape
    return literal_eval((folder / f"places-{rank}").read_text())


def after_one_step(rows: int, looked_up: dict[int, int], parts: int) -> torch.Tensor:
    """Row-wise Adagrad by hand, on rows that start at 0, 1/8, 2/8, …: column c of eight has gradient c + 1 a time."""
    table = torch.arange(rows * 8).view(rows, 8) / 8
    for row, times in looked_up.items():
        gradient = times * torch.arange(1.0, 9).view(parts, -1)
        step = 0.1 * gradient / gradient.square().mean(1, keepdim=True).sqrt()
        table[row] -= step.flatten()
    return table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sharding", "parts"),
    [
        ("rows", "row_wise", 1),
        ("rows", "table_wise", 1),
        ("rows", "column_wise", 2),
        ("bags", "table_wise", 1),
        ("bags", "column_wise", 2),
    ],
)
def test_one_step_on_two_workers_is_row_wise_adagrad_on_each_part_of_a_row(
    run_split: Run, kind: str, sharding: str, parts: int
) -> None:
    state = run_split(kind, sharding, workers=2)
    assert torch.allclose(state["user"], after_one_step(6, {0: 1, 2: 2, 5: 1}, parts))
    assert torch.allclose(state["item"], after_one_step(5, {4: 1, 1: 2, 0: 1}, parts))
    # Σ (c + 1)² / 8 = 204 / 8; a row looked up twice has twice the gradient
    assert state["user.momentum"].tolist() == [25.5, 0, 102, 0, 0, 25.5]
    assert state["item.momentum"].tolist() == [25.5, 102, 0, 0, 25.5]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sharding"), [("rows", "row_wise"), ("bags", "table_wise"), ("bags", "column_wise")])
def test_training_puts_tables_where_the_plan_says(run_split: Run, tmp_path: Path, kind: str, sharding: str) -> None:
    run_split(kind, sharding, workers=2)
    held = {
        (name, rank, first_row, shape[0], first_column, shape[1])
        for rank in range(2)
        for name, first_row, first_column, shape in parts_on(tmp_path / f"{kind}-{sharding}-2", rank)
        if not name.endswith("momentum")
    }
    planned = plan_tables(
        Model(kind),
        TablesConfig(dim=DIM, sharding=(sharding,)),
        workers=2,
        workers_a_node=2,
        device="cpu",
        batch_examples=4,
        free_bytes=1000 * MB,
    )
    assert held == {(name, *place) for name, parts in places(planned).items() for place in parts}


@pytest.mark.slow
def test_a_checkpoint_of_split_columns_loads_whole_and_split_again(run_split: Run, tmp_path: Path) -> None:
    split = run_split("bags", "column_wise", workers=2)
    assert parts_on(tmp_path / "bags-column_wise-2", 1)[:2] == [
        ("item", 0, 4, (5, 4)),
        ("item.momentum", 0, 1, (5, 1)),
    ]
    whole = run_split("bags", "column_wise", workers=1, loaded_from="bags-column_wise-2")
    again = run_split("bags", "column_wise", workers=2, loaded_from="bags-column_wise-1-loaded")
    assert parts_on(tmp_path / "bags-column_wise-1-loaded", 0)[:2] == [
        ("item", 0, 0, (5, 8)),
        ("item.momentum", 0, 0, (5,)),
    ]
    for name, value in split.items():
        assert torch.equal(whole[name], value)
        assert torch.equal(again[name], value)
