"""Does one epoch of 10⁹ interactions run on this machine at a flat speed, in bounded memory, and learn?

    python -m benchmarks.planted --rows 1e9 --users 1e7 --items 1e6 --out DIR     (minutes, 19 GB)
    python -m benchmarks.billion --data DIR --home HOME                           (goes on after a stop, too)

`recloop train` itself, with two workers and a checkpoint a minute; bounded by the lookups of the worker that holds the
item table. The ceiling is the bare loop of train_throughput.py; the optimum is the AUC of the true probabilities.
Writes NAME.json and NAME.png below benchmarks/results.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.harness import Check, PeakMemory, build_check, build_parser, hardware, print_result, versions
from benchmarks.planted import optimum_auc, write_examples
from cluster.errors import EngineError
from cluster.examples import load_examples

RESULTS = Path(__file__).with_name("results")
SETTINGS = (
    "train.workers=2",
    "train.checkpoint_steps=1300",
    "train.log_steps=100",
    "train.max_failures=5",
    "tables.learning_rate=0.1",
    "train.learning_rate=0.01",
)
QUICK = ("train.checkpoint_steps=50", "train.log_steps=5")
MEMORY_INTERVAL_S = 5.0
GIB = 2**30


def main() -> None:
    """Train, or go on training; then describe."""
    args = _parse()
    with tempfile.TemporaryDirectory() as scratch:
        folder, home = args.data or f"{scratch}/rows", Path(args.home or f"{scratch}/home")
        if args.data is None:
            write_examples(Path(folder), 5_000_000 if args.quick else 10**9, 100_000, 10_000, seed=0, processes=2)
        begun_s = time.monotonic()
        trained, peak_bytes = train(folder, home, [*SETTINGS, *(QUICK if args.quick else ())])
        wall_s = time.monotonic() - begun_s
        lines = read_lines(Path(trained["folder"]) / "metrics.jsonl")
    rows = load_examples(folder).info.rows if args.data else trained["examples"]
    optimum = optimum_auc(Path(folder)) if args.data else float("nan")
    results = describe(lines, trained, rows=rows, wall_s=wall_s, peak_bytes=peak_bytes, optimum=optimum)
    checks = build_checks(results, rows)
    for check in checks:
        print(f"{check.name:28} {check.value:>16,.3f}  bar {check.bar:14} {'holds' if check.holds else 'MISSED'}")
    config = {"settings": SETTINGS, "rows": rows, "quick": args.quick}
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        whole = {"results": results, "hardware": hardware(), "versions": versions(), "config": config, "lines": lines}
        (RESULTS / f"{args.name}.json").write_text(json.dumps(whole) + "\n")
        draw(lines, optimum, RESULTS / f"{args.name}.png")
    print_result(results=results, config=config, checks=checks)


def train(folder: str, home: Path, settings: list[str]) -> tuple[dict[str, Any], int]:
    """Run `recloop train`, or go on with this home's unfinished run; return its result and the peak bytes."""
    unfinished = [run for run in sorted(home.glob("runs/clicks-*")) if not (run / "run.json").exists()]
    begin = ["--recipe", "clicks", "--data", folder, *(word for setting in settings for word in ("--set", setting))]
    which = ["--resume", str(unfinished[-1])] if unfinished else begin
    command = ["train", "--home", str(home), "--json", *which]
    process = subprocess.Popen([sys.executable, "-m", "cluster", *command], stdout=subprocess.PIPE, text=True)
    with PeakMemory(process.pid, interval_s=MEMORY_INTERVAL_S) as memory:
        output, _ = process.communicate()
    if process.returncode:
        raise EngineError(f"recloop train ended with exit code {process.returncode}; the same command goes on")
    return json.loads(output.splitlines()[-1]), memory.peak_bytes


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; what was done again after a stop counts as it was done last."""
    kept: list[dict[str, Any]] = []
    for line in map(json.loads, path.read_text().splitlines()):
        while kept and kept[-1]["examples"] >= line["examples"]:
            kept.pop()
        kept.append(line)
    return kept


def describe(
    lines: list[dict[str, Any]], trained: dict[str, Any], *, rows: int, wall_s: float, peak_bytes: int, optimum: float
) -> dict[str, Any]:
    """Return the figures of a finished run."""
    first = speed_of_share(lines, rows, 0.0, 0.1)
    last = speed_of_share(lines, rows, 0.9, 1.0)
    training_s = sum(line["seconds"] for line in lines)
    return {
        "examples": trained["examples"],
        "wall_s": wall_s,
        "training_s": training_s,
        "examples_s": trained["examples"] / training_s,
        "first_tenth_examples_s": first,
        "last_tenth_examples_s": last,
        "peak_bytes_of_all_processes": peak_bytes,
        "worker_rss_bytes": max(line["rss_bytes"] for line in lines),
        "heldout_auc": trained["heldout_auc"],
        "heldout_ne": trained["heldout_ne"],
        "optimum_auc": optimum,
        "share_of_optimum_above_chance": (trained["heldout_auc"] - 0.5) / (optimum - 0.5),
    }


def speed_of_share(lines: list[dict[str, Any]], rows: int, begin: float, end: float) -> float:
    """Return examples a second over a share of the epoch, from the lines that end within it."""
    before = [0, *(line["examples"] for line in lines)]
    inside = [
        (line["examples"] - earlier, line["seconds"])
        for line, earlier in zip(lines, before, strict=False)
        if begin * rows < line["examples"] <= end * rows
    ]
    return sum(count for count, _ in inside) / sum(seconds for _, seconds in inside)


def build_checks(results: dict[str, Any], rows: int) -> list[Check]:
    """Hold the figures against their bars."""
    return [
        build_check("examples", results["examples"], f"=={rows}"),
        build_check("minutes", results["wall_s"] / 60, "<60"),
        build_check("peak_gib_of_all_processes", results["peak_bytes_of_all_processes"] / GIB, "<16"),
        build_check(
            "last_vs_first_tenth", results["last_tenth_examples_s"] / results["first_tenth_examples_s"], ">=0.95"
        ),
    ]


def draw(lines: list[dict[str, Any]], optimum: float, path: Path) -> None:
    """Draw throughput, progressive AUC and memory over the examples trained on."""
    examples = [line["examples"] / 1e6 for line in lines]
    figure, (speed, auc, memory) = plt.subplots(3, 1, sharex=True, figsize=(9, 8), layout="constrained")
    speed.plot(examples, [line["examples_per_s"] / 1e3 for line in lines], linewidth=0.8)
    speed.set(ylabel="thousand examples/s", ylim=(0, None), title="One epoch of recloop's click model, two workers")
    auc.plot(examples, [line["auc"] for line in lines], linewidth=0.8, label="each window, before it is learned")
    auc.axhline(optimum, color="grey", linestyle="--", linewidth=0.8, label="true probabilities")
    auc.set(ylabel="AUC")
    auc.legend(loc="lower right")
    memory.plot(examples, [line["rss_bytes"] / GIB for line in lines], linewidth=0.8)
    memory.set(ylabel="GiB resident, worker 0", ylim=(0, None), xlabel="million examples trained on")
    figure.savefig(path, dpi=110)


def _parse() -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--data", help="an examples folder of planted.py; a small one is made unless given")
    parser.add_argument("--home", help="where the run is kept, to go on with after a stop")
    parser.add_argument("--name", default="billion", help="of the files below benchmarks/results; default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
