"""Training on an examples folder, by real gloo processes: resuming, resharding, crashing, changed data."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster.examples import Examples, load_examples
from cluster.ray_session import find_free_port
from training.checkpoint import read_checkpoint
from training.examples.checkpoints import (
    MANIFEST,
    SPARE,
    SavedCheckpoint,
    checkpoint_folders,
    newest_checkpoint,
    read_arrays,
    worker_file,
)

from .conftest import USERS, numbered_table, write_parts

PROGRAM = Path(__file__).with_name("trainer_program.py")
ROWS = 150
"""Seven steps of 24 an epoch, fourteen in all; a checkpoint after 4, 8, 12 and the last."""


def run_workers(examples: Examples, folder: Path, workers: int, dies_after_steps: int = 0) -> str:
    """Return what the workers wrote to stderr."""
    folder.mkdir(exist_ok=True)
    port = str(find_free_port())
    started = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), str(workers), port, examples.uri, str(folder), str(dies_after_steps)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]
    return "".join(process.communicate(timeout=100)[1] for process in started)


def newest(folder: Path) -> Path:
    return checkpoint_folders(folder / "checkpoints")[0]


def position_of(folder: Path) -> tuple[int, int, int]:
    position = SavedCheckpoint.read(newest(folder)).position
    return position.steps, position.epoch, position.examples


def assert_equal_states(one: Path, other: Path, *, tolerance: float) -> None:
    first, second = read_checkpoint(newest(one)), read_checkpoint(newest(other))
    assert first.keys() == second.keys()
    assert {"tables.user", "tables.item.momentum", "dense.layers.0.weight"} <= first.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=tolerance, atol=tolerance), name
    assert first["tables.user"].abs().max() > 0.01  # something was learned


def ids_of(folder: Path) -> set[int]:
    """Return the user ids that have a row in the newest checkpoint."""
    saved = SavedCheckpoint.read(newest(folder))
    row_id = np.concatenate(read_arrays(newest(folder), "user.row_id", saved.workers))
    return set(row_id[row_id >= 0].tolist())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the data and the run of one worker that nothing happened to."""
    root = tmp_path_factory.mktemp("uninterrupted")
    write(root / "rows")
    run_workers(load_examples(str(root / "rows")), root / "run", workers=1)
    return root / "rows", root / "run"


def write(folder: Path) -> Examples:
    examples = write_parts(folder, [numbered_table(0, 90), numbered_table(90, ROWS - 90)])
    pq.write_table(numbered_table(1000, 37), folder / "heldout.parquet", row_group_size=10)
    return examples


def test_a_run_counts_every_example_of_every_epoch(uninterrupted: tuple[Path, Path]) -> None:
    _, run = uninterrupted
    end = json.loads((run / "end.json").read_text())
    assert (end["examples"], end["steps"]) == (2 * ROWS, 14)
    assert 0.5 < end["heldout_auc"] <= 1  # the label is whether the user's number is odd
    assert position_of(run) == (14, 2, 2 * ROWS)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["examples"] for line in lines] == sorted({line["examples"] for line in lines})


def test_the_newest_checkpoints_stay(uninterrupted: tuple[Path, Path]) -> None:
    _, run = uninterrupted
    assert [one.name[-2:] for one in checkpoint_folders(run / "checkpoints")] == ["14", "12", "08"]


def test_checkpoints_are_written_over_the_files_of_dropped_ones(
    uninterrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    rows, whole = uninterrupted
    spare = tmp_path / "checkpoints" / SPARE
    shutil.copytree(newest(whole), spare, ignore=shutil.ignore_patterns(MANIFEST))
    (spare / "__1_0.distcp").write_bytes(b"of a worker that is no more")
    with (spare / "__0_0.distcp").open("ab") as file:
        file.write(b"longer than the next")
    place = (spare / "__0_0.distcp").stat().st_ino
    run_workers(load_examples(str(rows)), tmp_path, workers=1, dies_after_steps=4)
    first = newest(tmp_path)
    SavedCheckpoint.read(first).verify(first)
    assert (first / "__0_0.distcp").stat().st_ino == place
    assert not (first / "__1_0.distcp").exists()
    run_workers(load_examples(str(rows)), tmp_path, workers=1)
    assert_equal_states(tmp_path, whole, tolerance=0)
    assert not spare.exists()


@pytest.mark.slow
def test_a_run_that_died_ends_as_if_it_had_not(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    rows, whole = uninterrupted
    run_workers(load_examples(str(rows)), tmp_path, workers=1, dies_after_steps=4)
    assert position_of(tmp_path) == (4, 0, 96)
    run_workers(load_examples(str(rows)), tmp_path, workers=1)
    assert position_of(tmp_path) == position_of(whole)
    assert_equal_states(tmp_path, whole, tolerance=0)


@pytest.mark.slow
def test_one_then_two_then_three_then_one_worker_end_as_one(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    rows, whole = uninterrupted
    for workers, dies_after_steps in ((1, 4), (2, 8), (3, 12), (1, 0)):
        run_workers(load_examples(str(rows)), tmp_path, workers=workers, dies_after_steps=dies_after_steps)
    assert position_of(tmp_path) == position_of(whole)
    assert_equal_states(tmp_path, whole, tolerance=1e-5)
    ends = [json.loads((folder / "end.json").read_text()) for folder in (tmp_path, whole)]
    assert ends[0]["heldout_ne"] == pytest.approx(ends[1]["heldout_ne"], abs=1e-5)


def test_ids_that_nobody_listed_get_the_same_rows_whatever_happens(tmp_path: Path) -> None:
    examples = write_parts(tmp_path / "rows", [numbered_table(0, 90), numbered_table(90, 60)], ids="any")
    run_workers(examples, tmp_path / "whole", workers=1)
    for workers, dies_after_steps in ((2, 4), (1, 12), (2, 0)):
        run_workers(examples, tmp_path / "run", workers=workers, dies_after_steps=dies_after_steps)
    assert position_of(tmp_path / "run") == position_of(tmp_path / "whole") == (14, 2, 2 * ROWS)
    assert_equal_states(tmp_path / "run", tmp_path / "whole", tolerance=1e-5)
    ids = [ids_of(tmp_path / run) for run in ("run", "whole")]
    assert ids[0] == ids[1]
    assert USERS / 2 < len(ids[0]) < USERS  # one row a bucket: some compete for theirs, and rows change hands


def harm_truncated(checkpoint: Path) -> None:
    data = checkpoint / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])


def harm_flipped(checkpoint: Path) -> None:
    data = checkpoint / "__0_0.distcp"
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(flipped)


def harm_unfinished(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def harm_lost_file(checkpoint: Path) -> None:
    (checkpoint / worker_file(0)).unlink()


@pytest.mark.parametrize("harm", [harm_truncated, harm_flipped, harm_unfinished, harm_lost_file])
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(
    harm: Callable[[Path], None], uninterrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted[1] / "checkpoints", tmp_path, dirs_exist_ok=True)
    newest_one, before, _ = checkpoint_folders(tmp_path)
    assert newest_checkpoint(tmp_path) == (newest_one, [])
    harm(newest_one)
    found, (reason,) = newest_checkpoint(tmp_path)
    assert found == before
    assert str(newest_one) in reason


def test_with_every_checkpoint_torn_there_is_none(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(uninterrupted[1] / "checkpoints", tmp_path, dirs_exist_ok=True)
    for folder in checkpoint_folders(tmp_path):
        harm_flipped(folder)
    found, reasons = newest_checkpoint(tmp_path)
    assert (found, len(reasons)) == (None, 3)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_torn_one(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    rows, whole = uninterrupted
    run_workers(load_examples(str(rows)), tmp_path, workers=1, dies_after_steps=8)
    harm_flipped(newest(tmp_path))
    said = run_workers(load_examples(str(rows)), tmp_path, workers=1)
    assert "checkpoint passed over" in said
    assert position_of(tmp_path) == position_of(whole)
    assert_equal_states(tmp_path, whole, tolerance=0)


@pytest.mark.slow
def test_data_that_changed_since_the_checkpoint_are_refused(
    uninterrupted: tuple[Path, Path], tmp_path: Path, write_numbered: Callable[..., Examples]
) -> None:
    examples = write_numbered(90, 60)
    run_workers(examples, tmp_path / "run", workers=1, dies_after_steps=4)
    pq.write_table(numbered_table(5, 60), tmp_path / "rows" / "part-00001.parquet", row_group_size=9)
    said = run_workers(examples, tmp_path / "run", workers=1)
    assert "DataError: part-00001.parquet: has changed since the checkpoint" in said
    assert position_of(tmp_path / "run")[0] == 4
