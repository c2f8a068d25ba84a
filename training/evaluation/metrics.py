"""Hit and NDCG at k from the rank of the one item that came next, with bootstrap confidence intervals.

In:  ranks (1 is best, 0 is "not ranked") or per-event values.  Out: per-event values, means with 95% intervals.
Knows nothing of models, users or how a rank was found.

One relevant item an event, so the ideal DCG is 1 and NDCG@k = 1 / log2(1 + rank) within the first k (Järvelin and
Kekäläinen, TOIS 2002). Intervals are percentile bootstraps; with `groups` whole groups are drawn, as events of one user
are not independent (Field and Welsh, JRSS B 2007).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.errors import DataError

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 2_000
CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its 95% confidence interval."""

    mean: float
    low: float
    high: float
    n: int
    """Values the mean was taken over."""


def hit_at_k(ranks_N: npt.ArrayLike, k: int) -> FloatArray:
    """Return 1.0 for each event whose item is among the first `k`, else 0.0."""
    ranks = np.asarray(ranks_N)
    return ((ranks >= 1) & (ranks <= k)).astype(np.float64)


def ndcg_at_k(ranks_N: npt.ArrayLike, k: int) -> FloatArray:
    """Return 1 / log2(1 + rank) for each event whose item is among the first `k`, else 0.0."""
    ranks = np.asarray(ranks_N)
    return hit_at_k(ranks, k) / np.log2(1.0 + np.maximum(ranks, 1))


def running_mean(values_N: npt.ArrayLike) -> FloatArray:
    """Return the mean of the first n values for every n from 1."""
    values = np.asarray(values_N, dtype=np.float64)
    return np.cumsum(values) / np.arange(1, values.size + 1)


def mean_interval(
    values_N: npt.ArrayLike, *, seed: int, groups_N: npt.ArrayLike | None = None, resamples: int = RESAMPLES
) -> Interval:
    """Return the mean of the values with its bootstrap interval; whole groups are drawn where `groups_N` is given.

    Raises `DataError` when there are no values.
    """
    values = np.asarray(values_N, dtype=np.float64)
    if values.size == 0:
        raise DataError("a mean of no events is asked for; evaluate on at least one event")
    sums_G, counts_G = _by_group(values, groups_N)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // sums_G.size)
    for start in range(0, resamples, step):
        drawn = rng.integers(0, sums_G.size, size=(min(step, resamples - start), sums_G.size))
        means[start : start + step] = sums_G[drawn].sum(axis=1) / counts_G[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high), n=values.size)


def difference_interval(
    values_N: npt.ArrayLike,
    baseline_N: npt.ArrayLike,
    *,
    seed: int,
    groups_N: npt.ArrayLike | None = None,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return the mean of values − baseline, paired event by event, with its bootstrap interval.

    Raises `DataError` when the two are not over the same events.
    """
    difference = _paired_difference(values_N, baseline_N)
    return mean_interval(difference, seed=seed, groups_N=groups_N, resamples=resamples)


def paired_sums(values_N: npt.ArrayLike, baseline_N: npt.ArrayLike, groups_N: npt.ArrayLike | None) -> FloatArray:
    """Return the sum of values − baseline of each group, or each event's where there are no groups.

    Raises `DataError` when the two are not over the same events.
    """
    return _by_group(_paired_difference(values_N, baseline_N), groups_N)[0]


def _paired_difference(values_N: npt.ArrayLike, baseline_N: npt.ArrayLike) -> FloatArray:
    values, baseline = np.asarray(values_N, dtype=np.float64), np.asarray(baseline_N, dtype=np.float64)
    if values.shape != baseline.shape:
        raise DataError(
            f"a paired difference needs the same events: {values.size:,} values, {baseline.size:,} baseline"
        )
    return values - baseline


def _by_group(values: FloatArray, groups_N: npt.ArrayLike | None) -> tuple[FloatArray, FloatArray]:
    if groups_N is None:
        return values, np.ones_like(values)
    groups = np.asarray(groups_N)
    if groups.shape != values.shape:
        raise DataError(f"every value needs its group: {values.size:,} values, {groups.size:,} groups")
    _names, rows = np.unique(groups, return_inverse=True)
    return np.bincount(rows, weights=values).astype(np.float64), np.bincount(rows).astype(np.float64)
