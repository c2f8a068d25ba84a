"""Fine-tune the text encoder on Ray Train: the `recloop finetune` command.

In:  a dataset and a recipe.  Out: a run folder: the adapter, the figures of the encoder as it was and as tuned.
Knows nothing of versions: `recloop train --set encoder.adapter=RUN_FOLDER` reads text as tuned, and `recloop publish`
puts the adapter into the version.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config import EngineConfig, Recipe, load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.home import Home
from cluster.progress import progress
from cluster.ray_session import ray_session
from embeddings.adapter import Adapter
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.encoder.config import FinetuneConfig
from training.encoder.inputs import load_finetune_inputs
from training.fit import fit_on_workers
from training.run import TrainConfig, new_run
from training.stream import DataConfig

RUN_FILE = "finetune.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetunedRun:
    """What fine-tuning leaves behind; written as finetune.json in its folder."""

    folder: str
    dataset_fingerprint: str
    encoder_fingerprint: str
    """Of the encoder as tuned."""
    base_fingerprint: str
    metrics: dict[str, float]
    """Of the best epoch; `frozen_…` are those of the head on the encoder as it was."""


def run(args: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Fine-tune on a dataset."""
    overrides = [f"finetune.epochs={args.epochs}"] if args.epochs is not None else []
    if args.workers is not None:
        overrides += [f"train.workers={args.workers}", "train.min_workers=none"]
    recipe = load_recipe(args.recipe, [*args.overrides, *overrides])
    dataset, home, engine = (
        load_dataset(args.data or args.home.default_dataset),
        args.home,
        recipe.section(EngineConfig),
    )
    with ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=args.verbose):
        return asdict(finetune_on_ray(recipe, dataset, home.ensure()))


def finetune_on_ray(recipe: Recipe, dataset: Dataset, home: Home) -> FinetunedRun:
    """Fine-tune within an open Ray session.

    Raises `DataError` where there is too little to learn from, `EngineError` when the workers failed for good.
    """
    config, encoder = recipe.section(FinetuneConfig), TextEncoder(recipe.section(EncoderConfig), home.cache)
    inputs = load_finetune_inputs(dataset, recipe.section(DataConfig), config)  # says what is wrong before any starts
    folder = new_run(home, recipe, "finetune")
    encoder.encode(inputs.texts)  # cached, so that workers find them
    job = {"recipe": recipe.to_toml(), "dataset": str(Path(dataset.path).resolve()), "folder": str(folder)}
    job["cache"] = str(home.cache)
    epochs = config.head_epochs + (0 if config.tuned == "frozen" else config.epochs)
    with progress(epochs, "fine-tuning", unit="epoch") as bar:
        result = fit_on_workers(
            "training.encoder.worker:finetune_worker", job, recipe.section(TrainConfig), folder, bar, done=len
        )
    assert result.metrics is not None  # workers report some after each epoch
    adapter = Adapter.load(folder) if config.tuned != "frozen" else encoder.adapter
    tuned = FinetunedRun(
        folder=str(folder),
        dataset_fingerprint=dataset.fingerprint(),
        encoder_fingerprint=TextEncoder(encoder.config, adapter=adapter).fingerprint,
        base_fingerprint=encoder.base_fingerprint,
        metrics={name: value for name, value in result.metrics.items() if isinstance(value, int | float)},
    )
    (folder / RUN_FILE).write_text(json.dumps(asdict(tuned), indent=1))
    return tuned
