"""How many bytes does a replica read for a second of learning, and what does rounding them cost in quality?

    python -m benchmarks.deltas [--quick] [--home DIR --data DIR]

In:  tables of 10⁶ users and 10⁶ items at dimension 64, and Zipf traffic of 1,000 events in one second, learned in the
online trainer's steps, with negatives and without the past; for quality a home with a version published on MovieLens.
Out: bytes of the delta's files that replicas read, and that only the trainer reads, over the tables' bytes in float32;
NDCG@10 on MovieLens' next events of replicas fed rounded deltas, against replicas fed exact ones by the same trainer.
Bound by the rows that a second touches: its items and users, what their histories hold, and the negatives drawn.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import build_check, build_parser, print_result
from cluster.config import Recipe, load_recipe
from cluster.dataset import load_dataset
from cluster.events import KIND_INDEX, Event, events_table
from cluster.home import Home
from cluster.log import EventLog
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.batch import PAD, Sequences, build_batch
from embeddings.quantized import FORMATS
from embeddings.tables import TablesConfig
from training.checkpoint import ADAM_FIELDS
from training.evaluation.metrics import ndcg_at_k
from training.evaluation.replay import split_for_replay
from training.models.ensemble import build_two_stage
from training.models.served import ServedModel
from training.models.two_stage import ModelConfig
from training.models.version import (
    COUNT_ROWS,
    ITEM_ROWS,
    TEXT_ROWS,
    USER_ROWS,
    VersionState,
    apply_delta,
    read_version,
    write_delta,
    write_version,
)
from training.online.learner import OnlineConfig, OnlineLearner
from training.online.model import LiveModel
from training.online.sent import SentRows
from training.stream import DataConfig, NegativeSampler

TEXT_DIM = 384
EVENTS_A_SECOND = 1_000
HISTORY = 20
"""Interactions that a user has before."""
PROBE_EVERY = 4


def main() -> None:
    """Measure bytes, then quality."""
    parser = build_parser(__doc__)
    parser.add_argument("--home", type=Path, help="with a version published on --data; leaves quality out if not given")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--events", type=int, default=2_000, help="of the replay, %(default)s unless given")
    args = parser.parse_args()
    torch.set_num_threads(2)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    rows = 20_000 if args.quick else 1_000_000
    recipe = load_recipe("movielens", ["tables.spare_rows=0"])
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(folder))
        publish_random(registry, recipe, rows)
        sizes = {row_format: _delta_bytes(registry, recipe, row_format) for row_format in FORMATS}
    table_bytes = 2 * rows * recipe.section(TablesConfig).dim * 4
    shares = {row_format: size["replica"] / table_bytes for row_format, size in sizes.items()}
    checks = [
        build_check("tables_over_float32_delta", 1 / shares["float32"], ">=17"),
        build_check("tables_over_int8_delta", 1 / shares["int8"], ">=60"),
    ]
    results: dict[str, Any] = {"table_bytes": table_bytes, "delta_bytes": sizes, "share": shares}  # Any: JSON
    if args.home and args.data:
        results["ndcg_at_10"] = _quality(Home(args.home), args.data, 200 if args.quick else args.events)
        exact = results["ndcg_at_10"]["float32"]
        for row_format in ("float16", "int8"):
            change = abs(results["ndcg_at_10"][row_format] / exact - 1)
            checks.append(build_check(f"ndcg_change_{row_format}", change, "<=0.002"))
    for check in checks:
        print(f"{check.name:28} {check.value:>12,.4f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    print_result(results=results, config={"rows": rows, "quick": args.quick, "events": args.events}, checks=checks)
    dist.destroy_process_group()


def publish_random(registry: Registry, recipe: Recipe, rows: int) -> None:
    """Publish a version of random weights with so many items and users."""
    dim = recipe.section(TablesConfig).dim
    generator = torch.Generator().manual_seed(0)
    dense = build_two_stage(recipe.section(ModelConfig), dim, TEXT_DIM)
    moments = {
        f"{name}.{field}": torch.zeros(()) if field == "step" else torch.zeros_like(parameter)
        for name, parameter in dense.named_parameters()
        for field in ADAM_FIELDS
    }
    ids = [str(row) for row in range(rows)]
    state = VersionState(
        ref=VersionRef(1),
        recipe=recipe,
        learned_seq=0,
        item_ids=ids,
        item_texts=[""] * rows,
        user_ids=ids,
        rows={
            ITEM_ROWS: 0.3 * torch.randn(rows, dim, generator=generator),
            USER_ROWS: 0.3 * torch.randn(rows, dim, generator=generator),
            TEXT_ROWS: torch.zeros(rows, TEXT_DIM, dtype=torch.float32),
            COUNT_ROWS: torch.ones(rows, dtype=torch.int64),
        },
        dense=dense.state_dict(),
        optimizer={"item.momentum": torch.ones(rows), "user.momentum": torch.ones(rows), **moments},
    )
    draft = registry.draft_version()
    write_version(draft, state, events_table([]))
    draft.publish(offset=0, metrics={})


def _delta_bytes(registry: Registry, recipe: Recipe, row_format: str) -> dict[str, int]:
    """Learn a second's events and return the sizes of what is written for them."""
    online, data = recipe.section(OnlineConfig), recipe.section(DataConfig)
    state = read_version(registry, VersionRef(1), with_optimizer=True)
    live = LiveModel(state, online.step(), online.table_rate, torch.device("cpu"), 0, SentRows(row_format, 0.0))
    rng = np.random.default_rng(0)
    sampler = NegativeSampler(live.counts, data)
    rows = len(state.item_ids)
    learned = 0
    while learned < EVENTS_A_SECOND:
        events = min(online.max_events, EVENTS_A_SECOND - learned)
        sequences = _zipf_sequences(rng, rows, events)
        live.learn(
            build_batch(sequences, sampler.draw(rng), live.text, sampler.log_q),
            events / online.batch_targets,
        )
        for user, item in zip(sequences.user_row_B, sequences.target_row_BL[:, -1], strict=True):
            live.count(state.item_ids[item], state.user_ids[user])
        learned += events
    draft = registry.draft_delta(1)
    write_delta(draft, live.change())
    manifest = registry.deltas(1)
    first = manifest[-1].last_seq + 1 if manifest else 1
    ref = draft.publish(first_seq=first, last_seq=first + EVENTS_A_SECOND - 1)
    files = registry.manifest(ref).files
    own = files["optimizer.safetensors"].size_bytes
    whole = sum(entry.size_bytes for entry in files.values())
    rows_bytes, dense_bytes = files["rows.safetensors"].size_bytes, files["dense.safetensors"].size_bytes
    return {"replica": whole - own, "rows": rows_bytes, "dense": dense_bytes, "trainer_only": own}


def _zipf_sequences(rng: np.random.Generator, rows: int, events: int) -> Sequences:
    """Return one new interaction of each of so many users, after a history; everything drawn by Zipf's law."""

    def draw(*shape: int) -> np.ndarray:
        return np.minimum((rows + 1.0) ** rng.random(shape), rows).astype(np.int64) - 1

    shape = (events, HISTORY)
    targets = np.full(shape, PAD, np.int64)
    targets[:, -1] = draw(events)
    return Sequences(
        user_row_B=draw(events),
        item_row_BL=draw(*shape),
        kind_BL=np.full(shape, KIND_INDEX["click"], np.int64),
        value_BL=np.full(shape, np.nan, np.float32),
        ts_BL=np.zeros(shape, np.int64),
        target_row_BL=targets,
        target_rating_BL=np.full(shape, np.nan, np.float32),
        weight_BL=np.ones(shape, np.float32),
    )


def _quality(home: Home, data: Path, events: int) -> dict[str, float]:
    """Replay MovieLens' next events; return NDCG@10 of replicas by the format of the deltas that they are fed.

    One trainer a format, all with the same seed and the same events, so that what differs is the rounding alone.
    """
    return {row_format: _replayed_ndcg(home, data, events, row_format) for row_format in FORMATS}


def _replayed_ndcg(home: Home, data: Path, events: int, row_format: str) -> float:
    recipe = load_recipe("movielens", [f"online.delta_rows={row_format}", "online.compact_every=1000000"])
    _, live = split_for_replay(load_dataset(data), recipe.section(DataConfig), events)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(home.registry, Path(folder) / "registry")
        registry = Registry(Path(folder) / "registry")
        with EventLog(Path(folder) / "events.sqlite") as log:
            log.seed_history("training-history", registry.open_version(1).table("history"))
            learner = OnlineLearner(registry, log, recipe, home.cache, torch.device("cpu"))
            state = read_version(registry, VersionRef(1))
            served, ranks = ServedModel.build(state, {}), []
            for number, row in enumerate(live.to_pylist()):
                event = Event(**{name: value for name, value in row.items() if value is not None and name != "context"})
                past = log.user_state(event.user_id, served.max_history).history
                shown = served.recommend(event.user_id, past, 10, log.seen_items(event.user_id)).item_ids
                ranks.append(shown.index(event.item_id) + 1 if event.item_id in shown else 0)
                log.append([event])
                if number % PROBE_EVERY == PROBE_EVERY - 1:
                    learner.learn(learner.read())
                    ref = learner.publish()
                    assert ref is not None, "something was learned"
                    state = apply_delta(state, registry.open_delta(ref.version, ref.delta))
                    served = ServedModel.build(state, {})
    return float(ndcg_at_k(ranks, 10).mean())


if __name__ == "__main__":
    main()
