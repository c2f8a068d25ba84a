"""What every worker runs to fit the click model to an examples folder: step after step, checkpoints, held-out scores.

In:  the job: a recipe, an examples folder, a run folder.  Out: checkpoints, metrics.jsonl, scores.json.
Knows nothing of the driver. Ray has set up the process group; torchrec is imported here, not on the driver.

A worker that dies takes the group with it: Ray Train starts all again, of as many workers as there are then, and they
go on at the newest whole checkpoint's step. What the lost steps had learned is undone, so no example counts twice.
"""

import ctypes
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from cluster.config import Recipe
from cluster.errors import ConfigError, DataError
from cluster.examples import Examples, load_examples
from embeddings.examples import ExampleBatch
from embeddings.ids.config import IdsConfig
from embeddings.tables import TablesConfig, local_shards, reset_rows
from training.checkpoint import load_checkpoint, training_state
from training.evaluation.clicks import ClickTally, collective_device
from training.examples.background import Background
from training.examples.checkpoints import (
    CheckpointWriter,
    Position,
    SavedCheckpoint,
    newest_checkpoint,
    read_arrays,
)
from training.examples.columns import REASONS
from training.examples.footprint import ids_an_example
from training.examples.rows import build_rows
from training.examples.stream import ExampleRows, ExampleStream, StreamConfig
from training.models.click import ClickConfig, build_click_model
from training.run import CHECKPOINTS_FOLDER, METRICS_FILE, SCORES_FILE, TrainConfig, learning_rate
from training.step import Optimizers, train_step
from training.tracking import closing, open_boards

RNG = "rng"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

logger = logging.getLogger(__name__)


def train_examples_worker(job: dict[str, str]) -> None:
    """Collective. Train this worker's share of the job to its end."""
    keep_freed_memory()
    recipe, folder = Recipe.from_toml(job["recipe"]), Path(job["folder"])
    trainer = ExamplesTrainer(load_examples(job["examples"]), recipe, folder, get_device())
    trainer.judge_heldout()
    position = trainer.train()
    scores = trainer.score_heldout()
    if dist.get_rank() == 0:
        counts = {"examples": position.examples, "steps": position.steps, "skipped": position.skipped}
        (folder / SCORES_FILE).write_text(json.dumps(counts | scores))


class ExamplesTrainer:
    """One worker's model, data and checkpoints."""

    def __init__(self, examples: Examples, recipe: Recipe, folder: Path, device: torch.device) -> None:
        """Collective. Build and shard the model."""
        self.config, self.stream = recipe.section(TrainConfig), recipe.section(StreamConfig)
        self.examples, self.folder, self.device = examples, folder, device
        self.ids = recipe.section(IdsConfig)
        # Collective. A group of its own: ids are exchanged on a background thread.
        group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self.rows = build_rows(examples, self.ids, cast("dist.ProcessGroup | None", group))
        self.model = build_click_model(
            recipe.section(TablesConfig),
            recipe.section(ClickConfig),
            self.rows.table_rows,
            batch_examples=self.stream.batch_examples,
            device=self.device,
            seed=self.config.seed,
            pooling=ids_an_example(examples, self.stream),
        )
        self.optimizers = Optimizers(self.model, self.config.step())
        self.writer = CheckpointWriter(folder / CHECKPOINTS_FOLDER, keep=self.config.keep_checkpoints)
        self._pieces = local_shards(self.model)
        self._ids_state = self.rows.state()
        self._saved_steps = -1
        self._boards = open_boards(folder, recipe) if dist.get_rank() == 0 else []

    def train(self) -> Position:
        """Collective. Train from the newest checkpoint to the end, which is saved as well; return where that is."""
        with closing(self._boards):
            position = self.resume()
            while position.epoch < self.config.epochs:
                for _ in self.train_epoch(position):
                    pass
                position.epoch, position.step = position.epoch + 1, 0
            self.save(position)
            self.writer.close()
        return position

    def train_epoch(self, position: Position) -> Iterator[int]:
        """Collective. Train the rest of the epoch, saving and reporting on the way; moves `position`.

        Yields this worker's examples of each step, once the step is done.
        """
        stream = self._stream(self.examples, position.epoch)
        window = Window()
        self.model.train()
        with stream.batches(position.step) as shares, self._mapped(shares, position, stream.steps) as batches:
            for share, batch, ids_state in batches:
                rate = learning_rate(position.steps, self.config.epochs * stream.steps, self.config)
                self.optimizers.scale_learning_rate(rate)
                for table, rows in batch.reused.items():
                    reset_rows(self._pieces, table, rows)
                losses = train_step(self.model, batch.to(self.device), self.optimizers)
                self.writer.check()
                window.add(losses.logit_B, batch.label_B, share.skipped)
                position.step, position.steps = position.step + 1, position.steps + 1
                if ids_state is not None or position.steps % self.config.log_steps == 0:
                    self._log(window.close(position))  # collective
                if ids_state is not None:
                    self._ids_state = ids_state
                ends = position.step == stream.steps and position.epoch + 1 == self.config.epochs
                if position.steps % self.config.checkpoint_steps == 0 and not ends:  # `train` saves the end
                    self.save(position)
                yield len(batch.label_B)

    def _mapped(
        self, shares: Iterable[ExampleRows], position: Position, steps: int
    ) -> "Background[tuple[ExampleRows, ExampleBatch, dict[str, np.ndarray] | None]]":
        """Collective, on a thread. Yield each share with its batch and, where a checkpoint follows, the id tables.

        Ids are mapped ahead of the steps, so the tables are copied when their turn comes: after the last batch before
        a checkpoint, which are due at steps that every worker knows without asking.
        """
        done = position.steps

        def map_all() -> Iterator[tuple[ExampleRows, ExampleBatch, dict[str, np.ndarray] | None]]:
            for number, share in enumerate(shares, start=1):
                batch = self.rows.learn(share, done + number)
                is_due = (done + number) % self.config.checkpoint_steps == 0 or share.step == steps - 1
                yield share, batch, self.rows.state() if is_due else None

        return Background(map_all, depth=self.stream.prefetch)

    def save(self, position: Position) -> None:
        """Collective. Write a checkpoint in the background, unless there is one of this step."""
        if position.steps == self._saved_steps:
            return
        self._saved_steps = position.steps
        state = training_state(self.model, self.optimizers)
        arrays = {RNG: torch.get_rng_state().numpy(), **self._ids_state}
        self.writer.save(state, arrays, position, self._stream_identity())

    def resume(self) -> Position:
        """Collective. Load the newest whole checkpoint; a new run starts at the beginning.

        Raises `DataError` or `ConfigError` where the data or the settings are not those of the checkpoint.
        """
        found: list[Path | None] = [None]
        if dist.get_rank() == 0:
            found[0], passed_over = newest_checkpoint(self.folder / CHECKPOINTS_FOLDER)
            for reason in passed_over:
                logger.warning("checkpoint passed over: %s", reason)
        dist.broadcast_object_list(found)  # collective: all go on from the same one
        folder = found[0]
        if folder is None:
            self._forget_metrics_after(0)
            return Position()
        saved = SavedCheckpoint.read(folder)
        self._forget_metrics_after(saved.position.steps)
        self._saved_steps = saved.position.steps
        _assert_same_stream(saved.stream, self._stream_identity())
        load_checkpoint(self.model, self.optimizers, folder)
        self.rows.load_state(
            {name: np.concatenate(read_arrays(folder, name, saved.workers)) for name in self._ids_state}
        )
        self._ids_state = self.rows.state()
        if saved.workers == dist.get_world_size():
            torch.set_rng_state(torch.from_numpy(read_arrays(folder, RNG, saved.workers)[dist.get_rank()]))
        return saved.position

    def judge_heldout(self) -> None:
        """Read the held-out rows once: where one cannot be used, training for hours must not come before the error."""
        if self.examples.heldout is not None:
            with self._stream(self._heldout(), 0).batches() as shares:
                for _ in shares:
                    pass

    def score_heldout(self) -> dict[str, float]:
        """Collective. Return AUC and normalised entropy over the held-out rows; nothing where there are none."""
        if self.examples.heldout is None:
            return {}
        tally = ClickTally()
        self.model.eval()
        with self._stream(self._heldout(), 0).batches() as shares, torch.no_grad():
            for share in shares:
                batch = self.rows.look_up(share)
                tally.add(self.model(batch.to(self.device)).logit_B, batch.label_B)
        tally = tally.over_all_workers()
        figures = tally.figures()
        scores = {f"heldout_{name}": figures[name] for name in ("auc", "ne")}
        return scores | {"heldout_examples": tally.examples}

    def _heldout(self) -> Examples:
        assert self.examples.heldout is not None  # callers ask first
        return dataclasses.replace(self.examples, parts=(self.examples.heldout,))

    def _forget_metrics_after(self, steps: int) -> None:
        """Take back the lines of steps that are trained again, and one that a crash tore."""
        path = self.folder / METRICS_FILE
        if dist.get_rank() == 0 and path.exists():
            kept = [line for line in path.read_text().splitlines() if _steps_of(line) <= steps]
            path.write_text("".join(f"{line}\n" for line in kept))

    def _stream(self, examples: Examples, epoch: int) -> ExampleStream:
        return ExampleStream(
            examples,
            self.stream,
            seed=self.config.seed,
            epoch=epoch,
            rank=dist.get_rank(),
            workers=dist.get_world_size(),
            limits=self.rows.limits,
        )

    def _stream_identity(self) -> dict[str, object]:
        return {
            "files": self.examples.marks,
            "train.seed": self.config.seed,
            **{
                f"stream.{key}": getattr(self.stream, key)
                for key in ("batch_examples", "lanes", "shuffle_rows", "max_history", "bad_rows")
            },
            **{f"ids.{key}": value for key, value in dataclasses.asdict(self.ids).items()},
        }

    def _log(self, metrics: Mapping[str, object]) -> None:
        figures = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for board in self._boards:
            board.write(figures, int(figures["steps"]))
        if dist.get_rank() == 0:
            with (self.folder / METRICS_FILE).open("a") as lines:
                lines.write(json.dumps(metrics) + "\n")


def _steps_of(line: str) -> float:
    try:
        return json.loads(line)["steps"]
    except ValueError:
        return math.inf


class Window:
    """What happened since the last report; predictions are made before their example is learned."""

    def __init__(self) -> None:
        self._tally = ClickTally()
        self._skipped = np.zeros(len(REASONS), np.int64)
        self._started_s = time.monotonic()

    def add(self, logit_B: torch.Tensor, label_B: torch.Tensor, skipped: np.ndarray) -> None:
        """Take one step."""
        self._tally.add(logit_B, label_B)
        self._skipped += skipped

    def close(self, position: Position) -> dict[str, object]:
        """Collective. Add the window to the position and return its figures; a new window begins."""
        skipped_by_reason = torch.from_numpy(self._skipped).to(collective_device())
        dist.all_reduce(skipped_by_reason)  # collective
        tally = self._tally.over_all_workers()  # collective
        position.examples += tally.examples
        for reason, count in zip(REASONS, skipped_by_reason.tolist(), strict=True):
            if count:
                position.skipped[reason] = position.skipped.get(reason, 0) + count
        seconds = time.monotonic() - self._started_s
        self.__init__()
        return {
            "epoch": position.epoch,
            "steps": position.steps,
            "examples": position.examples,
            "examples_per_s": round(tally.examples / seconds),
            "seconds": round(seconds, 3),
            **tally.figures(),
            "rss_bytes": psutil.Process().memory_info().rss,
            "skipped": position.skipped,
        }


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: it hands megabytes back after every step otherwise, to fault them in again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's alone
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _assert_same_stream(saved: Mapping[str, object], now: Mapping[str, object]) -> None:
    before, after = saved["files"], now["files"]
    assert isinstance(before, Mapping)
    assert isinstance(after, Mapping)
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            change = "is new" if name not in before else "is gone" if name not in after else "has changed"
            raise DataError(f"{name}: {change} since the checkpoint; a run goes on with the data it began with")
    for key, value in now.items():
        if key != "files" and saved.get(key) != value:
            raise ConfigError(f"{key}={value!r}: was {saved.get(key)!r} at the checkpoint; steps would hold other rows")
