"""Does text help where it should? Items with fewer than five interactions in training, with the encoder and without.

    python -m benchmarks.cold_items --data DIR [--seeds 1] [--quick]

In:  a prepared dataset whose items have text.
Out: NDCG@10 and Hit@10 of the two-stage model, trained on the first 90% of events with the text and with every text
left empty, on later interactions with items that training has hardly or never seen, and on all others.
What bounds it: without text an item that training has never seen cannot be told from any other such item.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.harness import build_check, build_parser, print_result
from cluster.config import load_recipe
from cluster.dataset import Dataset, load_dataset, write_dataset
from cluster.home import Home
from cluster.ray_session import ray_session
from cluster.registry import Registry
from embeddings.vocabulary import Vocabulary
from training.evaluation.metrics import difference_interval, hit_at_k, ndcg_at_k
from training.evaluation.system import Cases, VersionSystem
from training.inputs import is_training_event
from training.models.served import ServedModel
from training.models.version import COUNT_ROWS
from training.publish import publish_run
from training.stream import DataConfig, build_history
from training.trainer import train_on_ray

FEW = 5
ARMS = ("with text", "without text")

Json = dict[str, Any]  # Any: whatever JSON holds


def main() -> None:
    """Train both, and compare."""
    parser = build_parser(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    dataset = load_dataset(args.data)
    ranks: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    count_N = user_N = np.empty(0, np.int64)
    with ray_session("local"), tempfile.TemporaryDirectory() as folder:
        datasets = dict(zip(ARMS, (dataset, _without_text(dataset, Path(folder) / "data")), strict=True))
        for seed in range(1 if args.quick else args.seeds):
            epochs = 1 if args.quick else args.epochs
            overrides = [f"train.seed={seed}", f"train.epochs={epochs}", f"train.patience={epochs}", "train.workers=1"]
            for arm, data in datasets.items():
                home = Home(Path(folder) / f"{arm} {seed}").ensure()
                registry = Registry(home.registry)
                recipe = load_recipe("movielens", [*overrides, *args.overrides])
                ref = publish_run(train_on_ray(recipe, data, home), registry)
                found, count_N, user_N = _rank_later(ServedModel.load(registry, ref), data)
                ranks[arm].append(found)
                print(f"{arm}, seed {seed}: {_describe(found, count_N)}", file=sys.stderr, flush=True)
    results: Json = {}
    for name, chosen in (("few", count_N < FEW), ("others", count_N >= FEW)):
        gains = {
            arm: np.mean([ndcg_at_k(found[chosen], 10) for found in of_seeds], 0) for arm, of_seeds in ranks.items()
        }
        hits = {
            arm: float(np.mean([hit_at_k(found[chosen], 10) for found in of_seeds])) for arm, of_seeds in ranks.items()
        }
        better = difference_interval(gains[ARMS[0]], gains[ARMS[1]], seed=0, groups_N=user_N[chosen])
        results[name] = {
            "events": int(chosen.sum()),
            "ndcg_at_10": {arm: float(gain.mean()) for arm, gain in gains.items()},
            "hit_at_10": hits,
            "ndcg_gain": {"mean": better.mean, "ci95": [better.low, better.high]},
        }
    few = results["few"]["ndcg_at_10"]
    checks = [
        build_check("few interactions: ndcg_at_10 over without text", few[ARMS[0]] / max(few[ARMS[1]], 1e-9), ">=1.5")
    ]
    for check in checks:
        print(f"{check.name:52} {check.value:>8.3f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    config = {"data": args.data.name, "seeds": args.seeds, "epochs": args.epochs, "quick": args.quick}
    config["overrides"] = args.overrides
    print_result(results=results, config=config, checks=checks)


def _without_text(dataset: Dataset, path: Path) -> Dataset:
    """Write the dataset again with every item's text left empty."""
    items = dataset.items()
    place = items.schema.get_field_index("text")
    empty = pa.array([""] * len(items), pa.string())
    return write_dataset(
        path,
        name=dataset.info.name,
        events=dataset.events(),
        items=items.set_column(place, items.schema.field(place), empty),
        users=dataset.users(),
        label=dataset.info.label,
        sources=dataset.info.sources,
        rejected=dataset.info.rejected,
    )


def _rank_later(model: ServedModel, dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each later interaction but a user's first its rank, its item's count in training, and its user."""
    events = dataset.events()
    user_ids = events["user_id"].unique()
    users = Vocabulary(user_ids.to_pylist(), len(user_ids))
    history = build_history(events, Vocabulary(model.item_ids, model.item_count), users)
    later = ~is_training_event(events, model.state.recipe.section(DataConfig))[history.order]
    later[history.starts] = False
    targets = np.flatnonzero(later)
    ranks = VersionSystem(model).ranks(
        Cases(history=history, targets=targets, user_ids=user_ids, item_ids=model.item_ids)
    )
    return ranks, model.state.rows[COUNT_ROWS].numpy()[history.item_row[targets]], history.user_row[targets]


def _describe(ranks: np.ndarray, count_N: np.ndarray) -> str:
    told = (("few", ranks[count_N < FEW]), ("others", ranks[count_N >= FEW]))
    return ", ".join(f"{name} {ndcg_at_k(found, 10).mean():.4f} of {len(found):,}" for name, found in told)


if __name__ == "__main__":
    main()
