"""How many slates a second are served within 50 ms, and what happens beyond, when a replica dies, or code changes?

    python -m benchmarks.serve_load --home DIR [--bentoml PYTHON] [--litserve PYTHON] [--parts …] [--plot FILE]

In:  a home with a published version (its log is not touched: it is copied); Pythons that have the peers installed.
Out: of one run, in parts:
- rates: the highest rate of an open loop at which p99 is within 50 ms and nobody is refused, searched in turns for the
  app on Ray Serve, an app there that does nothing (the ceiling), the app on Serve's default flags, BentoML and LitServe
  with the same ranker, `serve --local`, and uvicorn with FastAPI and the same ranker (serve_peers.py);
- delay: the median of one request at a time, over that of the ranker's own call in a process;
- overload: twice the rate found, then half of it: how accepted requests fare, who is refused, how soon it is over;
- kill, upgrade, autoscale, swaps (serve_change.py): a replica is killed, the app is deployed anew, copies follow the
  load, versions change under load.
Users ask in turn, so that all but the first round have asked before: what the app keeps of them, peers keep too.
Bound by two cores that server, proxy and load generator share.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import serve_change
from benchmarks.harness import Check, build_check, build_parser, interleave, percentiles, print_result, tree_bytes
from benchmarks.load import Target, offer
from benchmarks.serve_peers import NOOP_PATH, load_ranker, running
from cluster.home import Home
from cluster.ray_session import find_free_port

P99_MS = 50.0
OVERLOAD_P99_MS = 100.0
K = 10
USERS = 943
"""Of MovieLens-100K; ids that a home does not know are answered as strangers."""
FIRST_RATE = 200.0
LEAST_RATE = 5.0
STEPS = (1.6, 1.25, 1.12)
"""By how much the rate is raised while it holds; after one that does not, by the next smaller one."""
WINDOW_S = 0.5
Json = dict[str, Any]  # Any: whatever JSON holds


def main() -> None:
    """Run the parts and print."""
    parser = build_parser(__doc__, repeats=3)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--bentoml", metavar="PYTHON", help="one that has bentoml beside what recloop needs")
    parser.add_argument("--litserve", metavar="PYTHON", help="likewise litserve")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rate", type=float, help="the sustainable rate, where it is not searched for")
    parser.add_argument("--requests", type=int, default=1_000_000, help="swaps: how many, %(default)s unless given")
    parser.add_argument("--swaps", type=int, default=1_000, help="swaps: of versions, %(default)s unless given")
    parser.add_argument("--plot", type=Path, help="autoscale: where the picture goes")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    results: Json = {}
    checks: list[Check] = []
    for name in args.parts:
        with copied(args.home) as home:
            results[name], held = PARTS[name](args, home, results)
        checks += held
        for check in held:
            print(f"{check.name:44} {check.value:>10,.3f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    config = {"k": K, "users": USERS, "quick": args.quick, "parts": args.parts, "overrides": args.overrides}
    print_result(results=results, config=config, checks=checks)


@contextlib.contextmanager
def copied(source: Path) -> Iterator[Path]:
    """Lend a home with the same versions and an empty log."""
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:  # Ray's socket paths must be short
        for name in ("registry", "cache"):
            shutil.copytree(source / name, Path(scratch) / name)
        yield Path(scratch)


def bodies() -> list[bytes]:
    """Return a request of every user."""
    return [json.dumps({"user_id": str(user), "k": K}).encode() for user in range(1, USERS + 1)]


def measure_rates(args: argparse.Namespace, home: Path, _: Json) -> tuple[Json, list[Check]]:
    """Search the highest rates in turns, with all servers up."""
    peers = {name: python for name in ("bentoml", "litserve") if (python := getattr(args, name))}
    seconds = 1.0 if args.quick else 3.0
    with contextlib.ExitStack() as stack:
        targets: dict[str, Target] = {}
        for name in ("serve", "default", "local", "plain", *peers):
            port = find_free_port()
            stack.enter_context(running(name, home, port, args.overrides, *([peers[name]] if name in peers else [])))
            targets[name] = Target(f"http://127.0.0.1:{port}/v1/recommend", bodies())
            if name == "serve":
                targets["noop"] = Target(f"http://127.0.0.1:{port}{NOOP_PATH}/", bodies())
        for target in targets.values():  # every user once, at a rate that all can take
            offer(target, [(100.0, 1.0 if args.quick else 1.2 * USERS / 100.0)])
        best = dict.fromkeys(targets, FIRST_RATE)

        def turn(name: str) -> Callable[[], float]:
            def search() -> float:
                best[name] = find_rate(targets[name], max(FIRST_RATE / 4, 0.6 * best[name]), seconds)
                return best[name]

            return search

        turns = interleave({name: turn(name) for name in targets}, 1 if args.quick else args.repeats, warm_ups=0)
    bars = {"noop": ">=0.6", "default": ">=2", "bentoml": ">=1.5", "litserve": ">=1.5"}
    checks = [
        build_check(f"serve_over_{base}", turns.ratio("serve", base), bars[base]) for base in bars if base in best
    ]
    checks.append(build_check("local_over_plain", turns.ratio("local", "plain"), ">=0.9"))
    return {"rate_per_s": turns.summary(), "seconds_a_step": seconds}, checks


def find_rate(target: Target, rate: float, seconds: float) -> float:
    """Return the highest rate found at which p99 is within the limit and all are answered; 0 where none is."""
    held, steps = 0.0, list(STEPS)
    while True:
        found = offer(target, [(rate, seconds)])
        print(f"{target.url} {rate:.0f}/s: {found.statuses()} p99 {found.p(99):.1f} ms", file=sys.stderr)
        if found.share(200) == 1.0 and found.p(99) <= P99_MS:
            held, rate = rate, rate * steps[0]
        elif not held and rate > LEAST_RATE:
            rate /= 2
        elif held and len(steps) > 1:
            steps.pop(0)
            rate = held * steps[0]
        else:
            return held


def measure_delay(args: argparse.Namespace, home: Path, _: Json) -> tuple[Json, list[Check]]:
    """Ask one at a time, over HTTP and in the process, in turns."""
    rank, port = load_ranker(Home(home), args.overrides), find_free_port()
    asked = 50 if args.quick else 500

    def call() -> float:
        took_ms = []
        for user in range(1, asked + 1):
            began_s = time.perf_counter()
            rank({"user_id": str(user), "k": K})
            took_ms.append(1e3 * (time.perf_counter() - began_s))
        return statistics.median(took_ms)

    with running("serve", home, port, args.overrides):
        url = f"http://127.0.0.1:{port}/v1/recommend"
        ask = partial(serve_change.ask_in_turn, url, bodies()[:asked])
        turns = interleave({"serve": ask, "ranker": call}, args.repeats)
    added = turns.median("serve") - turns.median("ranker")
    return {"p50_ms": turns.summary()}, [build_check("added_p50_ms", added, "<=2")]


def measure_overload(args: argparse.Namespace, home: Path, results: Json) -> tuple[Json, list[Check]]:
    """Offer twice what can be sustained, then half of it."""
    rate = sustainable(args, results)
    seconds = 5.0 if args.quick else 30.0
    port = find_free_port()
    with running("serve", home, port, args.overrides) as pid:
        target = Target(f"http://127.0.0.1:{port}/v1/recommend", bodies())
        offer(target, [(100.0, 1.2 * USERS / 100.0), (rate / 2, 5.0)])
        root = psutil.Process(pid)
        before_bytes = tree_bytes([root])
        found = offer(target, [(2 * rate, seconds), (rate / 2, 10.0)])
        after_bytes = tree_bytes([root])
    over = (found.ms(200, before_s=seconds), found.statuses())
    accepted = percentiles(over[0])
    windows = [seconds + number * WINDOW_S for number in range(int(10.0 / WINDOW_S))]
    late = [
        end - seconds + WINDOW_S
        for end in windows
        if found.p(99, after_s=end, before_s=end + WINDOW_S) > P99_MS or found.refused(end, end + WINDOW_S)
    ]
    recovery_s = max(late, default=0.0)
    other = 1 - found.share(200, 429, 503)
    told = {
        "rate_per_s": 2 * rate,
        "seconds": seconds,
        "accepted_ms": accepted,
        "accepted_per_s": len(over[0]) / seconds,
        "statuses": over[1],
        "recovery_s": recovery_s,
        "bytes": [before_bytes, after_bytes],
    }
    return told, [
        build_check("overload_accepted_p99_ms", accepted["p99"], f"<={OVERLOAD_P99_MS:g}"),
        build_check("overload_other_than_200_429_503", other, "==0"),
        build_check("overload_memory_after_over_before", after_bytes / before_bytes, "<=1.05"),
        build_check("overload_recovery_s", recovery_s, "<=5"),
    ]


def sustainable(args: argparse.Namespace, results: Json) -> float:
    """Return the rate that was found, or given."""
    if args.rate is None and "rates" not in results:
        raise SystemExit("--rate: needed where `rates` is not among --parts before")
    return args.rate or results["rates"]["rate_per_s"]["serve"]["median"]


def changing(part: Callable[..., tuple[Json, list[Check]]]) -> Callable[..., tuple[Json, list[Check]]]:
    """Return a part of serve_change.py as one of this script."""

    def run(args: argparse.Namespace, home: Path, results: Json) -> tuple[Json, list[Check]]:
        return part(args, Home(home).ensure(), bodies(), sustainable(args, results))

    return run


PARTS: dict[str, Callable[[argparse.Namespace, Path, Json], tuple[Json, Sequence[Check]]]] = {
    "rates": measure_rates,
    "delay": measure_delay,
    "overload": measure_overload,
    "kill": changing(serve_change.measure_kill),
    "upgrade": changing(serve_change.measure_upgrade),
    "autoscale": changing(serve_change.measure_autoscaling),
    "swaps": changing(serve_change.measure_swaps),
}

if __name__ == "__main__":
    main()
