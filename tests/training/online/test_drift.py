"""Drift of a figure's mean: seen soon after it happens, and hardly ever where there is none."""

import numpy as np
import pytest

from cluster.errors import ConfigError
from training.online.drift import DriftConfig, DriftDetector


def test_a_mean_that_moves_is_seen_with_its_direction_and_told_once():
    rng = np.random.default_rng(0)
    detector = DriftDetector(DriftConfig())
    detector.record({"new users": rng.random(2_000) < 0.2})
    assert detector.take() == []
    detector.record({"new users": rng.random(1_000) < 0.6})
    found = detector.take()
    assert found
    assert {drift.figure for drift in found} == {"new users"}
    assert found[0].before < 0.3
    assert all(drift.after > drift.before for drift in found)
    assert 2_000 < found[0].events < 2_200
    assert detector.take() == []


def test_figures_that_keep_their_mean_are_hardly_ever_called_drifting():
    alarms = 0
    for seed in range(20):
        detector = DriftDetector(DriftConfig())
        detector.record({"loss": np.random.default_rng(seed).exponential(5.0, 3_000)})
        alarms += len(detector.take())
    assert alarms <= 1


def test_each_figure_is_watched_by_itself_and_what_is_no_number_is_left_out():
    detector = DriftDetector(DriftConfig())
    steady, moving = np.full(600, 3.0), np.repeat([0.0, 1.0], 300)
    steady[50] = np.nan
    detector.record({"steady": steady, "moving": moving})
    assert {drift.figure for drift in detector.take()} == {"moving"}


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_a_setting_out_of_range_is_named(delta):
    with pytest.raises(ConfigError, match=rf"drift.delta={delta}: must be between 0 and 1"):
        DriftConfig(delta=delta)
