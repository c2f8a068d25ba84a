"""What does one swap cost a replica that serves a million items?

    python -m benchmarks.swap_cost [--quick]

In:  random tables of 10⁶ users and 10⁶ items at dimension 64, text vectors of 384; a second version of the same
catalogue with other tables and dense weights; a delta of 10,000 rows of each and all dense weights.
Out: of swapping in the version and the delta: time, processor time of the thread, and the longest that another thread
had to wait for the interpreter's lock; interleaved with the same without a resident version to share with.
Bound by one product of all text vectors with the projection, which every change of dense weights needs.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.deltas import TEXT_DIM
from benchmarks.harness import build_check, build_parser, interleave, print_result
from cluster.config import Recipe, load_recipe
from cluster.events import events_table
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.quantized import QuantizedRows
from embeddings.tables import TablesConfig
from training.models.ensemble import build_two_stage
from training.models.served import ServedModel
from training.models.two_stage import ModelConfig
from training.models.version import (
    COUNT_ROWS,
    ITEM_ROWS,
    TEXT_ROWS,
    USER_ROWS,
    Change,
    VersionState,
    apply_delta,
    write_delta,
    write_version,
)

CHANGED_ROWS = 10_000
TICK_S = 0.0005


class LockWait:
    """The longest that a thread which only wants to run for a moment was kept waiting, while the block runs."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "LockWait":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _tick(self) -> None:
        while not self._over.is_set():
            began_s = time.perf_counter()
            time.sleep(TICK_S)
            self.longest_s = max(self.longest_s, time.perf_counter() - began_s - TICK_S)


def main() -> None:
    """Publish, swap, compare."""
    args = build_parser(__doc__, repeats=3).parse_args()
    rows = 20_000 if args.quick else 1_000_000
    torch.set_num_threads(1)  # as a replica has it
    costs: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(folder))
        _publish(registry, rows)
        live = ServedModel.load(registry, VersionRef(1))
        swaps: dict[str, Callable[[], ServedModel]] = {
            "version": lambda: ServedModel.load(registry, VersionRef(2), live),
            "version_unshared": lambda: ServedModel.load(registry, VersionRef(2)),
            "delta": lambda: live.with_delta(registry.open_delta(1, 1)),
            "delta_unshared": lambda: ServedModel.build(apply_delta(live.state, registry.open_delta(1, 1)), {}),
        }

        def cost(name: str) -> float:
            with LockWait() as waited:
                began_s, cpu_s = time.perf_counter(), time.thread_time()
                swaps[name]()
                costs.setdefault(name, []).append(
                    (time.perf_counter() - began_s, time.thread_time() - cpu_s, waited.longest_s)
                )
            return costs[name][-1][1]

        turns = interleave({name: lambda name=name: cost(name) for name in swaps}, args.repeats)
    results = {
        name: {
            kind: 1e3 * statistics.median(cost[place] for cost in found[-args.repeats :])
            for place, kind in enumerate(("ms", "cpu_ms", "longest_lock_ms"))
        }
        for name, found in costs.items()
    }
    for name, found in results.items():
        print(f"{name:18}", "  ".join(f"{kind} {value:>9,.1f}" for kind, value in found.items()))
    checks = [
        build_check(f"{name}_cpu_over_unshared", turns.ratio(name, f"{name}_unshared"), "<1")
        for name in ("version", "delta")
    ]
    print_result(results=results, config={"rows": rows, "quick": args.quick}, checks=checks)


def _publish(registry: Registry, rows: int) -> None:
    """Publish the two versions and the first one's delta."""
    recipe = load_recipe("movielens")
    generator = torch.Generator().manual_seed(0)
    text_IE = torch.nn.functional.normalize(torch.randn(rows, TEXT_DIM, generator=generator), dim=1)
    for _ in range(2):
        draft = registry.draft_version()
        write_version(draft, _state(recipe, rows, text_IE, generator), events_table([]))
        draft.publish(offset=0, metrics={})
    changed = torch.randperm(rows, generator=generator)[:CHANGED_ROWS]
    after = _state(recipe, rows, text_IE, generator)
    none = torch.empty(0, dtype=torch.int64)
    draft = registry.draft_delta(1)
    write_delta(
        draft,
        Change(
            new_items=[],
            new_users=[],
            rows={
                name: (index, QuantizedRows(after.rows[name][index]))
                for name, index in {
                    ITEM_ROWS: changed,
                    USER_ROWS: changed,
                    TEXT_ROWS: none,
                    COUNT_ROWS: changed,
                }.items()
            },
            optimizer_rows={},
            dense=after.dense,
            optimizer={},
        ),
    )
    draft.publish(first_seq=1, last_seq=CHANGED_ROWS)


def _state(recipe: Recipe, rows: int, text_IE: torch.Tensor, generator: torch.Generator) -> VersionState:
    dim = recipe.section(TablesConfig).dim
    return VersionState(
        ref=VersionRef(1),
        recipe=recipe,
        learned_seq=0,
        item_ids=[f"item-{row}" for row in range(rows)],
        item_texts=[f"thing number {row}" for row in range(rows)],
        user_ids=[f"user-{row}" for row in range(rows)],
        rows={
            ITEM_ROWS: 0.3 * torch.randn(rows, dim, generator=generator),
            USER_ROWS: 0.3 * torch.randn(rows, dim, generator=generator),
            TEXT_ROWS: text_IE,
            COUNT_ROWS: torch.ones(rows, dtype=torch.int64),
        },
        dense=build_two_stage(recipe.section(ModelConfig), dim, TEXT_DIM).state_dict(),
        optimizer={},
    )


if __name__ == "__main__":
    main()
