"""Servers of one and the same ranker, each a process of its own: recloop's, and those it is compared to.

    python -m benchmarks.serve_peers NAME --home DIR --port N

In:  a home with a published version.  Out: a server at the port; `ready` on stdout, and its end with standard input.
Knows nothing of load (load.py, serve_load.py).

    serve      the app on Ray Serve as `recloop serve` sets it up, and at /noop one that does nothing: the ceiling
    default    the same app on Serve's default flags: its own proxy instead of HAProxy
    local      the app as `recloop serve --local` runs it
    plain      uvicorn and FastAPI with one route that calls the ranker
    bentoml, litserve   the same in serve_peer_bentoml.py and serve_peer_litserve.py, by a Python that has them
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cluster.ray_session
import cluster.registry
from cluster.config import Recipe, load_recipe
from cluster.home import Home

if TYPE_CHECKING:
    from ray.serve import Application

OVERRIDES = ("serve.arms=['live']", "serve.warm_encoder=false")
RAY = ("serve", "default")
START_PATIENCE_S = 180.0
NOOP_PATH = "/noop"
Json = dict[str, Any]  # Any: whatever JSON holds


def recipe_of(overrides: list[str]) -> Recipe:
    """Return the recipe that every server answers by."""
    return load_recipe("movielens", [*OVERRIDES, *overrides])


def load_ranker(home: Home, overrides: list[str]) -> Callable[[Json], Json]:
    """Return the function from a request to an answer that peers serve: state, candidates, ranking, slate."""
    from serving.encoders import LocalEncoder, VersionEncoders
    from serving.recommender import Query
    from serving.replica import Replica, resolve_settings

    settings = resolve_settings(recipe_of(overrides), home)
    encoders = VersionEncoders(settings.cache, settings.serve, cluster.registry.Registry(settings.registry_uri))
    replica = Replica(settings, LocalEncoder(encoders, settings.serve.encoder_timeout_s), rank=0)
    replica.load()

    def rank(asked: Json) -> Json:
        found = replica.recommender.recommend(Query(user_id=asked["user_id"], k=asked["k"], arm="live"))
        scored = zip(found.slate.item_ids, found.slate.scores, found.slate.propensities, strict=True)
        items = [{"item_id": item_id, "score": score, "propensity": share} for item_id, score, share in scored]
        return {"request_id": found.request_id, "version": found.version, "items": items}

    return rank


@contextlib.contextmanager
def running(name: str, home: Path, port: int, overrides: list[str], python: str = sys.executable) -> Iterator[int]:
    """Run a server while the block lasts; yield its process id."""
    module = f"benchmarks.serve_peer_{name}" if name in ("bentoml", "litserve") else "benchmarks.serve_peers"
    command = [python, "-m", module, name, "--home", str(home), "--port", str(port)]
    command += [part for override in overrides for part in ("--set", override)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdin is not None, "asked for above"
        assert process.stdout is not None, "likewise"
        while (line := process.stdout.readline()) != "ready\n":  # peers may print what they like before
            if not line:
                raise RuntimeError(f"{name} did not start")
        yield process.pid
        process.stdin.close()
        process.wait(60)
    finally:
        process.kill()


def parse_args() -> argparse.Namespace:
    """Return the flags that every server takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--home", type=lambda path: Home(Path(path)), required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    return parser.parse_args()


def wait_for_end() -> None:
    """Say that the server answers, and return once it is to end."""
    print("ready", flush=True)
    sys.stdin.read()


def main() -> None:
    """Serve until standard input ends."""
    args = parse_args()
    if args.name in RAY:
        _serve_on_ray(args)
    elif args.name == "local":
        from serving.local import running_locally

        with running_locally(recipe_of(args.overrides), args.home, "127.0.0.1", args.port):
            wait_for_end()
    else:
        _serve_plainly(args)


def _serve_on_ray(args: argparse.Namespace) -> None:
    from ray import serve

    from serving.app import running_app

    if args.name == "default":
        cluster.ray_session.build_settings = lambda folder, find_port: {}
    with (
        tempfile.TemporaryDirectory(dir="/tmp"),
        cluster.ray_session.ray_session(verbose=False),
        running_app(recipe_of(args.overrides), args.home, "127.0.0.1", args.port),
    ):
        if args.name == "serve":
            serve.run(_build_noop(), name="noop", route_prefix=NOOP_PATH)
        wait_for_end()


def _build_noop() -> "Application":
    from fastapi import FastAPI
    from ray import serve

    api = FastAPI()

    @api.post("/")
    async def answer() -> Json:
        return {}

    @serve.deployment(max_ongoing_requests=64, logging_config={"enable_access_log": False})
    @serve.ingress(api)
    class Noop:
        """Answers at once."""

    bind: Any = Noop  # Any: Ray's types do not say what a decorated class offers
    return bind.bind()


def _serve_plainly(args: argparse.Namespace) -> None:
    import threading

    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    rank = load_ranker(args.home, args.overrides)
    api = FastAPI()

    class Asked(BaseModel):
        user_id: str
        k: int = 10

    @api.post("/v1/recommend")
    def recommend(asked: Asked) -> Json:
        return rank({"user_id": asked.user_id, "k": asked.k})

    config = uvicorn.Config(api, "127.0.0.1", args.port, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    wait_for_end()
    server.should_exit = True
    thread.join()


if __name__ == "__main__":
    main()
