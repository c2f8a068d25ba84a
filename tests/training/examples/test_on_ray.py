"""`recloop train` on an examples folder, on a real Ray: to the last checkpoint, on bad data, with a worker killed."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from cluster.config import load_recipe
from cluster.errors import DataError
from cluster.examples import Examples
from cluster.home import Home
from training.checkpoint import read_checkpoint
from training.examples.checkpoints import checkpoint_folders
from training.examples.trainer import train_on_examples

from .conftest import bad_table, write_parts

pytestmark = pytest.mark.usefixtures("ray_cluster")
SETTINGS = (
    "tables.dim=8",
    "click.hidden=[8]",
    "stream.batch_examples=48",
    "stream.lanes=6",
    "train.checkpoint_steps=10",
    "train.log_steps=2",
    "train.workers=2",
    "train.max_failures=2",
)


def train(examples: Examples, home: Path, *settings: str) -> dict:
    recipe = load_recipe("clicks", [*SETTINGS, *settings])
    return train_on_examples(recipe, examples.uri, Home(home).ensure())


def checkpoints_below(home: Path) -> list[Path]:
    return [folder for run in home.glob("runs/*") for folder in checkpoint_folders(run / "checkpoints")]


def test_a_run_leaves_a_checkpoint_metrics_and_its_recipe(
    write_numbered: Callable[..., Examples], tmp_path: Path
) -> None:
    trained = train(write_numbered(300, 200), tmp_path / "home")
    folder = Path(trained["folder"])
    assert (trained["examples"], trained["steps"], trained["skipped"]) == (500, 11, {})
    assert Path(trained["checkpoint"]) == folder / "checkpoints" / "step-000000000011"
    assert json.loads((folder / "run.json").read_text()) == trained
    assert "[stream]" in (folder / "recipe.toml").read_text()


def test_a_finished_run_resumed_with_another_number_of_workers_is_what_it_was(
    write_numbered: Callable[..., Examples], tmp_path: Path
) -> None:
    first = train(write_numbered(300, 200), tmp_path / "home")
    recipe = load_recipe("clicks")  # of another run: its own counts
    again = train_on_examples(recipe, "", Home(tmp_path / "home"), resume=first["folder"], workers=(1, 1))
    assert again == first
    with pytest.raises(DataError, match="is no run over examples"):
        train_on_examples(recipe, "", Home(tmp_path / "home"), resume=str(tmp_path))


def test_bad_data_end_the_run_with_the_error_that_names_them(tmp_path: Path) -> None:
    examples = write_parts(tmp_path / "bad", [bad_table("label", float("nan"))], group_rows=3)
    with pytest.raises(DataError, match=r"part-00000.parquet: row group 1: row 1: label"):
        train(examples, tmp_path / "home", "train.max_failures=0")


def test_bad_rows_are_counted_where_the_recipe_skips_them(tmp_path: Path) -> None:
    examples = write_parts(tmp_path / "bad", [bad_table("label", float("nan"))], group_rows=3)
    trained = train(examples, tmp_path / "home", 'stream.bad_rows="skip"')
    assert (trained["examples"], trained["skipped"]) == (9, {"label": 1})


@pytest.mark.slow
def test_a_killed_worker_costs_no_example_and_counts_none_twice(
    write_numbered: Callable[..., Examples], tmp_path: Path
) -> None:
    examples = write_numbered(20_000, group_rows=500)
    killed = []

    def strike() -> None:
        while len(checkpoints_below(tmp_path / "killed")) < 2:
            time.sleep(0.01)
        ours = psutil.Process().children(recursive=True)
        workers = [one for one in ours if "RayTrainWorker" in " ".join(one.cmdline())]
        workers[0].kill()
        killed.append(workers[0].pid)

    threading.Thread(target=strike, daemon=True).start()
    trained = train(examples, tmp_path / "killed", "train.checkpoint_steps=50")
    whole = train(examples, tmp_path / "whole", "train.checkpoint_steps=50")
    assert len(killed) == 1
    assert trained["examples"] == whole["examples"] == 20_000
    one, other = read_checkpoint(Path(trained["checkpoint"])), read_checkpoint(Path(whole["checkpoint"]))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
