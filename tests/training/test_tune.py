"""A search for a recipe: what may be varied, and real trials on Ray Tune."""

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from cluster.config import Recipe
from cluster.errors import ConfigError, DataError
from cluster.home import Home
from cluster.ray_session import RaySession
from training.run import TrainConfig
from training.tune import METRIC, Search, begin_search, read_range, run_trials


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("model.dropout=0.1..0.5", FloatDistribution(0.1, 0.5)),
        ("train.learning_rate=log:0.001..0.01", FloatDistribution(0.001, 0.01, log=True)),
        ("model.layers=1..3", IntDistribution(1, 3)),
        ("model.history=lstm|hstu", CategoricalDistribution(["lstm", "hstu"])),
        ("tables.dim=16|32", CategoricalDistribution(["16", "32"])),
    ],
)
def test_ranges_are_read(text: str, drawn: object) -> None:
    assert read_range(text, Recipe.from_toml("")) == (text.partition("=")[0], drawn)


@pytest.mark.parametrize(
    "text",
    ["model.dropout", "model.dropout=0.3", "model.dropout=0.1..1.5", "model.dropout=0.5..0.1", "model.drop=0.1..0.2",
     "model.history=lstm|cnn", "train.learning_rate=log:0..1",
     "encoder.batch_texts=8|16"],
)  # fmt: skip
def test_what_is_no_range_or_leads_outside_the_recipe_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--search|model\.|train\."):
        read_range(text, Recipe.from_toml(""))


def test_a_search_is_for_the_two_stage_model_by_itself(board, tmp_path: Path) -> None:
    search = Search(ranges=["model.dropout=0.1..0.2"], trials=1, parallel=1)
    for setting in ("system.name=ease", "system.blend=ease"):
        with pytest.raises(ConfigError, match="ease: a search is for"):
            begin_search(board.recipe.with_overrides([setting]), board.dataset, Home(tmp_path), search)


def test_a_folder_without_a_search_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no search"):
        run_trials(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_best_trial_s_recipe_is_written_and_a_search_goes_on(
    ray_cluster: RaySession, board, tmp_path: Path
) -> None:
    """A learning rate of next to nothing learns nothing; two epochs of a usual one learn the checkerboard."""
    recipe = board.recipe.with_overrides(["train.workers=1", "train.final_epochs=0", "tables.learning_rate=0.00001"])
    search = Search(ranges=["train.learning_rate=0.00000001|0.03"], trials=3, parallel=1)
    folder = begin_search(recipe, board.dataset, Home(tmp_path / "home").ensure(), search)
    found = run_trials(folder)
    assert len(found["trials"]) == 3
    assert not any(trial["failed"] for trial in found["trials"])
    scores = [trial[METRIC] for trial in found["trials"]]
    assert scores == sorted(scores, reverse=True)
    best = Recipe.from_toml(Path(found["best"]).read_text())
    assert best.section(TrainConfig).learning_rate == float(found["trials"][0]["train.learning_rate"])
    assert run_trials(folder, resume=True)["trials"] == found["trials"]
