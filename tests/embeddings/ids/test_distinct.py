"""Distinct values by hashing."""

import numpy as np
import pytest

from cluster.errors import DataError
from embeddings.ids.distinct import distinct


def test_ids_come_in_order_of_first_occurrence() -> None:
    ids, inverse, counts = distinct(np.array([7, 3, 7, 9, 3, 7]))
    assert (ids.tolist(), inverse.tolist(), counts.tolist()) == ([7, 3, 9], [0, 1, 0, 2, 1, 0], [3, 2, 1])


def test_weights_are_summed() -> None:
    ids, _, counts = distinct(np.array([7, 3, 7]), np.array([10, 1, 5]))
    assert (ids.tolist(), counts.tolist()) == ([7, 3], [15, 1])


def test_nothing_has_no_distinct_values() -> None:
    assert [array.tolist() for array in distinct(np.empty(0, np.int64))] == [[], [], []]


@pytest.mark.parametrize("ids", [np.arange(1000), np.arange(1000) << 50, np.full(1000, 2**63 - 1), np.arange(1000) % 2])
def test_it_agrees_with_sorting(ids: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    values = rng.choice(ids, 5000)
    found, inverse, counts = distinct(values)
    by_id = np.argsort(found)
    expected, expected_counts = np.unique(values, return_counts=True)
    assert np.array_equal(found[by_id], expected)
    assert np.array_equal(counts[by_id], expected_counts)
    assert np.array_equal(found[inverse], values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([4, 0, -1, -2]), "id -1 at position 2: must be at least 0"),
        (np.array([4, 2**63, 2**64 - 1], np.uint64), "id 9223372036854775808 at position 1: .* below 2\\^63"),
        (np.array([-5], np.int8), "id -5 at position 0"),
        (np.array([1.0]), "ids are float64"),
        (np.array([[1]]), r"of shape \(1, 1\)"),
    ],
)
def test_what_is_no_id_is_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        distinct(values)
