"""`recloop events`: show, check, repair, seal, export or replay the log.

In:  the home's event log.  Out: events, or a report; exit code 5 where the log does not hold.
Knows nothing of who wrote or learns from them.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.config import SECTIONS, load_recipe
from cluster.errors import ConfigError, EngineError
from cluster.home import Home, find_home
from cluster.imports import load_target
from cluster.log import EventLog, LoggedEvent
from cluster.log.quarantine import Quarantine
from cluster.log.repair import RepairReport, repair_log
from cluster.log.retention import LogConfig
from cluster.log.transfer import export_events, replay_events
from cluster.output import Result

POLL_S = 0.2
BATCH_EVENTS = 1_000
NEEDED_TO = {
    "export": "a folder for the dataset",
    "replay": "the home whose log takes the events",
    "join": "the Parquet file for the examples",
}
"""What --to names, by action."""
LOG_SECTIONS = {**SECTIONS, "log": "cluster.log.retention:LogConfig"}


def run(args: argparse.Namespace) -> Result | None:
    """Do what `args.action` says."""
    if args.action in NEEDED_TO and args.to is None:
        what = NEEDED_TO[args.action]
        raise ConfigError(f"recloop events {args.action}: --to is missing; name {what}")
    return ACTIONS[args.action](args)


def _tail(args: argparse.Namespace) -> Result | None:
    with open_log(args.home) as log:
        if args.follow:
            _follow(log, args.last)
        newest = log.read(max(log.head_seq() - args.last, 0), args.last)
        return {"log": str(log.path), "events": [_row(logged) for logged in newest]}


def _seal(args: argparse.Namespace) -> Result:
    config = load_recipe(args.recipe, args.overrides, sections=LOG_SECTIONS).section(LogConfig)
    with open_log(args.home, config) as log:
        segments = log.seal()
        return {
            "log": str(log.path),
            "sealed_events": sum(segment.rows for segment in segments),
            "segments": [dataclasses.asdict(segment) for segment in segments],
        }


def _export(args: argparse.Namespace) -> Result:
    with open_log(args.home) as log:
        dataset = export_events(log, Path(args.to), args.first_seq, args.last_seq)
    return {"dataset": str(dataset.path), "events": dataset.info.events, "items": dataset.info.items}


def _replay(args: argparse.Namespace) -> Result:
    target = find_home(args.to)
    if target.path == args.home.path:
        raise ConfigError(f"--to {args.to}: is the home that is read; name another one")
    with open_log(args.home) as log, EventLog(target.ensure().log) as other:
        new, known = replay_events(log, other, args.first_seq, args.last_seq)
        return {"log": str(other.path), "appended": new, "duplicates": known, "head_seq": other.head_seq()}


def _join(args: argparse.Namespace) -> Result:
    """Join impressions with the feedback that followed them."""
    recipe = load_recipe(args.recipe, args.overrides)
    with open_log(args.home) as log:
        return load_target("training.online.join:join_log")(log, recipe, Path(args.to))


def _quarantine(args: argparse.Namespace) -> Result:
    """List what is in quarantine, and release or drop what was chosen of it."""
    _require_log(args.home)
    quarantine = Quarantine(args.home.log)
    try:
        chosen = {"user_id": args.user, "item_id": args.item, "first_seq": args.first_seq}
        chosen["last_seq"] = args.last_seq or 2**62
        held = [entry.seq for entry in quarantine.find(states=["held"], **chosen)]
        if args.release:
            quarantine.release(held)
        if args.drop:
            quarantine.drop(held)
        found = quarantine.find(limit=args.last, **chosen)
        return {
            "quarantine": str(quarantine.path),
            "counts": quarantine.counts(),
            "released": len(held) if args.release else 0,
            "dropped": len(held) if args.drop else 0,
            "events": [dataclasses.asdict(entry) | {"reasons": ", ".join(entry.reasons)} for entry in found],
        }
    finally:
        quarantine.close()


def open_log(home: Home, config: LogConfig | None = None) -> EventLog:
    """Open the home's log; raises `EngineError` where there is none yet."""
    _require_log(home)
    return EventLog(home.log, config)


def _require_log(home: Home) -> None:
    if not (home.log.exists() or home.log.with_name(f"{home.log.name}.swap").exists()):
        raise EngineError(f"{home.log}: no event log here yet; `recloop serve` starts one, or name another --home")


def _verify(args: argparse.Namespace) -> Result:
    _require_log(args.home)
    repair = None
    try:
        wrong, report = _check(args.home)
    except EngineError as error:
        wrong, report = str(error), {}
    if wrong and args.repair:
        repair = repair_log(args.home.log)
        wrong, report = _check(args.home)
    if wrong:
        raise EngineError(wrong)
    return {**report, **(_describe_repair(repair) if args.repair else {})}


def _check(home: Home) -> tuple[str, Result]:
    """Return what is wrong with a log, in words, and its figures."""
    with EventLog(home.log) as log:
        report = log.verify()
    figures = dataclasses.asdict(report)
    wrong = "" if report.sound else f"{home.log}: does not hold: {json.dumps(figures)}; try --repair"
    return wrong, {"log": str(home.log), **figures}


def _describe_repair(repair: RepairReport | None) -> Result:
    if repair is None:
        return {"repaired": False}
    return {
        "repaired": True,
        "rewritten_segments": repair.rewritten_segments,
        "lost_ranges": [f"{first}-{last}" for first, last in repair.lost],
        "unreadable": list(repair.unreadable),
        "forgotten_seeds": list(repair.forgotten_seeds),
        "kept": repair.kept,
    }


def _follow(log: EventLog, last: int) -> None:
    """Print one line of JSON an event, until Ctrl-C."""
    seq = max(log.head_seq() - last, 0)
    while True:
        for logged in log.read(seq, BATCH_EVENTS):
            print(json.dumps(_row(logged)), flush=True)
            seq = logged.seq
        time.sleep(POLL_S)


def _row(logged: LoggedEvent) -> Result:
    event = logged.event
    return {
        "seq": logged.seq,
        "ts_us": event.ts_us,
        "user_id": event.user_id,
        "item_id": event.item_id,
        "kind": event.kind,
        "value": event.value,
        "version": event.version,
        "event_id": event.event_id,
    }


ACTIONS: Mapping[str, Callable[[argparse.Namespace], Result | None]] = {
    "tail": _tail,
    "verify": _verify,
    "seal": _seal,
    "export": _export,
    "replay": _replay,
    "join": _join,
    "quarantine": _quarantine,
}
