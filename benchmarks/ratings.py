"""How well is it told who likes what? Ratings split at random 80/10/10, "liked" predicted for the last tenth.

    python -m benchmarks.ratings --data DIR [--splits 5] [--quick]

In:  a prepared dataset with ratings (MovieLens-100K for the figures of peers).
Out: AUC, log loss and normalised entropy of "liked" (four stars or more), RMSE and MAE of stars. The rating model is
trained as by `recloop train --recipe ratings`, on Ray Train; validation chooses the epoch, the test is seen once.
Peers on MovieLens-100K, RecBole 1.2.1: logistic regression .7768, DCNv2 .7775, AutoInt .7821, FM .7850, DeepFM .7855.
What bounds it: 10,000 ratings a test, so ± .004 of AUC from one split to another.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import build_check, build_parser, print_result
from cluster.config import load_recipe
from cluster.dataset import load_dataset
from cluster.home import Home
from cluster.ray_session import ray_session
from training.models.rating import RatingConfig
from training.trainer import train_ratings_on_ray

METRICS = ("auc", "log_loss", "ne", "rmse", "mae")
BEST_PEER_AUC = 0.7855
BAR = 0.795


def main() -> None:
    """Train on each split, and test."""
    parser = build_parser(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--splits", type=int, default=5, help="random splits, each trained once")
    args = parser.parse_args()
    dataset, splits = load_dataset(args.data), 1 if args.quick else args.splits
    quick = ["train.epochs=2"] if args.quick else []
    runs = []
    with ray_session("local"), tempfile.TemporaryDirectory() as folder:
        for split in range(splits):
            begun_s = time.monotonic()
            overrides = [f"ratings.split_seed={split}", f"train.seed={split}", "train.workers=1", *quick]
            recipe = load_recipe("ratings", overrides)
            run = train_ratings_on_ray(recipe, dataset, Home(Path(folder) / str(split)).ensure())
            runs.append(run.metrics | {"seconds": time.monotonic() - begun_s})
            told = ", ".join(f"{name} {run.metrics[f'test_{name}']:.4f}" for name in METRICS)
            print(f"split {split}: {told}  {runs[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    results = {}
    for name in METRICS:
        values = [run[f"test_{name}"] for run in runs]
        results[name] = {"mean": float(np.mean(values)), "splits": values}
    auc = results["auc"]["mean"]
    checks = [build_check("auc", auc, f">={BAR}"), build_check("auc over DeepFM's", auc, f">={BEST_PEER_AUC}")]
    for check in checks:
        print(f"{check.name:44} {check.value:>8.4f}  bar {check.bar:10} {'holds' if check.holds else 'MISSED'}")
    liked_from = load_recipe("ratings").section(RatingConfig).liked_from
    config = {"data": args.data.name, "splits": splits, "liked_from": liked_from, "quick": args.quick}
    print_result(results=results | {"seconds": [run["seconds"] for run in runs]}, config=config, checks=checks)


if __name__ == "__main__":
    main()
