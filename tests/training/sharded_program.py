"""One worker of a gloo group: forward, steps and checkpoints on one batch that the workers share out.

    sharded_program.py RANK WORKERS FOLDER

Two of these groups run beside each other, of one and of two workers; each goes on from the other's checkpoint. What
there is to compare is written by rank 0 to FOLDER/WORKERS/NAME.safetensors.
"""

import os
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist

from embeddings.batch import Batch, Sequences, build_batch
from embeddings.tables import TablesConfig, build_lookup, gather_tables, load_tables
from embeddings.vocabulary import Vocabulary
from training.checkpoint import dense_state, load_checkpoint, save_checkpoint
from training.models.recommender import Recommender, build_recommender
from training.models.two_stage import Losses, ModelConfig
from training.step import Optimizers, StepConfig, train_step

ITEMS, USERS, DIM, TEXT_DIM = 21, 8, 8, 6
SPARE_ROWS = 4
STEP = StepConfig(learning_rate=0.01, weight_decay=0.01, clip_norm=0.5)
TABLES = TablesConfig(dim=DIM, learning_rate=0.05, spare_rows=SPARE_ROWS)
STATE = ("item", "user", "item.momentum", "user.momentum")
PATIENCE_S = 90.0


def model_config(dropout: float) -> ModelConfig:
    return ModelConfig(max_history=5, layers=1, dropout=dropout, user_row_dropout=dropout, ranker_hidden=8)


def share_of_batch(rank: int, workers: int) -> Batch:
    """Every sequence is full and every target rated, so that a mean of the shares' means is the batch's mean."""
    rng = np.random.default_rng(5)
    items_BL = rng.integers(0, ITEMS, (8, 6))
    shape = (8, 5)
    whole = Sequences(
        user_row_B=np.arange(8),
        item_row_BL=items_BL[:, :-1],
        kind_BL=np.full(shape, 5),
        value_BL=rng.integers(1, 6, shape).astype(np.float32),
        ts_BL=np.sort(rng.integers(0, 10**6, shape), axis=1),
        target_row_BL=items_BL[:, 1:],
        target_rating_BL=rng.integers(1, 6, shape).astype(np.float32),
        weight_BL=np.ones(shape, np.float32),
    )
    mine = Sequences(**{f.name: getattr(whole, f.name)[rank::workers] for f in fields(Sequences)})
    text = rng.normal(size=(ITEMS, TEXT_DIM)).astype(np.float32)
    return build_batch(mine, rng.integers(0, ITEMS, 16), text, np.log(rng.dirichlet(np.full(ITEMS, 9.0))))


def build(dropout: float, seed: int) -> tuple["torch.nn.Module", Optimizers]:
    """Collective. A sharded model whose tables, as if trained, are not zero."""
    items = Vocabulary([f"i{row}" for row in range(ITEMS)], ITEMS + SPARE_ROWS)
    users = Vocabulary([f"u{row}" for row in range(USERS)], USERS + SPARE_ROWS)
    device = torch.device("cpu")
    model = build_recommender(TABLES, model_config(dropout), items, users, text_dim=TEXT_DIM, device=device, seed=seed)
    generator = torch.Generator().manual_seed(3)
    rows = {
        "item": torch.randn(items.capacity, DIM, generator=generator),
        "user": torch.randn(users.capacity, DIM, generator=generator),
    }
    load_tables(model, rows)
    return model, Optimizers(model, STEP)


class Worker:
    def __init__(self, rank: int, workers: int, folder: Path) -> None:
        self.rank, self.workers, self.folder = rank, workers, folder
        self.batch = share_of_batch(rank, workers)

    def run(self) -> None:
        model, optimizers = build(dropout=0.0, seed=1)
        self.write("start", self.state(model, optimizers))
        self.write("lookup", self.look_up(model))
        model.eval()
        with torch.no_grad():
            self.write("forward", self.mean(model(self.batch)))
        model.train()
        self.write("first_losses", self.mean(train_step(model, self.batch, optimizers)))
        self.write("first_step", self.state(model, optimizers))
        save_checkpoint(model, optimizers, self.folder / f"checkpoint-{self.workers}")
        train_step(model, self.batch, optimizers)
        self.write("second_step", self.state(model, optimizers))

        load_checkpoint(model, optimizers, self.other_checkpoint())
        self.write("loaded", self.state(model, optimizers))
        train_step(model, self.batch, optimizers)
        self.write("continued", self.state(model, optimizers))
        optimizers.scale_learning_rate(0.0)
        train_step(model, self.batch, optimizers)
        self.write("rate_0", self.state(model, optimizers))

        for name in ("seeded", "seeded_again"):
            model, optimizers = build(dropout=0.5, seed=7)
            for _ in range(3):
                train_step(model, self.batch, optimizers)
            self.write(name, self.state(model, optimizers))

    def look_up(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        recommender = next(module for module in model.modules() if isinstance(module, Recommender))
        with torch.no_grad():
            found = recommender.tables(build_lookup({"item": self.batch.item_rows_N, "user": self.batch.user_row_B}))
        return {name: found[name].values() for name in ("item", "user")}

    def mean(self, losses: Losses) -> dict[str, torch.Tensor]:
        mean = torch.stack(losses).detach()
        dist.all_reduce(mean)
        return dict(zip(Losses._fields, mean / self.workers, strict=True))

    def state(self, model: torch.nn.Module, optimizers: Optimizers) -> dict[str, torch.Tensor]:
        return gather_tables(model, list(STATE)) | dense_state(optimizers)

    def write(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        if self.rank == 0:
            copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
            safetensors.torch.save_file(copies, self.folder / str(self.workers) / f"{name}.safetensors")

    def other_checkpoint(self) -> Path:
        path = self.folder / f"checkpoint-{3 - self.workers}"
        deadline_s = time.monotonic() + PATIENCE_S
        while not (path / ".metadata").exists():
            assert time.monotonic() < deadline_s, f"{path}: the other group has not written it"
            time.sleep(0.05)
        return path


def main() -> None:
    rank, workers, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting_point = f"file://{folder}/{workers}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=workers)
    try:
        Worker(rank, workers, folder).run()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
