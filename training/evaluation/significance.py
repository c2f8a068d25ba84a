"""Is one system better than another, or was it luck? Paired randomisation tests, and what many of them are worth.

In:  values of two systems over the same events.  Out: p-values.
Knows nothing of metrics. The interval of the difference is in metrics.py (`difference_interval`).
"""

import numpy as np
import numpy.typing as npt

from training.evaluation.metrics import FloatArray, by_group, paired_difference

PERMUTATIONS = 10_000
_SIGNS_AT_ONCE = 4_000_000


def randomisation_test(
    values_N: npt.ArrayLike,
    baseline_N: npt.ArrayLike,
    *,
    seed: int,
    groups_N: npt.ArrayLike | None = None,
    permutations: int = PERMUTATIONS,
) -> float:
    """Return the two-sided p-value of the mean difference: how often as large a one comes up by swapping systems.

    Fisher's randomisation test, which Smucker, Allan and Carterette (CIKM 2007) recommend for rankings. With `groups_N`
    all events of a user are swapped together. The swap that was observed is one of those counted, so p is never 0
    (Phipson and Smyth, SAGMB 2010). Raises `DataError` when the two are not over the same events.
    """
    difference_N1 = paired_difference(values_N, baseline_N)[:, None]
    return float(randomisation_tests(difference_N1, seed=seed, groups_N=groups_N, permutations=permutations)[0])


def randomisation_tests(
    difference_NM: FloatArray, *, seed: int, groups_N: npt.ArrayLike | None = None, permutations: int = PERMUTATIONS
) -> FloatArray:
    """Return the p-value of `randomisation_test` for each of M columns of differences, from the same swaps."""
    sums_GM = by_group(difference_NM, groups_N)[0]
    sums_GM = sums_GM[(sums_GM != 0).any(axis=1)]  # to swap what is equal changes nothing
    total_M = sums_GM.sum(axis=0)
    as_large_M = np.abs(total_M) - 1e-12 * np.abs(sums_GM).sum(axis=0)  # sums in another order differ in the last bits
    rng = np.random.default_rng(seed)
    reached_M, step = np.ones(len(total_M)), max(1, _SIGNS_AT_ONCE // max(len(sums_GM), 1))
    for start in range(0, permutations, step):
        kept = rng.integers(0, 2, size=(min(step, permutations - start), len(sums_GM)), dtype=np.int8)
        # Signs ±1 are 2·kept − 1.
        reached_M += (np.abs(2 * (kept.astype(np.float64) @ sums_GM) - total_M) >= as_large_M).sum(axis=0)
    return reached_M / (1 + permutations)


def holm(p_M: npt.ArrayLike) -> FloatArray:
    """Return p-values of several comparisons, raised so that any false one among them is as rare as one alone.

    The smallest of M is multiplied by M, the next by M − 1, and none is less than one before it (Holm, 1979).
    """
    p = np.asarray(p_M, np.float64)
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    adjusted = np.empty_like(p)
    adjusted[order] = raised
    return adjusted
