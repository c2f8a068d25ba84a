"""How many events a second do two online workers learn, against one?

    python -m benchmarks.online_workers [--quick]

In:  random versions of 10,000 and of 100,000 items and users at dimension 64, text vectors of 384; steps of 64 events,
one a user, after 50 interactions each, with 1,024 negatives and 4 sequences of the past.
Out: events a second of everything the trainer has the model do for them: predict by base and present weights, users'
own rows, train step; processor time a step of the worker that leads, which waits for nobody; rows that it holds.
Without the log, histories, the guard's verdicts and publishing, which
the leader alone does.
Bound by the catalogue: its vectors are worked out and scored anew in every step, each worker its part; beside it by the
exchange of rows and gradients, which one worker does not pay, and by what each worker repeats (negatives, dense step).
Every worker has one thread: two use two cores. One worker takes the path without exchange, in turns with the two.
"""

import multiprocessing
import os
import tempfile
import time
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.deltas import publish_random
from benchmarks.harness import Turns, build_check, build_parser, interleave, print_result
from cluster.config import load_recipe
from cluster.events import KIND_INDEX
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.batch import PAD, Sequences, build_batch
from embeddings.tables import ITEM
from training.models.version import read_version
from training.online.learner import OnlineConfig
from training.online.model import LiveModel
from training.online.part import follow
from training.online.sequences import join_sequences
from training.online.workers import PATIENCE, Workers, open_store
from training.stream import DataConfig, NegativeSampler

HOST = "127.0.0.1"
EVENTS, HISTORY, REHEARSED = 64, 50, 4
WARM_UPS = 3
"""Steps of each turn that are not counted."""
PROCESSES = multiprocessing.get_context("forkserver")


class Leader(NamedTuple):
    """What the worker that leads found."""

    events_s: float
    cpu_ms: float
    """Processor time of a step, of all its threads."""
    item_rows: int


def main() -> None:
    """Measure both catalogues with one and two workers."""
    args = build_parser(__doc__, repeats=5).parse_args()
    sizes = {"small": 2_000, "large": 10_000} if args.quick else {"small": 10_000, "large": 100_000}
    steps = 5 if args.quick else 10
    PROCESSES.set_forkserver_preload(["training.online.part", "torchrec.distributed.model_parallel"])
    leaders: dict[str, list[Leader]] = {}
    turns: dict[str, Turns] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in sizes.items():
            registry = Path(folder) / name
            publish_random(Registry(registry), load_recipe("movielens", ["tables.spare_rows=0"]), rows)

            def events_s(workers: int, registry: Path = registry, name: str = name) -> float:
                found = _learn_apart(registry, workers, steps)
                leaders.setdefault(f"{name}_{workers}", []).append(found)
                return found.events_s

            turns[name] = interleave(
                {"one": lambda each=events_s: each(1), "two": lambda each=events_s: each(2)},
                2 if args.quick else args.repeats,
                warm_ups=0,  # every turn has its own
            )
    checks = [
        build_check("two_over_one_large", turns["large"].ratio("two", "one"), ">=1.2"),
        build_check("rows_a_worker_holds_of_two", leaders["large_2"][0].item_rows / sizes["large"], "<=0.5"),
    ]
    for name, found in turns.items():
        print(f"{name:5} {sizes[name]:>9,} items   one {found.median('one'):>8,.0f} events/s   ", end="")
        print(f"two {found.median('two'):>8,.0f} events/s   ratio {found.ratio('two', 'one'):.2f}")
    results = {
        "events_per_s": {name: found.summary() for name, found in turns.items()},
        "steps_per_s": {n: {w: found.median(w) / EVENTS for w in ("one", "two")} for n, found in turns.items()},
        "two_over_one": {name: found.ratio("two", "one") for name, found in turns.items()},
        "leader_cpu_ms_a_step": {name: median(one.cpu_ms for one in found) for name, found in leaders.items()},
        "item_rows_held": {name: found[0].item_rows for name, found in leaders.items()},
    }
    config = {"events": EVENTS, "history": HISTORY, "steps": steps, "sizes": sizes, "quick": args.quick}
    print_result(results=results, config=config, checks=checks)


def _learn_apart(registry: Path, workers: int, steps: int) -> Leader:
    """Learn in processes of their own."""
    _store, port = open_store(HOST, PATIENCE)  # there until all have met
    end, leaders = PROCESSES.Pipe()
    processes = [
        PROCESSES.Process(target=_work, args=(port, rank, workers, registry, steps, leaders), daemon=True)
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    leaders.close()  # so that a leader that fails is the end of what can be received
    try:
        return end.recv()
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def _work(port: int, rank: int, count: int, registry: Path, steps: int, end: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore(HOST, port, is_master=False)
    workers, device = Workers.join(store, rank, count, "cpu"), torch.device("cpu")
    if rank == 0:
        live = _take_up(registry, workers, device)
        end.send(Leader(*_measure(live, steps), len(live.part.pieces[ITEM].values)))
        workers.end()
    else:
        end.close()
        follow(workers, device)
    dist.destroy_process_group()


def _take_up(registry: Path, workers: Workers, device: torch.device) -> LiveModel:
    state = read_version(Registry(registry), VersionRef(1), with_optimizer=True)
    online = state.recipe.section(OnlineConfig)
    return LiveModel(
        state, online.step(), online.table_rate, device, 0, ranked_positions=online.ranked_positions, workers=workers
    )


def _measure(live: LiveModel, steps: int) -> tuple[float, float]:
    """Return events a second and processor time a step, over steps as training/online/learner.py takes them."""
    online, data = OnlineConfig(), DataConfig()
    rng = np.random.default_rng(0)
    sampler = NegativeSampler(live.counts, data)
    begun_s = cpu_s = 0.0
    for number in range(WARM_UPS + steps):
        if number == WARM_UPS:
            begun_s, cpu_s = time.perf_counter(), time.process_time()
        sequences = _sequences(rng, len(live.items), EVENTS, new=1)
        live.predict_base(sequences)
        live.predict(sequences)
        live.learn_users(sequences, online.user_rate)
        sequences = join_sequences(sequences, _sequences(rng, len(live.items), REHEARSED, new=HISTORY))
        batch = build_batch(sequences, sampler.draw(rng), live.text, sampler.log_q)
        live.learn(batch, float((sequences.target_row_BL != PAD).sum()) / online.batch_targets)
    live.item_scale()  # whatever has been told to the other workers is done when this returns
    return steps * EVENTS / (time.perf_counter() - begun_s), (time.process_time() - cpu_s) / steps * 1_000


def _sequences(rng: np.random.Generator, rows: int, users: int, new: int) -> Sequences:
    """Return histories of so many users by Zipf's law, of each of whom the `new` last interactions are learned."""
    shape = (users, HISTORY)
    drawn = np.minimum((rows + 1.0) ** rng.random((users, HISTORY + 1)), rows).astype(np.int64) - 1
    targets = drawn[:, 1:].copy()
    targets[:, : HISTORY - new] = PAD
    arrays = {
        "user_row_B": rng.choice(rows, users, replace=False),
        "item_row_BL": drawn[:, :-1],
        "kind_BL": np.full(shape, KIND_INDEX["click"], np.int64),
        "value_BL": np.full(shape, np.nan, np.float32),
        "ts_BL": np.sort(rng.integers(0, 10**6, shape), axis=1),
        "target_row_BL": targets,
        "target_rating_BL": np.full(shape, np.nan, np.float32),
        "weight_BL": np.ones(shape, np.float32),
    }
    return Sequences(**{f.name: arrays[f.name] for f in fields(Sequences)})


if __name__ == "__main__":
    main()
