"""`recloop demo`: the whole loop on MovieLens-100K, in one command.

In:  the command line.  Out: a table, a picture, and one JSON object as the last line.
Knows nothing of how any stage works: each is started by import string.

    prepare ─▶ train ─▶ publish version 1 ─▶ serve ─▶ replay the last events as live traffic ─▶ report

The demo keeps its registry, log and runs apart, in demo/ of the home folder, and starts each time from nothing; the
dataset and the text vectors are kept.
"""

import argparse
import contextlib
import fcntl
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from cluster.config import EngineConfig, load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.engine import open_registry
from cluster.errors import ConfigError, EngineError, GateError
from cluster.home import Home
from cluster.imports import load_target
from cluster.log import EventLog
from cluster.manifest import TWO_STAGE
from cluster.output import print_result
from cluster.ray_session import assert_port_free, ray_session
from cluster.registry import Registry

ARMS = ("frozen", "state", "live")


def run(args: argparse.Namespace) -> dict[str, Any] | None:  # Any: JSON
    """Run every stage and report. Raises `GateError` when an event was lost or learned twice."""
    started_s = time.monotonic()
    assert_port_free(args.host, args.port)
    load_target("serving.command:assert_reachable_by_keys_only")(args.host, args.home)
    workers = [f"train.workers={args.workers}"] if args.workers else []
    recipe = load_recipe(args.recipe, [f"serve.arms={list(ARMS)}", *workers, *args.overrides])
    if (system := recipe.section(load_target("training.baselines.config:SystemConfig")).name) != TWO_STAGE:
        raise ConfigError(f"system.name={system}: learns nothing while it serves, which is what the demo shows")
    dataset = _prepared(args.home.ensure())
    engine = recipe.section(EngineConfig)
    with _only_demo(args.home), ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=args.verbose):
        home = _fresh_home(args.home)
        registry = open_registry(recipe, home)
        _say(f"training on {dataset.info.name}")
        trained = load_target("training.trainer:train_on_ray")(recipe, dataset, home)
        version = load_target("training.publish:publish_run")(trained, registry)
        _say(f"published version {version}")
        with (
            load_target("serving.app:running_app")(recipe, home, args.host, args.port) as url,
            load_target("training.online.actor:running_trainer")(recipe, home),
        ):
            _say(f"serving at {url}; replaying live traffic")
            summary = load_target("training.evaluation.report:replay_and_report")(
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
        load_target("training.prepare.movielens:prepare_movielens")(home.default_dataset)
    return load_dataset(home.default_dataset)


@contextlib.contextmanager
def _only_demo(home: Home) -> Iterator[None]:
    """Hold the home's demo folder for the block. Raises `EngineError` while another demo runs there."""
    with (home.path / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EngineError(f"{home.path}: another demo runs in this home; name another with --home") from error
        yield


def _fresh_home(home: Home) -> Home:
    """Return the demo's own home, emptied, that shares the cache."""
    path = home.path / "demo"
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()
    (path / "cache").symlink_to(home.cache, target_is_directory=True)
    return Home(path).ensure()


def _audit(registry: Registry, home: Home, acked: int) -> dict[str, int]:
    """Count acked events that the log or the trainer does not have, and events that the trainer has twice.

    Every event of the log was acked to the replay, its only client. A version states how many events were applied up to
    it; the registry lets no delta leave a gap after its parent or overlap it, and the demo waits for the last event.
    """
    with EventLog(home.log) as log:
        report = log.verify()
    metrics = registry.manifest(registry.current()).metrics
    applied = int(metrics.get("events_total", 0))
    return {
        "lost": max(acked - report.events, 0) + max(report.events - applied, 0),
        "applied": applied,
        "applied_twice": max(applied - report.events, 0),
        "set_aside": int(metrics.get("set_aside_total", 0)),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
