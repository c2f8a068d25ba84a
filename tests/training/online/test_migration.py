"""From one encoder's vectors to another's: a bridge that says what it costs, and items that stay where they were."""

import numpy as np
import pytest
import torch

from training.models.placing import PROJECT, Regression, restart_moments
from training.online.migration import RIDGE, bridge, neighbour_recall, refit_projection


def unit(vector_NE: np.ndarray) -> np.ndarray:
    return vector_NE / np.linalg.norm(vector_NE, axis=1, keepdims=True)


@pytest.fixture
def old() -> np.ndarray:
    return unit(np.random.default_rng(0).normal(size=(200, 8))).astype(np.float32)


@pytest.fixture
def turned(old: np.ndarray) -> np.ndarray:
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    return (old @ rotation).astype(np.float32)


def test_what_is_a_turn_of_the_old_space_is_bridged_without_loss(old: np.ndarray, turned: np.ndarray) -> None:
    is_encoded = np.arange(200) < 100
    found = bridge(old, np.where(is_encoded[:, None], turned, 0), is_encoded)
    np.testing.assert_allclose(found.vector_NE, turned, atol=5e-3)
    assert found.recall is not None
    assert found.recall > 0.95
    assert found.coverage == 0.5


def test_what_has_nothing_to_do_with_the_old_space_is_told_by_recall(old: np.ndarray) -> None:
    other = unit(np.random.default_rng(2).normal(size=(200, 8))).astype(np.float32)
    found = bridge(old, other, np.arange(200) < 150)
    assert found.recall is not None
    assert found.recall < 0.4
    np.testing.assert_array_equal(found.vector_NE[:150], other[:150])


def test_all_encoded_is_no_bridge(old: np.ndarray, turned: np.ndarray) -> None:
    found = bridge(old, turned, np.ones(200, bool))
    assert (found.recall, found.coverage) == (None, 1.0)
    assert found.vector_NE is turned


def test_an_empty_text_stays_the_zero_vector(old: np.ndarray, turned: np.ndarray) -> None:
    old[150] = 0
    found = bridge(old, turned, np.arange(200) < 100)
    assert not found.vector_NE[150].any()


def test_recall_of_neighbours_by_hand() -> None:
    among = np.eye(12)
    assert neighbour_recall(among[:1], among[:1], among) == 1.0
    turned = np.linspace(1, 0, 12)[None]
    assert neighbour_recall(turned, -turned, among) == 8 / 10  # ten of twelve each: the ends differ by two


def test_ridge_follows_weights() -> None:
    one = np.array([[1.0], [1.0]])
    assert Regression.of(one, np.array([[0.0], [4.0]]), np.array([1.0, 3.0])).solve(RIDGE)[0, 0] == pytest.approx(
        3.0, rel=5e-3
    )


def test_items_stay_where_they_were_and_the_rest_of_the_weights_as_they_are(
    old: np.ndarray, turned: np.ndarray
) -> None:
    dense = {PROJECT: torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), "other": torch.ones(2)}
    before, after = torch.from_numpy(old), torch.from_numpy(turned)
    found, moved = refit_projection(dense, before, after, torch.ones(200))
    torch.testing.assert_close(after @ found[PROJECT].T, before @ dense[PROJECT].T, atol=2e-2, rtol=0)
    assert moved < 0.01
    assert found["other"] is dense["other"]


def test_what_adam_knew_of_the_old_projection_is_forgotten() -> None:
    found = restart_moments({f"{PROJECT}.exp_avg": torch.ones(2), "other.exp_avg": torch.ones(2)})
    assert found[f"{PROJECT}.exp_avg"].tolist() == [0, 0]
    assert found["other.exp_avg"].tolist() == [1, 1]
