"""A training run: its settings, the files of its folder, and what it leaves behind.

In:  a home or a run folder.  Out: the settings, the finished run, its recipe.
Knows nothing of how training goes: training/trainer.py drives it, training/worker.py does it, publish.py reads it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.config import Recipe
from cluster.errors import ConfigError, DataError
from cluster.home import Home
from training.step import StepConfig

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.toml"
TEXT_FILE = "text.npy"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and how fast to train."""

    workers: int = 2
    epochs: int = 20
    patience: int = 6
    """Epochs without a better validation NDCG@10 before training stops."""
    final_epochs: int = 2
    """Epochs after that over all interactions, the validation ones included."""
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

    def __post_init__(self) -> None:
        for name in ("workers", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)}: must be at least 1")
        for name in ("final_epochs", "warmup_steps", "max_failures", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)}: must be 0 or more")
        if not 0 < self.final_rate <= 1:
            raise ConfigError(f"train.final_rate={self.final_rate}: must be in (0, 1]")

    def step(self) -> StepConfig:
        """Return the settings of one train step."""
        return StepConfig(learning_rate=self.learning_rate, weight_decay=self.weight_decay, clip_norm=self.clip_norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """What a finished run leaves behind; written as run.json in its folder."""

    folder: str
    dataset: str
    dataset_fingerprint: str
    checkpoint: str
    """Folder of the last checkpoint: best epoch, then the final pass."""
    encoder_fingerprint: str
    metrics: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> "TrainedRun":
        """Raises `DataError` when the folder holds no finished run."""
        try:
            return cls(**json.loads((folder / RUN_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder}: holds no finished training run ({error}); `recloop train` makes one") from error


def latest_run(home: Home) -> Path:
    """Return the folder of the newest finished run. Raises `DataError` when there is none."""
    runs = sorted(home.runs.glob(f"train-*/{RUN_FILE}"))
    if not runs:
        raise DataError(f"{home.runs}: holds no finished training run; `recloop train` makes one")
    return runs[-1].parent


def read_recipe(folder: Path) -> Recipe:
    """Return the resolved recipe that a run was trained with."""
    return Recipe.from_toml((folder / RECIPE_FILE).read_text())
