"""How much of the speed of tensors in memory is left when examples stream from Parquet on disk?

    python -m benchmarks.train_throughput [--quick] [--data DIR]

Bounded by FBGEMM's lookups and by gloo's exchange of the summed rows; the ceiling is a bare TorchRec loop on batches
cut beforehand (bare_torchrec.py: same model, same plan, same batch, two gloo workers), measured in turns with recloop's
loop (streamed.py) and with a plain PyTorch loop (plain_torch.py) over the same files.
"""

import tempfile
from pathlib import Path

from benchmarks.bare_torchrec import build_bare, free_port
from benchmarks.harness import build_check, build_parser, interleave, print_result
from benchmarks.plain_torch import YIELDING, build_plain
from benchmarks.planted import write_examples
from benchmarks.segments import Segments
from benchmarks.streamed import build_streamed

WORKERS = 2
SHARDING = "table_wise"


def main() -> None:
    """Measure in turns and print."""
    parser = build_parser(__doc__)
    parser.add_argument("--data", help="an examples folder of planted.py; made in a temporary folder unless given")
    parser.add_argument("--batch", type=int, default=32_768, help="examples a step, both workers; default: %(default)s")
    args = parser.parse_args()
    users, items, rows, steps = (100_000, 10_000, 600_000, 5) if args.quick else (10**7, 10**6, 20 * 10**6, 100)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data or f"{scratch}/rows"
        if args.data is None:
            write_examples(Path(folder), rows, users, items, seed=0, processes=WORKERS)
        settings = (f"stream.batch_examples={args.batch}",)
        share = args.batch // WORKERS
        streamed = {"run_folder": scratch, "port": free_port(), "processes": WORKERS, "settings": settings}
        bare = {"port": free_port(), "batch": share, "sharding": SHARDING}
        with (
            Segments(build_bare, workers=WORKERS, folder=folder, **bare) as memory,
            Segments(build_streamed, workers=WORKERS, folder=folder, **streamed) as disk,
            Segments(build_plain, folder=folder, batch=args.batch, environment=YIELDING) as plain,
        ):
            turns = interleave(
                {
                    "disk": lambda: disk.measure(steps).examples_s,
                    "memory": lambda: memory.measure(steps).examples_s,
                    "plain": lambda: plain.measure(max(2, steps // 5)).examples_s,
                },
                args.repeats,
            )
    checks = [
        build_check("disk_vs_memory", turns.ratio("disk", "memory"), ">=0.9"),
        build_check("disk_vs_plain_pytorch", turns.ratio("disk", "plain"), ">=5"),
        build_check("disk_examples_s", turns.median("disk"), ">=500000"),
    ]
    for check in checks:
        print(f"{check.name:24} {check.value:>12,.3f}  bar {check.bar:10} {'holds' if check.holds else 'MISSED'}")
    config = {"batch": args.batch, "steps": steps, "workers": WORKERS, "sharding": SHARDING, "quick": args.quick}
    print_result(results=turns.summary(), config=config | {"users": users, "items": items}, checks=checks)


if __name__ == "__main__":
    main()
