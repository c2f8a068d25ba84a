"""The index finds what an exact search finds, nearly always, and what has changed at once."""

import numpy as np
import pytest
import torch

from cluster.errors import ConfigError
from embeddings.index import IndexConfig, ItemIndex

ITEMS, DIM, USERS = 20_000, 16, 50
NONE = np.empty(0, np.int64)


def draw(rows, seed, centres=200):
    """Return vectors that lie about centres, as learned ones do."""
    generator = torch.Generator().manual_seed(seed)
    centre_CD = torch.randn(centres, DIM, generator=torch.Generator().manual_seed(0))
    return centre_CD[torch.randint(centres, (rows,), generator=generator)] + 0.5 * torch.randn(
        rows, DIM, generator=generator
    )


@pytest.fixture(scope="module")
def items():
    return draw(ITEMS, 1)


@pytest.fixture(scope="module")
def index(items):
    return ItemIndex.build(items, draw(USERS, 2), IndexConfig())


def recall(index, items, users, k=100):
    found = [set(index.search(user, items, k, NONE).tolist()) for user in users]
    right = [(items @ user).topk(k).indices.tolist() for user in users]
    return np.mean([len(some.intersection(best)) / k for some, best in zip(found, right, strict=True)])


def test_users_who_did_not_tune_it_find_nearly_all_of_the_best(index, items):
    assert index.probes < index.lists.nlist / 2
    assert recall(index, items, draw(USERS, 3)) >= 0.98


def test_what_is_found_is_in_the_order_of_exact_scores(index, items):
    user = draw(1, 4)[0]
    scores = items[index.search(user, items, 100, NONE)] @ user
    assert torch.equal(scores, scores.sort(descending=True).values)


def test_what_is_excluded_is_not_found_and_others_take_its_place(index, items):
    user = draw(1, 5)[0]
    best = index.search(user, items, 50, NONE).numpy()
    after = index.search(user, items, 50, best)
    assert len(after) == 50
    assert not set(best.tolist()) & set(after.tolist())


def test_where_too_few_are_left_the_caller_is_told(index, items):
    assert index.search(draw(1, 6)[0], items, 100, np.arange(ITEMS - 10)) is None


def test_vectors_that_have_moved_and_new_ones_are_found_at_once(index, items):
    user = draw(1, 7)[0]
    now_ID = torch.cat([items, 10 * user[None]])  # a new item
    worst = int((items @ user).argmin())
    now_ID[worst] = 20 * user
    after = index.over(now_ID)
    assert after is not None
    assert after.search(user, now_ID, 2, NONE).tolist() == [worst, ITEMS]
    assert after.over(items).search(user, items, 1, NONE).tolist() != [worst]


def test_an_item_that_has_moved_away_is_not_shown_by_where_it_was(index, items):
    user = draw(1, 8)[0]
    best = int((items @ user).argmax())
    now_ID = items.clone()
    now_ID[best] = -user
    assert best not in index.over(now_ID).search(user, now_ID, 100, NONE).tolist()


def test_where_much_has_moved_it_is_to_be_made_anew(index, items):
    now_ID = items.clone()
    now_ID[: ITEMS // 10] += 1
    assert index.over(now_ID) is None
    assert index.over(items[:-1]) is None
    assert index.over(items + 1e-4) is not None  # all of them, by next to nothing


@pytest.mark.parametrize("wrong", [{"exact_up_to": 0}, {"recall": 0.0}, {"recall": 1.1}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=rf"index\.{next(iter(wrong))}="):
        IndexConfig(**wrong)
