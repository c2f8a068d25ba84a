"""How does the time of an answer grow with the catalogue, and what do the index and fewer bits cost?

    python -m benchmarks.catalogue [--home DIR --data DIR] [--quick]

In:  made-up versions of 1,000 to 1,000,000 items whose vectors lie about centres; perhaps a home and its dataset.
Out: the median of whole answers (state, candidates, ranking, slate; nothing kept of users) by size, in turns; how many
of the 100 best items the index finds; with a home, bytes and NDCG@10 of its tables in 32, 16 and 8 bits a number, over
the events that training did not see.
Bound by the encoder of histories for few items, by memory for many where every item is scored.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Check, build_check, build_parser, interleave, print_result
from cluster.config import load_recipe
from cluster.dataset import load_dataset
from cluster.events import Event
from cluster.log import EventLog, Interaction
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.quantized import quantize
from embeddings.tables import TablesConfig
from serving.recommender import Query, Recommender
from serving.refresh import Residents
from training.evaluation.metrics import ndcg_at_k
from training.evaluation.replay import split_for_replay
from training.models.served import ServedModel
from training.models.two_stage import ModelConfig, TwoStage
from training.models.version import COUNT_ROWS, ITEM_ROWS, TEXT_ROWS, USER_ROWS, VersionState, read_version
from training.policies import PolicyConfig
from training.stream import DataConfig

SIZES = (1_000, 10_000, 100_000, 1_000_000)
USERS, HISTORY, K, TEXT_DIM = 200, 50, 10, 32
RECALL_AT = 100
SPREAD = 0.5
"""Of vectors about their centre, in the centres' own spread."""


def main() -> None:
    """Build, ask, compare."""
    parser = build_parser(__doc__)
    parser.add_argument("--home", type=Path, help="of a version trained on --data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--events", type=int, default=5_000, help="later events by which tables are compared")
    args = parser.parse_args()
    sizes = SIZES[:3] if args.quick else SIZES
    torch.set_num_threads(1)
    models, results, checks = {}, {}, list[Check]()
    for size in sizes:
        began_s = time.perf_counter()
        models[size] = ServedModel.build(make_state(size), {})
        results[str(size)] = {"build_s": time.perf_counter() - began_s}
    with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder) / "events.db") as log:
        seed(log, min(sizes))
        turns = interleave({str(size): _asking(log, model, args.quick) for size, model in models.items()}, args.repeats)
    growth = turns.ratio(str(sizes[-1]), str(sizes[0]))
    checks.append(build_check(f"p50_{sizes[-1]}_over_{sizes[0]}_items", growth, "<=3"))
    for size, model in models.items():
        if model.index is not None:
            recall = measure_recall(model)
            results[str(size)] |= {
                "recall_at_100": recall,
                "probes": model.index.probes,
                "lists": model.index.lists.nlist,
            }
            checks.append(build_check(f"recall_at_100_of_{size}", recall, ">=0.98"))
    if args.home and args.data:
        tables = compare_tables(args.home, args.data, 200 if args.quick else args.events)
        results["tables"] = tables
        whole, small = tables["float32"], tables["int8"]
        checks.append(build_check("int8_times_smaller", whole["bytes"] / small["bytes"], ">=3.5"))
        checks.append(build_check("int8_ndcg_change", abs(small["ndcg_at_10"] / whole["ndcg_at_10"] - 1), "<=0.005"))
    for check in checks:
        print(f"{check.name:36} {check.value:>10,.3f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    config = {"users": USERS, "history": HISTORY, "k": K, "quick": args.quick}
    print_result(results={"p50_ms": turns.summary(), "of_size": results}, config=config, checks=checks)


def make_state(items: int) -> VersionState:
    """Return a version of random weights whose items lie about the square root of their number of centres."""
    recipe = load_recipe("movielens")
    dim = recipe.section(TablesConfig).dim
    generator = torch.Generator().manual_seed(items)
    torch.manual_seed(0)
    centre_CD = torch.randn(int(items**0.5), dim, generator=generator)
    row_ID = centre_CD[torch.randint(len(centre_CD), (items,), generator=generator)]
    row_ID += SPREAD * torch.randn(items, dim, generator=generator)
    return VersionState(
        ref=VersionRef(1),
        recipe=recipe,
        learned_seq=0,
        item_ids=[f"i{row}" for row in range(items)],
        item_texts=[""] * items,
        user_ids=[],
        rows={
            ITEM_ROWS: row_ID,
            USER_ROWS: torch.zeros(0, dim),
            TEXT_ROWS: torch.zeros(items, TEXT_DIM),
            COUNT_ROWS: torch.arange(items, 0, -1),
        },
        dense=TwoStage(recipe.section(ModelConfig), dim, TEXT_DIM).state_dict(),
        optimizer={},
    )


def seed(log: EventLog, items: int) -> None:
    """Give each user a history."""
    rng = np.random.default_rng(0)
    for user in range(USERS):
        log.append(
            [
                Event(event_id=f"{user} {place}", user_id=f"u{user}", item_id=f"i{row}", kind="click", ts_us=place)
                for place, row in enumerate(rng.choice(items, HISTORY, replace=False))
            ]
        )


def _asking(log: EventLog, model: ServedModel, quick: bool) -> Callable[[], float]:
    residents = Residents(live=model, pinned=None)
    recommender = Recommender(log, lambda: residents, PolicyConfig(), seed=0, candidates=100)

    def ask() -> float:
        took_ms = []
        for user in range(USERS // (4 if quick else 1)):
            began_s = time.perf_counter()
            recommender.recommend(Query(user_id=f"u{user}", k=K, arm="live"))
            took_ms.append(1e3 * (time.perf_counter() - began_s))
        return statistics.median(took_ms)

    return ask


def measure_recall(model: ServedModel) -> float:
    """Return the share of the best items that the index finds, for users who did not tune it."""
    assert model.index is not None, "the caller has looked"
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(USERS):
        rows = rng.choice(model.item_count, HISTORY, replace=False)
        history = [Interaction(model.item_ids[row], "click", None, 0, 0) for row in rows]
        with torch.inference_mode():
            user_D = model.user_vector("", history)
            found = model.index.search(user_D, model.item_ID, RECALL_AT, np.empty(0, np.int64))
            best = (model.item_ID @ user_D).topk(RECALL_AT).indices
        exact = found is None  # too few in the lists looked into: the model then scores every item
        shares.append(1.0 if exact else float(np.isin(best.numpy(), found.numpy()).mean()))
    return float(np.mean(shares))


def compare_tables(home: Path, data: Path, events: int) -> dict[str, dict[str, float]]:
    """Return bytes and NDCG@10 of the version's tables in each format, on the same later events."""
    state = read_version(Registry(home / "registry"), VersionRef(1))
    _, live = split_for_replay(load_dataset(data), load_recipe("movielens").section(DataConfig), events)
    history = Registry(home / "registry").open_version(1).table("history")
    found = {}
    for row_format in ("float32", "float16", "int8"):
        rows, size = dict(state.rows), 0
        for name in (ITEM_ROWS, USER_ROWS, TEXT_ROWS):
            rounded = quantize(rows[name], torch.zeros_like(rows[name]), row_format)
            rows[name] = rounded.applied_to(torch.zeros_like(rows[name]))
            size += rounded.value.nbytes + (rounded.scale_N.nbytes if rounded.scale_N is not None else 0)
        model, ranks = ServedModel.build(replace(state, rows=rows), {}), []
        with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder) / "events.db") as log:
            log.seed_history("training-history", history)
            for row in live.to_pylist():
                event = Event(**{name: value for name, value in row.items() if value is not None and name != "context"})
                past = log.user_state(event.user_id, model.max_history).history
                shown = model.recommend(event.user_id, past, 10, log.seen_items(event.user_id)).item_ids
                ranks.append(shown.index(event.item_id) + 1 if event.item_id in shown else 0)
                log.append([event])
        found[row_format] = {"bytes": size, "ndcg_at_10": float(ndcg_at_k(np.array(ranks), 10).mean())}
    return found


if __name__ == "__main__":
    main()
