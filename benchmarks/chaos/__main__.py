"""Does anything that a client was promised get lost, whatever is killed, stopped, filled or damaged meanwhile?

    python -m benchmarks.chaos [--quick] [--kills 200] [--only "kill raylet" …] [--small-disk DIR] [--kafka]

In:  MovieLens-100K, the demo's recipe trained for an epoch, `recloop serve` as a child that is started again whenever
it ends, clients that ask, click and repeat a click until it is acknowledged.
Out: after every fault, the seconds until answers came again without a failure; at the end an audit of log and registry:
every acknowledged event in the log, once, at its number; user state the fold of the log; the learned events those of
the log, each once; every answer from a published version.
Bound by how soon Ray finds that a process is gone and starts another, and by what `recloop serve` takes to start.
With `--kafka` the log is a topic of a real broker, and the audit reads what a node without a file folds from it.
`--small-disk` names a file system that the home is put on and that is filled, such as a mounted tmpfs of 512 MiB.
"""

import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.chaos.audit import audit
from benchmarks.chaos.broker import folded_anew, running_broker
from benchmarks.chaos.faults import Fault, Faults, is_mounted
from benchmarks.chaos.server import Server
from benchmarks.chaos.traffic import Traffic, longest
from benchmarks.harness import build_check, build_parser, percentiles, print_result
from cluster.config import EngineConfig, load_recipe
from cluster.dataset import load_dataset
from cluster.engine import open_registry
from cluster.home import Home
from cluster.log import EventLog
from cluster.ray_session import find_free_port, ray_session
from training.prepare.movielens import prepare_movielens
from training.publish import publish_run
from training.trainer import train_on_ray

OVERRIDES = ["serve.arms=['live']", "online.keep_chains=100000", "online.keep_versions=100000"]
"""All versions stay, so that the audit can look each answer's up."""
STREAK = 10
"""Answers in a row after which the server is well again, if they last so long:"""
SETTLED_S = {"kill raylet": 8.0, "kill gcs": 8.0, "kill driver": 8.0, "kill command": 8.0, "kill controller": 4.0}
"""Some processes end only a while after the one that was killed."""
SOON_SETTLED_S = 2.0
PATIENCE_S = 120.0
LEARNED_PATIENCE_S = 120.0


def main() -> None:
    """Serve, break, audit, print."""
    parser = build_parser(__doc__)
    parser.add_argument("--kills", type=int, default=200, help="faults, %(default)s unless given")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], metavar="FAULT", help="this kind alone; may be repeated")
    parser.add_argument("--small-disk", type=Path, help="a file system of its own for the home, to be filled")
    parser.add_argument("--kafka", action="store_true", help="log to a broker of the Kafka protocol")
    parser.add_argument("--from-home", type=Path, help="take this home's published version instead of training one")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    if args.small_disk and not is_mounted(args.small_disk):
        parser.error(f"--small-disk {args.small_disk}: is not a file system of its own; mount one there")
    rng = random.Random(args.seed)
    with _scratch(args.small_disk) as scratch, running_broker() if args.kafka else nullcontext() as servers:
        kafka = [f"engine.kafka_servers={servers}", "engine.log=kafka"] if servers else []
        home = published_home(scratch, args.from_home)
        port = find_free_port()
        log_file = Path(tempfile.gettempdir()) / f"recloop-chaos-{port}.log"
        with Server(home.path, port, [*OVERRIDES, *kafka, *args.overrides], log_file) as server:
            with Traffic(f"http://127.0.0.1:{port}", args.clients) as traffic:
                faults = Faults(server, home.path, args.small_disk, rng)
                _wait_until_well(traffic, time.monotonic())
                recoveries = _break(faults, traffic, rng, args.only or faults.kinds(), 8 if args.quick else args.kills)
            caught_up = _wait_until_learned(traffic.url, max(traffic.acked.values()))
            starts = server.starts
        damaged = {fault.detail for fault in faults.done if "delta" in fault.kind}
        newest = max(traffic.acked.values())
        with folded_anew(servers, scratch / "anew.db", newest) if servers else EventLog(home.log) as log:
            verdict = audit(traffic, log, open_registry(load_recipe("movielens"), home), set(map(_version_of, damaged)))
    results = {
        "faults": len(faults.done),
        "caught_up": caught_up,
        "starts": starts,
        "recovery_s": {
            kind: percentiles(found) | {"max": max(found), "n": len(found)} for kind, found in recoveries.items()
        },
        "broken": {name: getattr(verdict, name) for name in verdict.__slots__ if name != "facts"},
        **verdict.facts,
    }
    checks = [
        build_check("acked_events_lost", len(verdict.lost), "==0"),
        build_check("events_logged_twice", len(verdict.twice), "==0"),
        build_check("broken_promises", verdict.broken(), "==0"),
        build_check("longest_recovery_s", longest(value for found in recoveries.values() for value in found), "<=5"),
    ]
    for kind, found in sorted(recoveries.items()):
        median_s = percentiles(found)["p50"]
        print(f"{kind:28} {len(found):4} times, answers again after {median_s:6.2f} s, at most {max(found):6.2f} s")
    for check in checks:
        print(f"{check.name:28} {check.value:>10,.3f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    config = {
        "seed": args.seed,
        "clients": args.clients,
        "quick": args.quick,
        "kafka": args.kafka,
        "overrides": args.overrides,
    }
    print_result(results=results, config=config, checks=checks)


def _break(
    faults: Faults, traffic: Traffic, rng: random.Random, kinds: Sequence[str], count: int
) -> dict[str, list[float]]:
    """Do so many faults, each once the one before is over; return the seconds of recovery by kind."""
    recoveries: dict[str, list[float]] = {}
    pending: list[str] = []
    for number in range(count):
        pending = pending or rng.sample(list(kinds), len(kinds))  # every kind once a round, in random order
        kind = next((kind for kind in pending if faults.can_do(kind)), pending[0])  # what is starting is not waited for
        pending.remove(kind)
        fault = faults.do(kind)
        well = _wait_until_well(traffic, fault.at_s, SETTLED_S.get(fault.kind, SOON_SETTLED_S))
        time.sleep(rng.uniform(0.0, 1.5))
        took_s = traffic.recovery_s(fault.at_s, time.monotonic()) if well else float("inf")
        recoveries.setdefault(fault.kind, []).append(took_s)
        _tell(number, fault, took_s, traffic)
        if not well:
            break
    return recoveries


def _wait_until_well(traffic: Traffic, since_s: float, settled_s: float = SOON_SETTLED_S) -> bool:
    """Return whether answers, asked for after that time, came for so long without a failure, before patience ended."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        time.sleep(0.05)
        streak = traffic.streak_since(since_s)
        if len(streak) >= STREAK and time.monotonic() - min(streak) >= settled_s:
            return True
    return False


def _wait_until_learned(url: str, seq: int) -> bool:
    """Wait until the weights served have learned all that was acknowledged; return whether they have."""
    deadline_s = time.monotonic() + LEARNED_PATIENCE_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v1/versions", timeout=5) as answer:
            if json.load(answer)["learned_seq"] >= seq:
                return True
        time.sleep(0.2)
    return False


def published_home(scratch: Path, source: Path | None) -> Home:
    """Return a home with a published version: that of another home, or one trained now for an epoch."""
    if source is not None:
        for name in ("registry", "cache", "datasets"):
            if (source / name).exists():
                shutil.copytree(source / name, scratch / name)
        return Home(scratch).ensure()
    home = Home(scratch).ensure()
    recipe = load_recipe("movielens", ["train.epochs=1"])
    prepare_movielens(home.default_dataset)
    engine = recipe.section(EngineConfig)
    with ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=False):
        publish_run(train_on_ray(recipe, load_dataset(home.default_dataset), home), open_registry(recipe, home))
    return home


@contextlib.contextmanager
def _scratch(small_disk: Path | None) -> Iterator[Path]:
    if small_disk is not None:
        home = small_disk / "home"
        home.mkdir()
        try:
            yield home
        finally:
            shutil.rmtree(home)
        return
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # Ray's socket paths must be short
        yield Path(folder)


def _version_of(path: str) -> str:
    """Return the name of the version that a delta's file belongs to; itself where it is none."""
    parts = path.split("/")
    return f"{int(parts[2])}.{int(parts[4])}" if len(parts) > 5 else path


def _tell(number: int, fault: Fault, took_s: float, traffic: Traffic) -> None:
    errors = [(round(at_s - fault.at_s, 2), error) for at_s, error in traffic.errors if at_s >= fault.at_s]
    told: dict[str, Any] = {"n": number + 1, "fault": fault.kind, "recovery_s": round(took_s, 2)}
    told |= {"acked": len(traffic.acked), "pids": fault.pids[:5], "detail": fault.detail}
    told |= {"errors": len(errors), "last": errors[-3:]}
    print(json.dumps(told), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
