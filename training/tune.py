"""Search for a recipe: trainings of the two-stage model with settings that Optuna proposes, pruned by Ray Tune.

In:  a dataset, a recipe, which keys to vary and how.  Out: a folder with best.toml and every trial's figures.
Knows nothing of test events: a trial's figure is the best validation NDCG@10 of its epochs.

    propose (TPE, Bergstra et al., NIPS 2011) ─▶ train on Ray Train ─▶ after each epoch: go on, or prune
                                                  (ASHA, Li et al., MLSys 2020: the worse part of those as far along)

Every finished epoch is on disk: a search that was stopped goes on with `--resume`, its trials begun start anew.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.config import EngineConfig, Recipe, load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.errors import ConfigError, DataError, EngineError
from cluster.home import Home
from cluster.manifest import TWO_STAGE
from cluster.progress import progress
from cluster.ray_session import ray_session
from embeddings.tables import TablesConfig
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.baselines.config import SystemConfig
from training.fit import fit_on_workers
from training.inputs import encode_items, load_inputs
from training.models.two_stage import ModelConfig
from training.run import RECIPE_FILE, TEXT_FILE, TrainConfig, new_run
from training.stream import DataConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from ray.tune import Result

METRIC = "best_ndcg_at_10"
SEARCH_FILE = "search.json"
BEST_FILE = "best.toml"
SHARED_SECTIONS = ("system", "encoder")
"""What trials share: the model that is trained, and the vectors of the items' text."""
LEAST_EPOCHS = 2
"""Epochs that every trial has before it may be pruned."""


def run(args: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Search for a better recipe: the `recloop tune` command."""
    if args.resume:
        folder = Path(args.resume).resolve()
        _read_search(folder)  # or it says that there is none
    else:
        recipe, home = load_recipe(args.recipe, args.overrides), args.home.ensure()
        folder = begin_search(
            recipe,
            load_dataset(args.data or home.default_dataset),
            home,
            Search(ranges=args.search, trials=args.trials, parallel=args.parallel),
        )
    engine = Recipe.from_toml((folder / RECIPE_FILE).read_text()).section(EngineConfig)
    with ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=args.verbose):
        return run_trials(folder, resume=bool(args.resume))


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is searched."""

    ranges: list[str]
    """As `read_range` reads them."""
    trials: int
    parallel: int
    """Trials at once."""
    dataset: str = ""


def begin_search(recipe: Recipe, dataset: Dataset, home: Home, search: Search) -> Path:
    """Write what every trial reads, and return the search's folder. Raises `ConfigError` or `DataError`."""
    system = recipe.section(SystemConfig)
    if system.name != TWO_STAGE or system.blend is not None:
        raise ConfigError(f"[system] {system.classical or system.name}: a search is for the two-stage model by itself")
    for text in search.ranges:
        read_range(text, recipe)
    folder = new_run(home, recipe, "tune").resolve()
    encoder, media = TextEncoder(recipe.section(EncoderConfig), home.cache), recipe.section(ModelConfig).media
    np.save(folder / TEXT_FILE, encode_items(encoder, dataset, media))
    load_inputs(dataset, recipe.section(DataConfig), recipe.section(TablesConfig), folder / TEXT_FILE)
    search = replace(search, dataset=str(Path(dataset.path).resolve()))
    (folder / SEARCH_FILE).write_text(json.dumps(asdict(search)))
    return folder


def read_range(text: str, recipe: Recipe) -> tuple[str, "BaseDistribution"]:
    """Return the key that `section.key=LOW..HIGH`, `…=log:LOW..HIGH` or `…=A|B` names, and what to draw its value from.

    Raises `ConfigError` for anything else, and where the recipe refuses an end of the range.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    key, equals, told = text.partition("=")
    if key.partition(".")[0] in SHARED_SECTIONS or key == "model.media":
        raise ConfigError(f"--search {text}: is the same for all trials; search once for each value")
    ends = told.removeprefix("log:").split("..")
    choices = told.split("|")
    try:
        if len(ends) == 2:
            log = told.startswith("log:")
            if all(end.strip().lstrip("-").isdecimal() for end in ends):
                found = IntDistribution(int(ends[0]), int(ends[1]), log=log)
            else:
                found = FloatDistribution(float(ends[0]), float(ends[1]), log=log)
        elif equals and len(choices) > 1:
            found, ends = CategoricalDistribution(choices), choices
        else:
            raise ValueError("is neither a range nor a choice")
    except ValueError as error:
        raise ConfigError(
            f"--search {text}: {error}; try model.dropout=0.1..0.5, train.learning_rate=log:0.001..0.01 or "
            "model.history=lstm|transformer"
        ) from error
    for end in ends:
        _overridden(recipe, {key: end})
    return key, found


def run_trial(setting: dict[str, object], *, folder: str) -> None:
    """Train one trial, in a Ray Tune actor; each epoch's figures go to Ray Tune, which may end the process."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    recipe = _overridden(Recipe.from_toml((Path(folder) / RECIPE_FILE).read_text()), setting)
    own = Path(folder) / "trials" / f"{tune.get_context().get_trial_id()}-{os.getpid()}"
    own.mkdir(parents=True)
    (own / RECIPE_FILE).write_text(recipe.to_toml())
    (own / TEXT_FILE).hardlink_to(Path(folder) / TEXT_FILE)
    job = {"recipe": recipe.to_toml(), "dataset": _read_search(Path(folder)).dataset, "folder": str(own)}
    with progress(0, "trial", unit="epoch") as bar:
        fit_on_workers(
            "training.worker:train_worker",
            job,
            recipe.section(TrainConfig),
            own,
            bar,
            done=len,
            callbacks=[TuneReportCallback()],
        )


def run_trials(folder: Path, *, resume: bool = False) -> dict[str, Any]:  # Any: JSON
    """Run a search within an open Ray session, write the best trial's recipe and return what each came to, best first.

    Raises `EngineError` where no trial came to a figure.
    """
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    search, recipe = _read_search(folder), Recipe.from_toml((folder / RECIPE_FILE).read_text())
    config = recipe.section(TrainConfig)
    space = dict(read_range(text, recipe) for text in search.ranges)
    trainable = tune.with_parameters(run_trial, folder=str(folder))
    if resume:
        tuner = tune.Tuner.restore(str(folder / "ray"), trainable, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=OptunaSearch(space=space, metric=METRIC, mode="max", seed=config.seed),
                scheduler=ASHAScheduler(metric=METRIC, mode="max", max_t=config.epochs, grace_period=LEAST_EPOCHS),
                num_samples=search.trials,
                max_concurrent_trials=search.parallel,
            ),
            run_config=tune.RunConfig(name="ray", storage_path=str(folder), verbose=0),
        )
    trials = [_describe(result) for result in tuner.fit()]
    trials.sort(key=lambda trial: trial[METRIC], reverse=True)
    if not trials or trials[0]["epochs"] == 0:
        raise EngineError(f"{folder}: no trial came to a figure; see the logs below {folder / 'ray'}")
    best = {key: trials[0][key] for key in space}
    (folder / BEST_FILE).write_text(_overridden(recipe, best).to_toml())
    return {"best": str(folder / BEST_FILE), METRIC: trials[0][METRIC], "trials": trials}


def _describe(result: "Result") -> dict[str, Any]:  # Any: JSON
    metrics = result.metrics or {}
    told = {"epochs": metrics.get("training_iteration", 0), METRIC: metrics.get(METRIC, -1.0)}
    return told | {"failed": result.error is not None} | (result.config or {})


def _overridden(recipe: Recipe, setting: dict[str, Any]) -> Recipe:
    return recipe.with_overrides([f"{key}={value}" for key, value in setting.items()])


def _read_search(folder: Path) -> Search:
    try:
        return Search(**json.loads((folder / SEARCH_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder}: holds no search ({error}); `recloop tune` begins one") from error
