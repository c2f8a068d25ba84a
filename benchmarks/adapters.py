"""Does an encoder that is tuned while it serves place new items better than one that stays as it was trained?

    python -m benchmarks.adapters --home HOME --data DIR [--updates 2] [--events 10000] [--quick]

In:  a home with a published version, and the dataset it was trained on.
Out: Hit@10 and NDCG@10 of the events after training, replayed in the order of time into two homes that learn online
alike; in one an adapter is proposed and, where it is better beyond chance, adopted at even distances. Told apart: items
that the version had met less than five times when it was trained, and all.
What bounds it: proposals learn from all that was before them and are judged by themselves; what is refused changes
nothing, and is counted. All else of the two arms is the same, seeds included.
"""

import shutil
import sys
import tempfile
import time
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
from training.evaluation.metrics import difference_interval, hit_at_k, ndcg_at_k
from training.evaluation.replay import split_for_replay
from training.models.served import ServedModel
from training.models.version import COUNT_ROWS
from training.online.adapter import propose
from training.online.learner import OnlineLearner
from training.stream import DataConfig

FEW = 5
"""Interactions below which an item counts as cold."""
ARMS = ("frozen", "tuned")

Json = dict[str, Any]  # Any: whatever JSON holds


def main() -> None:
    """Replay twice, and compare."""
    parser = build_parser(__doc__, repeats=1)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    limit, updates = (300, 1) if args.quick else (args.events, args.updates)
    recipe = load_recipe("movielens", args.overrides)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    ranks: dict[str, np.ndarray] = {}
    told: Json = {}
    is_cold_N, user_N = np.empty(0, bool), np.empty(0, np.int64)
    for arm in ARMS:
        with tempfile.TemporaryDirectory() as folder:
            home = Home(Path(folder) / "home").ensure()
            shutil.copytree(Home(args.home).registry, home.registry, dirs_exist_ok=True)
            found = _replay(home, args.data, recipe, limit, updates if arm == "tuned" else 0, Home(args.home).cache)
            ranks[arm], is_cold_N, user_N, told[arm] = found
    results: Json = {"arms": told}
    for name, chosen in (("cold", is_cold_N), ("all", np.ones(len(is_cold_N), bool))):
        if not chosen.any():
            continue
        better = difference_interval(
            hit_at_k(ranks["tuned"][chosen], 10), hit_at_k(ranks["frozen"][chosen], 10), seed=0, groups_N=user_N[chosen]
        )
        results[name] = {
            "events": int(chosen.sum()),
            "hit_at_10": {arm: float(hit_at_k(ranks[arm][chosen], 10).mean()) for arm in ARMS},
            "ndcg_at_10": {arm: float(ndcg_at_k(ranks[arm][chosen], 10).mean()) for arm in ARMS},
            "hit_gain": {"mean": better.mean, "ci95": [better.low, better.high]},
        }
    checks = [
        build_check(f"{name}: Hit@10, tuned over frozen", results[name]["hit_gain"]["mean"], bar)
        for name, bar in (("cold", ">0"), ("all", ">=0"))
        if name in results
    ]
    for check in checks:
        print(f"{check.name:52} {check.value:>8.4f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    config = {"events": limit, "updates": updates, "overrides": args.overrides, "quick": args.quick}
    print_result(results=results, config=config, checks=checks)
    dist.destroy_process_group()


def _replay(
    home: Home, data: Path, recipe: Recipe, limit: int, updates: int, cache: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Json]:
    """Return of each event its item's rank (0: beyond the candidates), whether the item was cold, its user; figures."""
    registry = Registry(home.registry)
    first = registry.current()
    begun_s = time.monotonic()
    _, live = split_for_replay(load_dataset(data), recipe.section(DataConfig), limit)
    events = [
        Event(**{name: value for name, value in row.items() if value is not None and name != "context"})
        for row in live.to_pylist()
    ]
    due = {len(events) * (n + 1) // (updates + 1) for n in range(updates)}
    ranks, cold, users, proposals = [], [], [], []
    with EventLog(home.log) as log:
        log.seed_history("training-history", registry.open_version(first.version).table("history"))
        learner = OnlineLearner(registry, log, recipe, cache, torch.device("cpu"))
        model = ServedModel.load(registry, first)
        counts = model.state.rows[COUNT_ROWS].numpy()
        for n, event in enumerate(events):
            if n in due:
                learner.publish()
                proposal = propose(registry, log, recipe, cache)
                adopted = learner.adopt(proposal)
                proposals.append({**proposal.metrics, "refused": proposal.refused, "adopted": adopted is not None})
                print(f"event {n}: {proposals[-1]}", file=sys.stderr, flush=True)
            if learner.registry.current() != model.state.ref:
                model = ServedModel.load(registry, registry.current(), model)
            if event.kind in INTERACTION_KINDS and model.knows(event.item_id):
                history = log.user_state(event.user_id, model.max_history).history
                owned = frozenset(log.seen_items(event.user_id)) - {event.item_id}
                slate = model.recommend(event.user_id, history, 10, owned).item_ids
                ranks.append(slate.index(event.item_id) + 1 if event.item_id in slate else 0)
                row = model.item_row.get(event.item_id)
                cold.append(row is None or row >= len(counts) or counts[row] < FEW)
                users.append(event.user_id)
            log.append([event])
            if fresh := (learner.read() if (n + 1) % 16 == 0 else []):
                learner.learn(fresh)
                learner.publish()
    figures = {"proposals": proposals, "took_s": time.monotonic() - begun_s, "version": str(registry.current())}
    return np.array(ranks), np.array(cold), np.unique(users, return_inverse=True)[1], figures


if __name__ == "__main__":
    main()
