"""What several tests of training share: groups of real gloo workers, and one small run on Ray Train."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from cluster.config import Recipe
from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, Dataset, write_dataset
from cluster.events import Event, events_table
from cluster.home import Home
from cluster.log import Interaction
from cluster.ray_session import RaySession
from cluster.registry import Registry
from training.models.version import USER_ROWS, VersionState, read_version
from training.publish import publish_run
from training.run import TrainedRun
from training.trainer import train_on_ray

SHARDED_PROGRAM = Path(__file__).with_name("sharded_program.py")
Dump = Callable[[int, str], dict[str, torch.Tensor]]

BOARD_RECIPE = """
[data]
train_fraction = 0.95
validation_fraction = 0.1
batch_sequences = 4
negatives = 10
[tables]
dim = 16
learning_rate = 0.1
spare_rows = 4
[model]
max_history = 8
layers = 1
dropout = 0.0
user_row_dropout = 0.25
ranker_hidden = 8
candidates = 8
[train]
workers = 2
epochs = 2
final_epochs = 1
learning_rate = 0.01
warmup_steps = 2
"""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The tensors here are tiny, and threads that spin on busy cores wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a group of one and a group of two workers have run."""
    folder = tmp_path_factory.mktemp("sharded")
    running = []
    for workers in (1, 2):
        (folder / str(workers)).mkdir()
        for rank in range(workers):
            command = [sys.executable, str(SHARDED_PROGRAM), str(rank), str(workers), str(folder)]
            # One thread each: five threads that spin on two cores wait for each other.
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


@pytest.fixture(scope="session")
def sharded(sharded_folder: Path) -> Dump:
    """Return what a group wrote: (workers, name) to tensors."""
    return lambda workers, name: load_file(sharded_folder / str(workers) / f"{name}.safetensors")


@pytest.fixture(scope="session")
def checkpoint_of(sharded_folder: Path) -> Callable[[int], Path]:
    """Return the checkpoint that a group of so many workers wrote after its first step."""
    return lambda workers: sharded_folder / f"checkpoint-{workers}"


@pytest.fixture
def version(build_home: Callable[..., Any]) -> VersionState:  # Any: TinyHome of tests/conftest.py
    """A version in memory in which every part has a say: user rows and ranker as if trained."""
    home = build_home("model.candidates=12", "model.rating_weight=0.1", seed=3)
    state = read_version(home.registry, home.registry.current(), with_optimizer=True)
    generator = torch.Generator().manual_seed(4)

    def noise(like: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * torch.randn(like.shape, generator=generator)

    heads = {name: noise(state.dense[name], 0.5) for name in ("ranker.heads.weight", "ranker.heads.bias")}
    projected = {"project.weight": noise(state.dense["project.weight"], 0.1)}
    return replace(
        state,
        rows={**state.rows, USER_ROWS: noise(state.rows[USER_ROWS], 0.3)},
        dense={**state.dense, **heads, **projected},
    )


@dataclass(frozen=True)
class Board:
    """A checkerboard: user u and item i meet where u + i is even, but for one item withheld from each user."""

    folder: Path
    dataset: Dataset
    home: Home
    recipe: Recipe
    trained: TrainedRun

    USERS, ITEMS = 96, 12

    @classmethod
    def withheld(cls, user: int) -> str:
        """Return the one item of the user's colour that the user has not met."""
        return f"i{user % cls.ITEMS}"

    @classmethod
    def met(cls, user: int) -> list[Interaction]:
        """Return what the user did, oldest first; all users take turns."""
        items = [item for item in range(cls.ITEMS) if (user + item) % 2 == 0 and item != user % cls.ITEMS]
        return [
            Interaction(f"i{item}", "rating", 4.0, ts_us=(place * 100 + user) * 1_000_000, seq=-1)
            for place, item in enumerate(np.random.default_rng(user).permutation(items))
        ]

    @classmethod
    def write(cls, path: Path) -> Dataset:
        events = [
            Event(user_id=f"u{user}", item_id=entry.item_id, kind=entry.kind, value=entry.value, ts_us=entry.ts_us)
            for user in range(cls.USERS)
            for entry in cls.met(user)
        ]
        items = [
            {"item_id": f"i{item}", "domain": "default", "text": "", "categories": []} for item in range(cls.ITEMS)
        ]
        users = [{"user_id": f"u{user}", "attributes": []} for user in range(cls.USERS)]
        return write_dataset(
            path,
            name="checkerboard",
            events=events_table(events),
            items=pa.Table.from_pylist(items, schema=ITEM_SCHEMA),
            users=pa.Table.from_pylist(users, schema=USER_SCHEMA),
            label="a square of one's own colour",
            sources=[],
            rejected={},
        )


@pytest.fixture(scope="session")
def board(ray_cluster: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Board:
    """The checkerboard, trained by two Ray Train workers and published as version 1 of its home."""
    folder = tmp_path_factory.mktemp("board")
    dataset, home = Board.write(folder / "dataset"), Home(folder / "home").ensure()
    recipe = Recipe.from_toml(BOARD_RECIPE)
    trained = train_on_ray(recipe, dataset, home)
    publish_run(trained, Registry(home.registry))
    return Board(folder=folder, dataset=dataset, home=home, recipe=recipe, trained=trained)
