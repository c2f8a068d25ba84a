"""What is expected of events, and events that are not like that."""

import numpy as np
import pytest

from cluster.errors import ConfigError
from training.online.surprise import Surprise, SurpriseConfig


def build(**settings) -> Surprise:
    return Surprise(SurpriseConfig(**settings))


def noise(count: int, mean: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.5, count)


def test_events_like_those_before_are_expected_and_so_is_a_slow_drift():
    surprise = build()
    for step in range(100):
        surprise.record(noise(100, 6.0 + 0.03 * step, seed=step))
        assert surprise.objection() is None


def test_a_batch_of_other_events_is_objected_to_within_a_hundred_of_them():
    surprise = build()
    surprise.record(noise(3_000, 6.0))
    surprise.record(noise(100, 10.0, seed=1))
    found = surprise.objection()
    assert found is not None
    assert "the newest 200 events are not like those before" in found


def test_what_is_discarded_is_not_expected_afterwards():
    surprise = build()
    surprise.record(noise(3_000, 6.0))
    expected = surprise.metrics()
    for _ in range(5):
        surprise.record(noise(100, 10.0))
        if surprise.objection():
            surprise.discard()
    assert surprise.metrics()["expected_loss"]["mean"] < expected["expected_loss"]["mean"] + 0.5
    surprise.record(noise(200, 6.0, seed=3))
    assert surprise.objection() is None


def test_what_goes_on_for_long_enough_is_what_is_expected():
    surprise = build(patience_events=500)
    surprise.record(noise(3_000, 6.0))
    objections = 0
    for step in range(30):
        surprise.record(noise(100, 10.0, seed=step))
        if surprise.objection():
            objections += 1
            surprise.discard()
    assert 3 <= objections <= 7


def test_too_few_events_of_either_kind_say_nothing():
    surprise = build()
    surprise.record(noise(250, 6.0))  # 200 of them are the newest ones
    surprise.record(noise(100, 20.0))
    assert surprise.objection() is None
    other = build()
    other.record(noise(3_000, 6.0))
    other.discard()
    other.record(noise(99, 20.0))
    assert other.objection() is None


def test_a_successor_expects_the_same():
    surprise, successor = build(), build()
    surprise.record(noise(3_000, 6.0))
    successor.restore(surprise.metrics())
    assert successor.metrics() == surprise.metrics()
    successor.record(noise(150, 10.0))
    assert successor.objection() is not None


def test_what_is_no_number_is_left_out_and_turned_off_nothing_is_said():
    surprise = build(enabled=False)
    surprise.record(noise(3_000, 6.0))
    surprise.record(np.array([np.nan, np.inf]))
    surprise.record(noise(200, 30.0))
    assert surprise.objection() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_events": 1}, "surprise.newest_events=200: must be from surprise.min_events=1"),
        ({"newest_events": 5_000}, "surprise.newest_events=5000: must be from"),
        ({"max_increase": 0.0}, "max_increase must be above 0"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)
