"""Does the very next request reflect a click, and how soon do the weights that answer it?

    python -m benchmarks.freshness [--quick]

In:  MovieLens-100K, the demo's recipe trained for an epoch, served by Ray Serve and learned from by the online trainer.
Out: two figures of the same server:
- read-your-clicks: 1,000 users, each of whom gets a slate, clicks an item of it and asks again with the click's
  sequence number: whether the answer reflects it (and no longer holds the item), and the time from ack to that answer;
- freshness: clicks posted at a steady rate (open loop: a late answer delays no other post), and the time from each ack
  until weights that learned from it answer, as the replica measures it.
Bound by Serve's HTTP path for the first, by the trainer's publish interval and the replica's poll for the second.
"""

import asyncio
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.harness import build_check, build_parser, percentiles, print_result
from cluster.config import EngineConfig, load_recipe
from cluster.dataset import load_dataset
from cluster.engine import open_registry
from cluster.home import Home
from cluster.log import EventLog
from cluster.ray_session import find_free_port, ray_session
from serving.app import running_app
from training.online.actor import running_trainer
from training.prepare.movielens import prepare_movielens
from training.publish import publish_run
from training.trainer import train_on_ray

CONNECTIONS = 16
PATIENCE_S = 60.0


def main() -> None:
    """Serve, ask, click and print."""
    parser = build_parser(__doc__)
    parser.add_argument("--rate", type=float, default=100.0, help="clicks a second, %(default)s unless given")
    args = parser.parse_args()
    users, seconds = (50, 5.0) if args.quick else (1_000, 60.0)
    recipe = load_recipe("movielens", ["train.epochs=1", "serve.arms=['live']"])
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:  # Ray's socket paths must be short
        home = Home(Path(scratch)).ensure()
        prepare_movielens(home.default_dataset)
        engine = recipe.section(EngineConfig)
        with ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=False):
            publish_run(train_on_ray(recipe, load_dataset(home.default_dataset), home), open_registry(recipe, home))
            with running_app(recipe, home, "127.0.0.1", find_free_port()) as url, running_trainer(recipe, home):
                read = asyncio.run(read_your_clicks(url, users))
                learned = asyncio.run(freshness(url, args.rate, seconds))
        with EventLog(home.log) as log:
            report = log.verify()
    acked = read["clicks"] + learned["posted"]
    checks = [
        build_check("next_requests_that_reflect", read["reflected"] / read["clicks"], "==1"),
        build_check("ack_to_state_p99_ms", read["ack_to_answer_ms"]["p99"], "<=100"),
        build_check("ack_to_served_row_p99_ms", learned["ack_to_ms"]["row"]["p99"], "<=2000"),
        build_check("share_of_rate_posted", learned["posted_s"] / args.rate, ">=0.99"),
        build_check("events_in_log_vs_acked", report.events / acked, "==1"),
        build_check("log_is_sound", float(report.sound), "==1"),
    ]
    for check in checks:
        print(f"{check.name:32} {check.value:>10,.3f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    config = {"users": users, "connections": CONNECTIONS, "rate": args.rate, "seconds": seconds, "quick": args.quick}
    print_result(results={"read_your_clicks": read, "freshness": learned}, config=config, checks=checks)


async def read_your_clicks(url: str, users: int) -> dict[str, Any]:
    """Have every user ask, click and ask again; return how many second answers reflect the click."""
    numbers = iter(range(users))
    reflected, took_ms = 0, []

    async with aiohttp.ClientSession(raise_for_status=True) as session:

        async def visit(user_id: str) -> None:
            nonlocal reflected
            slate = await _post(session, f"{url}/v1/recommend", {"user_id": user_id, "k": 10})
            item_id = slate["items"][0]["item_id"]
            seq = await _click(session, url, user_id, item_id)
            acked_s = time.perf_counter()
            after = await _post(session, f"{url}/v1/recommend", {"user_id": user_id, "k": 10, "min_seq": seq})
            took_ms.append((time.perf_counter() - acked_s) * 1e3)
            still_there = item_id in {entry["item_id"] for entry in after["items"]}
            reflected += after["reflects_min_seq"] and after["state_seq"] == seq and not still_there

        async def connection() -> None:
            for number in numbers:
                await visit(f"reader-{number}")

        await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
    return {"clicks": users, "reflected": reflected, "ack_to_answer_ms": percentiles(took_ms)}


async def freshness(url: str, rate: float, seconds: float) -> dict[str, Any]:
    """Post clicks at a steady rate and wait until all are in the weights served."""
    rng = np.random.default_rng(0)
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        before = await _versions(session, url)
        items = [entry["item_id"] for entry in (await _ask_stranger(session, url))["items"]]
        begun_s = time.perf_counter()
        posts = []
        for number in itertools.count():
            due_s = begun_s + number / rate
            if due_s - begun_s >= seconds:
                break
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            user_id, item_id = f"walker-{rng.zipf(1.5) % 5_000}", items[rng.integers(len(items))]
            posts.append(asyncio.create_task(_click(session, url, user_id, item_id)))
        passed_s = time.perf_counter() - begun_s
        newest_seq = max(await asyncio.gather(*posts))
        until_s = time.monotonic() + PATIENCE_S
        while (after := await _versions(session, url))["learned_seq"] < newest_seq and time.monotonic() < until_s:
            await asyncio.sleep(0.1)
    return {
        "posted": len(posts),
        "posted_s": len(posts) / passed_s,
        "learned": after["learned_seq"] >= newest_seq,
        "versions": [before["served"], after["served"]],
        "ack_to_ms": {"weights": after["weights_freshness_ms"], **after["freshness_ms"]},
    }


async def _ask_stranger(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    return await _post(session, f"{url}/v1/recommend", {"user_id": "nobody", "k": 200})


async def _click(session: aiohttp.ClientSession, url: str, user_id: str, item_id: str) -> int:
    event = {"user_id": user_id, "item_id": item_id, "kind": "click"}
    return (await _post(session, f"{url}/v1/feedback", event))["last_seq"]


async def _versions(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(f"{url}/v1/versions") as response:
        return await response.json()


async def _post(session: aiohttp.ClientSession, url: str, body: object) -> dict[str, Any]:
    async with session.post(url, json=body) as response:
        return await response.json()


if __name__ == "__main__":
    main()
