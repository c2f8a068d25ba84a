"""How fast is TorchRec by itself, with batches that are already in memory? The ceiling of training from disk.

    python -m benchmarks.bare_torchrec --data DIR

In:  an examples folder whose ids are table rows (benchmarks/planted.py writes one).
Out: examples a second of two gloo processes with one thread each, in turns with plain PyTorch on two threads, which
     reads its batches from disk, once waiting for its threads by spinning and once by yielding; the better one
     counts. Here nothing is read, shuffled, counted or saved while the clock runs.
Bound by the lookups' memory traffic and by gloo's all-to-all of ids, sums and their gradients.

The batches, different ones for each process, are cut before the clock starts and used in turn.
Shapes: B examples a process, F features, D dimension, N ids of a batch.
"""

import logging
import os
import socket
import warnings
from contextlib import ExitStack
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from benchmarks.harness import build_parser, interleave, print_result
from benchmarks.plain_torch import (
    BATCH,
    DENSE_LEARNING_RATE,
    DIM,
    HIDDEN,
    LEARNING_RATE,
    YIELDING,
    Columns,
    build_plain,
    read_batches,
)
from benchmarks.planted import write_examples
from benchmarks.segments import Run, Segment, Segments, time_steps
from cluster.errors import DataError
from cluster.examples import load_examples
from training.examples.worker import keep_freed_memory

if TYPE_CHECKING:
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

WORKERS = 2
BATCHES = 64
"""Different batches in each process."""


class ReadyBatch(NamedTuple):
    """One process's share of a step."""

    lookup: "KeyedJaggedTensor"
    """Features user and item of one id an example, history of any number."""
    label_B: torch.Tensor


def ready_batch(columns: Columns, dtype: torch.dtype) -> ReadyBatch:
    """Lay a batch's ids out feature by feature, the form that embeddings/batch.py draws."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    count = len(columns.label_B)
    end_B = torch.cat([columns.start_B, torch.tensor([len(columns.history_N)])])
    lengths_FB = torch.cat([torch.ones(2 * count, dtype=torch.int32), end_B.diff().to(torch.int32)])
    values_N = torch.cat([columns.user_B, columns.item_B, columns.history_N]).to(dtype)
    lookup = KeyedJaggedTensor(keys=["user", "item", "history"], values=values_N, lengths=lengths_FB)
    return ReadyBatch(lookup, columns.label_B)


class BareClick(nn.Module):
    """The click model over TorchRec's tables."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
        from torchrec.modules.embedding_modules import EmbeddingBagCollection
        from torchrec.optim import RowWiseAdagrad
        from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

        configs = [
            EmbeddingBagConfig(
                name=name,
                num_embeddings=rows,
                embedding_dim=DIM,
                feature_names=features,
                pooling=PoolingType.SUM,
                init_fn=nn.init.zeros_,
            )
            for name, rows, features in (("user", users, ["user"]), ("item", items, ["item", "history"]))
        ]
        self.tables = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        apply_optimizer_in_backward(RowWiseAdagrad, self.tables.parameters(), {"lr": LEARNING_RATE, "eps": 1e-8})
        self.dense = nn.Sequential(nn.Linear(3 * DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, batch: ReadyBatch) -> torch.Tensor:
        """Collective. Return the mean binary cross entropy."""
        # Collective: ids to the processes that hold their rows, sums back.
        sums_BD = self.tables(batch.lookup).values()
        return functional.binary_cross_entropy_with_logits(self.dense(sums_BD).squeeze(1), batch.label_B)


def shard_bare(model: BareClick, batch: int, sharding: str | None) -> "DistributedModelParallel":
    """Collective. Plan with the machine's real memory and shard; `sharding` forces one kind, such as `table_wise`."""
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.distributed.types import ModuleSharder

    workers = dist.get_world_size()
    ddr_cap = psutil.virtual_memory().available // workers
    topology = Topology(world_size=workers, local_world_size=workers, compute_device="cpu", ddr_cap=ddr_cap)
    forced = ParameterConstraints(sharding_types=[sharding], min_partition=DIM // 2) if sharding else None
    constraints = {"user": forced, "item": forced} if forced else None
    sharders = [cast("ModuleSharder[nn.Module]", EmbeddingBagCollectionSharder())]
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=batch, constraints=constraints, debug=False)
    # Collective: process 0 plans, the others receive the plan.
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    if dist.get_rank() == 0:
        kinds = {name: (how.sharding_type, how.ranks) for name, how in cast("Any", plan.plan["tables"]).items()}
        print(f"bare plan: {kinds}", flush=True)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def build_bare(
    rank: int,
    *,
    folder: str,
    port: int,
    workers: int = WORKERS,
    batch: int = BATCH,
    batches: int = BATCHES,
    dtype: str = "int32",
    sharding: str | None = None,
    keep_memory: bool = True,
) -> Run:
    """Collective. Cut the batches, shard the model and return what runs a segment."""
    if keep_memory:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(workers)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # warns of a rename that is torchrec's to follow
    examples = load_examples(folder)
    paths = [Path(part.path) for part in examples.parts]
    columns = islice(read_batches(paths, batch, share=rank, shares=workers), batches)
    ready = [ready_batch(each, getattr(torch, dtype)) for each in columns]
    if not ready:
        raise DataError(f"{folder}: too few row groups of {batch} rows for {workers} processes; write more rows")
    model = shard_bare(BareClick(examples.info.users or 0, examples.info.items or 0), batch, sharding)
    dense = torch.optim.AdamW([p for name, p in model.named_parameters() if "dense" in name], lr=DENSE_LEARNING_RATE)
    turn = cycle(ready)

    def step() -> tuple[int, float]:
        mine = next(turn)
        dense.zero_grad()
        loss = model(mine)
        loss.backward()
        dense.step()
        return len(mine.label_B), loss.item()

    def run(steps: int) -> Segment:
        # Collective: both start together.
        dist.barrier()
        return time_steps(step, steps)

    return run


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--data", type=Path, help="examples folder; --quick writes a small one where none is given")
    parser.add_argument("--steps", type=int, default=30, help="of each segment")
    flags = parser.parse_args()
    if not (flags.data or flags.quick):
        parser.error("--data is needed; python -m benchmarks.planted writes one")
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = flags.data or write_examples(Path(scratch), 1_000_000, 100_000, 10_000, seed=0, heldout_rows=1)
        steps = min(flags.steps, 5) if flags.quick else flags.steps
        spinning = stack.enter_context(Segments(build_plain, folder=str(folder)))
        yielding = stack.enter_context(Segments(build_plain, environment=YIELDING, folder=str(folder)))
        bare = stack.enter_context(Segments(build_bare, workers=WORKERS, folder=str(folder), port=free_port()))
        variants = {"plain_spinning": spinning, "plain_yielding": yielding, "bare_torchrec": bare}
        measured = {name: partial(_examples_s, segments, steps) for name, segments in variants.items()}
        turns = interleave(measured, 2 if flags.quick else flags.repeats, warm_ups=2)
        plain = max("plain_spinning", "plain_yielding", key=turns.median)
        results = turns.summary() | {"plain": plain, "bare_over_plain": turns.ratio("bare_torchrec", plain)}
    config = {"batch": BATCH, "steps": steps, "workers": WORKERS, "dim": DIM, "hidden": HIDDEN, "quick": flags.quick}
    print_result(results=results, config=config, checks=[])


def _examples_s(segments: Segments, steps: int) -> float:
    return segments.measure(steps).examples_s


if __name__ == "__main__":
    main()
