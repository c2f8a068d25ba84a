"""P-values against every swap there is, SciPy's permutation test, and Holm's own rule."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from cluster.errors import DataError
from training.evaluation.significance import holm, randomisation_test

FIRST = np.array([0.9, 0.4, 0.7, 0.6, 0.3, 0.8, 0.5])
OTHER = np.array([0.5, 0.5, 0.3, 0.4, 0.2, 0.6, 0.1])


def every_swap(differences):
    """Return the exact p-value: the share of all sign patterns whose sum is as large."""
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
    return np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)


def test_p_is_the_share_of_swaps_that_make_as_large_a_difference():
    # The differences are .4 .4 .4 .2 .2 .1 −.1: signs all alike, or all but one .1, make as large a sum.
    p = randomisation_test(FIRST, OTHER, seed=0, permutations=100_000)
    assert every_swap(FIRST - OTHER) == 6 / 128
    assert p == pytest.approx(6 / 128, abs=0.003)  # 5 standard deviations of a share of 100,000


def test_scipy_finds_the_same():
    found = stats.permutation_test(
        (FIRST, OTHER), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples", vectorized=True
    )
    assert randomisation_test(FIRST, OTHER, seed=1, permutations=100_000) == pytest.approx(found.pvalue, abs=0.003)


def test_events_of_a_user_are_swapped_together():
    # Each user's 50 events agree, so they say no more than one: 7 users, not 350 events.
    users = np.repeat(np.arange(7), 50)
    together = randomisation_test(
        np.repeat(FIRST, 50), np.repeat(OTHER, 50), seed=0, groups_N=users, permutations=100_000
    )
    assert together == pytest.approx(6 / 128, abs=0.003)
    assert randomisation_test(np.repeat(FIRST, 50), np.repeat(OTHER, 50), seed=0) == 1 / 10_001


def test_equal_systems_do_not_differ_and_the_sides_do_not_matter():
    assert randomisation_test(FIRST, FIRST, seed=0) == 1
    assert randomisation_test(FIRST, OTHER, seed=0) == randomisation_test(OTHER, FIRST, seed=0)


def test_where_there_is_no_difference_p_is_evenly_spread():
    rng = np.random.default_rng(0)
    found = [randomisation_test(*rng.normal(size=(2, 30)), seed=n, permutations=500) for n in range(400)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) < 0.05) < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_blocks_do_not_show(monkeypatch):
    monkeypatch.setattr("training.evaluation.significance._SIGNS_AT_ONCE", 50)
    assert randomisation_test(FIRST, OTHER, seed=0) == pytest.approx(6 / 128, abs=0.01)


def test_holm_by_hand():
    # Of four: .01·4, .02·3 = .06, .03·2 = .06, .4
    assert holm([0.02, 0.4, 0.01, 0.03]) == pytest.approx([0.06, 0.4, 0.04, 0.06], abs=1e-15)
    assert holm([0.3, 0.5]).tolist() == [0.6, 0.6]
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([0.2]).tolist() == [0.2]
    assert holm([]).tolist() == []


def test_systems_over_other_events_cannot_be_paired():
    with pytest.raises(DataError, match="2 values, 1 baseline"):
        randomisation_test([1, 0], [1], seed=0)
