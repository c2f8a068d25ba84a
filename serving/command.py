"""`recloop serve`: serve the promoted version over HTTP until Ctrl-C, learning from feedback.

In:  the command line.  Out: an address on stdout; then a server.
Knows nothing of how requests are answered or how the trainer learns, which it starts by import string.
"""

import argparse
import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from cluster.config import EngineConfig, Recipe, load_recipe
from cluster.dataset import load_dataset
from cluster.engine import open_registry
from cluster.errors import EngineError
from cluster.home import Home
from cluster.output import print_result
from cluster.ray_session import RaySession, assert_port_free, ray_session

if TYPE_CHECKING:
    from ray.actor import ActorHandle

SESSION_WATCH_S = 0.2
"""How often the command looks whether Ray is still there."""
TRAINER_WATCH_S = 10.0
"""How often it looks whether the online trainer still learns."""
ONLINE_TRAINER = ("training.online.actor", "running_trainer")


def run(args: argparse.Namespace) -> None:
    """Check, start, say where, wait."""
    recipe = load_recipe(args.recipe, args.overrides)
    assert_port_free(args.host, args.port)
    from serving.app import running_app  # Ray Serve and torch: a wrong flag does not wait for them
    from serving.config import ServeConfig
    from serving.preflight import check_version, describe_damage

    registry = open_registry(recipe, args.home)
    version = check_version(registry, recipe.section(ServeConfig).pinned_version)
    if damage := describe_damage(registry, version):
        print(
            f"recloop: {version} is served as far as it is whole, and learned again from there: {damage}",
            file=sys.stderr,
        )
    dataset = load_dataset(args.data) if args.data else None
    engine = recipe.section(EngineConfig)
    with (
        ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=args.verbose) as session,
        _ending_with(session),
        running_app(recipe, args.home, args.host, args.port, dataset) as url,
        _online_trainer()(recipe, args.home) as trainer,
    ):
        print_result({"url": url, "docs": f"{url}/docs", "version": str(version)}, as_json=args.json)
        _watch(trainer)


def _watch(trainer: "ActorHandle[Any] | None") -> None:  # Any: an actor of a layer that serving may not name
    """Wait for Ctrl-C; say so when learning stops, which no request would show."""
    while True:
        time.sleep(TRAINER_WATCH_S)
        if trainer is not None:
            _look_after(trainer)


@contextlib.contextmanager
def _ending_with(session: RaySession) -> Iterator[None]:
    """End the command once Ray is gone, wherever in the block it is: what it waits for would never come.

    A Ray whose daemon has ended comes back by starting anew only: that is for whoever runs this command.
    """
    ended = threading.Event()

    def look() -> None:
        while not (lost := session.lost()):
            if ended.wait(SESSION_WATCH_S):
                return
        print(f"recloop: {lost} has ended, and Ray with it; start `recloop serve` again", file=sys.stderr, flush=True)
        session.abandon()
        os._exit(EngineError.exit_code)

    watch = threading.Thread(target=look, name="session-watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _look_after(trainer: "ActorHandle[Any]") -> None:  # Any: as above
    import ray
    from ray.exceptions import RayError

    try:
        status: Any = ray.get(trainer.status.remote(), timeout=TRAINER_WATCH_S)  # Any: JSON
    except RayError as error:
        status = {"ready": False, "error": type(error).__name__}
    if not status["ready"]:
        print(f"recloop: online training does not answer, the weights stand still: {status}", file=sys.stderr)


def _online_trainer() -> "Callable[[Recipe, Home], AbstractContextManager[ActorHandle[Any] | None]]":
    module, function = ONLINE_TRAINER
    return getattr(importlib.import_module(module), function)
