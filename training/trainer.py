"""Batch training on Ray Train: sharded tables, a checkpoint an epoch, early stopping.

In:  a dataset and a recipe.  Out: a run folder: the best checkpoint, metrics.jsonl, TensorBoard scalars, run.json.
Knows nothing of versions or serving. A recipe of a classical system is fitted by classical.py instead.

    train_on_ray  (driver)   encode item text, write the job's inputs, start N workers, show progress
    train_worker  (each)     training/worker.py: for epoch: for batch: train_step; validate; report a checkpoint

The run folder must be on storage that all workers share.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.config import EngineConfig, Recipe, load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.errors import ConfigError
from cluster.examples import is_examples
from cluster.home import Home
from cluster.manifest import TWO_STAGE
from cluster.progress import progress
from cluster.ray_session import ray_session
from embeddings.tables import TablesConfig
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.baselines.config import BASKETS, RATINGS, SystemConfig
from training.baskets.fit import fit_baskets
from training.classical import check_memory, fit_beside, fit_system
from training.examples.trainer import train_on_examples
from training.fit import fit_on_workers
from training.inputs import load_inputs, write_text_vectors
from training.models.rating import RatingConfig
from training.models.two_stage import ModelConfig
from training.ratings.inputs import load_rating_inputs
from training.run import TEXT_FILE, TrainConfig, TrainedRun, new_run
from training.stream import DataConfig


def run(args: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Train on a dataset, or on an examples folder: the `recloop train` command."""
    if args.resume and (args.overrides or args.epochs):
        raise ConfigError("--resume: the run goes on with its own recipe; of all settings only --workers may change")
    overrides = [f"train.epochs={args.epochs}"] if args.epochs is not None else []
    if args.workers is not None:
        fewest, most = args.workers
        overrides += [f"train.workers={most}", f"train.min_workers={fewest if fewest < most else 'none'}"]
    recipe = load_recipe(args.recipe, [*args.overrides, *overrides])
    data, home = args.data or args.home.default_dataset, args.home.ensure()
    system = recipe.section(SystemConfig)
    if (system.classical or system.name != TWO_STAGE) and (args.resume or is_examples(str(data))):
        raise ConfigError(f"[system] {system.classical or system.name}: is fitted on a dataset, not on examples")
    if system.name not in (TWO_STAGE, RATINGS):
        if overrides:
            raise ConfigError(f"system.name={system.name}: is fitted at once; leave out --epochs and --workers")
        fit = fit_baskets if system.name == BASKETS else fit_system
        return asdict(fit(recipe, load_dataset(data), home))
    engine = recipe.section(EngineConfig)
    with ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=args.verbose):
        if args.resume or is_examples(str(data)):
            return train_on_examples(recipe, str(data), home, resume=args.resume, workers=args.workers)
        train = train_ratings_on_ray if system.name == RATINGS else train_on_ray
        return asdict(train(recipe, load_dataset(data), home))


def train_on_ray(recipe: Recipe, dataset: Dataset, home: Home) -> TrainedRun:
    """Train within an open Ray session.

    Raises `ConfigError` for settings that do not go together, `EngineError` when the workers failed for good.
    """
    config, media = recipe.section(TrainConfig), recipe.section(ModelConfig).media
    if media and config.text_prior is not None:
        raise ConfigError(
            f"train.text_prior={config.text_prior}: is for models without model.media, where text is gated"
        )
    check_memory(recipe, dataset)

    def prepare(folder: Path) -> None:
        inputs = load_inputs(dataset, recipe.section(DataConfig), recipe.section(TablesConfig), folder / TEXT_FILE)
        fit_beside(recipe, inputs, folder)

    return _fit(recipe, dataset, home, "train", "training.worker:train_worker", config.final_epochs, prepare, media)


def train_ratings_on_ray(recipe: Recipe, dataset: Dataset, home: Home) -> TrainedRun:
    """Train the rating model within an open Ray session; its run is not one to publish.

    Raises `DataError` where the dataset has no ratings, `EngineError` when the workers failed for good.
    """

    def prepare(folder: Path) -> None:
        load_rating_inputs(dataset, recipe.section(RatingConfig), folder / TEXT_FILE)

    return _fit(recipe, dataset, home, "ratings", "training.ratings.worker:train_ratings", 0, prepare)


def _fit(
    recipe: Recipe,
    dataset: Dataset,
    home: Home,
    kind: str,
    train_function: str,
    final_epochs: int,
    prepare: Callable[[Path], object],
    media: Sequence[str] = (),
) -> TrainedRun:
    """Train; `prepare` writes what else the workers read, or says what is wrong, before any of them starts."""
    folder = new_run(home, recipe, kind)
    encoder = TextEncoder(recipe.section(EncoderConfig), home.cache)
    write_text_vectors(encoder, dataset, folder, media)
    prepare(folder)
    config = recipe.section(TrainConfig)
    job = {"recipe": recipe.to_toml(), "dataset": str(Path(dataset.path).resolve()), "folder": str(folder)}
    with progress(config.epochs + final_epochs, "training", unit="epoch") as bar:
        result = fit_on_workers(train_function, job, config, folder, bar, done=len)
    checkpoint, metrics = result.checkpoint, result.metrics
    assert checkpoint is not None  # workers report one after each epoch
    assert metrics is not None
    return TrainedRun.write(
        folder,
        dataset,
        checkpoint=checkpoint.path,
        encoder_fingerprint=encoder.fingerprint,
        metrics=metrics,
    )
