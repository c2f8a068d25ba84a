"""Which items stand for stated interests, by numbers that can be checked by hand."""

import numpy as np

from training.models.interests import MATCH_WEIGHT, MATCHES, WEIGHT, Interests, combine, is_buried, match_items, weigh

NONE = np.empty((0, 2), np.float32)
LIKED, DISLIKED = np.eye(2, dtype=np.float32)
TEXT_IE = np.array([LIKED] * 12 + [DISLIKED] * 12, np.float32)
FLAT = np.zeros(24, np.float32)


def test_items_that_match_are_taken_and_the_most_popular_of_them_is_last():
    popularity_I = np.arange(24, dtype=np.float32) / 24
    found = match_items(Interests(liked_E=LIKED, disliked_NE=NONE), TEXT_IE, popularity_I / 100)
    assert MATCHES == 10
    assert 0 < MATCH_WEIGHT < 1
    popular = match_items(Interests(liked_E=None, disliked_NE=NONE), TEXT_IE, popularity_I)
    assert popular.tolist() == list(range(14, 24))
    assert found[-1] == 11 or found[-1] == 23
    assert set(found) & set(range(12))


def test_of_equally_popular_items_those_that_match_are_taken():
    found = match_items(Interests(liked_E=LIKED, disliked_NE=NONE), TEXT_IE, FLAT)
    assert set(found) <= set(range(12))


def test_what_is_disliked_does_not_stand_for_the_interests():
    found = match_items(Interests(liked_E=None, disliked_NE=DISLIKED[None]), TEXT_IE, FLAT)
    assert set(found) <= set(range(12))


def test_items_all_alike_are_taken_in_order():
    found = match_items(Interests(liked_E=LIKED, disliked_NE=NONE), np.tile(LIKED, (24, 1)), FLAT)
    assert found.tolist() == list(range(9, -1, -1))


def test_the_tenth_most_like_something_disliked_is_buried():
    angle_I = np.linspace(0, np.pi / 2, 100)
    text_IE = np.stack([np.cos(angle_I), np.sin(angle_I)], 1).astype(np.float32)
    buried = is_buried(Interests(liked_E=None, disliked_NE=DISLIKED[None]), text_IE, text_IE)
    assert np.flatnonzero(buried).tolist() == list(range(90, 100))
    assert not is_buried(Interests(liked_E=LIKED, disliked_NE=NONE), text_IE, text_IE).any()


def test_what_is_most_like_any_of_the_things_disliked_is_buried_as_by_each_alone() -> None:
    angle_I = np.linspace(0, np.pi / 2, 100)
    text_IE = np.stack([np.cos(angle_I), np.sin(angle_I)], 1).astype(np.float32)
    both = Interests(liked_E=None, disliked_NE=np.stack([LIKED, DISLIKED]))
    assert np.flatnonzero(is_buried(both, text_IE[::5], text_IE)).tolist() == [0, 1, 18, 19]


def test_the_weight_of_interests_falls_with_each_interaction() -> None:
    assert [weigh(count) / WEIGHT for count in (0, 1, 4)] == [1, 1 / 2, 1 / 5]


def test_what_is_disliked_counts_against_what_is_liked_over_each_one_s_spread() -> None:
    liked_I, disliked_I = np.array([1, 3], np.float32), np.array([10, 30], np.float32)
    assert combine(liked_I, []).tolist() == [-1, 1]
    assert combine(liked_I, [disliked_I]).tolist() == [0, 0]
    assert combine(None, [disliked_I, disliked_I]).tolist() == [2, -2]
    assert combine(np.ones(2, np.float32), []).tolist() == [0, 0]
