"""Where a run's figures are shown: TensorBoard always, Weights & Biases and MLflow where the recipe says so.

In:  figures by name and the epoch, or step, that they are of, from the first worker.  Out: their records.
Knows nothing of what is trained. A run that Ray Train starts again goes on in the record that it had: each service is
given the same name for it, kept in the run's folder. Credentials are the services' own matter, from their environment.
"""

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from cluster.config import Recipe
from cluster.errors import ConfigError
from training.run import METRICS_FILE, RECIPE_FILE

MLFLOW_FILE = "mlflow.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """Where else a run's figures go."""

    wandb_project: str | None = None
    """Project of Weights & Biases; none: not there. Its key, entity and mode are in its own environment variables."""
    mlflow_uri: str | None = None
    """MLflow's tracking server, a folder or a database (sqlite:///FILE); none: not there."""
    mlflow_experiment: str = "recloop"

    def __post_init__(self) -> None:
        for key, package, wanted in (
            ("wandb_project", "wandb", self.wandb_project),
            ("mlflow_uri", "mlflow-skinny", self.mlflow_uri),
        ):
            module = package.partition("-")[0]
            if wanted is not None and importlib.util.find_spec(module) is None:
                raise ConfigError(f"tracking.{key}={wanted!r}: package {package!r} is missing; pip install {package}")


class Board(Protocol):
    """One place that shows figures."""

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the figures of an epoch or step."""
        ...

    def close(self, failed: bool = False) -> None:
        """Finish, or state that the run has failed; what was written stays."""
        ...


class Scalars:
    """Rank 0's record of a run: one JSON line an epoch, and every board; silent on the other ranks."""

    def __init__(self, folder: Path, recipe: Recipe, rank: int) -> None:
        self._lines = folder / METRICS_FILE
        self._boards = open_boards(folder, recipe) if rank == 0 else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for board in self._boards:
            board.close(failed=kind is not None)

    def write(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Record one epoch."""
        if not self._boards:
            return
        for board in self._boards:
            board.write(metrics, epoch)
        with self._lines.open("a") as lines:
            lines.write(json.dumps({"epoch": epoch, **metrics}) + "\n")


def open_boards(folder: Path, recipe: Recipe) -> list[Board]:
    """Return the boards of a run: TensorBoard's in its folder, and what `[tracking]` names."""
    config = recipe.section(TrackingConfig)
    boards: list[Board] = [TensorBoard(folder)]
    if config.wandb_project is not None:
        boards.append(WeightsAndBiases(config.wandb_project, folder, recipe))
    if config.mlflow_uri is not None:
        boards.append(MlFlow(config.mlflow_uri, config.mlflow_experiment, folder))
    return boards


@contextlib.contextmanager
def closing(boards: Sequence[Board]) -> Iterator[None]:
    """Close the boards after the block, as failed where it raises."""
    failed = True
    try:
        yield
        failed = False
    finally:
        for board in boards:
            board.close(failed)


class TensorBoard:
    """Event files below the run's folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the figures of an epoch or step."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"train/{name}", value, step)
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        """Finish the file, which states no outcome."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project, named after the run's folder, with the resolved recipe as its settings."""

    def __init__(self, project: str, folder: Path, recipe: Recipe) -> None:
        import wandb

        self._end_service = wandb.teardown
        self._run = wandb.init(
            project=project, name=folder.name, id=folder.name, resume="allow", dir=folder, config=dict(recipe.values)
        )

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the figures of an epoch or step."""
        self._run.log({f"train/{name}": value for name, value in metrics.items()}, step=step)

    def close(self, failed: bool = False) -> None:
        """Wait until everything is sent, or written where it works offline."""
        self._run.finish(exit_code=int(failed))
        self._end_service()  # its process writes what it holds when it ends; the worker may be killed before it would


class MlFlow:
    """A run of the experiment, named after the run's folder, with the resolved recipe as a file."""

    def __init__(self, uri: str, experiment: str, folder: Path) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else self._client.create_experiment(experiment)
        kept = folder / MLFLOW_FILE
        if kept.exists():
            self._run_id = json.loads(kept.read_text())["run_id"]
            self._client.update_run(self._run_id, status="RUNNING")  # the start before may have ended as failed
        else:
            self._run_id = self._client.create_run(experiment_id, run_name=folder.name).info.run_id
            kept.write_text(json.dumps({"run_id": self._run_id}))
            if (folder / RECIPE_FILE).exists():
                self._client.log_artifact(self._run_id, str(folder / RECIPE_FILE))

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the figures of an epoch or step."""
        for name, value in metrics.items():
            self._client.log_metric(self._run_id, f"train/{name}", value, step=step)

    def close(self, failed: bool = False) -> None:
        """Mark the run as finished, or as failed."""
        self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")
