"""Run a train function on Ray Train's workers, from the driver, and show how far it is.

In:  the function's import string, its job, the settings, a run folder on storage that all workers share.
Out: Ray Train's result, when the workers are done; failures as errors of ours.
Knows nothing of what is trained.
"""

import importlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from cluster.errors import EngineError, RecloopError
from embeddings.tables import device_type
from training.run import METRICS_FILE, TrainConfig

if TYPE_CHECKING:
    from ray.train import Result, UserCallback

MetricsLines = list[str]


def fit_on_workers(
    train_function: str,
    job: dict[str, str],
    config: TrainConfig,
    folder: Path,
    bar: tqdm,
    done: Callable[[MetricsLines], int],
    callbacks: "Sequence[UserCallback]" = (),
) -> "Result":
    """Train within an open Ray session; `done` tells from the lines of metrics.jsonl how far the bar is.

    A worker that fails is started again, with the others, up to `train.max_failures` times, whatever the reason: Ray
    Train does not tell bad data from a lost machine. Then raises what the workers raised of our errors, else
    `EngineError`.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from training.interface import ReachableTorchConfig

    module, _, name = train_function.partition(":")
    cuda = device_type() == "cuda"
    workers = config.workers if config.min_workers is None else (config.min_workers, config.workers)
    trainer = TorchTrainer(
        getattr(importlib.import_module(module), name),
        train_loop_config=job,
        torch_config=ReachableTorchConfig(backend="nccl" if cuda else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=cuda, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder.resolve()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=list(callbacks),
        ),
    )
    with _Follower(folder / METRICS_FILE, bar, done):
        try:
            return _wait_for(trainer.fit)
        except TrainingFailedError as error:
            raise _cause_of(error) from error


def _cause_of(error: Exception) -> RecloopError:
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, RecloopError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__  # Ray's own wrapper has `cause`
    return EngineError(f"training failed: {error}")


def _wait_for(fit: "Callable[[], Result]") -> "Result":
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


class _Follower:
    """Moves a progress bar along the run's metrics file while the driver waits for Ray Train."""

    def __init__(self, path: Path, bar: tqdm, done: Callable[[MetricsLines], int]) -> None:
        self._path, self._bar, self._done = path, bar, done
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(0.5):
            text = self._path.read_text() if self._path.exists() else ""
            lines = text[: text.rfind("\n") + 1].splitlines()  # one may be half-written
            if lines and (done := self._done(lines)) != self._bar.n:
                latest = json.loads(lines[-1])
                shown = ("loss_total", "ne", "examples_per_s")
                self._bar.set_postfix({name: f"{latest[name]:,.4g}" for name in shown if latest.get(name) is not None})
                self._bar.update(done - self._bar.n)
