"""`recloop demo`: the whole loop on MovieLens-100K, in one command.

In:  the command line.  Out: a table, a picture, and one JSON object as the last line.
Knows nothing of how any stage works: each is started by import string.

    prepare ─▶ train ─▶ publish version 1 ─▶ serve ─▶ replay the last events as live traffic ─▶ report

The demo keeps its registry, log and runs apart, in demo/ of the home folder, and starts each time from nothing; the
dataset and the text vectors are kept.
"""

import argparse
import importlib
import shutil
import sys
import threading
import time
from typing import Any

from cluster.config import EngineConfig, load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.errors import GateError
from cluster.home import Home
from cluster.log import EventLog
from cluster.output import print_result
from cluster.ray_session import assert_port_free, ray_session
from cluster.registry import Registry

ARMS = ("frozen", "state", "live")

Stage = Any  # Any: a function of a higher layer


def run(args: argparse.Namespace) -> dict[str, Any] | None:  # Any: JSON
    """Run every stage and report. Raises `GateError` when an event was lost or learned twice."""
    started_s = time.monotonic()
    assert_port_free(args.host, args.port)
    recipe = load_recipe(args.recipe, [f"serve.arms={list(ARMS)}", f"train.workers={args.workers}", *args.overrides])
    dataset = _prepared(args.home.ensure())
    home = _fresh_home(args.home)
    engine = recipe.section(EngineConfig)
    with ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=args.verbose):
        registry = Registry(home.registry)
        _say(f"training on {dataset.info.name} with {args.workers} workers")
        trained = _stage("training.trainer:train_on_ray")(recipe, dataset, home)
        version = _stage("training.publish:publish_run")(trained, registry)
        _say(f"published version {version}")
        with (
            _stage("serving.app:running_app")(recipe, home, args.host, args.port) as url,
            _stage("training.online.actor:running_trainer")(recipe, home),
        ):
            _say(f"serving at {url}; replaying live traffic")
            summary = _stage("training.evaluation.report:replay_and_report")(
                url, recipe, dataset, args.home.reports, args.events
            )
            summary |= _audit(registry, home, summary["events"]) | {"seconds": round(time.monotonic() - started_s, 1)}
            if args.stay:
                print_result(summary, as_json=True)
                _say(f"the server stays up at {url} (see {url}/docs); Ctrl-C ends it")
                threading.Event().wait()
    if summary["lost"] or summary["applied_twice"]:
        print_result(summary, as_json=True)
        raise GateError(f"{summary['lost']} events lost, {summary['applied_twice']} applied twice")
    return summary


def _prepared(home: Home) -> Dataset:
    if not (home.default_dataset / "dataset.json").exists():
        _say("preparing MovieLens-100K with film descriptions")
        _stage("training.prepare.movielens:prepare_movielens")(home.default_dataset)
    return load_dataset(home.default_dataset)


def _fresh_home(home: Home) -> Home:
    """Return the demo's own home, emptied, that shares the cache."""
    path = home.path / "demo"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    (path / "cache").symlink_to(home.cache, target_is_directory=True)
    return Home(path).ensure()


def _audit(registry: Registry, home: Home, acked: int) -> dict[str, int]:
    """Count acked events that the log or the trainer does not have, and events that the trainer has twice.

    Every event of the log was acked to the replay, its only client. A version states how many events were learned up
    to it; the demo waits until they are all of the log's.
    """
    with EventLog(home.log) as log:
        report = log.verify()
    applied = int(registry.manifest(registry.current()).metrics.get("events_total", 0))
    missing = max(acked - report.events, 0) + max(report.events - applied, 0)
    return {"lost": missing, "applied": applied, "applied_twice": max(applied - report.events, 0)}


def _stage(target: str) -> Stage:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
