"""Does a day of traffic leave memory, disk and file handles as they were, and learning never far behind?

    python -m benchmarks.soak [--quick] [--events 500000] [--rate 500]

In:  MovieLens-100K, the demo's recipe trained for an epoch, `recloop serve` with a log that keeps little.
Out: a day of clicks and impressions, compressed: the events are stamped over 24 hours that have just passed and posted
at a steady rate, with slates asked for in between; every few seconds the memory (proportional set size) and open files
of the server with all that it started, the home's bytes on disk, and how many events learning is behind.
A figure is bounded where its median over the last quarter is at most 5% above that over the second quarter.
Bound by the trainer: a rate above what it learns would be answered by a lag that grows.
"""

import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmarks.chaos.__main__ import published_home
from benchmarks.chaos.server import Server
from benchmarks.harness import build_check, build_parser, print_result, tree_bytes
from cluster.log import EventLog
from cluster.ray_session import find_free_port

DAY_US = 86_400 * 1_000_000
SAMPLE_S = 5.0
BATCH_EVENTS = 50
USERS = 2_000
SLATES_A_BATCH = 1
OVERRIDES = [
    "serve.arms=['live']",
    "log.seal_after_events=20000",
    "log.segment_events=5000",
    "log.keep_bytes=1000000",
    "log.keep_history=100",
    "log.dedupe_events=50000",
    "online.keep_versions=4",
]
"""Retention so tight that it is at work for most of the run."""
START_PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment."""

    at_s: float
    memory_bytes: int
    disk_bytes: int
    open_files: int
    lag_events: int


def main() -> None:
    """Serve, post a day, print."""
    parser = build_parser(__doc__)
    parser.add_argument("--events", type=int, default=500_000, help="in the day, %(default)s unless given")
    parser.add_argument("--rate", type=float, default=500.0, help="events a second, %(default)s unless given")
    parser.add_argument("--from-home", type=Path, help="take this home's published version instead of training one")
    args = parser.parse_args()
    events = 10_000 if args.quick else args.events
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:  # Ray's socket paths must be short
        home = published_home(Path(scratch), args.from_home)
        port = find_free_port()
        log_file = Path(tempfile.gettempdir()) / f"recloop-soak-{port}.log"
        with Server(home.path, port, OVERRIDES, log_file) as server:
            soak = Soak(f"http://127.0.0.1:{port}", home.path, server, events, args.rate)
            asyncio.run(soak.run())
            starts = server.starts
        with EventLog(home.log) as log:
            report = log.verify()
    quarters = np.array_split(np.array(soak.samples, object), 4)
    figures = {name: growth(quarters, name) for name in ("memory_bytes", "disk_bytes", "open_files")}
    lags = [sample.lag_events for sample in soak.samples]
    checks = [
        *(build_check(f"{name}_growth", figure["growth"], "<=1.05") for name, figure in figures.items()),
        build_check("lag_p99_s", float(np.percentile(lags, 99)) / args.rate, "<=10"),
        build_check("share_of_rate_posted", soak.posted / soak.passed_s / args.rate, ">=0.95"),
        build_check("failed_requests", soak.failed, "==0"),
        build_check("events_logged_vs_acked", report.last_seq / soak.posted, "==1"),
        build_check("log_is_sound", float(report.sound), "==1"),
        build_check("starts_of_the_server", starts, "==1"),
    ]
    for check in checks:
        print(f"{check.name:28} {check.value:>12,.3f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    results = {
        "events": soak.posted,
        "seconds": soak.passed_s,
        "slates": soak.slates,
        "dropped_by_retention": report.dropped,
        "figures": figures,
        "lag_events": {"median": statistics.median(lags), "max": max(lags)},
        "samples": [asdict(sample) for sample in soak.samples],
    }
    config = {"events": events, "rate": args.rate, "users": USERS, "overrides": OVERRIDES, "quick": args.quick}
    print_result(results=results, config=config, checks=checks)


def growth(quarters: list[np.ndarray], name: str) -> dict[str, Any]:
    """Return a figure's median in each quarter of the run, and the last's share of the second's."""
    medians = [statistics.median(getattr(sample, name) for sample in quarter) for quarter in quarters]
    return {"quarters": medians, "growth": medians[-1] / medians[1]}


class Soak:
    """The traffic, and samples of the server under it."""

    def __init__(self, url: str, home: Path, server: Server, events: int, rate: float) -> None:
        self.samples: list[Sample] = []
        self.posted = self.failed = self.slates = 0
        self.passed_s = 0.0
        self._url, self._home, self._server = url, home, server
        self._events, self._rate = events, rate
        self._rng = np.random.default_rng(0)

    async def run(self) -> None:
        """Post everything at the rate (open loop), sampling meanwhile."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
            items = await self._wait_until_learning(session)
            day_began_us = time.time_ns() // 1_000 - DAY_US
            sampling = asyncio.create_task(self._sample(session))
            began_s, posts = time.monotonic(), set[asyncio.Task[None]]()
            for first in range(0, self._events, BATCH_EVENTS):
                await asyncio.sleep(max(0.0, began_s + first / self._rate - time.monotonic()))
                ts_us = day_began_us + first * DAY_US // self._events
                post = asyncio.create_task(self._visit(session, items, ts_us))
                posts.add(post)
                post.add_done_callback(posts.discard)
            self.passed_s = time.monotonic() - began_s
            await asyncio.gather(*posts)
            sampling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sampling

    async def _visit(self, session: aiohttp.ClientSession, items: list[str], ts_us: int) -> None:
        """Ask for a slate, and post a batch of what users saw and chose."""
        for _ in range(SLATES_A_BATCH):
            asked = {"user_id": f"soak-{self._rng.integers(USERS)}", "k": 10}
            self.slates += await self._post(session, "/v1/recommend", asked) is not None
        events = [
            {
                "user_id": f"soak-{min(self._rng.zipf(1.3), USERS)}-{number % 20}",
                "item_id": items[min(self._rng.zipf(1.2), len(items)) - 1],
                "kind": "click" if self._rng.random() < 0.3 else "impression",
                "ts_us": ts_us + number,
            }
            for number in range(BATCH_EVENTS)
        ]
        receipt = await self._post(session, "/v1/feedback", {"events": events})
        self.posted += receipt["accepted"] if receipt else 0

    async def _sample(self, session: aiohttp.ClientSession) -> None:
        began_s = time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_S)
            processes = self._server.processes()
            async with session.get(f"{self._url}/v1/versions") as answer:
                versions = await answer.json()
            sample = Sample(
                at_s=round(time.monotonic() - began_s, 1),
                memory_bytes=await asyncio.to_thread(tree_bytes, processes[:1]),
                disk_bytes=await asyncio.to_thread(disk_bytes, self._home),
                open_files=sum(map(open_files, processes)),
                lag_events=versions["head_seq"] - versions["learned_seq"],
            )
            self.samples.append(sample)
            print(json.dumps(asdict(sample)), file=sys.stderr, flush=True)

    async def _wait_until_learning(self, session: aiohttp.ClientSession) -> list[str]:
        """Return the catalogue's items, most popular first, once Ray answers and the trainer is there."""
        deadline_s = time.monotonic() + START_PATIENCE_S
        while time.monotonic() < deadline_s:
            if self._server.part("trainer") and self._server.part("ingress"):
                answer = await self._post(session, "/v1/recommend", {"user_id": "nobody", "k": 500})
                if answer is not None:
                    await asyncio.sleep(SAMPLE_S)
                    self.failed = 0
                    return [item["item_id"] for item in answer["items"]]
            await asyncio.sleep(0.5)
        raise TimeoutError(f"the server does not learn within {START_PATIENCE_S:.0f} s")

    async def _post(self, session: aiohttp.ClientSession, path: str, body: object) -> dict[str, Any] | None:
        try:
            async with session.post(self._url + path, json=body) as answer:
                if answer.status == 200:
                    return await answer.json()
        except (aiohttp.ClientError, TimeoutError):
            pass
        self.failed += 1
        return None


def disk_bytes(folder: Path) -> int:
    """Return what the files below a folder take; one that goes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(Path(parent, name)).st_blocks * 512
    return total


def open_files(process: psutil.Process) -> int:
    """Return how many file descriptors a process has."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.num_fds()
    return 0


if __name__ == "__main__":
    main()
