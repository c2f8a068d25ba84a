"""Do version swaps under load cost errors or latency?

    python -m benchmarks.swaps --home DIR [--quick]

In:  a home with a published version, which is published twice more with other weights; `serve` on Ray Serve, without
learning. Two loads: connections that ask for slates one after the other (closed loop), then slates asked for at a fixed
rate, 60% of what those had answered, whether or not answers are late (open loop; late is counted from when it was due).
Out: of interleaved stretches with and without swaps, for both loads: errors, p99, their ratio. While swapping, the
pointer moves on as soon as the answers name the version it was moved to, round and round through three versions of one
catalogue, so that tables and dense weights of each are read from storage, verified, built and warmed up anew.
Bound by the processor that a swap takes from requests: reading and building run beside them.
"""

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import torch

from benchmarks.harness import Turns, build_check, build_parser, interleave, percentiles, print_result
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
FIRST_STEADY_S = 5.0
SHARE_OF_SUSTAINED = 0.6
WEIGHT_NOISE = 1e-3


@dataclass(slots=True)
class Load:
    """What a stretch of load saw."""

    took_ms: list[float] = field(default_factory=list)
    errors: int = 0
    newest: str = ""
    seconds: float = 0.0


Work = Callable[[Load], Awaitable[None]]
Generate = Callable[[Work], Coroutine[Any, Any, Load]]  # Any: what coroutines send and are sent
"""Load a server until the work is done."""


def main() -> None:
    """Serve, swap, compare."""
    parser = build_parser(__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=8)
    args = parser.parse_args()
    repeats, swaps = (1, 10) if args.quick else (args.repeats, SWAPS)
    recipe = load_recipe("movielens", ["serve.arms=['live']", "serve.poll_interval_ms=50"])
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:  # Ray's socket paths must be short
        for name in ("registry", "cache"):
            shutil.copytree(args.home / name, Path(scratch) / name)
        home = Home(Path(scratch)).ensure()
        registry = Registry(home.registry)
        refs = publish_relatives(registry)
        engine = recipe.section(EngineConfig)
        with (
            ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=False),
            running_app(recipe, home, "127.0.0.1", find_free_port()) as url,
        ):
            each = -(-swaps // repeats)
            closed = _compare(lambda work: _ask_in_turn(url, args.connections, work), registry, refs, each, repeats)
            steady = closed.loads["steady"]
            rate = SHARE_OF_SUSTAINED * sum(len(load.took_ms) for load in steady) / sum(load.seconds for load in steady)
            opened = _compare(lambda work: _ask_at_rate(url, rate, work), registry, refs, each, repeats)
    checks = [
        build_check("swaps", each * repeats, f">={swaps}"),
        build_check("errors", closed.errors, "==0"),
        build_check("p99_swapping_over_steady", closed.turns.ratio("swapping", "steady"), "<=1.2"),
        build_check("open_loop_errors", opened.errors, "==0"),
        build_check("open_loop_p99_swapping_over_steady", opened.turns.ratio("swapping", "steady"), "<=1.2"),
    ]
    for check in checks:
        print(f"{check.name:36} {check.value:>10,.3f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    results = {"closed_loop": closed.summary(), "open_loop": {"rate": rate, **opened.summary()}}
    print_result(results=results, config={"connections": args.connections, "quick": args.quick}, checks=checks)


@dataclass(frozen=True, slots=True)
class Compared:
    """Stretches of one load, with and without swaps."""

    turns: Turns
    """p99 in milliseconds."""
    loads: dict[str, list[Load]]

    @property
    def errors(self) -> int:
        """Return how many requests were not answered."""
        return sum(load.errors for stretch in self.loads.values() for load in stretch)

    def summary(self) -> dict[str, Any]:  # Any: JSON
        """Return everything as plain numbers."""
        return {
            "p99_ms": self.turns.summary(),
            "requests": {name: sum(len(load.took_ms) for load in found) for name, found in self.loads.items()},
            "seconds": {name: sum(load.seconds for load in found) for name, found in self.loads.items()},
            "p50_ms": {
                name: statistics.median(ms for load in found for ms in load.took_ms)
                for name, found in self.loads.items()
            },
        }


def _compare(generate: Generate, registry: Registry, refs: list[VersionRef], swaps: int, repeats: int) -> Compared:
    """Load the server in turns with so many swaps and, for as long, without."""
    loads: dict[str, list[Load]] = {"swapping": [], "steady": []}

    def stretch(name: str, work: Work) -> float:
        began_s = time.monotonic()
        load = asyncio.run(generate(work))
        load.seconds = time.monotonic() - began_s
        loads[name].append(load)
        return percentiles(load.took_ms)["p99"]

    def swapping() -> float:
        return stretch("swapping", lambda load: _swap(registry, refs, swaps, load))

    def steady() -> float:
        seconds = loads["swapping"][-1].seconds if loads["swapping"] else FIRST_STEADY_S
        return stretch("steady", lambda _: asyncio.sleep(seconds))

    return Compared(interleave({"swapping": swapping, "steady": steady}, repeats, warm_ups=0), loads)


def publish_relatives(registry: Registry) -> list[VersionRef]:
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


async def _ask_in_turn(url: str, connections: int, work: Work) -> Load:
    """Ask on so many connections, on each as soon as it has been answered."""
    load, done = Load(), asyncio.Event()

    async def connection(session: aiohttp.ClientSession, number: int) -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            await _ask(session, url, number * 97 + turn, load, time.perf_counter())

    async with aiohttp.ClientSession() as session:
        asking = [asyncio.create_task(connection(session, number)) for number in range(connections)]
        await work(load)
        done.set()
        await asyncio.gather(*asking)
    return load


async def _ask_at_rate(url: str, rate: float, work: Work) -> Load:
    """Ask so often a second, whatever becomes of the answers."""
    load, done = Load(), asyncio.Event()

    async def arrivals(session: aiohttp.ClientSession) -> None:
        begun_s, asked = time.perf_counter(), []
        while not done.is_set():
            due_s = begun_s + len(asked) / rate
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            asked.append(asyncio.create_task(_ask(session, url, len(asked), load, due_s)))
        await asyncio.gather(*asked)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        arriving = asyncio.create_task(arrivals(session))
        await work(load)
        done.set()
        await arriving
    return load


async def _ask(session: aiohttp.ClientSession, url: str, number: int, load: Load, due_s: float) -> None:
    body = {"user_id": str(1 + number % 900), "k": 10}
    try:
        async with session.post(f"{url}/v1/recommend", json=body) as response:
            answer = await response.json()
            load.errors += response.status != 200
            load.newest = answer.get("version", load.newest)
    except aiohttp.ClientError:
        load.errors += 1
    load.took_ms.append((time.perf_counter() - due_s) * 1e3)


if __name__ == "__main__":
    main()
