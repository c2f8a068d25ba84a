"""What every Ray Train worker runs to fine-tune the encoder: epochs, each reported with all that has been learned.

In:  the job: a recipe, a dataset folder, a run folder.  Out: checkpoints and figures; the adapter in the run folder.
Knows nothing of the driver. Ray has set up the process group.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import ray.train
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from cluster.config import Recipe
from cluster.dataset import load_dataset
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.encoder.config import FinetuneConfig
from training.encoder.inputs import load_finetune_inputs
from training.encoder.learner import EncoderLearner, EpochReport, Progress
from training.encoder.tuned import TunedEncoder
from training.run import METRICS_FILE
from training.stream import DataConfig

LEARNED_FILE, BEST_FILE, PROGRESS_FILE = "learned.safetensors", "best.safetensors", "progress.json"


def finetune_worker(job: dict[str, str]) -> None:
    """Collective. Fine-tune this worker's share of the job to its end."""
    recipe, folder = Recipe.from_toml(job["recipe"]), Path(job["folder"])
    config = recipe.section(FinetuneConfig)
    inputs = load_finetune_inputs(load_dataset(job["dataset"]), recipe.section(DataConfig), config)
    encoder = TextEncoder(recipe.section(EncoderConfig), Path(job["cache"]))
    tuned = TunedEncoder(encoder, config, inputs.texts)
    learner = EncoderLearner(tuned, inputs, config, encoder.encode(inputs.texts))
    resume(learner)
    sizes = {"trained_parameters": tuned.trained, "encoder_parameters": tuned.total}

    def report(epoch: EpochReport) -> None:
        metrics = {"epoch": epoch.progress.epoch, "phase": epoch.progress.phase} | epoch.figures
        if dist.get_rank() == 0:
            with (folder / METRICS_FILE).open("a") as lines:
                lines.write(json.dumps(metrics) + "\n")
        _report(learner, metrics | sizes)

    progress = learner.run(report)
    if dist.get_rank() == 0 and (adapter := tuned.adapter()) is not None:
        adapter.save(folder)
    figures = {f"frozen_{name}": value for name, value in progress.frozen.items()} | progress.best
    _report(learner, figures | sizes | {"tuned_epochs": progress.best_epoch, "tuning_s": progress.train_s})


def resume(learner: EncoderLearner) -> None:
    """Collective. Go on from the latest checkpoint after a worker failure."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        progress = Progress(**json.loads((Path(folder) / PROGRESS_FILE).read_text()))
        learner.resume(load_file(Path(folder) / LEARNED_FILE), load_file(Path(folder) / BEST_FILE), progress)


def _report(learner: EncoderLearner, metrics: Mapping[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if dist.get_rank() == 0:  # every worker has the same
            save_file(learner.tensors(), Path(folder) / LEARNED_FILE)
            save_file(learner.best, Path(folder) / BEST_FILE)
            (Path(folder) / PROGRESS_FILE).write_text(json.dumps(asdict(learner.progress)))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(dict(metrics), checkpoint=checkpoint)
