"""How much faster are two workers than one, and does an example cost more as the data grow?

    python -m benchmarks.scaling [--quick] [--data DIR]

Weak scaling: each worker has one core and the same share of a batch, so two do twice the work of one in the same time
if exchanging rows costs nothing. That exchange (the summed rows of half of the examples, out and back, over gloo's
loopback TCP, with both cores busy) and the uneven tables bound it; the ceiling is 2.
Then one worker's cost an example on folders of 10⁶ rows and more, with tables of the same size, in turns.
"""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.bare_torchrec import free_port
from benchmarks.harness import build_check, build_parser, interleave, print_result
from benchmarks.planted import write_examples
from benchmarks.segments import Run, Segments
from benchmarks.streamed import build_streamed
from cluster.examples import load_examples

SHARE = 16_384
"""Examples of a step a worker."""


def main() -> None:
    """Measure both in turns and print."""
    parser = build_parser(__doc__)
    parser.add_argument(
        "--data", help="the largest folder, of planted.py with 10⁷ users and 10⁶ items; made unless given"
    )
    args = parser.parse_args()
    users, items, steps = (100_000, 10_000, 5) if args.quick else (10**7, 10**6, 100)
    sizes = [10**6] if args.quick else [10**6, 10**7, 10**8]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folders = {rows: f"{scratch}/{rows}" for rows in sizes[: 2 if args.data else None]}
        for rows, folder in folders.items():
            write_examples(Path(folder), rows, users, items, seed=0, processes=2, heldout_rows=1000)
        if args.data:
            folders[load_examples(args.data).info.rows] = args.data
        largest = max(folders)

        def workers(count: int, rows: int) -> Segments:
            return stack.enter_context(
                Segments(
                    build_pinned,
                    workers=count,
                    folder=folders[rows],
                    run_folder=f"{scratch}/run-{count}-{rows}",
                    port=free_port(),
                    processes=count,
                    settings=(f"stream.batch_examples={SHARE * count}",),
                )
            )

        two = workers(2, largest)
        one_of = {rows: workers(1, rows) for rows in folders}
        variants = {"two": lambda: two.measure(steps).examples_s}
        variants |= {f"one_{rows}": lambda one=one: one.measure(steps).examples_s for rows, one in one_of.items()}
        turns = interleave(variants, args.repeats)
    checks = [build_check("two_workers_vs_one", turns.ratio("two", f"one_{largest}"), ">=1.7")]
    checks += [
        build_check(f"cost_of_{largest}_vs_{rows}_rows", turns.ratio(f"one_{rows}", f"one_{largest}"), "<=1.05")
        for rows in sorted(folders)[:-1]
    ]
    for check in checks:
        print(f"{check.name:36} {check.value:>10,.3f}  bar {check.bar:8} {'holds' if check.holds else 'MISSED'}")
    config = {"share": SHARE, "steps": steps, "rows": sorted(folders), "quick": args.quick}
    print_result(results=turns.summary(), config=config | {"users": users, "items": items}, checks=checks)


def build_pinned(rank: int, **arguments: object) -> Run:
    """Collective. Build the trainer on one core of its own: reading ahead must not borrow another worker's."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    return build_streamed(rank, **arguments)  # pyright: ignore[reportArgumentType]  # as given to `Segments`


if __name__ == "__main__":
    main()
