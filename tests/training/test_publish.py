"""A run becomes a version: complete, promoted, and the same in every process that loads it."""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster.errors import DataError, NoVersionError
from cluster.home import Home
from cluster.log import Interaction
from cluster.manifest import VersionRef
from cluster.registry import Registry
from training.checkpoint import read_checkpoint
from training.inputs import training_events
from training.models.served import ServedModel
from training.models.version import COUNT_ROWS, ITEM_ROWS, TEXT_ROWS, USER_ROWS, checkpoint_names, read_version
from training.publish import publish_run, run
from training.run import latest_run
from training.stream import DataConfig

pytestmark = pytest.mark.timeout(300)  # the first test waits for the run, half a minute on idle cores

ASK_A_NEW_PROCESS = """
import json, sys, torch
from cluster.log import Interaction
from cluster.manifest import VersionRef
from cluster.registry import Registry
from training.models.served import ServedModel
torch.set_num_threads(int(sys.argv[2]))
model = ServedModel.load(Registry(sys.argv[1]), VersionRef(1))
for user_id, history in json.load(sys.stdin):
    found = model.recommend(user_id, [Interaction(*entry) for entry in history], 12)
    print(json.dumps([found.item_ids, found.scores.tobytes().hex(), model.similar(found.item_ids[0], 3)]))
"""


def test_reloaded_in_a_new_process_it_gives_bit_equal_recommendations(board) -> None:
    asked = [(f"u{user}", board.met(user)[: user % 6]) for user in range(24)] + [("a stranger", board.met(0))]
    # Floating-point sums are cut by thread: as many threads there as here.
    command = [sys.executable, "-c", ASK_A_NEW_PROCESS, str(board.home.registry), str(torch.get_num_threads())]
    told = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    model = ServedModel.load(Registry(board.home.registry), VersionRef(1))
    answered = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(answered) == len(asked)
    for (user_id, history), (item_ids, scores, similar) in zip(asked, answered, strict=True):
        found = model.recommend(user_id, history, 12)
        assert (found.item_ids, found.scores.tobytes().hex()) == (item_ids, scores)
        assert [list(pair) for pair in model.similar(item_ids[0], 3)] == similar


def test_the_version_holds_the_checkpoint_row_for_row(board) -> None:
    state = read_version(Registry(board.home.registry), VersionRef(1), with_optimizer=True)
    whole = read_checkpoint(Path(board.trained.checkpoint))
    named = checkpoint_names(state)
    assert named.keys() == whole.keys()
    for name, tensor in named.items():
        assert torch.equal(tensor, whole[name][: len(tensor)] if name.startswith("tables.") else whole[name]), name
    assert (len(state.rows[ITEM_ROWS]), len(state.rows[USER_ROWS])) == (board.ITEMS, board.USERS)
    assert state.rows[TEXT_ROWS].shape == (board.ITEMS, 384)


def test_the_version_knows_what_it_was_trained_on(board) -> None:
    registry = Registry(board.home.registry)
    state, reader = read_version(registry, VersionRef(1)), registry.open_version(1)
    seen = training_events(board.dataset, board.recipe.section(DataConfig))
    assert reader.table("history").equals(seen)
    assert reader.manifest.metrics == {**board.trained.metrics, "encoder": state.encoder}
    assert state.encoder == board.trained.encoder_fingerprint
    assert state.learned_seq == 0
    counts = dict.fromkeys(state.item_ids, 0)
    for item_id in seen["item_id"].to_pylist():
        counts[item_id] += 1
    assert dict(zip(state.item_ids, state.rows[COUNT_ROWS].tolist(), strict=True)) == counts


def test_a_published_run_is_current_and_published_again_it_is_the_next_version(board, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    assert publish_run(board.trained, registry) == registry.current() == VersionRef(1)
    assert publish_run(board.trained, registry) == registry.current() == VersionRef(2)
    one, two = (ServedModel.load(registry, VersionRef(number)) for number in (1, 2))
    asked = [Interaction("i0", "click", None, 0, -1)]
    np.testing.assert_array_equal(one.recommend("u0", asked, 9).scores, two.recommend("u0", asked, 9).scores)


def test_the_command_publishes_the_newest_run(board) -> None:
    before = Registry(board.home.registry).current()
    told = run(argparse.Namespace(run=None, home=board.home, canary=False))
    assert told == {
        "version": str(VersionRef(before.version + 1)),
        "run": board.trained.folder,
        "metrics": board.trained.metrics,
    }


def test_a_run_published_as_canary_is_tried_on_some_users_and_not_promoted(board, tmp_path: Path) -> None:
    with pytest.raises(NoVersionError):  # there is nothing that the others could be served
        run(argparse.Namespace(run=board.trained.folder, home=Home(tmp_path).ensure(), canary=True))
    registry = Registry(board.home.registry)
    before = registry.current()
    told = run(argparse.Namespace(run=None, home=board.home, canary=True))
    canary = registry.canary()
    assert (str(canary.ref), canary.share) == (told["version"], told["share"])
    assert registry.current() == before != canary.ref
    registry.end_canary(canary, "over")


def test_without_a_run_the_error_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no finished training run; `recloop train` makes one"):
        latest_run(Home(tmp_path).ensure())


def test_a_run_whose_dataset_was_prepared_anew_otherwise_publishes_nothing(board, tmp_path: Path) -> None:
    other = tmp_path / "dataset"
    shutil.copytree(board.dataset.path, other)
    items = board.dataset.items()
    pq.write_table(items.take(list(reversed(range(len(items))))), other / "items.parquet")
    registry = Registry(tmp_path / "registry")
    with pytest.raises(DataError, match="has changed since"):
        publish_run(replace(board.trained, dataset=str(other)), registry)
    assert registry.versions() == []


def test_a_run_whose_dataset_is_gone_publishes_nothing(board, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(DataError, match="gone"):
        publish_run(replace(board.trained, dataset=str(tmp_path / "gone")), registry)
    assert registry.versions() == []
