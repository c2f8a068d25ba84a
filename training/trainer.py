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
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.config import EngineConfig, Recipe, load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.errors import EngineError
from cluster.home import Home
from cluster.progress import progress
from cluster.ray_session import ray_session
from embeddings.tables import TablesConfig, device_type
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.inputs import load_inputs
from training.run import METRICS_FILE, RECIPE_FILE, RUN_FILE, TEXT_FILE, TrainConfig, TrainedRun
from training.stream import DataConfig

if TYPE_CHECKING:
    from ray.train import Result


def run(args: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Train on a dataset: the `recloop train` command."""
    overrides = [f"train.{key}={value}" for key in ("workers", "epochs") if (value := getattr(args, key)) is not None]
    recipe = load_recipe(args.recipe, [*args.overrides, *overrides])
    dataset, home = load_dataset(args.data or args.home.default_dataset), args.home.ensure()
    engine = recipe.section(EngineConfig)
    with ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=args.verbose):
        return asdict(train_on_ray(recipe, dataset, home))


def train_on_ray(recipe: Recipe, dataset: Dataset, home: Home) -> TrainedRun:
    """Train within an open Ray session. Raises `EngineError` when the workers failed for good."""
    folder = home.runs / f"train-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True)
    (folder / RECIPE_FILE).write_text(recipe.to_toml())
    encoder = TextEncoder(recipe.section(EncoderConfig), home.cache)
    np.save(folder / TEXT_FILE, encode_items(encoder, dataset))
    load_inputs(dataset, recipe.section(DataConfig), recipe.section(TablesConfig), folder / TEXT_FILE)  # or it says why
    result = _fit(recipe, dataset, folder)
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


def encode_items(encoder: TextEncoder, dataset: Dataset) -> np.ndarray:
    """Return the encoder's vector of each item of the dataset, float32 [items, E], in the order of `items()`."""
    texts = dataset.items()["text"].to_pylist()
    with progress(len(texts), "encoding item text", unit="text") as bar:
        return encoder.encode(texts, on_progress=bar.update)


def _fit(recipe: Recipe, dataset: Dataset, folder: Path) -> "Result":
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from training.worker import train_worker

    config = recipe.section(TrainConfig)
    cuda = device_type() == "cuda"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": recipe.to_toml(),
            "dataset": str(Path(dataset.path).resolve()),
            "folder": str(folder),
        },
        torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=cuda, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder.resolve()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    with _EpochBar(folder / METRICS_FILE, config.epochs + config.final_epochs):
        try:
            return _wait_for(trainer.fit)
        except TrainingFailedError as error:
            raise EngineError(f"training failed: {error}") from error


def _wait_for(fit: Callable[[], "Result"]) -> "Result":
    """Fit on a thread of its own, so that Ctrl-C stays Ctrl-C.

    On the main thread Ray Train puts a SIGINT handler of its own in place, for good, that ends in exit code 1 (2.60).
    """
    fitted: Future[Result] = Future()

    def run_fit() -> None:
        try:
            fitted.set_result(fit())
        except BaseException as error:  # for whoever waits
            fitted.set_exception(error)

    threading.Thread(target=run_fit, name="ray-train", daemon=True).start()
    return fitted.result()


class _EpochBar:
    """A progress bar that follows the run's metrics file while the driver waits for Ray Train."""

    def __init__(self, path: Path, epochs: int) -> None:
        self._path = path
        self._bar = progress(epochs, "training", unit="epoch")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="epoch-bar", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.close()

    def _follow(self) -> None:
        while not self._ended.wait(0.5):
            lines = self._path.read_text().splitlines() if self._path.exists() else []
            if len(lines) > self._bar.n:
                latest = json.loads(lines[-1])
                self._bar.set_postfix({name: f"{latest[name]:.4f}" for name in ("loss_total",) if name in latest})
                self._bar.update(len(lines) - self._bar.n)
