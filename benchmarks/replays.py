"""What does learning from the stream pay, by how often the weights served follow it: 1 s, 1 min, 1 h, never?

The newest events of a dataset come in time order. Each is first predicted by every arm, then learned by one online
learner; the arms differ in when they take up its weights: at each second, minute or hour of the events' own time, or
never. All see the same, newest user state, so that what is compared is the weights alone. An event counts by how many
of the items that its user does not have rank below it (AUC), and by NDCG@10; where users buy the same again, all items
rank (`--may-repeat NAME`). Items rank as they are served: the candidates in the ranker's order, then all others in that
of retrieval.

What bounds it: learning is one pass, in the order of time; events of one second are learned after all of them are
predicted. A seed draws the negatives and the rehearsed past; the version it starts from is the same for all.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from benchmarks.harness import Check, build_check, build_parser, print_result
from cluster.config import Recipe, load_recipe
from cluster.dataset import load_dataset
from cluster.events import INTERACTION_KINDS, Event
from cluster.home import Home
from cluster.log import EventLog, Interaction
from cluster.registry import Registry
from training.evaluation.metrics import Interval, mean_interval, ndcg_at_k
from training.evaluation.replay import split_for_replay
from training.models.served import ServedModel
from training.models.version import VersionState
from training.online.learner import OnlineLearner
from training.stream import DataConfig

ARMS: Mapping[str, int | None] = {"1 s": 1, "1 min": 60, "1 h": 3_600, "never": None}
"""Seconds of the events' time between two looks at what was learned."""
GAIN_BAR = 0.0037
"""AUC that following each second must add to never: Monolith's gain of online over batch training."""

Json = dict[str, Any]  # Any: whatever JSON holds


@dataclass(slots=True)
class Arm:
    """Weights that follow the learner at intervals."""

    every_s: int | None
    model: ServedModel
    slot: int = -1
    auc: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)

    def note(self, above: int, ranked: int) -> None:
        """Count an event whose item so many of those that ranked stood above."""
        self.ranks.append(above + 1)
        self.auc.append(1 - above / (ranked - 1))


@dataclass(slots=True)
class User:
    """What the shop knows of a user, up to the event at hand."""

    history: list[Interaction]
    owned: set[str]


def main() -> None:
    """Replay every home given, seed by seed."""
    parser = build_parser(__doc__, repeats=10)
    parser.add_argument("--home", action="append", required=True, help="NAME=DIR: a home with a published version")
    parser.add_argument("--data", action="append", required=True, help="NAME=DIR: the dataset it was trained on")
    parser.add_argument("--may-repeat", action="append", default=[], help="NAME of data whose users choose items again")
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--recipe", default="movielens")
    args = parser.parse_args()
    repeats, limit = (2, 300) if args.quick else (args.repeats, args.events)
    homes, datasets = (dict(entry.split("=", 1) for entry in given) for given in (args.home, args.data))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    results, checks = {}, []
    for name, folder in homes.items():
        recipes = [load_recipe(args.recipe, [*args.overrides, f"online.seed={seed}"]) for seed in range(repeats)]
        found = _replay_seeds(Home(Path(folder)), Path(datasets[name]), recipes, limit, name in args.may_repeat)
        results[name] = summarise(found)
        checks += _checks(name, results[name])
    config = {"seeds": repeats, "events": limit, "overrides": args.overrides, "quick": args.quick}
    print_result(results=results, config=config, checks=checks)
    dist.destroy_process_group()


def _replay_seeds(home: Home, data: Path, recipes: Sequence[Recipe], limit: int, may_repeat: bool) -> list[Json]:
    found: list[Json] = []
    for seed, recipe in enumerate(recipes):
        _, live = split_for_replay(load_dataset(data), recipe.section(DataConfig), limit)
        begun_s = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder) / "events.sqlite") as log:
            arms, users = replay(home, log, recipe, live, may_repeat=may_repeat)
        found.append({"arms": arms, "users": users})
        told = {arm: round(float(np.mean(values["auc"])), 5) for arm, values in arms.items()}
        print(f"{data.name} seed {seed}: AUC {json.dumps(told)} {time.monotonic() - begun_s:.0f} s", file=sys.stderr)
    return found


def replay(
    home: Home, log: EventLog, recipe: Recipe, live: pa.Table, *, may_repeat: bool
) -> tuple[dict[str, Json], list[str]]:
    """Return AUC and rank of every event an arm, and the events' users."""
    registry = Registry(home.registry)
    log.seed_history("training-history", registry.open_version(registry.current().version).table("history"))
    learner = OnlineLearner(registry, log, recipe, home.cache, torch.device("cpu"))
    first = _snapshot(learner)
    arms = {name: Arm(every_s, first) for name, every_s in ARMS.items()}
    users: dict[str, User] = {}
    asked: list[str] = []
    newest, learned = first, False
    for second, events in _by_second(live):
        if learned:
            newest, learned = _snapshot(learner), False
        for arm in arms.values():
            if arm.every_s is not None and arm.slot != second // arm.every_s:
                arm.slot, arm.model = second // arm.every_s, newest
        for event in events:
            user = users.get(event.user_id) or users.setdefault(event.user_id, _look_up(log, event.user_id))
            if event.kind in INTERACTION_KINDS and first.knows(event.item_id):
                asked.append(event.user_id)
                places: dict[int, tuple[int, int]] = {}
                for arm in arms.values():
                    if id(arm.model) not in places:  # arms that serve the same weights rank alike
                        places[id(arm.model)] = _place(arm.model, user, event, set() if may_repeat else user.owned)
                    arm.note(*places[id(arm.model)])
            user.history.append(Interaction(event.item_id, event.kind, event.value, event.ts_us, 0))
            user.owned.add(event.item_id)
        log.append(events)
        while fresh := learner.read():
            learner.learn(fresh)
            learned = True
    return {name: {"auc": np.array(arm.auc), "ranks": np.array(arm.ranks)} for name, arm in arms.items()}, asked


def _by_second(live: pa.Table) -> Iterator[tuple[int, list[Event]]]:
    """Yield the events of each second that has any."""
    second, group = -1, []
    for row in live.to_pylist():
        event = Event(**{name: value for name, value in row.items() if value is not None and name != "context"})
        if event.ts_us // 1_000_000 != second and group:
            yield second, group
            group = []
        second = event.ts_us // 1_000_000
        group.append(event)
    if group:
        yield second, group


def _look_up(log: EventLog, user_id: str) -> User:
    return User(list(log.user_state(user_id, 1_000).history), set(log.seen_items(user_id)))


def _place(model: ServedModel, user: User, event: Event, owned: set[str]) -> tuple[int, int]:
    """Return how many items rank above the event's, and how many ranked."""
    exclude = frozenset(owned - {event.item_id})
    ranked = len(model.item_ids) - sum(model.knows(item_id) for item_id in exclude)
    known = [entry for entry in user.history if model.knows(entry.item_id)][-model.max_history :]
    first = model.recommend(
        event.user_id, user.history, ranked if not known else model.dense.config.candidates, exclude
    ).item_ids
    if event.item_id in first:
        return first.index(event.item_id), ranked
    score_I = model.item_ID @ model.user_vector(event.user_id, known)
    above_I = score_I > score_I[model.index_of[event.item_id]]
    above_I[[model.index_of[item_id] for item_id in exclude if model.knows(item_id)]] = False
    return max(int(above_I.sum()), len(first)), ranked


def _snapshot(learner: OnlineLearner) -> ServedModel:
    """Return the learner's present weights as replicas would serve them."""
    rows, dense, _ = learner.live.tensors()
    state = VersionState(
        ref=learner.ref,
        recipe=learner.recipe,
        learned_seq=learner.applied_seq,
        item_ids=list(learner.live.items.ids),
        item_texts=list(learner.live.item_texts),
        user_ids=list(learner.live.users.ids),
        rows=rows,
        dense=dense,
        optimizer={},
    )
    return ServedModel.build(state, {})


def summarise(found: Sequence[Json]) -> Json:
    """Return means over seeds, and paired differences: over seeds, and over users of the mean over seeds."""
    users = np.unique(found[0]["users"], return_inverse=True)[1]
    auc = {arm: np.stack([seed["arms"][arm]["auc"] for seed in found]) for arm in ARMS}
    ndcg = {arm: np.stack([ndcg_at_k(seed["arms"][arm]["ranks"], 10) for seed in found]) for arm in ARMS}
    summary: Json = {"events": int(auc["never"].shape[1]), "seeds": len(found)}
    for metric, values in (("auc", auc), ("ndcg_at_10", ndcg)):
        summary[metric] = {arm: float(of_arm.mean()) for arm, of_arm in values.items()}
        summary[f"{metric}_gain"] = {}
        for better, worse in zip(list(ARMS), [*list(ARMS)[1:], "never"], strict=True):
            if better == worse:
                continue
            summary[f"{metric}_gain"][f"{better} over {worse}"] = _difference(values[better] - values[worse], users)
        summary[f"{metric}_gain"]["1 s over never"] = _difference(values["1 s"] - values["never"], users)
    return summary


def _difference(gain_SN: np.ndarray, users_N: np.ndarray) -> Json:
    """Return the mean gain with its interval over users, and each seed's."""
    interval: Interval = mean_interval(gain_SN.mean(0), groups_N=users_N, seed=0)
    return {"mean": interval.mean, "ci95_users": [interval.low, interval.high], "seeds": gain_SN.mean(1).tolist()}


def _checks(name: str, summary: Json) -> list[Check]:
    checks = [build_check(f"{name}: AUC, {pair}", gain["mean"], ">=0") for pair, gain in summary["auc_gain"].items()]
    gain = summary["auc_gain"]["1 s over never"]
    checks.append(build_check(f"{name}: AUC gain of 1 s over never", gain["mean"], f">={GAIN_BAR}"))
    checks.append(
        build_check(
            f"{name}: NDCG@10, live over state, lower end of 95%",
            summary["ndcg_at_10_gain"]["1 s over never"]["ci95_users"][0],
            ">0",
        )
    )
    for check in checks:
        print(f"{check.name:60} {check.value:>10.5f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    return checks


if __name__ == "__main__":
    main()
