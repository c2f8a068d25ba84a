"""Batch training on Ray Train: sharded tables, a checkpoint an epoch, early stopping.

In:  a dataset and a recipe.  Out: a run folder: the best checkpoint, metrics.jsonl, TensorBoard scalars, run.json.
Knows nothing of versions or serving.

    train_on_ray  (driver)   encode item text, write the job's inputs, start N workers, show progress
    train_worker  (each)     training/worker.py: for epoch: for batch: train_step; validate; report a checkpoint

The run folder must be on storage that all workers share.
"""

import argparse
import datetime
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import EngineConfig, Recipe, load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.errors import ConfigError
from cluster.examples import is_examples
from cluster.home import Home
from cluster.progress import progress
from cluster.ray_session import ray_session
from embeddings.tables import TablesConfig
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.examples.trainer import train_on_examples
from training.fit import fit_on_workers
from training.inputs import load_inputs
from training.models.rating import RatingConfig
from training.ratings.inputs import load_rating_inputs
from training.run import RECIPE_FILE, RUN_FILE, TEXT_FILE, TrainConfig, TrainedRun
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
    engine = recipe.section(EngineConfig)
    with ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=args.verbose):
        if args.resume or is_examples(str(data)):
            return train_on_examples(recipe, str(data), home, resume=args.resume, workers=args.workers)
        return asdict(train_on_ray(recipe, load_dataset(data), home))


def train_on_ray(recipe: Recipe, dataset: Dataset, home: Home) -> TrainedRun:
    """Train within an open Ray session. Raises `EngineError` when the workers failed for good."""

    def check(text_path: Path) -> None:
        load_inputs(dataset, recipe.section(DataConfig), recipe.section(TablesConfig), text_path)

    config = recipe.section(TrainConfig)
    return _fit(recipe, dataset, home, "train", "training.worker:train_worker", config.final_epochs, check)


def train_ratings_on_ray(recipe: Recipe, dataset: Dataset, home: Home) -> TrainedRun:
    """Train the rating model within an open Ray session; its run is not one to publish.

    Raises `DataError` where the dataset has no ratings, `EngineError` when the workers failed for good.
    """

    def check(text_path: Path) -> None:
        load_rating_inputs(dataset, recipe.section(RatingConfig), text_path)

    return _fit(recipe, dataset, home, "ratings", "training.ratings.worker:train_ratings", 0, check)


def _fit(
    recipe: Recipe,
    dataset: Dataset,
    home: Home,
    kind: str,
    train_function: str,
    final_epochs: int,
    check: Callable[[Path], object],
) -> TrainedRun:
    """Train; `check` reads what the workers will, or says what is wrong with it, before any of them starts."""
    folder = home.runs / f"{kind}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True)
    (folder / RECIPE_FILE).write_text(recipe.to_toml())
    encoder = TextEncoder(recipe.section(EncoderConfig), home.cache)
    write_item_vectors(encoder, dataset, folder)
    check(folder / TEXT_FILE)
    config = recipe.section(TrainConfig)
    job = {"recipe": recipe.to_toml(), "dataset": str(Path(dataset.path).resolve()), "folder": str(folder)}
    with progress(config.epochs + final_epochs, "training", unit="epoch") as bar:
        result = fit_on_workers(train_function, job, config, folder, bar, done=len)
    checkpoint, metrics = result.checkpoint, result.metrics
    assert checkpoint is not None  # workers report one after each epoch
    assert metrics is not None
    trained = TrainedRun(
        folder=str(folder),
        dataset=str(Path(dataset.path).resolve()),
        dataset_fingerprint=dataset.fingerprint(),
        checkpoint=checkpoint.path,
        encoder_fingerprint=encoder.fingerprint,
        metrics=dict(metrics),
    )
    (folder / RUN_FILE).write_text(json.dumps(asdict(trained), indent=1))
    return trained


def write_item_vectors(encoder: TextEncoder, dataset: Dataset, folder: Path) -> None:
    """Write the encoder's vector of each item of the dataset, float32 [items, E], in the order of `items()`."""
    texts = dataset.items()["text"].to_pylist()
    with progress(len(texts), "encoding item text", unit="text") as bar:
        np.save(folder / TEXT_FILE, encoder.encode(texts, on_progress=bar.update))
