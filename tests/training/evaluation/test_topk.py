"""The best k items, held against sorting everything."""

import numpy as np
import pytest
import torch
from scipy import sparse

from cluster.errors import DataError
from training.evaluation import topk
from training.evaluation.leakage import check_excluded
from training.evaluation.lists import NO_ITEM
from training.evaluation.topk import popular_items, top_items, top_of_scores


def small_world(seed, users=300, items=500, dim=8):
    """Return vectors of small whole numbers, whose products are exact and often equal, and what users have."""
    rng = np.random.default_rng(seed)
    user, item = (rng.integers(-2, 3, (rows, dim)).astype(np.float32) for rows in (users, items))
    seen = sparse.random_array((users, items), density=0.1, format="csr", rng=rng, dtype=np.float32)
    return user, item, seen


def sorted_lists(score, seen, k):
    """Return the lists by sorting all scores, ties in order of rows."""
    score = np.where(seen.toarray() > 0, -np.inf, score)
    order = np.argsort(-score, axis=1, kind="stable")[:, :k]
    return np.where(np.isneginf(np.take_along_axis(score, order, axis=1)), NO_ITEM, order)


@pytest.mark.parametrize("k", [1, 10, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_lists_are_those_of_sorting_whatever_the_blocks(monkeypatch, k, threads):
    monkeypatch.setattr(topk, "USERS_AT_ONCE", 37)
    monkeypatch.setattr(topk, "ITEMS_AT_ONCE", 130)  # 500 items do not fit, nor do chunks of 64 into 130
    user, item, seen = small_world(seed=0)
    rows, scores = top_items(user, item, seen, k, threads=threads)
    assert rows.tolist() == sorted_lists(user @ item.T, seen, k).tolist()
    assert scores.tolist() == np.take_along_axis(user @ item.T, rows, axis=1).tolist()
    check_excluded(rows, seen)


def test_real_vectors_give_the_lists_of_torch():
    rng = np.random.default_rng(1)
    user, item = (rng.normal(size=(rows, 64)).astype(np.float32) for rows in (500, 3_000))
    rows, scores = top_items(user, item, sparse.csr_array((500, 3_000), dtype=np.float32), 10)
    values = (torch.from_numpy(user) @ torch.from_numpy(item).T).topk(10).values.numpy()
    assert scores == pytest.approx(values, rel=1e-5)
    assert np.take_along_axis(user @ item.T, rows, axis=1) == pytest.approx(values, rel=1e-5)


def test_scores_as_given_make_the_same_lists():
    user, item, seen = small_world(seed=2)
    assert top_of_scores(user @ item.T, seen, 10).tolist() == top_items(user, item, seen, 10)[0].tolist()


def test_where_nothing_is_left_places_stay_empty():
    scores = np.array([[1.0, 2.0, 3.0], [1.0, -np.inf, 0.0]], np.float32)
    seen = sparse.csr_array(np.array([[0, 1, 1], [0, 0, 0]]))
    assert top_of_scores(scores, seen, 4).tolist() == [[0, -1, -1, -1], [0, 2, -1, -1]]


def test_popular_items_are_those_of_a_system_that_scores_everyone_alike():
    _user, _item, seen = small_world(seed=5)
    count = np.random.default_rng(6).integers(0, 20, 500)
    lists = popular_items(count, seen, 10)
    assert lists.tolist() == top_of_scores(np.tile(count.astype(np.float32), (300, 1)), seen, 10).tolist()
    everything = sparse.csr_array(np.ones((1, 3)))
    assert popular_items(np.array([1, 2, 3]), everything, 2).tolist() == [[NO_ITEM, NO_ITEM]]


def test_entries_in_any_order_are_left_out():
    seen = sparse.csr_array((np.ones(3), np.array([2, 0, 1]), np.array([0, 3])), shape=(1, 4))
    assert top_of_scores(np.ones((1, 4), np.float32), seen, 2).tolist() == [[3, -1]]


def test_threads_of_torch_are_as_before():
    before = torch.get_num_threads()
    user, item, seen = small_world(seed=3)
    top_items(user, item, seen, 5)
    assert torch.get_num_threads() == before


def test_what_has_no_order_is_an_error():
    user, item, seen = small_world(seed=4)
    for bad in (np.nan, np.inf, 1e38):
        broken = item.copy()
        broken[7, 3] = bad
        with pytest.raises(DataError, match="not finite"):
            top_items(user, broken, seen, 5)
    with pytest.raises(DataError, match="1 of 6 scores are not finite"):
        top_of_scores(np.array([[1, np.nan, 0], [1, 2, 3]], np.float32), seen[:2], 2)
