"""One worker of a gloo group that trains on an examples folder and dies after a checkpoint, if told so.

trainer_program.py RANK WORKERS PORT EXAMPLES FOLDER DIES_AFTER_STEPS
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.config import load_recipe
from cluster.examples import load_examples
from training.examples.checkpoints import Position
from training.examples.worker import ExamplesTrainer

SETTINGS = (
    "tables.dim=8",
    "click.hidden=[8]",
    "stream.batch_examples=24",
    "stream.lanes=6",
    "stream.shuffle_rows=20",
    "train.checkpoint_steps=4",
    "train.log_steps=2",
    "train.epochs=2",
    "train.warmup_steps=2",
    "train.keep_checkpoints=3",
    "ids.user_rows=240",
    "ids.item_rows=240",
    "ids.admit_after=2",
)


class Mortal(ExamplesTrainer):
    dies_after_steps = 0

    def save(self, position: Position) -> None:
        super().save(position)
        if position.steps == self.dies_after_steps:
            self.writer.wait()
            os._exit(9)


def main() -> None:
    rank, workers, port, examples, folder, dies_after_steps = sys.argv[1:]
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=int(rank), world_size=int(workers))
    recipe = load_recipe("clicks", SETTINGS)
    trainer = Mortal(load_examples(examples), recipe, Path(folder), torch.device("cpu"))
    trainer.dies_after_steps = int(dies_after_steps)
    position = trainer.train()
    end = {"examples": position.examples, "steps": position.steps} | trainer.score_heldout()
    if rank == "0":
        (Path(folder) / "end.json").write_text(json.dumps(end))


if __name__ == "__main__":
    main()
