"""What will a household buy on its next visit? Whole baskets, repeats allowed: who buys again against who learns.

    python -m benchmarks.next_basket --data DIR [--home DIR] [--quick]

In:  a prepared dataset of purchases (Complete Journey); a home with a two-stage model trained on the first 90% of its
events, less the validation share at their end (`train.final_epochs=0`).
Out: NDCG@10 of each user's first basket after these 90%, every product ranked, with 95% intervals over users: what is
popular, what the user buys most often, with and without forgetting, TIFU-KNN; the learned ranker of baskets, with all
that is told of purchases and with what histories tell a version of it (`recloop train --recipe baskets`); the
two-stage model, alone and with the best classical system beside it. Settings and weights are chosen on first baskets
after the start of the validation share, from what was bought before it.
What bounds it: nine in ten products of a basket are repeats or bought by few.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import torch

from benchmarks.harness import build_check, build_parser, print_result
from cluster.config import load_recipe
from cluster.dataset import load_dataset
from cluster.events import KINDS
from cluster.home import Home
from cluster.log import Interaction
from cluster.registry import Registry
from embeddings.vocabulary import Vocabulary
from training.baselines.baskets import PersonalFrequency, TifuKnn
from training.baselines.config import SystemConfig
from training.baselines.interface import IntArray, Scores
from training.baskets.fit import ndcg_of_visits
from training.baskets.inputs import COLUMNS, read_kinds, read_purchases
from training.baskets.promotions import Promotions
from training.baskets.purchases import Purchases, Visits
from training.baskets.ranker import BasketConfig, BasketRanker
from training.evaluation.metrics import FloatArray, difference_interval, mean_interval
from training.models.served import ServedModel
from training.stream import DataConfig, History, build_history

K = 10
BATCH = 128
WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Of the two-stage model's scores beside the logarithm of a classical system's."""
FLOOR = 1e-6
"""Added to a classical score before its logarithm, as a share of the largest of the user."""

Json = dict[str, Any]  # Any: whatever JSON holds
Learned = tuple[Json, float, FloatArray]
"""Settings, the validated figure, and each user's on the test."""


class BasketSystem(Protocol):
    """Fitted on purchases, it scores every product for users."""

    def fit(self, bought: Purchases) -> Self:
        """Learn."""
        ...

    def scores(self, user_row_B: IntArray) -> Scores:
        """Score every product, [B, I]."""
        ...


class Popular:
    """What everyone buys."""

    def fit(self, bought: Purchases) -> Self:
        """Count."""
        self._count_I = np.bincount(bought.item_row, minlength=bought.items).astype(np.float32)
        return self

    def scores(self, user_row_B: IntArray) -> Scores:
        """Score every product, [B, I]."""
        return np.tile(self._count_I, (len(user_row_B), 1))


class Task:
    """Users' first baskets after a time, and what was bought before it."""

    def __init__(self, bought: Purchases, from_s: int, until_s: int) -> None:
        self.from_s = from_s
        self.visits = Visits.after(bought, from_s, until_s)
        self.known, self.users = self.visits.known, self.visits.users

    def ndcg(self, scores: Callable[[IntArray], Scores]) -> FloatArray:
        """Return NDCG@10 of each user."""
        return ndcg_of_visits(self.visits, scores)


def main() -> None:
    """Choose on validation, test."""
    parser = build_parser(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--home", type=Path, help="with a version trained on it; leaves the two-stage model out if absent"
    )
    args = parser.parse_args()
    data, dataset = DataConfig(), load_dataset(args.data)
    events = dataset.events(list(COLUMNS))
    user_ids, item_ids = events["user_id"].unique().to_pylist(), dataset.items()["item_id"].to_pylist()
    users, items = Vocabulary(user_ids, len(user_ids)), Vocabulary(item_ids, len(item_ids))
    bought, promotions = read_purchases(events, users, items, dataset, besides=True)
    cut = [int(len(events) * data.train_fraction * share) for share in (1 - data.validation_fraction, 1.0)]
    times = [int(events["ts_us"][position].as_py()) // 1_000_000 for position in cut]
    validation, test = Task(bought, times[0], times[1]), Task(bought, times[1], np.iinfo(np.int64).max)
    values: dict[str, FloatArray] = {}
    results: Json = {}
    best: tuple[float, str, Callable[[], BasketSystem]] = (-1.0, "", Popular)
    for name, candidates in _systems(quick=args.quick).items():
        tried = [
            (float(validation.ndcg(build().fit(validation.known).scores).mean()), s, build) for s, build in candidates
        ]
        found, settings, build = max(tried, key=lambda one: one[0])
        values[name] = test.ndcg(build().fit(test.known).scores)
        results[name] = {"settings": settings, "validation": found, "tried": len(tried)} | _interval(values[name])
        print(f"{name:36} {results[name]}", file=sys.stderr, flush=True)
        best = max(best, (found, name, build), key=lambda one: one[0])
    learned = _ranked(read_kinds(dataset.items()), promotions, validation, test, quick=args.quick)
    if args.home:
        learned |= _two_stage(args.home, events, users, items, validation, test, best[2])
    for name, (settings, found, value_U) in learned.items():
        values[name] = value_U
        results[name] = {"settings": settings, "validation": found} | _interval(value_U)
        print(f"{name:36} {results[name]}", file=sys.stderr, flush=True)
    ours = max(learned, key=lambda name: learned[name][1])
    better = difference_interval(values[ours], values[best[1]], seed=0)
    results["best of ours over best classical"] = {
        "ours": ours,
        "classical": best[1],
        "gain": better.mean,
        "ci95": [better.low, better.high],
    }
    ratio = float(values[ours].mean() / values[best[1]].mean())
    checks = [build_check("ndcg_at_10 over the best classical system's", ratio, ">=1.1")]
    for check in checks:
        print(f"{check.name:44} {check.value:>8.4f}  bar {check.bar:10} {'holds' if check.holds else 'MISSED'}")
    config = {"data": args.data.name, "baskets": len(test.users), "items": len(items), "quick": args.quick}
    print_result(results=results, config=config, checks=checks)


def _systems(*, quick: bool) -> dict[str, list[tuple[Json, Callable[[], BasketSystem]]]]:
    halves = (None,), (30.0, 60.0, 120.0, 240.0)
    tifu = [
        {"group_baskets": g, "within_decay": w, "group_decay": d, "neighbours": k, "own_share": o}
        for g, w, d, k, o in itertools.product((7, 15), (0.9, 0.95, 1.0), (0.7, 0.9), (100, 300), (0.7, 0.9))
    ]
    return {
        "popularity": [({}, Popular)],
        "personal frequency": [({}, PersonalFrequency)],
        "personal frequency, forgetting": [
            ({"half_life_days": h}, lambda h=h: PersonalFrequency(h)) for h in halves[1]
        ],
        "TIFU-KNN": [(given, lambda given=given: TifuKnn(**given)) for given in tifu[:: 12 if quick else 1]],
    }


def _ranked(
    kind_I: IntArray, promotions: dict[str, Promotions], validation: Task, test: Task, *, quick: bool
) -> dict[str, Learned]:
    """Return the learned ranker's figures: with all that is told of purchases, and with what a version is told."""
    config = BasketConfig(cuts=2, rounds=20) if quick else BasketConfig()
    newest = load_recipe("baskets").section(SystemConfig).max_history
    found: dict[str, Learned] = {}
    for name, is_served in (("learned ranker", False), ("learned ranker, as served", True)):
        values = []
        for task in (validation, test):
            known = replace(task.known, besides={}) if is_served else task.known
            ranker = BasketRanker(kind_I, config, promotions, newest=newest if is_served else None).fit(known)
            at_s_of = task.visits.at_s_of
            values.append(task.ndcg(lambda rows, ranker=ranker, at_s_of=at_s_of: ranker.scores(rows, at_s_of(rows))))
        found[name] = (asdict(config), float(values[0].mean()), values[1])
    return found


def _two_stage(
    home: Path,
    events: pa.Table,
    users: Vocabulary,
    items: Vocabulary,
    validation: Task,
    test: Task,
    classical: Callable[[], BasketSystem],
) -> dict[str, Learned]:
    """Return of the two-stage model, alone and beside a classical system: weight, validated figure, test values."""
    registry = Registry(Home(home).registry)
    model = ServedModel.load(registry, registry.current())
    history = build_history(events, items, users)
    place = torch.tensor([model.index_of[item_id] for item_id in items.ids])
    tables = {}
    for name, task in (("validation", validation), ("test", test)):
        tables[name] = (_user_vectors(model, history, users, items, task), classical().fit(task.known))

    def scorer(name: str, task: Task, weight: float | None) -> Callable[[IntArray], Scores]:
        user_UD, fitted = tables[name]

        def scores(user_row_B: IntArray) -> Scores:
            user_BD = user_UD[np.searchsorted(task.users, user_row_B)]
            learned_BI = (user_BD @ model.item_ID[place].T).numpy()
            if weight is None:
                return learned_BI
            own_BI = fitted.scores(user_row_B)
            own_BI = np.log(own_BI / own_BI.max(axis=1, keepdims=True) + FLOOR)
            return own_BI + weight * learned_BI

        return scores

    weight = max(WEIGHTS, key=lambda w: validation.ndcg(scorer("validation", validation, w)).mean())
    found: dict[str, Learned] = {}
    for name, chosen in (("two-stage", None), ("two-stage beside the best classical", weight)):
        validated = float(validation.ndcg(scorer("validation", validation, chosen)).mean())
        found[name] = ({"weight": chosen}, validated, test.ndcg(scorer("test", test, chosen)))
    return found


def _user_vectors(
    model: ServedModel, history: History, users: Vocabulary, items: Vocabulary, task: Task
) -> torch.Tensor:
    """Return the vector [B, D] of each of the task's users after what they bought before it."""
    start_of = dict(zip(history.user_row[history.starts].tolist(), history.starts.tolist(), strict=True))
    end_of = dict(zip(history.user_row[history.starts].tolist(), history.ends.tolist(), strict=True))
    vectors = []
    with torch.inference_mode():
        for user in task.users.tolist():
            start, end = start_of[user], end_of[user]
            known = start + int(np.searchsorted(history.ts_s[start:end], task.from_s))
            seen = range(max(start, known - model.max_history), known)
            past = [
                Interaction(
                    items.ids[history.item_row[n]],
                    KINDS[history.kind[n]],
                    None if np.isnan(history.value[n]) else float(history.value[n]),
                    int(history.ts_s[n]) * 1_000_000,
                    -1,
                )
                for n in seen
            ]
            vectors.append(model.user_vector(users.ids[user], past))
    return torch.stack(vectors)


def _interval(values_U: FloatArray) -> Json:
    interval = mean_interval(values_U, seed=0)
    return {"ndcg_at_10": interval.mean, "ci95": [interval.low, interval.high]}


if __name__ == "__main__":
    main()
