"""Promotions: whether there is one, where and when, against going through all of them."""

import numpy as np
import pytest

from training.baskets.promotions import Promotions

PLACES, ITEMS = 3, 4
ROWS = [(0, 1, 10, 20), (0, 1, 20, 30), (1, 1, 15, 40), (2, 3, 10, 15), (0, 0, 35, 50)]
"""Place, item, from, until."""


@pytest.fixture(scope="module")
def promotions() -> Promotions:
    place, item, from_s, until_s = np.array(ROWS).T
    return Promotions.of(place, item, from_s, until_s, places=PLACES, items=ITEMS)


def asked() -> tuple[np.ndarray, ...]:
    grid = np.meshgrid(np.arange(PLACES), np.arange(ITEMS), np.arange(0, 60), indexing="ij")
    return tuple(part.ravel() for part in grid)


def test_each_place_item_and_time_is_answered_as_by_looking_through_all(promotions: Promotions) -> None:
    place, item, at_s = asked()
    told = promotions.at(place, item, at_s)
    for found, p, i, t in zip(told, place, item, at_s, strict=True):
        assert found == any((p, i) == row[:2] and row[2] <= t < row[3] for row in ROWS), (p, i, t)


def test_share_of_places_counts_them(promotions: Promotions) -> None:
    place, item, at_s = asked()
    shares = promotions.share_of_places(item, at_s)
    for share, i, t in zip(shares, item, at_s, strict=True):
        assert share == sum(i == row[1] and row[2] <= t < row[3] for row in ROWS) / PLACES
    assert len(place)


def test_where_the_place_is_not_known_nothing_is_promoted(promotions: Promotions) -> None:
    assert not promotions.at(np.array([-1, -1]), np.array([1, 3]), np.array([12, 12])).any()


def test_without_any_there_are_none() -> None:
    nothing = Promotions.of(*np.empty((4, 0), np.int64), places=PLACES, items=ITEMS)
    assert nothing.at(*asked()).sum() == 0
    assert nothing.share_of_places(*asked()[1:]).sum() == 0
