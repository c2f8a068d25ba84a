"""Leave one out, by hand: what is held out, what is left out of the ranking, ties, and bad scores."""

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import DataError
from training.baselines.popularity import Popularity
from training.evaluation.holdout import NONE, leave_one_out, rank_of

EVENTS = pa.table(
    {
        "user_id": ["a", "b", "a", "c", "a", "b", "a", "d", "d"],
        "item_id": ["x", "x", "y", "z", "x", "z", "z", "y", "z"],
    }
)
"""a: x y (x) z, b: x z, c: z, d: y z."""


class Fixed:
    """A system that scores everyone alike."""

    def __init__(self, *scores: float) -> None:
        self._scores = np.array(scores, np.float32)

    def scores(self, seen_BI, user_row_B):
        return np.tile(self._scores, (seen_BI.shape[0], 1))


def test_the_last_of_each_user_is_the_test_and_the_one_before_it_validation():
    split = leave_one_out(EVENTS)
    assert (split.user_ids, split.item_ids) == (["a", "b", "c", "d"], ["x", "y", "z"])
    assert split.test_U.tolist() == [2, 2, NONE, 2]
    assert split.validation_U.tolist() == [1, NONE, NONE, NONE]
    assert split.fitted_UI.toarray().tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_what_a_user_has_and_the_validation_item_do_not_rank():
    split = leave_one_out(EVENTS)
    assert split.ranks(Fixed(3.0, 2.0, 1.0)).tolist() == [1, 2, 0, 2]
    assert split.ranks(Fixed(3.0, 2.0, 1.0), validation=True).tolist() == [1, 0, 0, 0]


def test_of_equals_those_before_are_above():
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [5.0, 1.0, 5.0]])
    assert rank_of(scores, np.array([2, 1, 0])).tolist() == [3, 1, 1]


def test_ranks_are_those_of_sorting():
    rng = np.random.default_rng(0)
    scores, item_row = rng.integers(0, 5, (50, 30)).astype(float), rng.integers(0, 30, 50)
    order = np.argsort(-scores, axis=1, kind="stable")
    assert rank_of(scores, item_row).tolist() == (np.argmax(order == item_row[:, None], axis=1) + 1).tolist()


def test_a_score_that_is_not_a_number_is_an_error():
    with pytest.raises(DataError, match="not finite"):
        leave_one_out(EVENTS).ranks(Fixed(1.0, float("nan"), 0.0))


def test_nobody_with_two_items_is_an_error():
    with pytest.raises(DataError, match="two items"):
        leave_one_out(EVENTS.slice(0, 2))


def test_batches_do_not_show():
    rng = np.random.default_rng(1)
    user_N, item_N = rng.integers(0, 600, 6_000), rng.integers(0, 40, 6_000)
    events = pa.table({"user_id": [f"u{u}" for u in user_N], "item_id": [f"i{i}" for i in item_N]})
    split = leave_one_out(events)
    model = Popularity().fit(split.fitted_UI)
    ranks = split.ranks(model)
    seen = split.fitted_UI.toarray() > 0
    for user in range(0, len(ranks), 37):
        left = [i for i in range(40) if not seen[user, i] and i != split.validation_U[user]]
        order = sorted(left, key=lambda i: (-model.popularity_I[i], i))
        assert ranks[user] == order.index(split.test_U[user]) + 1
