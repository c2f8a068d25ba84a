"""Is one system better than another, or was it luck? Paired randomisation tests, and what many of them are worth.

In:  values of two systems over the same events.  Out: p-values.
Knows nothing of metrics. The interval of the difference is in metrics.py (`difference_interval`).
"""

import numpy as np
import numpy.typing as npt

from training.evaluation.metrics import FloatArray, paired_sums

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
    sums_G = paired_sums(values_N, baseline_N, groups_N)
    sums_G = sums_G[sums_G != 0]  # to swap what is equal changes nothing
    total = sums_G.sum()
    as_large = abs(total) - 1e-12 * np.abs(sums_G).sum()  # sums in another order differ in their last bits
    rng = np.random.default_rng(seed)
    reached, step = 0, max(1, _SIGNS_AT_ONCE // max(sums_G.size, 1))
    for start in range(0, permutations, step):
        kept = rng.integers(0, 2, size=(min(step, permutations - start), sums_G.size), dtype=np.int8)
        # Signs ±1 are 2·kept − 1.
        reached += int((np.abs(2 * (kept.astype(np.float64) @ sums_G) - total) >= as_large).sum())
    return (1 + reached) / (1 + permutations)


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
