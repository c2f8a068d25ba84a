"""`recloop serve`: serve the promoted version over HTTP until Ctrl-C, learning from feedback.

In:  the command line.  Out: an address on stdout; then a server.
Knows nothing of how requests are answered or how the trainer learns, which it starts by import string.
"""

import argparse
import importlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from cluster.config import EngineConfig, Recipe, load_recipe
from cluster.dataset import load_dataset
from cluster.engine import open_registry
from cluster.home import Home
from cluster.output import print_result
from cluster.ray_session import assert_port_free, ray_session

ONLINE_TRAINER = ("training.online.actor", "running_trainer")


def run(args: argparse.Namespace) -> None:
    """Check, start, say where, wait."""
    recipe = load_recipe(args.recipe, args.overrides)
    assert_port_free(args.host, args.port)
    from serving.app import running_app  # Ray Serve and torch: a wrong flag does not wait for them
    from serving.config import ServeConfig
    from serving.preflight import check_version

    version = check_version(open_registry(recipe, args.home), recipe.section(ServeConfig).pinned_version)
    dataset = load_dataset(args.data) if args.data else None
    engine = recipe.section(EngineConfig)
    with (
        ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=args.verbose),
        running_app(recipe, args.home, args.host, args.port, dataset) as url,
        _online_trainer()(recipe, args.home),
    ):
        print_result({"url": url, "docs": f"{url}/docs", "version": str(version)}, as_json=args.json)
        threading.Event().wait()


def _online_trainer() -> Callable[[Recipe, Home], AbstractContextManager[object]]:
    module, function = ONLINE_TRAINER
    return getattr(importlib.import_module(module), function)
