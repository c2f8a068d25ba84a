"""`recloop plan`: bytes a reader can count, the verdict, and that training follows the plan."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.cli import main
from cluster.config import load_recipe
from cluster.examples import ExamplesInfo, load_examples, write_info
from embeddings.ids.config import BUCKETS, IdsConfig
from embeddings.ids.table import IdTable
from embeddings.tables import local_shards
from training.examples.worker import ExamplesTrainer
from training.needs import RAY_BYTES, id_tables_bytes
from training.plan import in_units, readable

from .conftest import Board
from .examples.conftest import ITEMS, USERS, numbered_table, write_parts

SETTINGS = ("tables.dim=8", "click.hidden=[8]", "stream.lanes=6", "stream.batch_examples=24", "stream.shuffle_rows=20")
DENSE_BYTES = 4 * (24 * 8 + 8 + 8 + 1)
"""Three vectors of 8 columns into 8 hidden units, those into one logit, with biases."""


def plan(
    capsys: pytest.CaptureFixture[str], data: Path, *words: str, settings: Sequence[str] = SETTINGS
) -> tuple[int, dict, str]:
    """Return the exit code, the figures and what was said on stderr."""
    recipe = ["--recipe", "clicks", *(word for setting in settings for word in ("--set", setting))]
    code = main(["plan", "--data", str(data), "--home", str(data / "home"), "--json", *recipe, *words])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else {}, said.err


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """150 examples of 40 users and 20 items."""
    write_parts(tmp_path / "rows", [numbered_table(0, 90), numbered_table(90, 60)])
    return tmp_path / "rows"


def test_every_byte_of_the_tables_is_on_one_worker(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, figures, said = plan(capsys, rows, "--workers", "2")
    assert (code, said, figures["fits"]) == (0, "", True)
    assert figures["tables"] == [
        {"table": "user", "sharding": "table_wise", "rows": USERS, "dim": 8}
        | {"weight_bytes": USERS * 8 * 4, "optimizer_bytes": USERS * 4},
        {"table": "item", "sharding": "table_wise", "rows": ITEMS, "dim": 8}
        | {"weight_bytes": ITEMS * 8 * 4, "optimizer_bytes": ITEMS * 4},
    ]
    assert sorted(part["worker"] for part in figures["parts"]) == [0, 1]
    held = [need["weight_bytes"] + need["optimizer_bytes"] for need in figures["needs"]]
    assert sorted(held) == [ITEMS * 9 * 4, USERS * 9 * 4]
    for need, tables_bytes in zip(figures["needs"], held, strict=True):
        assert need["copy_bytes"] == tables_bytes + 3 * DENSE_BYTES
        assert need["dense_bytes"] == 5 * DENSE_BYTES
        parts = ("weight", "optimizer", "lookup", "dense", "stream", "ids", "copy", "process")
        assert need["total_bytes"] == sum(need[f"{part}_bytes"] for part in parts)
    assert figures["machine_needs_bytes"] == RAY_BYTES + sum(need["total_bytes"] for need in figures["needs"])


def test_split_by_columns_workers_hold_alike(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (*SETTINGS, 'tables.sharding=["column_wise"]')
    _, figures, _ = plan(capsys, rows, "--workers", "2", settings=settings)
    assert [(p["table"], p["worker"], p["first_column"], p["columns"]) for p in figures["parts"]] == [
        ("user", 0, 0, 4),
        ("user", 1, 4, 4),
        ("item", 0, 0, 4),
        ("item", 1, 4, 4),
    ]
    assert [need["weight_bytes"] for need in figures["needs"]] == [(USERS + ITEMS) * 4 * 4] * 2
    assert [need["optimizer_bytes"] for need in figures["needs"]] == [(USERS + ITEMS) * 4] * 2


def test_workers_of_one_machine_share_its_memory(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, figures, _ = plan(capsys, rows, "--workers", "4", "--machines", "2")
    totals = [need["total_bytes"] for need in figures["needs"]]
    assert figures["workers_a_machine"] == 2
    assert figures["machine_needs_bytes"] == RAY_BYTES + max(sum(totals[:2]), sum(totals[2:]))


def test_tables_that_do_not_fit_are_shown_then_refused_with_numbers(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_info(rows, ExamplesInfo(schema_version=1, name="vast", rows=150, ids="rows", users=10**11, items=ITEMS))
    code, figures, said = plan(capsys, rows, "--workers", "2")
    assert (code, figures["fits"]) == (2, False)
    assert figures["tables"][0]["weight_bytes"] == 10**11 * 8 * 4
    assert "needs 3,352.76 GiB for its tables" in said  # 3.6·10¹² bytes and a few
    assert "lower tables.dim" in said


def test_a_machine_too_small_for_everything_beside_the_tables_is_named_with_the_largest_part(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, figures, said = plan(capsys, rows, settings=(*SETTINGS, "stream.prefetch=10000000000"))
    assert (code, figures["fits"]) == (2, False)
    assert "machine 0: its 2 workers and Ray need" in said
    assert "the largest part is stream_bytes=" in said


@pytest.mark.parametrize(
    ("words", "settings", "reason"),
    [
        (["--workers", "7"], SETTINGS, "stream.lanes=6: fewer than the 7 workers"),
        (["--workers", "2", "--machines", "3"], SETTINGS, "--machines 3: more than the 2 workers"),
        ([], (*SETTINGS, 'tables.sharding=["row_wise"]'), "EmbeddingBagCollection on cpu has none of these"),
    ],
)
def test_plans_that_cannot_be_are_refused_with_the_reason(
    words: list[str], settings: tuple[str, ...], reason: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = plan(capsys, rows, *words, settings=settings)
    assert code == 2
    assert reason in said


def test_ids_that_nobody_listed_have_the_capacities_of_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_parts(tmp_path / "any", [numbered_table(0, 90)], ids="any")
    settings = (*SETTINGS, "ids.user_rows=1000", "ids.item_rows=240")
    _, figures, _ = plan(capsys, tmp_path / "any", settings=settings)
    assert [table["rows"] for table in figures["tables"]] == [1200, 240]  # whole buckets of 240
    assert all(need["ids_bytes"] > 0 for need in figures["needs"])


def test_id_tables_take_what_is_said() -> None:
    config = IdsConfig(user_rows=240 * 500, item_rows=240 * 100)
    buckets = range(BUCKETS // 2)
    tables = [IdTable(capacity, config, buckets) for capacity in (config.user_rows, config.item_rows)]
    arrays = [array for table in tables for array in table._store if isinstance(array, np.ndarray)]
    states = [array for table in tables for array in table.state().values()]
    held = sum(array.nbytes for array in arrays) + 2 * sum(array.nbytes for array in states)
    assert id_tables_bytes(config, 0, 2) == pytest.approx(held, rel=0.01)


@pytest.mark.usefixtures("process_group")
def test_training_holds_what_was_planned(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, figures, _ = plan(capsys, rows, "--workers", "1")
    recipe = load_recipe("clicks", [*SETTINGS, "train.workers=1"])
    trainer = ExamplesTrainer(load_examples(str(rows)), recipe, tmp_path / "run", torch.device("cpu"))
    held = {name: tuple(piece.values.shape) for name, (piece,) in local_shards(trainer.model).items()}
    assert held == {"user": (USERS, 8), "user.momentum": (USERS,), "item": (ITEMS, 8), "item.momentum": (ITEMS,)}
    held_bytes = sum(piece.values.nbytes for (piece,) in local_shards(trainer.model).values())
    assert figures["needs"][0]["weight_bytes"] + figures["needs"][0]["optimizer_bytes"] == held_bytes


def test_a_dataset_is_planned_with_its_own_counts_and_spare_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Board.write(tmp_path / "board")
    settings = ("tables.dim=16", "tables.spare_rows=4")
    code, figures, _ = plan(capsys, Path(dataset.path), "--workers", "2", settings=settings)
    assert code == 0
    tables = {table["table"]: (table["sharding"], table["rows"]) for table in figures["tables"]}
    assert tables["item"][1] == Board.ITEMS + 4
    assert tables["user"][1] == Board.USERS + 4
    whole_bytes = sum(table["weight_bytes"] for table in figures["tables"])
    assert [need["copy_bytes"] for need in figures["needs"]] == [3 * whole_bytes] * 2


def test_people_read_units() -> None:
    assert readable({"workers": 2, "free_bytes": 3 << 30, "needs": [{"copy_bytes": 1536}]}) == {
        "workers": 2,
        "free": "3.00 GiB",
        "needs": [{"copy": "1.5 KiB"}],
    }
    assert [in_units(count) for count in (0, 1023, 1 << 20)] == ["0", "1023", "1.0 MiB"]
