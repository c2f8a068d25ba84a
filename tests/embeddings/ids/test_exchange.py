"""Two real gloo workers that own half of the buckets each get the rows that one worker gets."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cluster.errors import DataError
from embeddings.ids.config import IdsConfig, table_rows
from embeddings.ids.exchange import ShardedIds

PROGRAM = Path(__file__).with_name("exchange_program.py")
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """The workers' program, for the stream and the settings that they ran with."""
    spec = importlib.util.spec_from_file_location("exchange_program", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a group of one and a group of two workers have run."""
    folder = tmp_path_factory.mktemp("exchange")
    running = []
    for workers in (1, 2):
        (folder / str(workers)).mkdir()
        for rank in range(workers):
            command = [sys.executable, str(PROGRAM), str(rank), str(workers), str(folder)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            running.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
    try:
        for process in running:
            output, _ = process.communicate(timeout=100)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Arrays:
    """What the only worker got, in every step."""
    return dict(np.load(folder / "1" / "0.npz"))


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Arrays]:
    """What each of two workers got, in every step."""
    return [dict(np.load(folder / "2" / f"{rank}.npz")) for rank in range(2)]


@pytest.mark.parametrize("table", ["user", "item"])
def test_every_id_gets_the_row_it_has_with_one_worker(
    one: Arrays, two: list[Arrays], program: ModuleType, table: str
) -> None:
    for step in range(program.STEPS):
        for rank in range(2):
            expected = program.mine(one[f"{step}.{table}_rows"], step, rank, 2)
            assert two[rank][f"{step}.{table}_rows"].tolist() == expected.tolist(), f"step {step}"


@pytest.mark.parametrize("table", ["user", "item"])
def test_every_worker_learns_all_reused_rows(one: Arrays, two: list[Arrays], program: ModuleType, table: str) -> None:
    reused = [one[f"{step}.{table}_reused"].tolist() for step in range(program.STEPS)]
    for rank in range(2):
        assert [two[rank][f"{step}.{table}_reused"].tolist() for step in range(program.STEPS)] == reused
    assert sum(map(len, reused)) > 100
    assert all(rows == sorted(set(rows)) for rows in reused)


@pytest.mark.parametrize("name", ["middle", "end"])
def test_two_workers_parts_join_into_one_worker_s_state(folder: Path, name: str) -> None:
    whole, joined = (dict(np.load(folder / workers / f"{name}.npz")) for workers in "12")
    assert whole.keys() == joined.keys()
    assert [key for key in whole if not np.array_equal(whole[key], joined[key])] == []


def test_looking_up_through_owners_gives_each_worker_its_rows(
    one: Arrays, two: list[Arrays], program: ModuleType
) -> None:
    for table in ("user", "item"):
        rows = one[f"lookup.{table}_rows"]
        assert np.array_equal(rows, one[f"{program.STEPS - 1}.{table}_rows"])  # as the last step left them
        assert [two[rank][f"lookup.{table}_rows"].tolist() for rank in range(2)] == [
            rows[rank::2].tolist() for rank in range(2)
        ]


def test_one_worker_maps_repeated_ids_to_one_row_each() -> None:
    sharded = ShardedIds(IdsConfig(user_rows=100, item_rows=1000))
    mapped = sharded.map(np.array([7, 8, 7]), np.array([5, 5, 6, 5]), 0)
    a, b, again = mapped.user_rows.tolist()
    assert a == again != b
    assert max(a, b) < table_rows(100)
    assert len(set(mapped.item_rows.tolist())) == 2
    assert sharded.tables["item"].state()["row_count"].max() == 3
    assert (mapped.user_reused.size, mapped.item_reused.size) == (0, 0)
    assert [rows.tolist() for rows in sharded.lookup(np.array([8, 9]), np.array([5]))] == [
        [b, -1],
        [mapped.item_rows[0]],
        [],
        [],
    ]


def test_no_ids_map_to_no_rows() -> None:
    nothing = np.empty(0, np.int64)
    assert [rows.size for rows in ShardedIds(IdsConfig(user_rows=1, item_rows=1)).map(nothing, nothing, 0)] == [0] * 4


def test_a_negative_id_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="id -4 at position 1"):
        ShardedIds(IdsConfig(user_rows=1, item_rows=1)).map(np.array([1]), np.array([1, -4]), 0)
