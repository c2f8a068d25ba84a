"""Progressive validation, with losses that can be averaged in one's head."""

import numpy as np
import pytest

from cluster.errors import ConfigError
from training.online.guard import GuardConfig, ProgressiveValidation

BASE = np.full(10, 2.0)


def build_guard(**settings):
    return ProgressiveValidation(GuardConfig(**{"window_events": 20, "min_events": 10, **settings}))


def test_before_the_first_event_there_is_nothing_to_say():
    guard = build_guard()
    assert guard.objection() is None
    assert guard.metrics() == {}
    assert guard.window_start == guard.recorded == 0


def test_the_metrics_are_the_means_over_the_window():
    guard = build_guard()
    guard.record(np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    guard.record(np.array([6.0]), np.array([2.0]))
    assert guard.metrics() == {"events": 3.0, "log_loss": 3.0, "base_log_loss": 3.0}


def test_learning_that_predicts_as_well_or_better_passes():
    guard = build_guard()
    guard.record(BASE - 1, BASE)
    guard.record(BASE, BASE)
    assert guard.objection() is None


def test_a_rise_above_the_bound_is_objected_to_with_its_size():
    guard = build_guard(max_loss_increase=0.1)
    guard.record(BASE + 0.25, BASE)
    assert guard.objection() == (
        "log loss rose by 0.250 nats over 10 events, surely by 0.250; at most 0.1"  # no spread: sure of all of it
    )


def test_a_rise_up_to_the_bound_passes():
    guard = build_guard(max_loss_increase=0.25)
    guard.record(BASE + 0.25, BASE)
    assert guard.objection() is None


def test_a_rise_that_chance_explains_passes():
    guard = build_guard(max_loss_increase=0.1)
    # mean 0.5, standard deviation √(10/9) ≈ 1.05, so surely by 0.5 − 2·1.05/√10 < 0 only
    guard.record(BASE + np.tile([1.5, -0.5], 5), BASE)
    assert guard.objection() is None


def test_too_few_events_decide_nothing_but_that_a_loss_is_not_a_number():
    guard = build_guard()
    guard.record(BASE[:9] + 100, BASE[:9])
    assert guard.objection() is None
    guard.record(np.array([np.nan]), np.array([2.0]))
    assert guard.objection() == "a predicted probability is not finite"


def test_what_left_the_window_is_forgotten():
    guard = build_guard(window_events=10)
    guard.record(BASE + 1, BASE)
    assert guard.objection() is not None
    guard.record(BASE, BASE)
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
    guard.record(BASE + 100, BASE)
    assert guard.objection() is None
    assert guard.damage(BASE + 100, BASE) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_events": 1}, "guard.min_events=1: must be from 2"),
        ({"min_events": 21}, "guard.min_events=21: must be from 2 to guard.window_events=20"),
        ({"max_loss_increase": -0.1}, "guard.max_loss_increase=-0.1: must be 0 or more"),
        ({"max_learned_loss_increase": -1.0}, "guard.max_learned_loss_increase=-1.0: must be 0 or more"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_guard(**settings)
