"""What do ids that nobody listed cost a training step, and do two of them ever share a row?

    python -m benchmarks.dynamic_ids [--quick]

First: 10⁸ events of 10⁷ distinct ids through one id table; after every call each event's row must belong to its id.
Then: recloop's loop on the same planted world twice, with ids that are rows (static) and with ids scattered over
[0, 2⁶³) (dynamic), in turns. Bounded by the exchange of distinct ids between the two workers and by one random access
to the table an id; the ceiling is the static loop.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bare_torchrec import free_port
from benchmarks.harness import build_check, build_parser, interleave, print_result
from benchmarks.planted import scatter, write_examples
from benchmarks.segments import Segments
from benchmarks.streamed import build_streamed
from embeddings.ids.config import IdsConfig, table_rows
from embeddings.ids.distinct import distinct
from embeddings.ids.table import IdTable

WORKERS = 2
CALL_EVENTS = 200_000
FRESH_EVERY = 10
"""Every tenth event has an id of its own, so that all ids occur; the others are Zipf over all."""


def main() -> None:
    """Count collisions, measure in turns and print."""
    parser = build_parser(__doc__)
    parser.add_argument("--steps", type=int, default=60, help="a segment; default: %(default)s")
    args = parser.parse_args()
    events, users, items, rows = (10**6, 10**5, 10**4, 10**6) if args.quick else (10**8, 10**7, 10**6, 4 * 10**7)
    steps = 5 if args.quick else args.steps
    table = fill(events)
    print(f"table: {table}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for ids in ("rows", "any"):
            write_examples(
                Path(scratch, ids), rows, users, items, seed=0, processes=WORKERS, ids=ids, heldout_rows=1000
            )
        settings = (f"ids.user_rows={users + users // 20}", f"ids.item_rows={items + items // 20}")
        common = {"processes": WORKERS, "settings": settings}
        static = {"folder": f"{scratch}/rows", "run_folder": f"{scratch}/static", "port": free_port()}
        dynamic = {"folder": f"{scratch}/any", "run_folder": f"{scratch}/dynamic", "port": free_port()}
        with (
            Segments(build_streamed, workers=WORKERS, **common, **static) as listed,
            Segments(build_streamed, workers=WORKERS, **common, **dynamic) as unlisted,
        ):
            turns = interleave(
                {"static": lambda: listed.measure(steps).seconds, "dynamic": lambda: unlisted.measure(steps).seconds},
                args.repeats,
            )
    checks = [
        build_check("collisions", table["collisions"], "==0"),
        build_check("distinct_ids", table["distinct"], f">={events // FRESH_EVERY}"),
        build_check("step_vs_static", turns.ratio("dynamic", "static"), "<=1.2"),
    ]
    for check in checks:
        print(f"{check.name:20} {check.value:>16,.3f}  bar {check.bar:14} {'holds' if check.holds else 'MISSED'}")
    config = {"events": events, "users": users, "items": items, "steps": steps, "quick": args.quick}
    print_result(results={"table": table, "steps": turns.summary()}, config=config, checks=checks)


def fill(events: int) -> dict[str, Any]:
    """Send events through one id table and check every one of them."""
    distinct_ids = events // FRESH_EVERY
    capacity = distinct_ids + distinct_ids // 10 + 20_000  # buckets fill unevenly
    table = IdTable(capacity, IdsConfig(user_rows=capacity, evict="none"))
    owner = np.full(table_rows(capacity), -1, np.int64)
    collisions = without_row = 0
    assign_s = 0.0
    for step, ids_N in enumerate(draw(events, distinct_ids)):
        begun_s = time.perf_counter()
        ids, inverse, counts = distinct(ids_N)
        rows, _ = table.assign(ids, counts, step)
        rows_N = rows[inverse]
        assign_s += time.perf_counter() - begun_s
        known = rows_N >= 0
        without_row += int((~known).sum())
        held = owner[rows_N[known]]
        collisions += int(((held != -1) & (held != ids_N[known])).sum())
        owner[rows_N[known]] = ids_N[known]
        collisions += int((owner[rows_N[known]] != ids_N[known]).sum())  # two ids of this call in one row
    table.verify()
    return {
        "events": events,
        "distinct": len(table),
        "collisions": collisions,
        "events_without_row": without_row,
        "events_s": events / assign_s,
    }


def draw(events: int, distinct_ids: int) -> Iterator[np.ndarray]:
    """Yield ids in calls of some events."""
    rng = np.random.default_rng(0)
    for first in range(0, events, CALL_EVENTS):
        count = min(CALL_EVENTS, events - first)
        number_N = np.minimum(distinct_ids ** rng.random(count), distinct_ids - 1).astype(np.int64)
        own = np.arange(first, first + count)
        number_N = np.where(own % FRESH_EVERY == 0, own // FRESH_EVERY, number_N)
        yield scatter(number_N)


if __name__ == "__main__":
    main()
