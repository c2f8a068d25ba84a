"""What do checkpoints cost, and what is lost when a worker or a whole node is killed?

    python -m benchmarks.resume [--quick] [--data DIR]

Three parts, all with two workers:
- steps with a checkpoint of all tables among them, in turns with as many steps without one: bounded by copying the
  state once and by writing it beside the training; the ceiling is the run without checkpoints;
- `recloop train`'s own path on Ray, one worker killed (SIGKILL) after a checkpoint;
- the same on a cluster of several Ray nodes, one node killed with everything on it.

A killed run must end with every example counted once, and with tables and weights equal to those of a run that nothing
happened to.
"""

import argparse
import json
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.bare_torchrec import free_port
from benchmarks.harness import build_check, build_parser, interleave, print_result
from benchmarks.planted import write_examples
from benchmarks.segments import Segments
from benchmarks.streamed import build_streamed
from cluster.config import load_recipe
from cluster.errors import EngineError
from cluster.home import Home
from training.checkpoint import read_checkpoint
from training.examples.checkpoints import MANIFEST, SavedCheckpoint, checkpoint_folders
from training.examples.trainer import train_on_examples
from training.run import CHECKPOINTS_FOLDER

WORKERS = 2
CHECKPOINT_STEPS = 8
SMALL = (
    "stream.batch_examples=2048",
    f"train.checkpoint_steps={CHECKPOINT_STEPS}",
    "train.log_steps=1",
    "train.max_failures=3",
    "train.seed=1",
)
PATIENCE_S = 120.0
RAY_ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


def main() -> None:
    """Measure, kill, compare and print."""
    args = _parse()
    os.environ |= RAY_ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}  # read by processes started from here on
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:  # Ray's socket paths must be short
        folder = Path(scratch) / "killed"
        rows = 60_000 if args.quick else 400_000
        write_examples(folder, rows, 20_000, 2_000, seed=1, part_rows=rows // 4, heldout_rows=10_000)
        for kill in ("nothing", "worker", "node"):
            results[kill] = _in_process(run_and_kill, kill=kill, folder=str(folder), home=f"{scratch}/{kill}")
            print(f"{kill}: {results[kill]}", flush=True)
        differences = {kill: largest_difference(scratch, "nothing", kill) for kill in ("worker", "node")}
        cost = checkpoint_cost(args, scratch)
    interval = CHECKPOINT_STEPS
    checks = [build_check("checkpoint_share_of_a_minute", cost["share"], "<=0.03")]
    for kill in ("worker", "node"):
        checks += [
            build_check(f"examples_after_{kill}_killed", results[kill]["examples"], f"=={rows}"),
            build_check(f"{kill}_was_killed", results[kill]["was_killed"], "==1"),
            build_check(f"steps_lost_{kill}_killed", results[kill]["steps_lost"], f"<={interval}"),
            build_check(f"state_difference_{kill}_killed", differences[kill], "<=1e-6"),
        ]
    for check in checks:
        print(f"{check.name:36} {check.value:>14,.6g}  bar {check.bar:10} {'holds' if check.holds else 'MISSED'}")
    config = {"rows": rows, "checkpoint_steps": interval, "workers": WORKERS, "quick": args.quick}
    print_result(results=results | {"checkpoint": cost}, config=config, checks=checks)


def checkpoint_cost(args: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """Return the seconds that one checkpoint adds, and their share of a minute."""
    users, items, rows, steps = (100_000, 10_000, 600_000, 6) if args.quick else (10**7, 10**6, 20 * 10**6, 300)
    folder = args.data or f"{scratch}/rows"
    if args.data is None:
        write_examples(Path(folder), rows, users, items, seed=0, processes=WORKERS)
    common = {"folder": folder, "processes": WORKERS}
    saving = {"port": free_port(), "run_folder": f"{scratch}/saving", "saves": True}
    plain = {"port": free_port(), "run_folder": f"{scratch}/plain"}
    with (
        Segments(build_streamed, workers=WORKERS, **common, **saving) as with_one,
        Segments(build_streamed, workers=WORKERS, **common, **plain) as without,
    ):
        turns = interleave(
            {"with": lambda: with_one.measure(steps).seconds, "without": lambda: without.measure(steps).seconds},
            args.repeats,
        )
    seconds = turns.median("with") - turns.median("without")
    return {"seconds": seconds, "share": seconds / 60, "segments": turns.summary()}


def run_and_kill(kill: str, folder: str, home: str) -> dict[str, float]:
    """Train on Ray in this process; kill a worker or a node once the second checkpoint is whole."""
    import ray
    from ray.cluster_utils import Cluster

    place = Home(Path(home)).ensure()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    # One more than there are workers: what was killed must have somewhere to go.
    nodes = [cluster.add_node(num_cpus=1) for _ in range(WORKERS + 1)]
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    told: dict[str, float] = {}

    def strike() -> None:
        metrics = wait_for(lambda: next(iter(place.runs.glob("clicks-*/metrics.jsonl")), None))
        saved = f"{CHECKPOINTS_FOLDER}/step-*/{MANIFEST}"
        whole = wait_for(lambda: found if len(found := sorted(metrics.parent.glob(saved))) > 1 else None)
        if kill == "worker":
            _train_workers()[0].kill()
        else:
            busy = {worker.ppid() for worker in _train_workers()}
            victim = next(node for node in nodes if _raylet_pid(node) in busy)
            cluster.remove_node(victim, allow_graceful=False)
        told["struck_s"] = time.monotonic()
        told["steps_lost"] = steps_done(metrics) - SavedCheckpoint.read(whole[-1].parent).position.steps

    if kill != "nothing":
        threading.Thread(target=strike, daemon=True).start()
    recipe = load_recipe("clicks", [*SMALL, f"train.workers={WORKERS}"])
    begun_s = time.monotonic()
    trained = train_on_examples(recipe, folder, place)
    ended_s = time.monotonic()
    result = {
        "examples": trained["examples"],
        "steps": trained["steps"],
        "steps_lost": told.get("steps_lost", 0),
        "seconds": ended_s - begun_s,
        "seconds_after_the_kill": ended_s - told.get("struck_s", ended_s),
        "was_killed": float("struck_s" in told),
    }
    ray.shutdown()
    cluster.shutdown()
    return result


def largest_difference(scratch: str, one: str, other: str) -> float:
    """Return the largest difference between two runs' last checkpoints, over all tensors."""
    first, second = (
        read_checkpoint(checkpoint_folders(next(Path(scratch, run).glob("runs/*")) / CHECKPOINTS_FOLDER)[0])
        for run in (one, other)
    )
    if first.keys() != second.keys():
        raise EngineError(f"checkpoints of unlike tensors: {first.keys() ^ second.keys()}")
    return max(float(torch.max(torch.abs(value - second[name])).item()) for name, value in first.items())


def _parse() -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--data", help="an examples folder of planted.py for the first part; made unless given")
    return parser.parse_args()


def _in_process(run: Callable[..., dict[str, float]], **arguments: str) -> dict[str, float]:
    """Run in a process of its own: a process is connected to one Ray."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(run, kwds=arguments)


def steps_done(metrics: Path) -> int:
    """Return the steps that the newest line of a run's metrics states."""
    return json.loads(metrics.read_text().splitlines()[-1])["steps"]


def _train_workers() -> list[psutil.Process]:
    ours = psutil.Process().children(recursive=True)
    return [one for one in ours if one.is_running() and "RayTrainWorker" in " ".join(one.cmdline())]


def _raylet_pid(node: Any) -> int:  # noqa: ANN401  (Ray's own class of a node is private)
    return node.all_processes["raylet"][0].process.pid


def wait_for(look: Callable[[], Any]) -> Any:  # noqa: ANN401  (whatever `look` returns)
    """Look again and again until something is seen; raises `EngineError` when nothing was for too long."""
    give_up_s = time.monotonic() + PATIENCE_S
    while not (found := look()):
        if time.monotonic() > give_up_s:
            raise EngineError(f"nothing seen within {PATIENCE_S:.0f} s")
        time.sleep(0.05)
    return found


if __name__ == "__main__":
    main()
