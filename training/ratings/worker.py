"""What every Ray Train worker of the rating model runs: epochs until validation AUC stops rising, then the test.

In:  the job: a recipe, a dataset folder, a run folder.  Out: the best epoch's checkpoint and its figures.
Knows nothing of the driver. Ray has set up the process group; torchrec is imported here, not on the driver. A worker
that fails makes training start anew: epochs take seconds.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from cluster.config import Recipe
from cluster.dataset import load_dataset
from embeddings.tables import TablesConfig
from training.checkpoint import load_checkpoint, save_checkpoint
from training.evaluation.clicks import ClickTally, collective_device
from training.models.rating import RatingBatch, RatingConfig, RatingLosses, RatingModel, build_rating_model
from training.ratings.inputs import RatingInputs, build_rating_batch, load_rating_inputs
from training.run import TEXT_FILE, TrainConfig, learning_rate
from training.step import Optimizers, train_step
from training.tracking import Scalars
from training.worker import Progress, best_folder

if TYPE_CHECKING:
    from torchrec.distributed.model_parallel import DistributedModelParallel


def train_ratings(job: dict[str, str]) -> None:
    """Collective. Train this worker's share of the job to its end."""
    recipe, folder = Recipe.from_toml(job["recipe"]), Path(job["folder"])
    config, ratings = recipe.section(TrainConfig), recipe.section(RatingConfig)
    inputs = load_rating_inputs(load_dataset(job["dataset"]), ratings, folder / TEXT_FILE)
    model = build_rating_model(
        recipe.section(TablesConfig),
        ratings,
        inputs.rows,
        text_dim=inputs.text.shape[1],
        levels=len(inputs.levels),
        mean_stars=inputs.mean_stars(),
        device=get_device(),
        seed=config.seed,
    )
    optimizers = Optimizers(model, config.step())
    progress, best_auc = Progress(), -1.0
    with Scalars(folder, recipe, dist.get_rank()) as scalars:
        while not progress.is_final(config):
            metrics = _train_epoch(model, optimizers, inputs, recipe, progress)
            metrics |= evaluate_ratings(model, inputs, inputs.validation, ratings)
            if metrics["auc"] > best_auc:
                progress.best_epoch, best_auc = progress.epoch, metrics["auc"]
                save_checkpoint(model, optimizers, best_folder(folder, progress.best_epoch))
            progress.epoch += 1
            scalars.write(metrics, progress.epochs_done)
    load_checkpoint(model, optimizers, best_folder(folder, progress.best_epoch))
    figures: dict[str, float] = {"best_epoch": progress.best_epoch}
    for part, chosen in (("validation", inputs.validation), ("test", inputs.test)):
        found = evaluate_ratings(model, inputs, chosen, ratings)
        figures |= {f"{part}_{name}": value for name, value in found.items()}
    with tempfile.TemporaryDirectory() as saved:
        save_checkpoint(model, optimizers, Path(saved))
        ray.train.report(figures, checkpoint=ray.train.Checkpoint.from_directory(saved))


def _train_epoch(
    model: "DistributedModelParallel",
    optimizers: Optimizers,
    inputs: RatingInputs,
    recipe: Recipe,
    progress: Progress,
) -> dict[str, float]:
    """Collective. Train one epoch and return its duration and mean losses, on this worker's ratings."""
    config, ratings = recipe.section(TrainConfig), recipe.section(RatingConfig)
    order = np.random.default_rng((config.seed, progress.epoch)).permutation(inputs.train)
    steps = -(-len(order) // ratings.batch_ratings)
    started_s = time.monotonic()
    losses = []
    model.train()
    for batch in _batches(inputs, order, ratings):
        optimizers.scale_learning_rate(learning_rate(progress.step, config.epochs * steps, config))
        losses.append(torch.stack(train_step(model, batch.to(get_device()), optimizers)))
        progress.step += 1
    means = torch.stack(losses).mean(0).tolist()
    named = zip(RatingLosses._fields, means, strict=True)
    return {f"loss_{name}": value for name, value in named} | {"epoch_s": time.monotonic() - started_s}


@torch.no_grad()
def evaluate_ratings(
    model: "DistributedModelParallel", inputs: RatingInputs, chosen: np.ndarray, config: RatingConfig
) -> dict[str, float]:
    """Collective. Return AUC, log loss and normalised entropy of "liked", RMSE and MAE of the stars."""
    rating_model = next(module for module in model.modules() if isinstance(module, RatingModel))
    lowest, highest = float(inputs.levels[0]), float(inputs.levels[-1])
    tally, errors = ClickTally(), torch.zeros(3, dtype=torch.float64)
    model.eval()
    for batch in _batches(inputs, chosen, config):
        batch = batch.to(get_device())
        liked_B, stars_B, _ = rating_model.predict(batch)
        tally.add(liked_B, (batch.stars_B >= config.liked_from).float())
        error_B = (stars_B.clamp(lowest, highest) - batch.stars_B).double().cpu()
        errors += torch.stack([error_B.square().sum(), error_B.abs().sum(), torch.tensor(float(len(error_B)))])
    errors = errors.to(collective_device())
    dist.all_reduce(errors)  # collective
    squares, absolute, count = errors.tolist()
    return tally.over_all_workers().figures() | {"rmse": (squares / count) ** 0.5, "mae": absolute / count}


def _batches(inputs: RatingInputs, order: np.ndarray, config: RatingConfig) -> Iterator[RatingBatch]:
    """Yield this worker's part of each batch; every worker yields equally many, the last may hold none."""
    for start in range(0, len(order), config.batch_ratings):
        whole = order[start : start + config.batch_ratings]
        mine = whole[dist.get_rank() :: dist.get_world_size()]
        yield build_rating_batch(inputs, mine, config.bag, global_ratings=len(whole))
