"""Progress bars for whatever takes longer than two seconds.

In:  an iterable, or a total to count up to.  Out: a tqdm bar on stderr, silent where stderr is not a terminal.
Knows nothing of what is counted. `hush_progress` silences every later bar, in Ray workers too (`--json`).
"""

import os
from collections.abc import Iterable
from typing import TypeVar, cast

from tqdm import tqdm

T = TypeVar("T")

_DISABLE_VARIABLE = "TQDM_DISABLE"


def progress(counted: Iterable[T] | int, description: str, *, unit: str = "it", total: int | None = None) -> "tqdm[T]":
    """Wrap an iterable, or make a bar of `counted` steps to advance with `.update(n)` and close.

    An iterable without a length takes its `total` from the caller.
    """
    iterable, total = (None, counted) if isinstance(counted, int) else (counted, total)
    bar = tqdm(
        iterable,
        total=total,
        desc=description,
        unit=f" {unit}",
        disable=True if os.environ.get(_DISABLE_VARIABLE) else None,
        delay=0.5,
        dynamic_ncols=True,
        leave=False,
    )
    return cast("tqdm[T]", bar)  # a bar without an iterable is typed NoReturn


def hush_progress() -> None:
    """Silence all bars from here on, in this process and in those that it starts."""
    os.environ[_DISABLE_VARIABLE] = "1"
