"""recloop's own training loop as segments: an examples folder on disk in, steps of the click model out.

In:  an examples folder, recipe overrides, how many gloo processes.  Out: `Run`, for segments.py.
The very loop of `recloop train`, without Ray around it: read, decode, shuffle, map ids, step, tally.
"""

import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.segments import Run, Segment, time_steps
from cluster.config import load_recipe
from cluster.examples import load_examples
from training.examples.checkpoints import Position
from training.examples.worker import ExamplesTrainer, keep_freed_memory

NEVER = 10**9
SETTLING_STEPS = 8
"""Steps before a segment's clock starts: what was read ahead while others were measured is used up."""


def build_streamed(
    rank: int,
    *,
    folder: str,
    run_folder: str,
    port: int,
    processes: int,
    settings: Sequence[str] = (),
    saves: bool = False,
) -> Run:
    """Collective. Build the trainer and return what runs a segment; epochs follow one another without end.

    With `saves`, a checkpoint is begun as a segment begins, and the segment does not end before it is whole.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # warns of a rename that is torchrec's to follow
    overrides = [f"train.checkpoint_steps={NEVER}", "train.epochs=1000", *settings]
    Path(run_folder).mkdir(parents=True, exist_ok=True)
    trainer = ExamplesTrainer(
        load_examples(folder), load_recipe("clicks", overrides), Path(run_folder), torch.device("cpu")
    )
    position = Position()
    steps_done = _steps(trainer, position)

    def step() -> tuple[int, float]:
        return next(steps_done), 0.0

    def run(steps: int) -> Segment:
        for _ in range(SETTLING_STEPS):
            next(steps_done)
        # Collective: all start together.
        dist.barrier()
        if not saves:
            return time_steps(step, steps)
        begun_s = time.perf_counter()
        trainer.save(position)
        segment = time_steps(step, steps)
        trainer.writer.wait()
        return replace(segment, seconds=time.perf_counter() - begun_s)

    return run


def _steps(trainer: ExamplesTrainer, position: Position) -> Iterator[int]:
    while True:
        yield from trainer.train_epoch(position)
        position.epoch, position.step = position.epoch + 1, 0
