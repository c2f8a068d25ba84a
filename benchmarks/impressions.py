"""Does learning from what was shown order items by what people like, free of where and how often they were shown?

    python -m benchmarks.impressions --home DIR [--slates N] [--quick]

In:  a home with a version published on films. What people like is planted: the chance of a click on an item that is
looked at is sigmoid(1.5 · taste − 1), taste being a linear function of the item's vector with mean 0 and spread 1,
chosen to run against the version's own scores, so that what stands on top is not what is liked. Position p is looked at
with chance 1 / (1 + p). Slates of ten are drawn by the version and an ε-greedy policy; all arms see the same log.
Out: an arm, the expected clicks of ten items in the order that the learned version gives people's candidates, over
those of the best order; differences are paired by person.

    clicks      impressions are not learned from: what retrieval makes of clicks alone
    unweighted  one bias for all positions, no propensities
    position    a bias a position
    propensity  inverse propensities
    both        as served

What bounds it: clicks, some hundreds, to learn a hundred weights of.
"""

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import build_check, build_parser, print_result
from cluster.config import Recipe, load_recipe
from cluster.events import Event
from cluster.home import Home
from cluster.log import EventLog
from cluster.registry import Registry
from training.evaluation.metrics import mean_interval
from training.models.served import ServedModel
from training.online.learner import OnlineLearner
from training.policies import EpsilonGreedyPolicy

ARMS: Mapping[str, Sequence[str]] = {
    "clicks": ("impressions.enabled=false",),
    "unweighted": ("impressions.positions=1", "impressions.max_inverse_propensity=1"),
    "position": ("impressions.max_inverse_propensity=1",),
    "propensity": ("impressions.positions=1",),
    "both": (),
}
SLATE = 10
EPSILON = 0.2
CANDIDATES = 200
START_US = 1_700_000_000_000_000
GAP_US = 2_000_000
READ_AT_ONCE = 220
"""Events between two deltas, about twenty slates."""


def looked_at(position_K: np.ndarray) -> np.ndarray:
    """Return the chance that people look at a position."""
    return 1 / (1.0 + position_K)


class Taste:
    """What people like; the same for all, so that there is one thing to find."""

    def __init__(self, model: ServedModel, people: Sequence[str], log: EventLog, seed: int) -> None:
        rng = np.random.default_rng(seed)
        vector_ID = model.item_ID.numpy()
        mean_score_I = np.mean([self._scores(model, person, log) for person in people], axis=0)
        free_I = vector_ID @ rng.normal(size=vector_ID.shape[1])
        taste_I = _standardised(free_I) - 0.5 * _standardised(mean_score_I)
        self.chance_I = 1 / (1 + np.exp(-(1.5 * _standardised(taste_I) - 1.0)))

    @staticmethod
    def _scores(model: ServedModel, person: str, log: EventLog) -> np.ndarray:
        history = log.user_state(person, model.max_history).history
        return (model.item_ID @ model.user_vector(person, history)).numpy()


def main() -> None:
    """Learn one log five ways, a seed at a time."""
    parser = build_parser(__doc__, repeats=3)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--slates", type=int, default=3_000, help="%(default)s unless given")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    slates, repeats = (100, 1) if args.quick else (args.slates, args.repeats)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    per_seed = [_replay(Home(args.home), slates, seed, args.overrides) for seed in range(repeats)]
    shares = {arm: np.mean([found[arm] for found in per_seed], axis=0) for arm in ("before", *ARMS)}
    results = {"share_of_best": {arm: float(values.mean()) for arm, values in shares.items()}, "gains": {}}
    checks = []
    for better, worse in (
        ("both", "clicks"),
        ("both", "unweighted"),
        ("position", "unweighted"),
        ("both", "propensity"),
    ):
        gain = mean_interval(shares[better] - shares[worse], seed=0)
        results["gains"][f"{better} over {worse}"] = {"mean": gain.mean, "ci95_people": [gain.low, gain.high]}
        if worse != "propensity":
            checks.append(build_check(f"{better} over {worse}, lower end of 95%", gain.low, ">0"))
    for arm, share in results["share_of_best"].items():
        print(f"{arm:12} {share:.4f} of the clicks of the best order")
    for check in checks:
        print(f"{check.name:44} {check.value:>8.4f}  bar {check.bar:6} {'holds' if check.holds else 'MISSED'}")
    print_result(
        results=results,
        config={"slates": slates, "seeds": repeats, "overrides": args.overrides, "quick": args.quick},
        checks=checks,
    )
    dist.destroy_process_group()


def _replay(home: Home, slates: int, seed: int, extra: Sequence[str]) -> dict[str, np.ndarray]:
    """Return, an arm, each person's share of the best order's clicks."""
    found: dict[str, np.ndarray] = {}
    registry = Registry(home.registry)
    model = ServedModel.load(registry, registry.current())
    history = registry.open_version(registry.current().version).table("history")
    people = sorted(set(history["user_id"].to_pylist()))[seed::5]
    with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder) / "past.sqlite") as log:
        log.seed_history("training-history", history)
        taste = Taste(model, people, log, seed)
        events = _events(model, taste, people, log, slates, seed)
        found["before"] = _shares(model, model, taste, people, log)
        for arm, overrides in ARMS.items():
            recipe = load_recipe("movielens", [*overrides, *extra, "guard.enabled=false", "surprise.enabled=false"])
            learned = _learned(home, recipe, events)
            found[arm] = _shares(learned, model, taste, people, log)
            print(f"seed {seed} {arm}: {found[arm].mean():.4f}", file=sys.stderr, flush=True)
    return found


def _events(
    model: ServedModel, taste: Taste, people: Sequence[str], log: EventLog, slates: int, seed: int
) -> list[Event]:
    rng, policy = np.random.default_rng((seed, 1)), EpsilonGreedyPolicy(EPSILON, seed)
    events: list[Event] = []
    for number in range(slates):
        person, at_us = people[int(rng.integers(len(people)))], START_US + number * GAP_US
        candidates = model.recommend(person, log.user_state(person, model.max_history).history, CANDIDATES)
        slate = policy.slate(candidates.item_ids, candidates.scores, SLATE)
        chance_K = np.array([taste.chance_I[model.index_of[item_id]] for item_id in slate.item_ids])
        clicked_K = rng.random(SLATE) < chance_K * looked_at(np.arange(SLATE))
        for position, item_id in enumerate(slate.item_ids):
            common = {"user_id": person, "item_id": item_id, "request_id": f"r{number}", "position": position}
            propensity = slate.propensities[position]
            events.append(Event(kind="impression", ts_us=at_us, propensity=propensity, **common))
        events += [
            Event(
                kind="click", ts_us=at_us + 500_000 + position, user_id=person, item_id=item_id, request_id=f"r{number}"
            )
            for position, item_id in enumerate(slate.item_ids)
            if clicked_K[position]
        ]
    return events


def _learned(home: Home, recipe: Recipe, events: Sequence[Event]) -> ServedModel:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(home.registry, Path(folder) / "registry")
        registry = Registry(Path(folder) / "registry")
        with EventLog(Path(folder) / "events.sqlite") as log:
            log.seed_history("training-history", registry.open_version(registry.current().version).table("history"))
            torch.manual_seed(0)
            learner = OnlineLearner(registry, log, recipe, home.cache, torch.device("cpu"))
            for start in range(0, len(events), READ_AT_ONCE):
                log.append(events[start : start + READ_AT_ONCE])
                while fresh := learner.read():
                    learner.learn(fresh)
                learner.publish()
        return ServedModel.load(registry, registry.current())


def _shares(learned: ServedModel, first: ServedModel, taste: Taste, people: Sequence[str], log: EventLog) -> np.ndarray:
    """Return each person's expected clicks on the top ten in the learned order, over those of the best ten.

    Candidates and histories are those from before, so that the order alone is judged.
    """
    seen_K = looked_at(np.arange(SLATE))
    shares = []
    for person in people:
        history = log.user_state(person, first.max_history).history
        item_ids = first.recommend(person, history, CANDIDATES).item_ids
        index = torch.tensor([learned.index_of[item_id] for item_id in item_ids])
        with torch.inference_mode():
            order_K = learned.order(learned.user_vector(person, history), learned.item_ID[index])
        chance_K = np.array([taste.chance_I[first.index_of[item_id]] for item_id in item_ids])
        shown_K = chance_K[order_K.argsort(descending=True, stable=True).numpy()[:SLATE]]
        shares.append(float((shown_K * seen_K).sum() / (np.sort(chance_K)[::-1][:SLATE] * seen_K).sum()))
    return np.array(shares)


def _standardised(value_I: np.ndarray) -> np.ndarray:
    return (value_I - value_I.mean()) / value_I.std()


if __name__ == "__main__":
    main()
