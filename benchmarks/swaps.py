"""Do version swaps under load cost errors or latency?

    python -m benchmarks.swaps --home DIR [--quick]

In:  a home with a published version, which is published twice more; `serve` on Ray Serve, without learning; connections
that ask for slates one after the other.
Out: of interleaved stretches with and without swaps: errors, p99, their ratio. In a stretch of swaps the pointer moves
on as soon as the answers name the version it was moved to, round and round through three versions, so that each is read
from storage, verified, built and warmed up anew.
Bound by the processor that a swap takes from requests: reading and building run beside them.
"""

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import torch

from benchmarks.harness import build_check, build_parser, interleave, percentiles, print_result
from cluster.config import EngineConfig, load_recipe
from cluster.home import Home
from cluster.manifest import VersionRef
from cluster.ray_session import find_free_port, ray_session
from cluster.registry import Registry
from serving.app import running_app
from training.models.version import ITEM_ROWS, USER_ROWS, read_version, write_version

VERSIONS = 3
SWAPS = 200
PATIENCE_S = 30.0
WEIGHT_NOISE = 1e-3


@dataclass(slots=True)
class Load:
    """What a stretch of load saw."""

    took_ms: list[float] = field(default_factory=list)
    errors: int = 0
    newest: str = ""


def main() -> None:
    """Serve, swap, compare."""
    parser = build_parser(__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=8)
    args = parser.parse_args()
    repeats, swaps = (1, 10) if args.quick else (args.repeats, SWAPS)
    recipe = load_recipe("movielens", ["serve.arms=['live']", "serve.poll_interval_ms=50"])
    loads: dict[str, list[Load]] = {"steady": [], "swapping": []}
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:  # Ray's socket paths must be short
        for name in ("registry", "cache"):
            shutil.copytree(args.home / name, Path(scratch) / name)
        home = Home(Path(scratch)).ensure()
        registry = Registry(home.registry)
        refs = _publish_relatives(registry)
        engine = recipe.section(EngineConfig)
        seconds = [5.0]
        with (
            ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=False),
            running_app(recipe, home, "127.0.0.1", find_free_port()) as url,
        ):

            def steady() -> float:
                loads["steady"].append(asyncio.run(_load(url, args.connections, lambda _: _wait(seconds[0]))))
                return percentiles(loads["steady"][-1].took_ms)["p99"]

            def swapping() -> float:
                began_s = time.monotonic()
                each = -(-swaps // repeats)
                work = lambda load: _swap(registry, refs, each, load)  # noqa: E731
                loads["swapping"].append(asyncio.run(_load(url, args.connections, work)))
                seconds[0] = time.monotonic() - began_s  # the next steady stretch is as long
                return percentiles(loads["swapping"][-1].took_ms)["p99"]

            turns = interleave({"swapping": swapping, "steady": steady}, repeats, warm_ups=0)
    made = len(loads["swapping"]) * -(-swaps // repeats)
    errors = sum(load.errors for stretch in loads.values() for load in stretch)
    results: dict[str, Any] = {  # Any: JSON
        "p99_ms": turns.summary(),
        "swaps": made,
        "requests": {name: sum(len(load.took_ms) for load in found) for name, found in loads.items()},
        "p50_ms": {
            name: statistics.median(ms for load in found for ms in load.took_ms) for name, found in loads.items()
        },
    }
    checks = [
        build_check("swaps", made, f">={swaps}"),
        build_check("errors", errors, "==0"),
        build_check("p99_swapping_over_steady", turns.ratio("swapping", "steady"), "<=1.2"),
    ]
    for check in checks:
        print(f"{check.name:28} {check.value:>10,.3f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    print_result(results=results, config={"connections": args.connections, "quick": args.quick}, checks=checks)


def _publish_relatives(registry: Registry) -> list[VersionRef]:
    """Publish the version twice more with other weights, as training again on the same catalogue would."""
    first = registry.current()
    state, history = read_version(registry, first, with_optimizer=True), registry.open_version(1).table("history")
    generator = torch.Generator().manual_seed(0)
    moved = lambda tensor: tensor + WEIGHT_NOISE * torch.randn(tensor.shape, generator=generator)  # noqa: E731
    refs = [first]
    for _ in range(VERSIONS - 1):
        rows = {**state.rows, **{name: moved(state.rows[name]) for name in (ITEM_ROWS, USER_ROWS)}}
        dense = {name: moved(tensor) for name, tensor in state.dense.items()}
        draft = registry.draft_version()
        write_version(draft, replace(state, rows=rows, dense=dense), history)
        refs.append(draft.publish(offset=0, metrics={}, promote=False))
    return refs


async def _wait(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def _swap(registry: Registry, refs: list[VersionRef], swaps: int, load: Load) -> None:
    place = refs.index(registry.current())
    for _ in range(swaps):
        place = (place + 1) % len(refs)
        await asyncio.to_thread(registry.promote, refs[place], "swap")
        until_s = time.monotonic() + PATIENCE_S
        while load.newest != str(refs[place]):
            if time.monotonic() > until_s:
                raise TimeoutError(f"{refs[place]} is not served {PATIENCE_S:.0f} s after it was promoted")
            await asyncio.sleep(0.01)


async def _load(url: str, connections: int, work: Callable[[Load], Any]) -> Load:  # Any: a coroutine
    """Ask on all connections until the work is done."""
    load, done = Load(), asyncio.Event()

    async def ask(session: aiohttp.ClientSession, number: int) -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            body = {"user_id": str(1 + (number * 97 + turn) % 900), "k": 10}
            asked_s = time.perf_counter()
            try:
                async with session.post(f"{url}/v1/recommend", json=body) as response:
                    answer = await response.json()
                    load.errors += response.status != 200
                    load.newest = answer.get("version", load.newest)
            except aiohttp.ClientError:
                load.errors += 1
            load.took_ms.append((time.perf_counter() - asked_s) * 1e3)

    async with aiohttp.ClientSession() as session:
        asking = [asyncio.create_task(ask(session, number)) for number in range(connections)]
        await work(load)
        done.set()
        await asyncio.gather(*asking)
    return load


if __name__ == "__main__":
    main()
