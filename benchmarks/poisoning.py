"""Do bots that push an item, or a batch of corrupted labels, get to steer what is served?

    python -m benchmarks.poisoning --home DIR --data DIR [--quick]

In:  a home with a version published on a dataset, and that dataset's next events in time order.
Out: of three attacks, each 5% of the events, with the intake guard off and on: in how many slates of people (and of
strangers) the pushed item is, over how many it is in after the same events without bots; the share of people's events
that are held in quarantine. Of a batch of flipped labels (each click is on what its user would like least), posted at
100 events a second: the seconds until what was learned from it is undone, and NDCG@10 on the events that follow, before
and after.
Bound by the first bot events, which nothing tells from a new release: until there are `intake.burst_events` of them.
"""

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import build_check, build_parser, print_result
from cluster.config import Recipe, load_recipe
from cluster.dataset import load_dataset
from cluster.events import INTERACTION_KINDS, Event
from cluster.home import Home
from cluster.log import EventLog
from cluster.registry import Registry
from training.evaluation.metrics import ndcg_at_k
from training.evaluation.replay import split_for_replay
from training.models.served import ServedModel
from training.online.learner import OnlineLearner
from training.stream import DataConfig

ATTACKS = ("few fast accounts", "many accounts that mimic people", "one account a push")
BOT_SHARE = 0.05
SLATE = 10
RATE = 100
"""Corrupted events a second."""
PUBLISH_S = 0.5
DECOYS = 3
"""Popular items that an account which mimics people chooses for each push."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A learner on a registry and a log of its own."""

    learner: OnlineLearner
    registry: Registry
    log: EventLog

    def follow(self, events: Sequence[Event]) -> None:
        """Log the events and learn them, with a delta every so many."""
        for start in range(0, len(events), int(RATE * PUBLISH_S)):
            self.log.append(events[start : start + int(RATE * PUBLISH_S)])
            while fresh := self.learner.read():
                self.learner.learn(fresh)
            self.learner.publish()

    def served(self) -> ServedModel:
        """Return what replicas serve."""
        return ServedModel.load(self.registry, self.registry.current())


def main() -> None:
    """Attack with and without the guard, then corrupt a batch."""
    parser = build_parser(__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--events", type=int, default=3_000, help="of people, %(default)s unless given")
    args = parser.parse_args()
    count = 400 if args.quick else args.events
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    home, recipe = Home(args.home), load_recipe("movielens", ["guard.enabled=false"])
    known, live = split_for_replay(load_dataset(args.data), recipe.section(DataConfig), 2 * count)
    events = [_event(row) for row in live.to_pylist() if row["kind"] in INTERACTION_KINDS]
    people = sorted(set(known["user_id"].to_pylist()))[:: 4 if args.quick else 2]
    pushed = _unpopular_item(home, people, known["item_id"].to_pylist())
    results: dict[str, Any] = {"pushed": pushed, "attacks": {}}  # Any: JSON
    clean = _attacked(home, recipe, events[:count], people, pushed)
    results["without_bots"] = clean
    for attack in ATTACKS:
        mixed = _with_bots(events[:count], attack, pushed, known["item_id"].to_pylist())
        found = {}
        for guarded in (False, True):
            judged = load_recipe("movielens", ["guard.enabled=false", f"intake.enabled={str(guarded).lower()}"])
            found["guarded" if guarded else "unguarded"] = _attacked(home, judged, mixed, people, pushed)
        results["attacks"][attack] = found | {
            f"lift_{name}": outcome["exposure"] / max(clean["exposure"], 1 / clean["slates"])
            for name, outcome in found.items()
        }
        print(attack, results["attacks"][attack], file=sys.stderr, flush=True)
    results["corrupted"] = _corrupted_batch(home, events, count)
    strongest = max(found["lift_unguarded"] for found in results["attacks"].values())
    checks = [build_check("strongest attack: lift unguarded", strongest, ">=10")]
    for attack, found in results["attacks"].items():
        checks.append(build_check(f"{attack}: lift guarded", found["lift_guarded"], "<=1.5"))
        checks.append(build_check(f"{attack}: people's events held", found["guarded"]["people_held"], "<0.01"))
    corrupted = results["corrupted"]
    checks.append(build_check("corrupted batch undone after s", corrupted["undone_after_s"], "<=60"))
    checks.append(
        build_check("NDCG@10 after over before", corrupted["ndcg_after"] / corrupted["ndcg_before"], ">=0.99")
    )
    for check in checks:
        print(f"{check.name:58} {check.value:>9.4f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    print_result(results=results, config={"events": count, "quick": args.quick, "people": len(people)}, checks=checks)
    dist.destroy_process_group()


@contextmanager
def _loop(home: Home, recipe: Recipe) -> Iterator[Loop]:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(home.registry, Path(folder) / "registry")
        registry = Registry(Path(folder) / "registry")
        with EventLog(Path(folder) / "events.sqlite") as log:
            log.seed_history("training-history", registry.open_version(1).table("history"))
            torch.manual_seed(0)
            yield Loop(OnlineLearner(registry, log, recipe, home.cache, torch.device("cpu")), registry, log)


def _attacked(
    home: Home, recipe: Recipe, events: Sequence[Event], people: Sequence[str], pushed: str
) -> dict[str, float]:
    """Learn the events; return how the pushed item is exposed then, and who was held."""
    with _loop(home, recipe) as loop:
        loop.follow(events)
        held = loop.learner.intake.quarantine.find()
        exposure, slates = _exposure(loop.served(), loop.log, people, pushed)
        of_people = sum(not event.user_id.startswith("bot-") for event in events)
        bots_held = sum(entry.user_id.startswith("bot-") for entry in held)
        return {
            "exposure": exposure,
            "slates": float(slates),
            "people_held": (len(held) - bots_held) / of_people,
            "bots_held": bots_held / max(len(events) - of_people, 1),
        }


def _exposure(served: ServedModel, log: EventLog, people: Sequence[str], item_id: str) -> tuple[float, int]:
    """Return the share of slates that hold the item, of people who do not have it and of as many strangers' one."""
    shown = []
    for user_id in people:
        owned = log.seen_items(user_id)
        if item_id not in owned:
            history = log.user_state(user_id, served.max_history).history
            shown.append(item_id in served.recommend(user_id, history, SLATE, owned).item_ids)
    stranger = item_id in served.recommend("a stranger", (), SLATE).item_ids
    strangers = len(shown) // 4
    return (sum(shown) + strangers * stranger) / (len(shown) + strangers), len(shown) + strangers


def _unpopular_item(home: Home, people: Sequence[str], past: Sequence[str]) -> str:
    """Return an item of little popularity that is in few slates, though in some."""
    with _loop(home, load_recipe("movielens")) as loop:
        served, log = loop.served(), loop.log
        counts: dict[str, int] = {}
        for user_id in people:
            history = log.user_state(user_id, served.max_history).history
            for item_id in served.recommend(user_id, history, SLATE, log.seen_items(user_id)).item_ids:
                counts[item_id] = counts.get(item_id, 0) + 1
        popularity = {item_id: past.count(item_id) for item_id in counts}
        return min(counts, key=lambda item_id: (abs(counts[item_id] - 2), popularity[item_id]))


def _with_bots(events: Sequence[Event], attack: str, pushed: str, past: Sequence[str]) -> list[Event]:
    rng = random.Random(0)
    mixed: list[Event] = []
    bots = 0
    for event in events:
        mixed.append(event)
        while bots < BOT_SHARE * len(mixed):
            bots += 1
            if attack == "few fast accounts":
                user, item = bots % 5, pushed
            elif attack == "one account a push":
                user, item = bots, pushed
            else:
                user = bots // (DECOYS + 1)
                item = rng.choice(past) if bots % (DECOYS + 1) else pushed
            mixed.append(
                Event(user_id=f"bot-{user}", item_id=item, kind=event.kind, value=event.value, ts_us=event.ts_us)
            )
    return mixed


def _corrupted_batch(home: Home, events: Sequence[Event], count: int) -> dict[str, float]:
    """Learn, then learn flipped labels until that is undone; return when it was and the quality before and after."""
    with _loop(home, load_recipe("movielens")) as loop:
        loop.follow(events[: count // 2])
        rest = events[count : count + count // 2]
        before = _ndcg(loop.served(), loop.log, rest)
        good, served = loop.registry.current(), loop.served()
        began_s = time.monotonic()
        undone_s, posted = float("inf"), 0
        for start in range(count // 2, len(events), int(RATE * PUBLISH_S)):
            batch = [_flipped(event, served, loop.log) for event in events[start : start + int(RATE * PUBLISH_S)]]
            time.sleep(max(0.0, began_s + posted / RATE - time.monotonic()))
            loop.follow(batch)
            posted += len(batch)
            metrics = loop.registry.manifest(loop.registry.current()).metrics
            if "set_aside" in metrics or "rolled_back_to" in metrics:
                undone_s = time.monotonic() - began_s
                break
        after = _ndcg(loop.served(), loop.log, rest)
        reason = str(loop.registry.manifest(loop.registry.current()).metrics.get("set_aside", "none"))
        told = {"good": str(good), "now": str(loop.registry.current()), "reason": reason}
        print(told, file=sys.stderr, flush=True)
        held = len(loop.learner.intake.quarantine.find())
        return {"undone_after_s": undone_s, "posted": posted, "held": held, "ndcg_before": before, "ndcg_after": after}


def _flipped(event: Event, served: ServedModel, log: EventLog) -> Event:
    history = log.user_state(event.user_id, served.max_history).history
    ranked = served.recommend(event.user_id, history, served.item_count).item_ids
    return replace(
        event, item_id=ranked[-1 - len(log.seen_items(event.user_id)) % 100], event_id=f"flipped-{event.event_id}"
    )


def _ndcg(served: ServedModel, log: EventLog, events: Sequence[Event]) -> float:
    """Return NDCG@10 of each event's item after its user's history as the training data had it."""
    ranks = []
    for event in events:
        history = log.user_state(event.user_id, served.max_history, before_seq=1).history
        shown = served.recommend(event.user_id, history, SLATE, log.seen_items(event.user_id, before_seq=1)).item_ids
        ranks.append(shown.index(event.item_id) + 1 if event.item_id in shown else 0)
    return float(ndcg_at_k(np.array(ranks), SLATE).mean())


def _event(row: dict[str, Any]) -> Event:  # Any: a row's values
    return Event(**{name: value for name, value in row.items() if value is not None and name != "context"})


if __name__ == "__main__":
    main()
