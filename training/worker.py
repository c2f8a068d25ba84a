"""What every Ray Train worker runs: epochs of train steps, validation, checkpoints.

In:  the job: a recipe, a dataset folder, a run folder.  Out: checkpoints and metrics, reported to Ray Train.
Knows nothing of the driver. Ray has set up the process group; torchrec is imported here, not on the driver.

    fit     epochs over the training interactions until validation NDCG@10 stops rising
    place   how far items with few interactions are drawn to where their texts say, chosen by validation
    blend   where the recipe says so: the weight of the classical system beside it that validates best
    final   the best epoch's state back, then a few epochs over the validation interactions as well
"""

import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device
from safetensors.numpy import load_file

from cluster.config import Recipe
from cluster.dataset import load_dataset
from cluster.errors import DataError
from embeddings.tables import ITEM, USER, TablesConfig, gather_tables, load_tables
from training.baselines.config import SystemConfig, build_system
from training.checkpoint import load_checkpoint, save_checkpoint
from training.evaluation.classical import WEIGHTS
from training.evaluation.metrics import hit_at_k, ndcg_at_k
from training.evaluation.next_item import Beside, Catalogue, rank_next_items
from training.inputs import TrainingInputs, load_inputs
from training.models.placing import LEFT, PLACINGS, RARE, Placing, draw_to_text, regress_on_text
from training.models.recommender import build_recommender, dense_part
from training.models.two_stage import Losses, ModelConfig, TwoStage
from training.run import TEXT_FILE, TEXT_PRIOR, TEXT_RIDGE, VALIDATED_SYSTEM_FILE, TrainConfig, learning_rate
from training.step import Optimizers, train_step
from training.stream import DataConfig, count_batches, stream_batches
from training.tracking import Scalars

if TYPE_CHECKING:
    from torchrec.distributed.model_parallel import DistributedModelParallel

PROGRESS_FILE = "progress.json"
MOST_CHOOSING = 5_000
"""Validation interactions by which a placing is chosen."""
UNTOLD_SPREAD = 0.02
"""Standard deviation of the rows that items without text start from."""


@dataclass(slots=True)
class Progress:
    """Where the run is; saved with every checkpoint."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_hit_at_10: float = 0.0
    best_ndcg_at_10: float = -1.0
    final_epochs: int = 0
    """Final epochs already done."""
    placed: dict[str, float] = field(default_factory=dict)
    """How far items are drawn to their texts, and what that comes to; empty until it is chosen."""
    blended: dict[str, float] = field(default_factory=dict)
    """The weight of the classical system beside the model, and what they come to together; empty without one."""

    @property
    def epochs_done(self) -> int:
        """Epochs of the fit and final ones."""
        return self.epoch + self.final_epochs

    def is_final(self, config: TrainConfig) -> bool:
        """Whether the fit is over: out of epochs or out of patience."""
        return self.epoch >= config.epochs or self.epoch - self.best_epoch > config.patience


def train_worker(job: dict[str, str]) -> None:
    """Collective. Train this worker's share of the job to its end."""
    recipe, folder = Recipe.from_toml(job["recipe"]), Path(job["folder"])
    config, data, tables = recipe.section(TrainConfig), recipe.section(DataConfig), recipe.section(TablesConfig)
    inputs = load_inputs(load_dataset(job["dataset"]), data, tables, folder / TEXT_FILE)
    model = build_recommender(
        tables,
        recipe.section(ModelConfig),
        inputs.items,
        inputs.users,
        text_dim=inputs.text.shape[1],
        device=get_device(),
        seed=config.seed,
    )
    optimizers = Optimizers(model, config.step())
    start_untold_items(model, inputs.text, tables.dim, config.seed)
    progress = resume(model, optimizers)
    with Scalars(folder, recipe, dist.get_rank()) as scalars:
        while not progress.is_final(config):
            metrics = train_epoch(model, optimizers, inputs, recipe, progress) | validate(model, inputs)
            if metrics["ndcg_at_10"] > progress.best_ndcg_at_10:
                progress.best_epoch = progress.epoch
                progress.best_hit_at_10, progress.best_ndcg_at_10 = metrics["hit_at_10"], metrics["ndcg_at_10"]
                save_checkpoint(model, optimizers, best_folder(folder, progress.best_epoch))
            progress.epoch += 1
            scalars.write(metrics, progress.epochs_done)
            report(metrics, model, optimizers, progress)
        if progress.final_epochs == 0:
            load_checkpoint(model, optimizers, best_folder(folder, progress.best_epoch))
            catalogue, progress.placed = choose_placing(model, inputs, config)
            progress.blended = choose_blend(dense_part(model), catalogue, inputs, recipe, folder)
        while progress.final_epochs < config.final_epochs:
            metrics = train_epoch(model, optimizers, inputs, recipe, progress)
            progress.final_epochs += 1
            scalars.write(metrics, progress.epochs_done)
            report(metrics, model, optimizers, progress)
        if config.final_epochs == 0:
            report({}, model, optimizers, progress)


def best_folder(folder: Path, epoch: int) -> Path:
    """Return where the best epoch's checkpoint is; one an epoch, so that a crash while writing tears none in use."""
    return folder / f"best-{epoch}"


def train_epoch(
    model: "DistributedModelParallel",
    optimizers: Optimizers,
    inputs: TrainingInputs,
    recipe: Recipe,
    progress: Progress,
) -> dict[str, float]:
    """Collective. Train one epoch and return its mean losses and its duration."""
    config, data = recipe.section(TrainConfig), recipe.section(DataConfig)
    max_history = recipe.section(ModelConfig).max_history
    final = progress.is_final(config)
    device = get_device()
    total_steps = config.epochs * count_batches(inputs.train, data, max_history)
    started_s = time.monotonic()
    losses = []
    model.train()
    for batch in stream_batches(
        inputs.full if final else inputs.train,
        inputs.text,
        inputs.sampler,
        data,
        max_history=max_history,
        seed=config.seed,
        epoch=progress.epochs_done,
        rank=dist.get_rank(),
        workers=dist.get_world_size(),
    ):
        rate = config.final_rate if final else learning_rate(progress.step, total_steps, config)
        optimizers.scale_learning_rate(rate)
        losses.append(torch.stack(train_step(model, batch.to(device), optimizers)))
        progress.step += 1
    if not losses:
        raise DataError(f"the training events make fewer sequences than there are workers ({dist.get_world_size()})")
    means = torch.stack(losses).mean(0)
    dist.all_reduce(means)  # collective
    named = zip(Losses._fields, (means / dist.get_world_size()).tolist(), strict=True)
    return {f"loss_{name}": value for name, value in named} | {"epoch_s": time.monotonic() - started_s}


def validate(model: "DistributedModelParallel", inputs: TrainingInputs) -> dict[str, float]:
    """Collective. Return Hit@10 and NDCG@10 over the validation interactions, each worker ranking its share."""
    mine = inputs.validation[dist.get_rank() :: dist.get_world_size()]
    return _mean_figures(dense_part(model), gather_catalogue(model, inputs), inputs, mine)


def choose_placing(
    model: "DistributedModelParallel", inputs: TrainingInputs, config: TrainConfig
) -> tuple[Catalogue, dict[str, float]]:
    """Collective. Return the catalogue placed as it validates best, and how: see training/models/placing.py."""
    dense, step = dense_part(model), math.ceil(len(inputs.validation) / MOST_CHOOSING)
    mine = inputs.validation[:: max(step, 1)][dist.get_rank() :: dist.get_world_size()]
    catalogue, text_IE = gather_catalogue(model, inputs), torch.tensor(inputs.text)
    if not text_IE.any() or dense.config.media:  # what is gated is no line, which the regression would fit
        return catalogue, {}
    count_I = torch.from_numpy(np.bincount(inputs.train.item_row, minlength=len(text_IE)))
    text_IE = text_IE.to(catalogue.item_ID)
    told = regress_on_text(catalogue.item_ID, text_IE, count_I)
    is_rare_N = count_I.numpy()[inputs.full.item_row[mine]] < RARE
    best, best_placing, best_figures, best_balance, least = catalogue, LEFT, dict[str, float](), -1.0, -1.0
    for placing in PLACINGS if config.text_prior is None else (Placing(config.text_prior, config.text_ridge),):
        item_ID, _ = draw_to_text(catalogue.item_ID, text_IE, count_I, placing, told)
        placed = replace(catalogue, item_ID=item_ID)
        figures, balance = _balanced_figures(dense, placed, inputs, mine, is_rare_N)
        if placing == LEFT:
            least = figures["ndcg_at_10"]
        if balance > best_balance and figures["ndcg_at_10"] >= least:
            best, best_placing, best_figures, best_balance = placed, placing, figures, balance
    chosen = {TEXT_PRIOR: best_placing.prior, TEXT_RIDGE: best_placing.ridge}
    return best, chosen | {f"placed_{name}": value for name, value in best_figures.items()}


def choose_blend(
    dense: TwoStage, catalogue: Catalogue, inputs: TrainingInputs, recipe: Recipe, folder: Path
) -> dict[str, float]:
    """Collective. Return the weight of the classical system beside the model that validates best, and its figures."""
    config = recipe.section(SystemConfig)
    if config.blend is None:
        return {}
    arrays = load_file(folder / VALIDATED_SYSTEM_FILE)
    system = build_system(recipe, config.blend, np.asarray(inputs.text)).restore(arrays)
    mine = inputs.validation[dist.get_rank() :: dist.get_world_size()]
    figures: dict[float, dict[str, float]] = {}
    for weight in WEIGHTS if config.blend_weight is None else (config.blend_weight,):
        beside = Beside(system=system, max_history=config.max_history, weight=weight)
        figures[weight] = _mean_figures(dense, replace(catalogue, beside=beside), inputs, mine)
    best = max(figures, key=lambda weight: figures[weight]["ndcg_at_10"])
    return {"blend_weight": best} | {f"blended_{name}": value for name, value in figures[best].items()}


def gather_catalogue(model: "DistributedModelParallel", inputs: TrainingInputs) -> Catalogue:
    """Collective. Return the whole tables of a model in evaluation mode."""
    dense = dense_part(model)
    device = next(dense.parameters()).device
    whole = gather_tables(model, [ITEM, USER])
    with torch.inference_mode():
        rows_ID, text_IE = whole[ITEM][: len(inputs.items)], torch.tensor(inputs.text)
        item_ID = dense.eval().item_vectors(rows_ID.to(device), text_IE.to(device))
    return Catalogue(item_ID=item_ID, user_UD=whole[USER].to(device))


def _mean_figures(dense: TwoStage, catalogue: Catalogue, inputs: TrainingInputs, mine: np.ndarray) -> dict[str, float]:
    """Collective. Return Hit@10 and NDCG@10 over the validation interactions of all workers."""
    return _balanced_figures(dense, catalogue, inputs, mine, np.zeros(len(mine), bool))[0]


def _balanced_figures(
    dense: TwoStage, catalogue: Catalogue, inputs: TrainingInputs, mine: np.ndarray, is_rare_N: np.ndarray
) -> tuple[dict[str, float], float]:
    """Collective. Return Hit@10 and NDCG@10 over all workers' interactions, and the mean of NDCG@10 of rare and others.

    Where there are none of one kind it is that of the other.
    """
    ranks = rank_next_items(dense, catalogue, inputs.full, mine)
    gain_N = ndcg_at_k(ranks, 10)
    kinds = [part for kind in (is_rare_N, ~is_rare_N) for part in (gain_N[kind].sum(), kind.sum())]
    sums = torch.tensor([hit_at_k(ranks, 10).sum(), *kinds], device=catalogue.item_ID.device)
    dist.all_reduce(sums)  # collective
    hits, rare_gain, rare, other_gain, other = sums.tolist()
    count = max(rare + other, 1)
    means = [gain / times for gain, times in ((rare_gain, rare), (other_gain, other)) if times]
    figures = {"hit_at_10": hits / count, "ndcg_at_10": (rare_gain + other_gain) / count}
    return figures, sum(means) / max(len(means), 1)


def start_untold_items(model: "DistributedModelParallel", text: np.ndarray, dim: int, seed: int) -> None:
    """Let items without text start from a little noise: rows start at zero, and nothing else would tell them apart."""
    untold_I1 = ~np.any(text, axis=1, keepdims=True)
    if untold_I1.any():
        noise_ID = np.random.default_rng(seed).normal(0, UNTOLD_SPREAD, (len(text), dim))
        load_tables(model, {ITEM: torch.tensor(noise_ID * untold_I1, dtype=torch.float32)})


def resume(model: "DistributedModelParallel", optimizers: Optimizers) -> Progress:
    """Collective. Load the latest checkpoint after a worker failure; a new run starts at the beginning."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress()
    with checkpoint.as_directory() as folder:
        load_checkpoint(model, optimizers, Path(folder))
        return Progress(**json.loads((Path(folder) / PROGRESS_FILE).read_text()))


def report(
    metrics: dict[str, float], model: "DistributedModelParallel", optimizers: Optimizers, progress: Progress
) -> None:
    """Collective. Hand this worker's part of a checkpoint to Ray Train."""
    best = {"hit_at_10": progress.best_hit_at_10, "ndcg_at_10": progress.best_ndcg_at_10}
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, optimizers, Path(folder))
        if dist.get_rank() == 0:
            (Path(folder) / PROGRESS_FILE).write_text(json.dumps(asdict(progress)))
        ray.train.report(
            metrics
            | {f"best_{name}": value for name, value in best.items()}
            | {"best_epoch": progress.best_epoch}
            | progress.placed
            | progress.blended,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
        )
