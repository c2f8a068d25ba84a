"""What lists are like besides right, by hand and against the definitions written out pair by pair."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cosine

from training.evaluation import beyond_accuracy
from training.evaluation.beyond_accuracy import (
    category_vectors,
    coverage,
    diversity,
    exposure,
    gini,
    novelty,
    popularity,
    serendipity,
    unit_vectors,
)
from training.evaluation.lists import NO_ITEM, find_hits

TOP = np.array([[0, 1, 2], [0, 1, NO_ITEM], [0, NO_ITEM, NO_ITEM]])
COUNT = np.array([8, 2, 0, 5])


def random_lists(seed, lists=100, items=50, k=6):
    rng = np.random.default_rng(seed)
    top = rng.permuted(np.tile(np.arange(items), (lists, 1)), axis=1)[:, :k]
    top[rng.random(lists) < 0.3, k // 2 :] = NO_ITEM
    return top


def test_coverage_counts_items_in_any_list():
    assert exposure(TOP, 4).tolist() == [3, 2, 1, 0]
    assert coverage(exposure(TOP, 4)) == 3 / 4


def test_gini_by_hand_and_at_its_ends():
    # 0, 1, 2, 3 ascending: (-3·0 - 1·1 + 1·2 + 3·3) / (4·6)
    assert gini(np.array([3, 2, 1, 0])) == pytest.approx(float(Fraction(10, 24)), abs=1e-15)
    assert gini(np.full(7, 3)) == pytest.approx(0, abs=1e-15)
    assert gini(np.array([0, 0, 0, 9])) == pytest.approx(3 / 4, abs=1e-15)
    assert gini(np.zeros(4)) == 0


def test_gini_is_half_the_mean_difference_of_any_two_items_over_the_mean():
    exposure_I = np.random.default_rng(0).integers(0, 30, 80)
    differences = np.abs(exposure_I[:, None] - exposure_I).mean()
    assert gini(exposure_I) == pytest.approx(differences / (2 * exposure_I.mean()), abs=1e-12)


def test_novelty_is_the_bits_of_what_few_have():
    # Of 8 users 8, 2 and (taken as) 1 have the items: 0, 2 and 3 bits.
    assert novelty(TOP, COUNT, 8).tolist() == [5 / 3, 1, 0]
    assert novelty(np.full((1, 2), NO_ITEM), COUNT, 8).tolist() == [0]


def test_popularity_is_the_mean_number_of_users():
    assert popularity(TOP, COUNT) == pytest.approx([10 / 3, 5, 8], abs=1e-15)


def test_diversity_by_hand():
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    unit = unit_vectors(vectors)
    # 0 and 1 are at right angles, 0 and 2 opposite, 1 and 2 at right angles; 3 is unknown and like none.
    assert diversity(TOP, unit).tolist() == [float(Fraction(1 + 2 + 1, 3)), 1, 0]
    assert diversity(np.array([[0, 3]]), unit).tolist() == [1]


def test_diversity_is_the_mean_distance_of_all_pairs(monkeypatch):
    monkeypatch.setattr(beyond_accuracy, "BLOCK", 7)  # 100 lists do not fit
    top, vectors = random_lists(seed=1), np.random.default_rng(2).normal(size=(50, 8))
    expected = [
        np.mean([cosine(vectors[i], vectors[j]) for i, j in combinations(row[row != NO_ITEM], 2)]) for row in top
    ]
    assert diversity(top, unit_vectors(vectors)) == pytest.approx(expected, abs=1e-9)
    assert diversity(top, sparse.csr_array(unit_vectors(vectors))) == pytest.approx(expected, abs=1e-9)


def test_items_are_alike_as_far_as_they_share_categories():
    vectors = category_vectors([["drama", "war"], ["war"], [], ["drama", "war", "war"]])
    # {drama, war} and {war}: 1/√2; equal sets are at no distance; without categories an item is like none.
    assert diversity(np.array([[0, 1], [0, 3], [0, 2]]), vectors) == pytest.approx([1 - 0.5**0.5, 0, 1], abs=1e-12)
    assert diversity(np.array([[0, 1]]), category_vectors([[], []])).tolist() == [1]


def test_serendipity_leaves_out_what_popularity_would_have_named():
    relevant = sparse.csr_array(np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]))
    popular = np.array([[1, 3], [3, 2], [0, 1]])
    hits = find_hits(TOP, relevant)
    assert serendipity(hits, TOP, popular, 3) == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-15)
    assert serendipity(hits, TOP, popular, 1).tolist() == [1, 1, 0]


def test_what_popularity_names_itself_is_never_serendipitous():
    top = random_lists(seed=3)
    rng = np.random.default_rng(4)
    relevant = sparse.csr_array(rng.random((100, 50)) < 0.5)
    relevant = sparse.csr_array(relevant.astype(float))
    hits = find_hits(top, relevant)
    assert not serendipity(hits, top, top, 6).any()
    nothing = np.full((100, 1), NO_ITEM)
    assert serendipity(hits, top, nothing, 6).tolist() == (hits.hit_BK.sum(axis=1) / 6).tolist()


def test_order_of_a_list_and_of_the_lists_does_not_matter():
    top = random_lists(seed=5)
    rng = np.random.default_rng(6)
    count, unit = rng.integers(0, 40, 50), unit_vectors(rng.normal(size=(50, 4)))
    shuffled, order = rng.permuted(top, axis=1), rng.permutation(100)
    for measure in (lambda t: novelty(t, count, 40), lambda t: popularity(t, count), lambda t: diversity(t, unit)):
        assert measure(shuffled) == pytest.approx(measure(top), abs=1e-12)
        assert measure(top[order]) == pytest.approx(measure(top)[order], abs=1e-12)
    assert (novelty(top, count, 40) >= 0).all()
    assert ((diversity(top, unit) >= 0) & (diversity(top, unit) <= 2)).all()
