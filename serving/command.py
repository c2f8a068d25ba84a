"""`recloop serve`: serve the promoted version over HTTP until Ctrl-C, learning from feedback.

In:  the command line.  Out: an address on stdout; then a server.
Knows nothing of how requests are answered or how the trainer learns, which it starts by import string.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
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
        running_app(recipe, args.home, args.host, args.port, dataset) as url,
        _online_trainer()(recipe, args.home) as trainer,
    ):
        print_result({"url": url, "docs": f"{url}/docs", "version": str(version)}, as_json=args.json)
        _watch(session, trainer)


def _watch(session: RaySession, trainer: "ActorHandle[Any] | None") -> None:  # Any: a layer that serving may not name
    """Wait for Ctrl-C; say so when learning stops, which no request would show, and end when Ray is gone.

    A Ray whose daemon has ended comes back by starting anew only: that is for whoever runs this command.
    """
    looked_s = time.monotonic()
    while True:
        time.sleep(SESSION_WATCH_S)
        if lost := session.lost():
            print(
                f"recloop: {lost} has ended, and Ray with it; start `recloop serve` again", file=sys.stderr, flush=True
            )
            session.abandon()
            os._exit(EngineError.exit_code)
        if trainer is not None and time.monotonic() - looked_s >= TRAINER_WATCH_S:
            _look_after(trainer)
            looked_s = time.monotonic()


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
