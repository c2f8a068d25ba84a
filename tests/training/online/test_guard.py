"""Progressive validation, with losses that can be averaged in one's head."""

import numpy as np
import pytest

from cluster.errors import ConfigError
from training.online.guard import GuardConfig, ProgressiveValidation
from training.online.predictions import Predictions

BASE = np.full(10, 2.0)


def predictions(loss_P, *, rank=1, confidence=0.5) -> Predictions:
    shape = np.shape(loss_P)
    return Predictions(
        loss_P=np.asarray(loss_P, float),
        rank_P=np.broadcast_to(rank, shape),
        confidence_P=np.broadcast_to(confidence, shape),
    )


def record(guard, loss_P, base_loss_P, segments=None, **learned) -> None:
    guard.record(predictions(loss_P, **learned), predictions(base_loss_P), np.full(np.shape(loss_P), 4.0), segments)


def build_guard(**settings):
    return ProgressiveValidation(GuardConfig(**{"window_events": 20, "min_events": 10, **settings}))


def test_before_the_first_event_there_is_nothing_to_say():
    guard = build_guard()
    assert guard.objection() is None
    assert guard.metrics() == {}
    assert guard.window_start == guard.recorded == 0


def test_the_metrics_are_the_means_over_the_window():
    guard = build_guard()
    record(guard, np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    record(guard, np.array([6.0]), np.array([2.0]))
    metrics = guard.metrics()
    assert (metrics["events"], metrics["log_loss"], metrics["base_log_loss"]) == (3.0, 3.0, 3.0)
    assert metrics["ne"] == 3 / 4  # guessing by popularity loses 4 nats
    assert metrics["calibration"] == 1 / 2  # half sure each time, right each time


def test_learning_that_predicts_as_well_or_better_passes():
    guard = build_guard()
    record(guard, BASE - 1, BASE)
    record(guard, BASE, BASE)
    assert guard.objection() is None


def test_a_rise_above_the_bound_is_objected_to_with_its_size():
    guard = build_guard(max_loss_increase=0.1)
    record(guard, BASE + 0.25, BASE)
    assert guard.objection() == (
        "log loss rose by 0.250 nats over 10 events, surely by 0.250; at most 0.1"  # no spread: sure of all of it
    )


def test_a_rise_up_to_the_bound_passes():
    guard = build_guard(max_loss_increase=0.25)
    record(guard, BASE + 0.25, BASE)
    assert guard.objection() is None


def test_a_rise_that_chance_explains_passes():
    guard = build_guard(max_loss_increase=0.1)
    # mean 0.5, standard deviation √(10/9) ≈ 1.05, so surely by 0.5 − 2.4·1.05/√10 < 0 only
    record(guard, BASE + np.tile([1.5, -0.5], 5), BASE)
    assert guard.objection() is None


def test_too_few_events_decide_nothing_but_that_a_loss_is_not_a_number():
    guard = build_guard()
    record(guard, BASE[:9] + 100, BASE[:9])
    assert guard.objection() is None
    record(guard, np.array([np.nan]), np.array([2.0]))
    assert guard.objection() == "a predicted probability is not finite"


def test_a_segment_that_gets_worse_is_objected_to_though_the_mean_is_well():
    guard = build_guard()
    in_P = np.arange(20) < 10
    segments = {"new users": in_P, "known users": ~in_P}
    record(guard, np.where(in_P, 3.0, 0.5), np.full(20, 2.0), segments)
    assert guard.objection() == (
        "log loss rose by 1.000 nats over 10 events of new users, surely by 1.000; at most 0.1"
    )
    assert guard.metrics()["segments"]["known users"]["log_loss"] == 0.5


def test_a_segment_with_too_few_events_decides_nothing():
    guard = build_guard()
    in_P = np.arange(20) < 9
    record(guard, np.where(in_P, 3.0, 0.5), np.full(20, 2.0), {"new users": in_P})
    assert guard.objection() is None


def test_items_that_rank_lower_than_before_are_objected_to():
    guard = build_guard()
    record(guard, BASE, BASE, rank=3)  # NDCG of rank 3 is 1 / log2(4)
    assert guard.objection() == "NDCG@10 fell by 0.500 over 10 events, surely by 0.500; at most 0.05"
    assert guard.metrics()["ndcg_at_10"] == 1 / 2


def test_weights_surer_than_the_events_bear_out_are_objected_to():
    guard = build_guard(max_ndcg_drop=1.0)
    record(guard, BASE, BASE, rank=2, confidence=0.75)
    # The base is half sure and right each time, so it is 0.5 too modest; these are 0.75 sure and never right.
    assert guard.objection() == "confidence outgrew the hits by 1.250 over 10 events, surely by 1.250; at most 0.1"
    assert "calibration" not in guard.metrics()  # nothing was hit to hold it against


def test_what_left_the_window_is_forgotten():
    guard = build_guard(window_events=10)
    record(guard, BASE + 1, BASE)
    assert guard.objection() is not None
    record(guard, BASE, BASE)
    assert guard.objection() is None
    assert (guard.recorded, guard.window_start) == (20, 10)


def test_events_just_learned_condemn_ruined_weights_however_few_they_are():
    guard = build_guard(max_learned_loss_increase=3.0)
    assert guard.damage(np.array([5.0]), np.array([2.0])) is None
    assert guard.damage(np.array([7.0, 5.0]), np.array([2.0, 2.0])) == (
        "log loss of events just learned is 4.000 nats above the base; at most 3.0"
    )
    assert guard.damage(np.array([np.nan]), np.array([2.0])) is not None
    assert guard.damage(np.array([]), np.array([])) is None


def test_a_guard_turned_off_lets_everything_through():
    guard = build_guard(enabled=False)
    record(guard, BASE + 100, BASE)
    assert guard.objection() is None
    assert guard.damage(BASE + 100, BASE) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_events": 1}, "guard.min_events=1: must be from 2"),
        ({"min_events": 21}, "guard.min_events=21: must be from 2 to guard.window_events=20"),
        ({"max_ndcg_drop": -0.1}, "guard.max_ndcg_drop=-0.1: must be 0 or more"),
        ({"max_overconfidence": -0.1}, "guard.max_overconfidence=-0.1: must be 0 or more"),
        ({"max_loss_increase": -0.1}, "guard.max_loss_increase=-0.1: must be 0 or more"),
        ({"max_learned_loss_increase": -1.0}, "guard.max_learned_loss_increase=-1.0: must be 0 or more"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_guard(**settings)
