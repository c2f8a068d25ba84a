"""Hit, NDCG and their intervals, against values computed by hand."""

from fractions import Fraction

import numpy as np
import pytest

from cluster.errors import DataError
from training.evaluation.metrics import difference_interval, hit_at_k, mean_interval, ndcg_at_k, running_mean

RANKS = [1, 2, 3, 10, 11, 0]


def test_hit_at_k_counts_the_first_k_ranks_and_nothing_unranked() -> None:
    assert hit_at_k(RANKS, 10).tolist() == [1, 1, 1, 1, 0, 0]
    assert hit_at_k(RANKS, 2).tolist() == [1, 1, 0, 0, 0, 0]
    assert hit_at_k(RANKS, 10).mean() == float(Fraction(4, 6))


def test_ndcg_at_k_discounts_by_the_log_of_the_rank() -> None:
    # 1/log2(2) = 1 and 1/log2(4) = 1/2 exactly; rank 7 gives 1/log2(8) = 1/3
    assert ndcg_at_k([1, 3, 7], 10).tolist() == [1, float(Fraction(1, 2)), float(Fraction(1, 3))]
    assert ndcg_at_k([1, 3, 7, 0], 3).tolist() == [1, float(Fraction(1, 2)), 0, 0]
    assert ndcg_at_k([11, 0], 10).tolist() == [0, 0]


def test_no_ranks_give_no_values() -> None:
    assert hit_at_k([], 10).tolist() == ndcg_at_k([], 10).tolist() == []


def test_running_mean_of_ones_and_zeros() -> None:
    assert running_mean([1, 0, 0, 1]).tolist() == [
        1,
        float(Fraction(1, 2)),
        float(Fraction(1, 3)),
        float(Fraction(1, 2)),
    ]
    assert running_mean([]).tolist() == []


def test_interval_covers_the_mean_and_has_the_width_that_theory_gives() -> None:
    values = np.tile([1.0, 0.0, 0.0, 0.0], 2_500)
    interval = mean_interval(values, seed=0)
    half_width = 1.96 * (Fraction(1, 4) * Fraction(3, 4) / 10_000) ** 0.5
    assert (interval.mean, interval.n) == (float(Fraction(1, 4)), 10_000)
    assert interval.high - interval.mean == pytest.approx(half_width, rel=0.1)
    assert interval.mean - interval.low == pytest.approx(half_width, rel=0.1)


def test_interval_of_constant_values_is_a_point() -> None:
    interval = mean_interval([1.0] * 7, seed=3)
    assert (interval.low, interval.mean, interval.high) == (1.0, 1.0, 1.0)


def test_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.arange(50) % 7
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_intervals_are_wider_when_events_of_a_user_go_together() -> None:
    values = np.repeat([1.0, 0.0] * 20, 25)
    users = np.repeat(np.arange(40), 25)
    alone, together = mean_interval(values, seed=0), mean_interval(values, seed=0, groups_N=users)
    assert alone.mean == together.mean
    # All of a user's 25 events agree, so 1,000 events say no more than 40: the width grows fivefold.
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(5, rel=0.15)


def test_one_group_an_event_is_the_plain_bootstrap() -> None:
    values = np.arange(30) % 4
    grouped = mean_interval(values, seed=5, groups_N=np.arange(30))
    plain = mean_interval(values, seed=5)
    assert (grouped.low, grouped.high) == (plain.low, plain.high)


def test_paired_difference_is_narrower_than_the_arms_themselves() -> None:
    rng = np.random.default_rng(0)
    baseline = (rng.random(2_000) < 0.2).astype(float)
    values = baseline.copy()
    values[np.flatnonzero(baseline == 0)[:20]] = 1.0
    difference = difference_interval(values, baseline, seed=0)
    assert difference.mean == pytest.approx(float(Fraction(20, 2_000)))
    assert difference.low > 0
    arm = mean_interval(values, seed=0)
    assert difference.high - difference.low < (arm.high - arm.low) / 3


def test_equal_arms_differ_by_exactly_nothing() -> None:
    difference = difference_interval([1, 0, 1], [1, 0, 1], seed=0)
    assert (difference.low, difference.mean, difference.high) == (0, 0, 0)


def test_nothing_to_average_and_unpaired_events_are_errors() -> None:
    with pytest.raises(DataError, match="no events"):
        mean_interval([], seed=0)
    with pytest.raises(DataError, match="2 values, 1 baseline"):
        difference_interval([1, 0], [1], seed=0)
    with pytest.raises(DataError, match="2 values, 1 groups"):
        mean_interval([1, 0], seed=0, groups_N=["u"])
