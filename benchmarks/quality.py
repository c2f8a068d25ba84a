"""How good are the lists? Each user's last film held out, all films ranked: every system on one scoreboard.

    python -m benchmarks.quality --data DIR [--quick]

In:  a prepared dataset of interactions (MovieLens-100K for the figures of peers).
Out: NDCG@10 and Hit@10 of each system on validation and test, with 95% intervals over users; settings are chosen on
validation alone. RecBole 1.2.1's figures on MovieLens-100K are held beside those of the systems that it has too.
What bounds the comparison: 943 users, so an interval of ± .012 of Hit@10; which of several ratings in one second is a
user's last is anybody's choice, and ours is the order of the file.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Check, build_check, build_parser, print_result
from cluster.dataset import load_dataset
from training.baselines.autoencoder import Autoencoder
from training.baselines.factors import AlternatingLeastSquares, BayesianRanking
from training.baselines.interface import Recommender
from training.baselines.neighbours import ItemNeighbours, UserNeighbours
from training.baselines.popularity import Popularity
from training.evaluation.holdout import Holdout, leave_one_out
from training.evaluation.metrics import hit_at_k, mean_interval, ndcg_at_k

Json = dict[str, Any]  # Any: whatever JSON holds
Candidates = list[tuple[Json, Callable[[], Recommender]]]

PEER: dict[str, tuple[float, float]] = {
    "popularity": (0.0354, 0.0710),
    "item neighbours": (0.0628, 0.1145),
    "BPR": (0.0673, 0.1241),
    "EASE": (0.0706, 0.1347),
}
"""NDCG@10 and Hit@10 of RecBole 1.2.1 on MovieLens-100K, last item held out."""


def main() -> None:
    """Fit, choose on validation, test."""
    parser = build_parser(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    split = leave_one_out(load_dataset(args.data).events(["user_id", "item_id"]))
    results, checks = {}, []
    for name, candidates in _systems(quick=args.quick):
        begun_s = time.monotonic()
        settings, model = max(candidates, key=lambda candidate: _validated(split, candidate[1]))
        results[name] = _figures(split, model()) | {"settings": settings, "tried": len(candidates)}
        results[name]["seconds"] = time.monotonic() - begun_s
        print(_line(name, results[name]), file=sys.stderr, flush=True)
        checks += _checks(name, results[name]) if name in PEER else []
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


def _checks(name: str, figures: Json) -> list[Check]:
    """Return whether the figures are at least as good as the peer's, but for noise."""
    checks = []
    for metric, peer in zip(("ndcg_at_10", "hit_at_10"), PEER[name], strict=True):
        low, high = figures[f"test_{metric}"]["ci95"]
        checks.append(build_check(f"{name}: {metric}, upper end over RecBole's {peer}", high, f">={peer}"))
        checks.append(build_check(f"{name}: {metric}, lower end under RecBole's {peer}", low, f"<={peer}"))
    return checks


def _line(name: str, figures: Json) -> str:
    shown = {metric: figures[f"test_{metric}"] for metric in ("ndcg_at_10", "hit_at_10")}
    told = ", ".join(f"{m} {f['mean']:.4f} [{f['ci95'][0]:.4f}, {f['ci95'][1]:.4f}]" for m, f in shown.items())
    return f"{name:16} {told}  {figures['settings']}  {figures['seconds']:.0f} s"


if __name__ == "__main__":
    main()
