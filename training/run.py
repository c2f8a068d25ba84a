"""A training run: its settings, the files of its folder, and what it leaves behind.

In:  a home or a run folder.  Out: the settings, the finished run, its recipe.
Knows nothing of how training goes: training/trainer.py drives it, training/worker.py does it, publish.py reads it.
"""

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.config import Recipe
from cluster.dataset import Dataset
from cluster.errors import ConfigError, DataError
from cluster.home import Home
from training.step import StepConfig

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.toml"
TEXT_FILE = "text.npy"
SYSTEM_FILE = "system.safetensors"
"""What a classical system has learned."""
VALIDATED_SYSTEM_FILE = "system-validated.safetensors"
"""The same without the validation interactions, where it is blended with the two-stage model."""
METRICS_FILE = "metrics.jsonl"
TEXT_PRIOR, TEXT_RIDGE = "text_prior", "text_ridge"
"""Metrics of a run: how its version places items (training/models/placing.py)."""
SCORES_FILE = "scores.json"
"""What a run over examples came to, written by its first worker."""
CHECKPOINTS_FOLDER = "checkpoints"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and how fast to train."""

    workers: int = 2
    min_workers: int | None = None
    """With it training is elastic: it goes on with as few workers, and with up to `workers` when there is room."""
    epochs: int = 20
    patience: int = 6
    """Epochs without a better validation NDCG@10 before training stops."""
    final_epochs: int = 2
    """Epochs after that over all interactions, the validation ones included."""
    text_prior: float | None = None
    """Interactions that an item's text counts for in where a version places it; where none is given the best for rare
    items and others of what does not lower validation NDCG@10; 0 leaves items where training left them."""
    text_ridge: float = 1.0
    """The larger, the less a text says; chosen too, where `text_prior` is."""
    learning_rate: float = 0.002
    """Of AdamW on the dense weights."""
    weight_decay: float = 0.0
    clip_norm: float = 5.0
    warmup_steps: int = 50
    final_rate: float = 0.1
    """Share of the learning rates left at the last epoch, reached along a cosine, and kept for the final epochs."""
    max_failures: int = 1
    """Worker failures after which Ray Train still starts again from the latest checkpoint."""
    seed: int = 0
    checkpoint_steps: int = 1000
    """Steps between two checkpoints of a run over examples; a run over interactions makes one an epoch."""
    keep_checkpoints: int = 2
    """Newest checkpoints of a run over examples that stay."""
    log_steps: int = 100
    """Steps over examples between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("workers", "epochs", "patience", "checkpoint_steps", "keep_checkpoints", "log_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)}: must be at least 1")
        for name in ("final_epochs", "warmup_steps", "max_failures", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)}: must be 0 or more")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise ConfigError(f"train.min_workers={self.min_workers}: must be from 1 to train.workers={self.workers}")
        if self.text_prior is not None and self.text_prior < 0:
            raise ConfigError(f"train.text_prior={self.text_prior}: must be 0 or more")
        if self.text_ridge <= 0:
            raise ConfigError(f"train.text_ridge={self.text_ridge}: must be above 0")
        if not 0 < self.final_rate <= 1:
            raise ConfigError(f"train.final_rate={self.final_rate}: must be in (0, 1]")

    def step(self) -> StepConfig:
        """Return the settings of one train step."""
        return StepConfig(learning_rate=self.learning_rate, weight_decay=self.weight_decay, clip_norm=self.clip_norm)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the share of the learning rates at a step: linear warm-up, then a cosine down to `final_rate`."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
    return warm * (config.final_rate + (1 - config.final_rate) * cosine)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """What a finished run leaves behind; written as run.json in its folder."""

    folder: str
    dataset: str
    dataset_fingerprint: str
    checkpoint: str
    """Folder of the last checkpoint: best epoch, then the final pass; of a classical system, its file."""
    encoder_fingerprint: str
    metrics: dict[str, float]

    @classmethod
    def write(
        cls, folder: Path, dataset: Dataset, *, checkpoint: str, encoder_fingerprint: str, metrics: Mapping[str, float]
    ) -> "TrainedRun":
        """State in the run's folder that it is finished."""
        trained = cls(
            folder=str(folder),
            dataset=str(Path(dataset.path).resolve()),
            dataset_fingerprint=dataset.fingerprint(),
            checkpoint=checkpoint,
            encoder_fingerprint=encoder_fingerprint,
            metrics=dict(metrics),
        )
        (folder / RUN_FILE).write_text(json.dumps(asdict(trained), indent=1))
        return trained

    @classmethod
    def read(cls, folder: Path) -> "TrainedRun":
        """Raises `DataError` when the folder holds no finished run."""
        try:
            return cls(**json.loads((folder / RUN_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder}: holds no finished training run ({error}); `recloop train` makes one") from error


def new_run(home: Home, recipe: Recipe, kind: str = "train") -> Path:
    """Make the folder of a run over a dataset, with its recipe; `latest_run` finds those of kind `train`."""
    folder = home.runs / f"{kind}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True)
    (folder / RECIPE_FILE).write_text(recipe.to_toml())
    return folder


def latest_run(home: Home) -> Path:
    """Return the folder of the newest finished run. Raises `DataError` when there is none."""
    runs = sorted(home.runs.glob(f"train-*/{RUN_FILE}"))
    if not runs:
        raise DataError(f"{home.runs}: holds no finished training run; `recloop train` makes one")
    return runs[-1].parent


def read_recipe(folder: Path) -> Recipe:
    """Return the resolved recipe that a run was trained with."""
    return Recipe.from_toml((folder / RECIPE_FILE).read_text())
