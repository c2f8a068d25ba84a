"""One worker of a gloo group: one step on tables split in one way, and what is in them before and after a checkpoint.

split_program.py RANK WORKERS PORT KIND SHARDING FOLDER [LOADED_FROM]

KIND is `bags` or `rows` (looked up one by one). Every worker looks up the same rows, so the gradient of a step is that
of one worker. Rank 0 writes tables and accumulators to FOLDER/state.safetensors; all write FOLDER/checkpoint.
"""

import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from embeddings.tables import TablesConfig, build_bags, build_tables, gather_tables, load_tables, local_shards, shard
from training.checkpoint import load_checkpoint, save_checkpoint
from training.step import Optimizers, StepConfig

ROWS = {"user": 6, "item": 5}
DIM, RATE = 8, 0.1
LOOKED_UP = {"user": [0, 2, 2, 5], "item": [4, 1, 0, 1]}
NAMES = ["user", "item", "user.momentum", "item.momentum"]


class Model(nn.Module):
    """The sum of all rows looked up, column c counting c + 1 times: that is the gradient of each."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.is_bags = kind == "bags"
        bags = build_bags(ROWS, {name: [name] for name in ROWS}, DIM, RATE) if self.is_bags else None
        self.tables = bags or build_tables(ROWS, DIM, RATE)
        self.dense = nn.Linear(DIM, 1, bias=False)
        nn.init.constant_(self.dense.weight, 1.0)

    def forward(self, lookup: object) -> torch.Tensor:
        found = self.tables(lookup)
        column_D = torch.arange(1.0, DIM + 1)
        rows = [found[name] if self.is_bags else found[name].values() for name in ROWS]
        return self.dense(torch.cat(rows) * column_D).sum()


def lookup_of_all() -> object:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    values = torch.tensor([row for rows in LOOKED_UP.values() for row in rows])
    return KeyedJaggedTensor(keys=list(ROWS), values=values, lengths=torch.ones(len(values), dtype=torch.int64))


def main() -> None:
    rank, workers, port, kind, sharding, folder, *loaded_from = sys.argv[1:]
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=int(rank), world_size=int(workers))
    config = TablesConfig(dim=DIM, learning_rate=RATE, sharding=(sharding,))
    model = shard(Model(kind), config, torch.device("cpu"), batch_examples=4)
    optimizers = Optimizers(model, StepConfig(learning_rate=1e-9, weight_decay=0.0, clip_norm=1e9))
    whole = {name: torch.arange(count * DIM).view(count, DIM) / 8 for name, count in ROWS.items()}
    load_tables(model, whole)
    if loaded_from:
        load_checkpoint(model, optimizers, Path(loaded_from[0]))
    else:
        model(lookup_of_all()).backward()
    places = [
        (n, p.first_row, p.first_column, tuple(p.values.shape)) for n, ps in local_shards(model).items() for p in ps
    ]
    Path(folder, f"places-{rank}").write_text(repr(sorted(places)))
    state = gather_tables(model, NAMES)  # collective
    save_checkpoint(model, optimizers, Path(folder) / "checkpoint")  # collective
    if rank == "0":
        safetensors.torch.save_file(
            {name: value.contiguous() for name, value in state.items()}, f"{folder}/state.safetensors"
        )
    dist.barrier()


if __name__ == "__main__":
    main()
