"""Every leak is an error that says how much is wrong, and what is clean passes."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from cluster.errors import DataError
from training.evaluation.leakage import (
    check_excluded,
    check_not_fitted,
    check_pairs_not_fitted,
    check_scores,
    check_time_order,
)
from training.evaluation.lists import NO_ITEM

OWNED = sparse.csr_array(np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 2, 0]]))


def test_an_event_that_was_fitted_on_is_not_scored():
    fitted = pa.chunked_array([["a", "b"], ["c"]])
    check_not_fitted(fitted, pa.chunked_array([["d"], ["e"]]))
    check_not_fitted(pa.chunked_array([[]], pa.string()), pa.chunked_array([["d"]]))
    with pytest.raises(DataError, match="2 of 3 held-out events were fitted on"):
        check_not_fitted(fitted, pa.chunked_array([["d", "c", "a"]]))


def test_nor_is_a_users_item_that_was():
    check_pairs_not_fitted(OWNED, sparse.csr_array(np.array([[0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])))
    with pytest.raises(DataError, match="1 of 3 held-out interactions"):
        check_pairs_not_fitted(OWNED, sparse.csr_array(np.array([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])))


def test_the_future_is_not_fitted_on():
    check_time_order([1, 5, 3], [5, 6])
    check_time_order([], [1])
    with pytest.raises(DataError, match="1 of 2 held-out events are older"):
        check_time_order([1, 5, 3], [4, 6])


def test_a_list_does_not_name_what_is_left_out():
    check_excluded(np.array([[1, 2], [0, 3], [3, NO_ITEM]]), OWNED)
    with pytest.raises(DataError, match="1 of 3 lists name what was to be left out, such as list 2 with item 2"):
        check_excluded(np.array([[1, 2], [0, 3], [3, 2]]), OWNED)


def test_scores_are_numbers():
    check_scores(np.array([1.0, -np.inf]))
    for bad in (np.nan, np.inf):
        with pytest.raises(DataError, match="1 of 2 scores are not finite"):
            check_scores(np.array([1.0, bad]))
