"""Metrics of lists, against fractions worked out by hand, torchmetrics, and the metrics made from ranks."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import sparse
from torchmetrics.functional import retrieval

from cluster.errors import DataError
from training.evaluation import metrics
from training.evaluation.lists import LIST_METRICS, NO_ITEM, find_hits, list_values

TOP = [[3, 0, 4, 1], [2, 5, NO_ITEM, NO_ITEM], [1, 0, 2, 3]]
RELEVANT = [[0, 1, 2], [5], [4, 5]]


def relevant_matrix(rows, items=6):
    indptr = np.cumsum([0, *map(len, rows)])
    return sparse.csr_array((np.ones(indptr[-1]), np.concatenate(rows), indptr), shape=(len(rows), items))


def random_lists(seed, lists=200, items=40, k=10):
    """Return lists and relevant items: one to fifteen a list."""
    rng = np.random.default_rng(seed)
    top = rng.permuted(np.tile(np.arange(items), (lists, 1)), axis=1)[:, :k]
    relevant = [rng.permutation(items)[: rng.integers(1, 16)] for _ in range(lists)]
    return top, relevant_matrix(relevant, items)


def test_values_are_those_worked_out_by_hand():
    # The first list has hits at 2 and 4 of three relevant items, the second at 2 of one, the third none of two.
    hits = find_hits(TOP, relevant_matrix(RELEVANT))
    values = list_values(hits, 4)
    first = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 1 / 2)
    expected = {
        "ndcg_at_4": [first, 1 / math.log2(3), 0],
        "hit_at_4": [1, 1, 0],
        "recall_at_4": [Fraction(2, 3), 1, 0],
        "precision_at_4": [Fraction(2, 4), Fraction(1, 4), 0],
        "f1_at_4": [Fraction(4, 7), Fraction(2, 5), 0],
        "mrr_at_4": [Fraction(1, 2), Fraction(1, 2), 0],
        "map_at_4": [(Fraction(1, 2) + Fraction(2, 4)) / 3, Fraction(1, 2), 0],
    }
    assert list(values) == list(expected)
    for name, value in values.items():
        assert value == pytest.approx([float(entry) for entry in expected[name]], abs=1e-15), name


def test_fewer_places_than_are_relevant_can_still_be_perfect():
    hits = find_hits([[2, 0]], relevant_matrix([[0, 1, 2]]))
    assert {name: metric(hits, 2)[0] for name, metric in LIST_METRICS.items()} == pytest.approx(
        {"ndcg": 1, "hit": 1, "recall": 2 / 3, "precision": 1, "f1": 4 / 5, "mrr": 1, "map": 1}
    )


def test_a_list_may_be_longer_or_shorter_than_k():
    hits = find_hits([[3, 0, 4, 1]], relevant_matrix([[1]]))
    assert list_values(hits, 3) == dict.fromkeys(list_values(hits, 3), 0)
    assert LIST_METRICS["precision"](hits, 10)[0] == 1 / 10
    assert LIST_METRICS["ndcg"](hits, 10)[0] == pytest.approx(1 / math.log2(5), abs=1e-15)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_values_are_those_of_torchmetrics(k):
    top, relevant = random_lists(seed=0)
    values = list_values(find_hits(top, relevant), k)
    score = np.zeros(relevant.shape)
    np.put_along_axis(score, top, np.arange(top.shape[1], 0, -1.0)[None], axis=1)
    score, target = torch.from_numpy(score), torch.from_numpy(relevant.toarray()).long()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for row, (score_I, target_I) in enumerate(zip(score, target, strict=True)):
            relevant_count = int(target_I.sum())
            found_I = target_I * (score_I >= score_I.topk(k).values[-1])
            peers = {
                "ndcg": retrieval.retrieval_normalized_dcg(score_I, target_I, k),
                "hit": retrieval.retrieval_hit_rate(score_I, target_I, k),
                # These come in single precision, but stand for whole numbers of hits.
                "recall": round(float(retrieval.retrieval_recall(score_I, target_I, k)) * relevant_count)
                / relevant_count,
                "precision": round(float(retrieval.retrieval_precision(score_I, target_I, k)) * k) / k,
                "mrr": retrieval.retrieval_reciprocal_rank(score_I, found_I),
            }
            for name, peer in peers.items():
                assert values[f"{name}_at_{k}"][row] == pytest.approx(float(peer), abs=1e-9), name
            # Theirs divides by the hits found, ours by those that k places could have held; single precision.
            precision = float(retrieval.retrieval_average_precision(score_I, target_I, k))
            share = int(found_I.sum()) / min(k, relevant_count)
            assert values[f"map_at_{k}"][row] == pytest.approx(precision * share, abs=1e-6)
    finally:
        torch.set_default_dtype(default)


def test_average_precision_is_the_sum_of_its_definition():
    top, relevant = random_lists(seed=1)
    for k in (1, 4, 10):
        values = LIST_METRICS["map"](find_hits(top, relevant), k)
        for row, value in enumerate(values):
            wanted = set(relevant.indices[relevant.indptr[row] : relevant.indptr[row + 1]].tolist())
            found, total = 0, Fraction(0)
            for place, item in enumerate(top[row, :k].tolist(), 1):
                if item in wanted:
                    found += 1
                    total += Fraction(found, place)
            assert value == pytest.approx(float(total / min(k, len(wanted))), abs=1e-12)


def test_with_one_relevant_item_lists_and_ranks_agree():
    rng = np.random.default_rng(2)
    top = rng.permuted(np.tile(np.arange(30), (300, 1)), axis=1)[:, :12]
    wanted = rng.integers(0, 30, 300)
    found = top == wanted[:, None]
    ranks = np.where(found.any(axis=1), found.argmax(axis=1) + 1, 0)
    hits = find_hits(top, relevant_matrix(wanted[:, None], 30))
    for k in (1, 5, 10, 12):
        assert LIST_METRICS["hit"](hits, k).tolist() == metrics.hit_at_k(ranks, k).tolist()
        assert LIST_METRICS["recall"](hits, k).tolist() == metrics.hit_at_k(ranks, k).tolist()
        assert LIST_METRICS["ndcg"](hits, k) == pytest.approx(metrics.ndcg_at_k(ranks, k), abs=1e-15)
        assert LIST_METRICS["map"](hits, k) == pytest.approx(LIST_METRICS["mrr"](hits, k), abs=1e-15)


def test_values_lie_between_0_and_1_and_do_not_know_the_order_of_users_or_the_names_of_items():
    top, relevant = random_lists(seed=3)
    values = list_values(find_hits(top, relevant), 10)
    rng = np.random.default_rng(4)
    order, names = rng.permutation(len(top)), rng.permutation(relevant.shape[1])
    renamed = sparse.csr_array((relevant.data, names[relevant.indices], relevant.indptr), shape=relevant.shape)
    again = list_values(find_hits(names[top][order], sparse.csr_array(renamed[order])), 10)
    for name, value in values.items():
        assert ((value >= 0) & (value <= 1)).all()
        assert again[name].tolist() == value[order].tolist()


def test_moving_a_hit_up_is_never_worse():
    top, relevant = random_lists(seed=5)
    hits = find_hits(top, relevant)
    sorted_hits = find_hits(np.take_along_axis(top, np.argsort(~hits.hit_BK, axis=1, kind="stable"), axis=1), relevant)
    for k in (3, 10):
        for name, value in list_values(hits, k).items():
            assert (list_values(sorted_hits, k)[name] >= value - 1e-15).all()


def test_what_cannot_be_judged_is_an_error():
    relevant = relevant_matrix(RELEVANT)
    for top, said in (
        (TOP[:2], "2 lists of items, but relevant ones of 3"),
        ([[0, 0], [1, 2], [3, 4]], "list 0 names item 0 twice"),
        ([[0, 6], [1, 2], [3, 4]], "rows go from 0 to 5"),
    ):
        with pytest.raises(DataError, match=said):
            find_hits(top, relevant)
    with pytest.raises(DataError, match="1 of 2 lists have nothing relevant"):
        find_hits([[0], [1]], relevant_matrix([[0], []]))
    with pytest.raises(DataError, match="k=0"):
        list_values(find_hits([[0]], relevant_matrix([[0]])), 0)
