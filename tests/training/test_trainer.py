"""Batch training by two real Ray Train workers, on a checkerboard."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.config import Recipe
from cluster.errors import ConfigError, DataError
from cluster.home import Home
from cluster.registry import Registry
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.checkpoint import read_checkpoint
from training.evaluation.classical import WEIGHTS
from training.inputs import encode_items
from training.models.served import ServedModel
from training.models.version import COUNT_ROWS
from training.publish import publish_run
from training.run import METRICS_FILE, RECIPE_FILE, TEXT_FILE, TrainConfig, TrainedRun, learning_rate
from training.trainer import train_on_ray
from training.worker import UNTOLD_SPREAD, Progress

pytestmark = pytest.mark.timeout(300)  # the first test waits for the run, half a minute on idle cores


def test_a_run_leaves_its_recipe_texts_and_figures(board) -> None:
    folder = Path(board.trained.folder)
    assert Recipe.from_toml((folder / RECIPE_FILE).read_text()).section(TrainConfig) == board.recipe.section(
        TrainConfig
    )
    assert np.load(folder / TEXT_FILE).shape == (board.ITEMS, 384)
    assert TrainedRun.read(folder) == board.trained
    assert board.trained.dataset == str(board.dataset.path.resolve())
    assert board.trained.encoder_fingerprint == TextEncoder(EncoderConfig()).fingerprint


def test_every_epoch_writes_a_line_and_the_final_ones_do_not_validate(board) -> None:
    lines = [json.loads(line) for line in (Path(board.trained.folder) / METRICS_FILE).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert ["ndcg_at_10" in line for line in lines] == [True, True, False]
    assert lines[0]["loss_total"] > lines[1]["loss_total"] > lines[2]["loss_total"]
    for line in lines:
        parts = line["loss_retrieval"] + line["loss_click"] + line["loss_rating"]
        assert line["loss_total"] == pytest.approx(parts, rel=1e-5)
    assert board.trained.metrics["best_ndcg_at_10"] == max(line.get("ndcg_at_10", 0) for line in lines)


def test_tensorboard_shows_the_same_figures(board) -> None:
    folder = Path(board.trained.folder)
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    scalars = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss_total")
    assert [scalar.step for scalar in scalars] == [1, 2, 3]
    assert [scalar.value for scalar in scalars] == pytest.approx([line["loss_total"] for line in lines])


def test_the_checkpoint_holds_tables_with_spare_rows_and_optimisers(board) -> None:
    whole = read_checkpoint(Path(board.trained.checkpoint))
    spare = 4
    assert whole["tables.item"].shape == (board.ITEMS + spare, 16)
    assert whole["tables.user.momentum"].shape == (board.USERS + spare,)
    assert whole["tables.item"][: board.ITEMS].any(1).all()
    assert not whole["tables.item"][board.ITEMS :].any()
    parameters = [name.removeprefix("dense.") for name in whole if name.startswith("dense.")]
    for name in parameters:
        assert whole[f"dense_optimizer.{name}.exp_avg"].shape == whole[f"dense.{name}"].shape
        assert whole[f"dense_optimizer.{name}.step"] > 0


@pytest.mark.slow
def test_items_without_text_start_from_noise_and_spare_rows_from_nothing(board, tmp_path: Path) -> None:
    still = ["tables.learning_rate=0.0000001", "train.workers=1", "train.epochs=1", "train.final_epochs=0"]
    trained = train_on_ray(board.recipe.with_overrides(still), board.dataset, Home(tmp_path).ensure())
    rows = read_checkpoint(Path(trained.checkpoint))["tables.item"]
    assert rows[: board.ITEMS].std().item() == pytest.approx(UNTOLD_SPREAD, rel=0.2)
    assert not rows[board.ITEMS :].any()


def test_items_are_encoded_in_the_catalogue_s_order(board, tmp_path: Path) -> None:
    assert not encode_items(TextEncoder(EncoderConfig(), tmp_path), board.dataset).any()


def test_a_folder_without_a_finished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}: holds no finished training run.*`recloop train` makes one"):
        TrainedRun.read(tmp_path)


def test_the_rate_warms_up_then_falls_along_a_cosine_to_its_end() -> None:
    config = TrainConfig(warmup_steps=4, final_rate=0.2)
    assert learning_rate(0, 100, config) == pytest.approx(1 / 4)
    assert learning_rate(50, 100, config) == pytest.approx((1 + 0.2) / 2)
    assert learning_rate(100, 100, config) == learning_rate(500, 100, config) == pytest.approx(0.2)
    rates = [learning_rate(step, 100, config) for step in range(4, 101)]
    assert rates == sorted(rates, reverse=True)


def test_a_fit_ends_out_of_epochs_or_out_of_patience() -> None:
    config = TrainConfig(epochs=10, patience=2)
    assert not Progress().is_final(config)
    assert Progress(epoch=10, best_epoch=9).is_final(config)
    # Epoch 0 was the best; 1 and 2 were not better.
    assert not Progress(epoch=2, best_epoch=0).is_final(config)
    assert Progress(epoch=3, best_epoch=0).is_final(config)


@pytest.mark.parametrize(
    "setting", [{"workers": 0}, {"epochs": 0}, {"patience": 0}, {"final_epochs": -1}, {"seed": -1}, {"final_rate": 0.0}]
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=rf"train\.{name}={value}"):
        TrainConfig(**setting)


@pytest.mark.slow
def test_a_system_beside_it_is_fitted_too_and_blended_by_the_weight_that_validates_best(board, tmp_path: Path) -> None:
    beside = {"system": {"blend": "ease"}, "ease": {"l2": 10.0}}
    recipe = replace(board.recipe, values={**board.recipe.values, **beside})
    trained = train_on_ray(recipe, board.dataset, Home(tmp_path / "home").ensure())
    assert trained.metrics["blend_weight"] in WEIGHTS
    assert trained.metrics["blended_ndcg_at_10"] >= trained.metrics["best_ndcg_at_10"]
    registry = Registry(tmp_path / "registry")
    ref = publish_run(trained, registry)
    model = ServedModel.load(registry, ref)
    assert model.blend_weight == trained.metrics["blend_weight"]
    assert registry.manifest(ref).system == "two_stage"
    counted = model.state.rows[COUNT_ROWS].float()
    assert torch.equal(model.state.system["popularity"], counted), (
        "what is served is fitted on the validation share too"
    )
    met = board.met(0)
    assert model.recommend("u0", met, 1, frozenset(entry.item_id for entry in met)).item_ids == [board.withheld(0)]
