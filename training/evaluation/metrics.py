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
    values_N1 = np.asarray(values_N, dtype=np.float64)[:, None]
    return mean_intervals(values_N1, seed=seed, groups_N=groups_N, resamples=resamples)[0]


def mean_intervals(
    values_NM: npt.ArrayLike, *, seed: int, groups_N: npt.ArrayLike | None = None, resamples: int = RESAMPLES
) -> list[Interval]:
    """Return `mean_interval` of each of M columns, from the same draws: one product for all of them.

    Raises `DataError` when there are no values.
    """
    values = np.asarray(values_NM, dtype=np.float64)
    if values.size == 0:
        raise DataError("a mean of no events is asked for; evaluate on at least one event")
    sums_GM, counts_G = by_group(values, groups_N)
    groups = len(counts_G)
    rng = np.random.default_rng(seed)
    means_RM = np.empty((resamples, values.shape[1]))
    step = max(1, _DRAWS_AT_ONCE // groups)
    for start in range(0, resamples, step):
        drawn = rng.integers(0, groups, size=(min(step, resamples - start), groups))
        drawn += np.arange(len(drawn))[:, None] * groups
        times_RG = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        means_RM[start : start + step] = (times_RG @ sums_GM) / (times_RG @ counts_G)[:, None]
    low_M, high_M = np.quantile(means_RM, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return [
        Interval(mean=float(mean), low=float(low), high=float(high), n=len(values))
        for mean, low, high in zip(values.mean(axis=0), low_M, high_M, strict=True)
    ]


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
    return mean_interval(paired_difference(values_N, baseline_N), seed=seed, groups_N=groups_N, resamples=resamples)


def paired_difference(values_N: npt.ArrayLike, baseline_N: npt.ArrayLike) -> FloatArray:
    """Return values − baseline, event by event. Raises `DataError` when the two are not over the same events."""
    values, baseline = np.asarray(values_N, dtype=np.float64), np.asarray(baseline_N, dtype=np.float64)
    if values.shape != baseline.shape:
        raise DataError(
            f"a paired difference needs the same events: {values.size:,} values, {baseline.size:,} baseline"
        )
    return values - baseline


def by_group(values_NM: FloatArray, groups_N: npt.ArrayLike | None) -> tuple[FloatArray, FloatArray]:
    """Return the sums of each group's values [G, M] and its number of events [G]; without groups each event is one."""
    if groups_N is None:
        return values_NM, np.ones(len(values_NM))
    groups = np.asarray(groups_N)
    if len(groups) != len(values_NM):
        raise DataError(f"every value needs its group: {len(values_NM):,} values, {len(groups):,} groups")
    rows = np.unique(groups, return_inverse=True)[1]
    sums = [np.bincount(rows, weights=values_N).astype(np.float64) for values_N in values_NM.T]
    return np.stack(sums, axis=1), np.bincount(rows).astype(np.float64)
