"""Train the click model with PyTorch alone, from Parquet, the way a competent user would write it: the baseline.

In:  an examples folder whose ids are table rows.
Out: `build_plain`, for segments.py: one process on all cores, data loading included.
Knows nothing of what it is compared to.
Bound by the sparse Adagrad: it sorts and sums each batch's gradients in separate passes over memory.

    IterableDataset (row groups, whole batches) ─▶ DataLoader ─▶ EmbeddingBag(sparse=True) ─▶ MLP 96-64-1 ─▶ BCE
    torch.optim.Adagrad for the tables, AdamW for the MLP

Rows are read in the order of the files: shuffling, sharding and resuming are left out, in its favour.
Shapes: B examples, D dimension, N history items of a batch.
"""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.segments import Run, time_steps
from cluster.examples import load_examples
from training.examples.worker import keep_freed_memory

DIM = 32
HIDDEN = 64
BATCH = 16_384
LEARNING_RATE = 0.05
DENSE_LEARNING_RATE = 1e-3
YIELDING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment in which a thread that waits for the other gives its core away. Measured on 2 cores with one busy process
beside it: 253,000 examples/s instead of 22,000; undisturbed, spinning is 2 % faster. Compare to the better one."""


class Columns(NamedTuple):
    """A batch as plain tensors."""

    user_B: torch.Tensor
    item_B: torch.Tensor
    history_N: torch.Tensor
    start_B: torch.Tensor
    """Where each example's history begins in `history_N`."""
    label_B: torch.Tensor


def read_batches(paths: list[Path], batch: int, *, share: int = 0, shares: int = 1) -> Iterator[Columns]:
    """Yield whole batches from every `shares`-th row group, from the `share`-th on; a row group's short end is left."""
    seen = 0
    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                seen += 1
                if (seen - 1) % shares == share:
                    table = file.read_row_group(group, use_threads=False)
                    for first in range(0, len(table) - batch + 1, batch):
                        yield _columns(table.slice(first, batch))


def _columns(table: pa.Table) -> Columns:
    user_B, item_B, label_B = (table[name].to_numpy() for name in ("user_id", "item_id", "label"))
    history: pa.ListArray = table["history"].combine_chunks()
    end_B = history.offsets.to_numpy()
    history_N = history.values.to_numpy()[end_B[0] : end_B[-1]]
    user_B, item_B, history_N, start_B = (
        torch.from_numpy(array.copy()) for array in (user_B, item_B, history_N, end_B[:-1] - end_B[0])
    )
    return Columns(user_B, item_B, history_N, start_B, torch.from_numpy(label_B.astype(np.float32)))


class Rows(IterableDataset[Columns]):
    """The training rows, for ever."""

    def __init__(self, paths: list[Path], batch: int) -> None:
        self.paths, self.batch = paths, batch

    def __iter__(self) -> Iterator[Columns]:
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            yield from read_batches(self.paths, self.batch, share=share, shares=shares)


class PlainClick(nn.Module):
    """The click model in torch.nn alone."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.user = nn.EmbeddingBag(users, DIM, mode="sum", sparse=True, _weight=_zeros(users))
        self.item = nn.EmbeddingBag(items, DIM, mode="sum", sparse=True, _weight=_zeros(items))
        self.dense = nn.Sequential(nn.Linear(3 * DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, batch: Columns) -> torch.Tensor:
        """Return the mean binary cross entropy."""
        count = len(batch.user_B)
        # Items and histories in one lookup: one sparse gradient of the item table instead of two to add up.
        item_N = torch.cat([batch.item_B, batch.history_N])
        start_2B = torch.cat([torch.arange(count, dtype=item_N.dtype), batch.start_B + count])
        item_2BD = self.item(item_N, start_2B)
        user_BD = self.user(batch.user_B, torch.arange(count, dtype=batch.user_B.dtype))
        features_BD = torch.cat([user_BD, item_2BD[:count], item_2BD[count:]], dim=1)
        return functional.binary_cross_entropy_with_logits(self.dense(features_BD).squeeze(1), batch.label_B)


def _zeros(rows: int) -> torch.Tensor:
    """Return zeros whose memory is there already: the first steps are not to pay for it."""
    return torch.empty(rows, DIM).zero_()


def build_plain(
    rank: int,
    *,
    folder: str,
    batch: int = BATCH,
    threads: int | None = None,
    loaders: int = 0,
    keep_memory: bool = False,
) -> Run:
    """Build model, optimisers and loader in this process; `loaders` are the DataLoader's worker processes."""
    if keep_memory:
        keep_freed_memory()
    warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)  # torch's Adagrad, about itself
    torch.manual_seed(rank)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    examples = load_examples(folder)
    model = PlainClick(examples.info.users or 0, examples.info.items or 0)
    sparse = torch.optim.Adagrad([*model.user.parameters(), *model.item.parameters()], lr=LEARNING_RATE, eps=1e-8)
    dense = torch.optim.AdamW(model.dense.parameters(), lr=DENSE_LEARNING_RATE)
    rows = Rows([Path(part.path) for part in examples.parts], batch)
    batches = iter(DataLoader(rows, batch_size=None, num_workers=loaders))

    def step() -> tuple[int, float]:
        columns = next(batches)
        sparse.zero_grad()
        dense.zero_grad()
        loss = model(columns)
        loss.backward()
        sparse.step()
        dense.step()
        return len(columns.label_B), loss.item()

    return lambda steps: time_steps(step, steps)
