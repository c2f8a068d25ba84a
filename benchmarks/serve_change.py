"""What happens when a replica dies, or code, versions or the load itself change: parts of serve_load.py.

In:  a home of the run's own, request bodies, the rate that one replica sustains.  Out: figures and their checks.
Knows nothing of peers. Ray runs below the benchmark's own process, which also offers the load.
"""

import argparse
import contextlib
import http.client
import itertools
import os
import re
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import matplotlib.pyplot as plt
import numpy as np
import psutil
from ray import serve

from benchmarks.harness import Check, build_check, percentiles, tree_bytes
from benchmarks.load import Answered, Target, offer
from benchmarks.serve_peers import recipe_of
from benchmarks.swaps import publish_relatives
from cluster.haproxy import STATS_PORT, count_replicas
from cluster.home import Home
from cluster.ray_session import find_free_port, ray_session
from cluster.registry import Registry
from serving.app import APP_NAME, build_application, running_app
from serving.replica import resolve_settings

LOGICAL_CPUS = 16
"""For Ray: copies are not held back by the number of cores."""
LOOK_S = 0.1
WARM_UP_S = 12.0
Json = dict[str, Any]  # Any: whatever JSON holds


def ask_in_turn(url: str, bodies: list[bytes]) -> float:
    """Return the median time of one request at a time, in milliseconds."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc)
    took_ms = []
    for body in bodies:
        began_s = time.perf_counter()
        connection.request("POST", parts.path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        took_ms.append(1e3 * (time.perf_counter() - began_s))
        if answer.status != 200:
            raise RuntimeError(f"{url}: answered {answer.status}")
    connection.close()
    return statistics.median(took_ms)


@contextlib.contextmanager
def serving(args: argparse.Namespace, home: Home, bodies: list[bytes], *overrides: str) -> Iterator[Target]:
    """Serve on a Ray of the run's own, where every user has asked once."""
    recipe = recipe_of([*args.overrides, *overrides])
    with (
        ray_session(logical_cpus=LOGICAL_CPUS),
        running_app(recipe, home, "127.0.0.1", find_free_port()) as url,
    ):
        target = Target(f"{url}/v1/recommend", bodies)
        offer(target, [(len(bodies) / WARM_UP_S, WARM_UP_S)])
        yield target


def replica_processes() -> list[psutil.Process]:
    """Return the processes of the ingress's replicas."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "ServeReplica:recloop:Ingress" in " ".join(child.cmdline())]


def measure_kill(args: argparse.Namespace, home: Home, bodies: list[bytes], rate: float) -> tuple[Json, list[Check]]:
    """Kill one of two replicas in the middle of the load."""
    seconds, kill_s = 30.0, 5.0
    with serving(args, home, bodies, "serve.replicas=2") as target:
        stats_port, told = int(os.environ[STATS_PORT]), {}

        def kill() -> None:
            time.sleep(kill_s)
            replica_processes()[0].kill()
            killed_s = time.monotonic()
            while count_replicas(stats_port) == 2:
                time.sleep(LOOK_S)
            told["missed_s"] = time.monotonic() - killed_s
            while count_replicas(stats_port) < 2:
                time.sleep(LOOK_S)
            told["whole_s"] = time.monotonic() - killed_s

        with ThreadPoolExecutor(1) as other:
            ended = other.submit(kill)
            found = offer(target, [(rate / 3, seconds)])
            ended.result()
    failed = 1 - found.share(200)
    return _told(found) | told | {"rate_per_s": rate / 3, "failed_share": failed}, [
        build_check("kill_failed_share", failed, "<0.001"),
        build_check("kill_until_full_capacity_s", told["whole_s"], "<=10"),
    ]


def measure_upgrade(args: argparse.Namespace, home: Home, bodies: list[bytes], rate: float) -> tuple[Json, list[Check]]:
    """Deploy the app anew, with other settings, in the middle of the load."""
    seconds = 45.0
    with serving(args, home, bodies, "serve.replicas=2") as target:
        before = {process.pid for process in replica_processes()}

        def deploy() -> float:
            time.sleep(5.0)
            began_s = time.monotonic()
            settings = resolve_settings(recipe_of([*args.overrides, "serve.replicas=2", "serve.candidates=90"]), home)
            serve.run(build_application(settings), name=APP_NAME, route_prefix="/")
            return time.monotonic() - began_s

        with ThreadPoolExecutor(1) as other:
            ended = other.submit(deploy)
            found = offer(target, [(rate / 3, seconds)])
            took_s = ended.result()
        replaced = before.isdisjoint(process.pid for process in replica_processes())
    return _told(found) | {"deploy_s": took_s, "rate_per_s": rate / 3, "replaced": replaced}, [
        build_check("upgrade_failed", (1 - found.share(200)) * len(found.status), "==0"),
        build_check("upgrade_replaced_all_replicas", float(replaced), "==1"),
    ]


def measure_autoscaling(
    args: argparse.Namespace, home: Home, bodies: list[bytes], rate: float
) -> tuple[Json, list[Check]]:
    """Raise the load and lower it again; look how many copies there are."""
    overrides = ["serve.max_replicas=4", "serve.target_ongoing_requests=2", "serve.upscale_delay_s=2"]
    overrides += ["serve.downscale_delay_s=10", "serve.max_wait_ms=1000"]
    phases = [(rate * share, 15.0) for share in (0.1, 0.4, 0.8, 1.2, 1.2, 0.4, 0.1)]
    looked: list[tuple[float, int]] = []
    with serving(args, home, bodies, *overrides) as target:
        began_s, stopping, stats_port = time.monotonic(), threading.Event(), int(os.environ[STATS_PORT])

        def look() -> None:
            while not stopping.wait(LOOK_S):
                with contextlib.suppress(OSError):  # HAProxy starts anew where copies come or go
                    looked.append((time.monotonic() - began_s, count_replicas(stats_port)))

        with ThreadPoolExecutor(1) as other:
            ended = other.submit(look)
            found = offer(target, phases)
            until_s = time.monotonic() + 60.0
            while looked[-1][1] > 1 and time.monotonic() < until_s:
                time.sleep(LOOK_S)
            stopping.set()
            ended.result()
    counts = [number for _, number in looked]
    changes = [looked[0], *(now for before, now in itertools.pairwise(looked) if before[1] != now[1])]
    if args.plot:
        _plot(args.plot, phases, looked, found)
    return _told(found) | {"phases": phases, "replicas_at_s": changes}, [
        build_check("autoscale_first_replicas", counts[0], "==1"),
        build_check("autoscale_most_replicas", max(counts), "==4"),
        build_check("autoscale_last_replicas", counts[-1], "==1"),
    ]


def measure_swaps(args: argparse.Namespace, home: Home, bodies: list[bytes], rate: float) -> tuple[Json, list[Check]]:
    """Change versions under load, evenly over all requests; look how memory grows after the first fifth."""
    registry = Registry(home.registry)
    refs = publish_relatives(registry)
    offered = 0.5 * rate
    seconds = args.requests / offered
    samples: list[tuple[float, float]] = []
    with serving(args, home, bodies, "serve.poll_interval_ms=50") as target:
        root, began_s = replica_processes(), time.monotonic()

        def swap() -> None:
            for number in range(args.swaps):
                due_s = began_s + (number + 0.5) * seconds / args.swaps
                time.sleep(max(due_s - time.monotonic(), 0.0))
                registry.promote(refs[(number + 1) % len(refs)], "swap")
                samples.append((time.monotonic() - began_s, tree_bytes(root)))

        with ThreadPoolExecutor(1) as other:
            ended = other.submit(swap)
            found = offer(target, [(offered, seconds)])
            ended.result()
        swaps = _count_swaps(target.url)
    at_s, size = np.array(samples)[len(samples) // 5 :].T
    slope = np.polyfit(at_s, size, 1)[0] * (at_s[-1] - at_s[0]) / size[0]
    errors = len(found.status) - sum(status in (200, 429) for status in found.status)
    told = {"rate_per_s": offered, "swaps": swaps, "seconds": seconds, "rss_slope": slope}
    return _told(found) | told | {"bytes": [int(size[0]), int(size[-1])]}, [
        build_check("swaps_requests", len(found.status), ">=1000000"),
        build_check("swaps_number", swaps, ">=1000"),
        build_check("swaps_errors", errors, "==0"),
        build_check("swaps_refused_share", found.share(429), "==0"),
        build_check("swaps_rss_slope", float(slope), "<0.02"),
    ]


def _count_swaps(url: str) -> int:
    """Return how many swaps the replica has made, as its metrics say."""
    with urllib.request.urlopen(url.replace("/v1/recommend", "/metrics"), timeout=10) as answer:
        found = re.search(r'recloop_version_swaps_total{outcome="swapped"} (\S+)', answer.read().decode())
    return int(float(found[1])) if found else 0


def _told(found: Answered) -> Json:
    return {"statuses": found.statuses(), "ms": percentiles(found.ms(200)), "seconds": found.seconds}


def _plot(path: Path, phases: list[tuple[float, float]], looked: list[tuple[float, int]], found: Answered) -> None:
    """Draw the load, the copies and the latency over time."""
    ends_s = np.cumsum([seconds for _, seconds in phases])
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 5.5), layout="constrained")
    above.stairs([rate for rate, _ in phases], [0, *ends_s], color="tab:gray", label="requests/s offered", fill=True)
    above.set_ylabel("requests/s")
    copies = above.twinx()
    copies.step(*zip(*looked, strict=True), where="post", color="tab:blue", linewidth=2)
    copies.set_ylabel("replicas", color="tab:blue")
    copies.set_ylim(0, 5)
    seconds = range(int(ends_s[-1]))
    for percent, colour in ((50, "tab:green"), (99, "tab:red")):
        values = [found.p(percent, after_s=second, before_s=second + 1) for second in seconds]
        below.plot(seconds, values, color=colour, label=f"p{percent}")
    below.set_yscale("log")
    below.set_ylabel("ms")
    below.set_xlabel("seconds")
    below.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
