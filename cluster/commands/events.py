"""`recloop events`: show the newest events of the log, or check the log against itself.

In:  the home's event log.  Out: events, or a report; exit code 5 where the log does not hold.
Knows nothing of who wrote or learns from them.
"""

import argparse
import dataclasses
import json
import time

from cluster.errors import EngineError
from cluster.home import Home
from cluster.log import EventLog, LoggedEvent
from cluster.output import Result

POLL_S = 0.2
BATCH_EVENTS = 1_000


def run(args: argparse.Namespace) -> Result | None:
    """Do what `args.action` says."""
    with open_log(args.home) as log:
        if args.action == "verify":
            return _verify(log)
        if args.follow:
            _follow(log, args.last)
        newest = log.read(max(log.head_seq() - args.last, 0), args.last)
        return {"log": str(log.path), "events": [_row(logged) for logged in newest]}


def open_log(home: Home) -> EventLog:
    """Open the home's log; raises `EngineError` where there is none yet."""
    if not home.log.exists():
        raise EngineError(f"{home.log}: no event log here yet; `recloop serve` starts one, or name another --home")
    return EventLog(home.log)


def _verify(log: EventLog) -> Result:
    report = log.verify()
    if not report.sound:
        raise EngineError(f"{log.path}: does not hold: {json.dumps(dataclasses.asdict(report))}")
    return {"log": str(log.path), **dataclasses.asdict(report)}


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
