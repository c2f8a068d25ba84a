"""How good are the lists? Each user's last film held out, all films ranked: every system on one scoreboard.

    python -m benchmarks.quality --data DIR [--seeds 5] [--quick]
    python -m benchmarks.quality --data DIR --recipe sasrec --recipe hstu --seeds 1 --without-classical

In:  a prepared dataset of interactions (MovieLens-100K for the figures of peers).
Out: NDCG@10 and Hit@10 of each system on validation and test, with 95% intervals over users; settings are chosen on
validation alone, and so is the best epoch of the two-stage model, which is trained by `recloop train`'s own function on
Ray Train, published, and ranked as it would be served, once a seed. RecBole 1.2.1's figures on MovieLens-100K are held
beside those of the systems that it has too.
What bounds the comparison: 943 users, so an interval of ± .012 of Hit@10; which of several ratings in one second is a
user's last is anybody's choice, and ours is the order of the file.
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Check, build_check, build_parser, print_result
from cluster.config import load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.home import Home
from cluster.ray_session import ray_session
from cluster.registry import Registry
from embeddings.vocabulary import Vocabulary
from training.baselines.autoencoder import Autoencoder
from training.baselines.factors import AlternatingLeastSquares, BayesianRanking
from training.baselines.interface import Recommender
from training.baselines.neighbours import ItemNeighbours, UserNeighbours
from training.baselines.popularity import Popularity
from training.evaluation.holdout import Holdout, leave_one_out
from training.evaluation.metrics import hit_at_k, mean_interval, ndcg_at_k
from training.evaluation.system import Cases, VersionSystem
from training.models.served import ServedModel
from training.publish import publish_run
from training.stream import build_history
from training.trainer import train_on_ray

Json = dict[str, Any]  # Any: whatever JSON holds
Candidates = list[tuple[Json, Callable[[], Recommender]]]

PEER: dict[str, tuple[float, float]] = {
    "popularity": (0.0354, 0.0710),
    "item neighbours": (0.0628, 0.1145),
    "BPR": (0.0673, 0.1241),
    "EASE": (0.0706, 0.1347),
}
"""NDCG@10 and Hit@10 of RecBole 1.2.1 on MovieLens-100K, last item held out."""
DEMO = "movielens"
"""The recipe that the bars are of."""
PEERS_DATA = "ml-100k"
"""The dataset that these figures, and the bar of the two-stage model, are of."""
TWO_STAGE = (
    "data.split=leave_one_out",
    "train.workers=1",
    "train.final_epochs=0",
    "train.epochs=50",
    "train.patience=15",
)
"""The recipe's settings, but for the split, and for more epochs than the demo has patience for."""


def main() -> None:
    """Fit, choose on validation, test."""
    parser = build_parser(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", action="append", help="of a two-stage model; movielens where none is given")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of the two-stage model; 0 leaves it out")
    parser.add_argument("--without-classical", action="store_true", help="the two-stage models alone")
    args = parser.parse_args()
    dataset = load_dataset(args.data)
    split = leave_one_out(dataset.events(["user_id", "item_id"]))
    results, checks = {}, []
    for name, candidates in [] if args.without_classical else _systems(quick=args.quick):
        begun_s = time.monotonic()
        settings, model = max(candidates, key=lambda candidate: _validated(split, candidate[1]))
        results[name] = _figures(split, model()) | {"settings": settings, "tried": len(candidates)}
        results[name]["seconds"] = time.monotonic() - begun_s
        print(_line(name, results[name]), file=sys.stderr, flush=True)
        checks += _checks(name, results[name]) if name in PEER and dataset.info.name == PEERS_DATA else []
    best = max((figures["test_ndcg_at_10"]["mean"] for figures in results.values()), default=None)
    seeds = min(args.seeds, 1) if args.quick else args.seeds
    overrides = [*TWO_STAGE, *(("train.epochs=2",) if args.quick else ()), *args.overrides]
    for recipe in (args.recipe or [DEMO]) if seeds else []:
        name = ", ".join(["two-stage", *([recipe] if recipe != DEMO else []), *args.overrides])
        results[name] = _two_stage(dataset, recipe, overrides, seeds)
        print(_line(name, results[name]), file=sys.stderr, flush=True)
        ndcg = results[name]["test_ndcg_at_10"]["mean"]
        if recipe == DEMO and dataset.info.name == PEERS_DATA:
            checks.append(build_check(f"{name}: ndcg_at_10", ndcg, ">=0.115"))
        if recipe == DEMO and best is not None:
            checks.append(build_check(f"{name}: ndcg_at_10 over the best classical system's", ndcg / best, ">=1.1"))
    for check in checks:
        print(f"{check.name:44} {check.value:>8.4f}  bar {check.bar:10} {'holds' if check.holds else 'MISSED'}")
    config = {"data": args.data.name, "users": len(split.user_ids), "items": len(split.item_ids), "quick": args.quick}
    print_result(results=results, config=config, checks=checks)


def _systems(*, quick: bool) -> Iterator[tuple[str, Candidates]]:
    yield "popularity", [({}, Popularity)]
    for name, system in (("item neighbours", ItemNeighbours), ("user neighbours", UserNeighbours)):
        grid = itertools.product((20, 50, 100, 200), ("cosine", "pearson"), (0.0, 5.0, 20.0))
        yield (
            name,
            _grid(system, [{"neighbours": k, "similarity": s, "shrink": h} for k, s, h in grid][:: 6 if quick else 1]),
        )
    yield "EASE", _grid(Autoencoder, [{"l2": l2} for l2 in (100.0, 200.0, 250.0, 350.0, 500.0, 750.0)])
    if quick:
        return
    grid = itertools.product((32, 64), (0.05, 1.0, 5.0), (2.0, 10.0))
    yield "ALS", _grid(AlternatingLeastSquares, [{"factors": f, "regularization": r, "alpha": a} for f, r, a in grid])
    grid = itertools.product((32, 64), (0.01, 0.03, 0.1))
    yield "BPR", _grid(BayesianRanking, [{"factors": f, "regularization": r} for f, r in grid])


def _grid(system: Callable[..., Recommender], settings: list[Json]) -> Candidates:
    return [(given, lambda given=given: system(**given)) for given in settings]


def _validated(split: Holdout, build: Callable[[], Recommender]) -> float:
    ranks = split.ranks(build().fit(split.fitted_UI), validation=True)
    return float(ndcg_at_k(ranks[ranks > 0], 10).mean())


def _figures(split: Holdout, model: Recommender) -> Json:
    model.fit(split.fitted_UI)
    figures: Json = {}
    for part, ranks in (("validation", split.ranks(model, validation=True)), ("test", split.ranks(model))):
        ranked = ranks[ranks > 0]
        for metric, values in (("ndcg_at_10", ndcg_at_k(ranked, 10)), ("hit_at_10", hit_at_k(ranked, 10))):
            interval = mean_interval(values, seed=0)
            figures[f"{part}_{metric}"] = {"mean": interval.mean, "ci95": [interval.low, interval.high]}
    return figures


def _two_stage(dataset: Dataset, recipe_name: str, overrides: list[str], seeds: int) -> Json:
    """Train, publish and rank once a seed; figures are means over seeds, intervals over users' means."""
    begun_s, ranks = time.monotonic(), {"validation": [], "test": []}
    with ray_session("local"), tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            recipe = load_recipe(recipe_name, [*overrides, f"train.seed={seed}"])
            home = Home(Path(folder) / str(seed)).ensure()
            registry = Registry(home.registry)
            ref = publish_run(train_on_ray(recipe, dataset, home), registry)
            for part, found in _rank_last(ServedModel.load(registry, ref), dataset).items():
                ranks[part].append(found)
            print(
                f"{recipe_name}, seed {seed}: {ndcg_at_k(ranks['test'][-1], 10).mean():.4f}",
                file=sys.stderr,
                flush=True,
            )
    figures: Json = {"settings": {"recipe": recipe_name, "overrides": overrides}, "seeds": seeds}
    for part, of_seeds in ranks.items():
        for metric, value_of in (("ndcg_at_10", ndcg_at_k), ("hit_at_10", hit_at_k)):
            values_SU = np.stack([value_of(found, 10) for found in of_seeds])
            interval = mean_interval(values_SU.mean(0), seed=0)
            figures[f"{part}_{metric}"] = {"mean": interval.mean, "ci95": [interval.low, interval.high]}
            figures[f"{part}_{metric}"]["seeds"] = values_SU.mean(1).tolist()
    return figures | {"seconds": time.monotonic() - begun_s}


def _rank_last(model: ServedModel, dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the ranks of each user's last but one and last interaction; users with too few are left out."""
    events = dataset.events()
    user_ids = events["user_id"].unique()
    users = Vocabulary(user_ids.to_pylist(), len(user_ids))
    history = build_history(events, Vocabulary(model.item_ids, model.item_count), users)
    sizes = history.ends - history.starts
    targets = {"validation": (history.ends - 2)[sizes > 2], "test": (history.ends - 1)[sizes > 1]}
    system = VersionSystem(model)
    return {
        part: system.ranks(Cases(history=history, targets=found, user_ids=user_ids, item_ids=model.item_ids))
        for part, found in targets.items()
    }


def _checks(name: str, figures: Json) -> list[Check]:
    """Return whether the figures are at least as good as the peer's, but for noise."""
    checks = []
    for metric, peer in zip(("ndcg_at_10", "hit_at_10"), PEER[name], strict=True):
        low, high = figures[f"test_{metric}"]["ci95"]
        checks.append(build_check(f"{name}: {metric}, upper end over RecBole's {peer}", high, f">={peer}"))
        checks.append(build_check(f"{name}: {metric}, lower end under RecBole's {peer}", low, f"<={peer}"))
    return checks


def _line(name: str, figures: Json) -> str:
    told_of = f"{figures['settings']}  {figures['seconds']:.0f} s"
    shown = {metric: figures[f"test_{metric}"] for metric in ("ndcg_at_10", "hit_at_10")}
    told = ", ".join(f"{m} {f['mean']:.4f} [{f['ci95'][0]:.4f}, {f['ci95'][1]:.4f}]" for m, f in shown.items())
    return f"{name:16} {told}  {told_of}"


if __name__ == "__main__":
    main()
