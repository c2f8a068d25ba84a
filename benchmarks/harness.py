"""What every benchmark does alike: fair turns for what it compares, peak memory, and the JSON line at its end.

In:  functions that measure one figure each, and the figures' bars.
Out: medians, spreads and paired ratios; one JSON object as the last line of stdout.
Knows nothing of what is measured.
"""

import argparse
import importlib.metadata
import json
import operator
import os
import platform
import statistics
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil

VERSIONED = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "ray", "pyarrow", "numba")
_BARS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True, slots=True)
class Check:
    """A figure that the work was asked to reach."""

    name: str
    value: float
    bar: str
    """Such as `>=0.9`."""
    holds: bool


def build_check(name: str, value: float, bar: str) -> Check:
    """Hold a figure against its bar; NaN holds against none. Raises ValueError for a bar it cannot read."""
    for sign, holds in _BARS.items():
        if bar.startswith(sign):
            return Check(name, value, bar, bool(holds(value, float(bar.removeprefix(sign)))))
    raise ValueError(f"bar {bar!r} of {name}: must start with one of {', '.join(_BARS)}")


@dataclass(frozen=True, slots=True)
class Turns:
    """What several variants measured in turns: one value a variant and round."""

    values: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.values[name])

    def spread(self, name: str) -> float:
        """Return (largest − smallest) / median."""
        return (max(self.values[name]) - min(self.values[name])) / self.median(name)

    def ratio(self, name: str, base: str) -> float:
        """Return the median over the rounds of name / base: what both shared in a round cancels out."""
        return statistics.median(a / b for a, b in zip(self.values[name], self.values[base], strict=True))

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return everything as plain numbers, for the result line."""
        return {
            name: {"median": self.median(name), "spread": self.spread(name), "values": list(values)}
            for name, values in self.values.items()
        }


def interleave(variants: Mapping[str, Callable[[], float]], repeats: int, *, warm_ups: int = 1) -> Turns:
    """Measure every variant once a round; odd rounds go backwards, so that a drift favours none.

    The first `warm_ups` rounds are not kept.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: must be 1 or more")
    values: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-warm_ups, repeats):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            value = variants[name]()
            if turn >= 0:
                values[name].append(value)
    return Turns(values)


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """Return p50, p95 and p99."""
    points = np.percentile(np.fromiter(values, float), (50, 95, 99))
    return dict(zip(("p50", "p95", "p99"), points.tolist(), strict=True))


class PeakMemory:
    """Sample the memory of processes and of all they started, while the block runs.

    Memory that processes share counts once (proportional set size), memory-mapped files count while resident.
    """

    def __init__(self, *pids: int, interval_s: float = 0.25) -> None:
        self.peak_bytes = 0
        self.samples = 0
        self._roots = [psutil.Process(pid) for pid in pids or (os.getpid(),)]
        self._interval_s = interval_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._over.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, tree_bytes(self._roots))
        self.samples += 1


def tree_bytes(roots: Iterable[psutil.Process]) -> int:
    """Return the proportional set size of processes and their descendants; what has ended counts nothing."""
    processes: set[psutil.Process] = set()
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            processes |= {root, *root.children(recursive=True)}
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().pss
    return total


def build_parser(doc: str | None, *, repeats: int = 5) -> argparse.ArgumentParser:
    """Return a parser with the flags that every benchmark has; `doc` is the script's, its first line the question."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute: does it run, not how fast")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds that are kept, %(default)s unless given")
    return parser


def hardware() -> dict[str, Any]:
    """Return what the figures were measured on."""
    described = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def print_result(*, results: Mapping[str, Any], config: Mapping[str, Any], checks: Sequence[Check]) -> None:
    """Print the JSON object that ends a benchmark's stdout."""
    line = {
        "results": results,
        "hardware": hardware(),
        "versions": versions(),
        "config": config,
        "checks": [asdict(check) for check in checks],
    }
    print(json.dumps(line), flush=True)
