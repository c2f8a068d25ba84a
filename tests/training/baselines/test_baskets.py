"""Who buys again: personal frequency and TIFU-KNN, in fractions that can be worked out by hand."""

import numpy as np
import pytest

from training.baselines.baskets import PersonalFrequency, TifuKnn
from training.baskets.purchases import Purchases

DAY = 86_400


def purchases(*bought: tuple[int, int, int], users: int = 3, items: int = 4) -> Purchases:
    """Of (user, item, day)."""
    rows = np.array(bought).reshape(-1, 3)
    return Purchases(user_row=rows[:, 0], item_row=rows[:, 1], ts_s=rows[:, 2] * DAY, users=users, items=items)


BOUGHT = purchases((0, 0, 0), (0, 1, 0), (1, 0, 1), (0, 1, 10), (1, 2, 11), (0, 1, 20), (0, 3, 20))
"""User 0: {0 1}, {1}, {1 3}; user 1: {0}, {2}; user 2 bought nothing."""


def test_ages_count_the_baskets_since() -> None:
    assert BOUGHT.ages().tolist() == [2, 2, 1, 1, 0, 0, 0]
    assert BOUGHT.before(11 * DAY).ages().tolist() == [1, 1, 0, 0]


def test_what_was_bought_most_often_is_first_and_the_popular_before_what_nobody_bought() -> None:
    scores = PersonalFrequency().fit(BOUGHT).scores(np.arange(3))
    assert np.argsort(-scores[0], kind="stable").tolist() == [1, 0, 3, 2]  # 3 times; once each, 0 by two users
    assert np.argsort(-scores[1], kind="stable").tolist() == [0, 2, 1, 3]
    assert np.argsort(-scores[2], kind="stable").tolist() == [1, 0, 2, 3]


def test_a_purchase_counts_half_after_a_half_life() -> None:
    often = purchases((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 20), users=1, items=2)
    # Three times by 1/4 and a little, against once now.
    assert np.argsort(-PersonalFrequency().fit(often).scores(np.array([0]))[0]).tolist() == [0, 1]
    assert np.argsort(-PersonalFrequency(half_life_days=10).fit(often).scores(np.array([0]))[0]).tolist() == [1, 0]


def test_what_all_buy_never_overtakes_what_a_user_buys_more_often() -> None:
    everyone = [(user, 1, 20) for user in range(1, 21)]
    bought = purchases((0, 0, 11), (0, 1, 10), (0, 2, 0), *everyone, users=22, items=4)
    model = PersonalFrequency(half_life_days=10).fit(bought)
    own = np.array([0.5**0.9, 1 / 2, 1 / 4, 0])
    half_popular = np.array([0.5**0.9, 20 + 1 / 2, 1 / 4, 0]) / 41
    room = np.array([own[0], own[0] - 1 / 2, 1 / 2 - 1 / 4, 1 / 4])  # to the next larger weight
    assert model.scores(np.array([0]))[0] == pytest.approx(own + room * half_popular, rel=1e-6)
    assert np.argsort(-model.scores(np.array([0]))[0]).tolist() == [0, 1, 2, 3]
    assert model.scores(np.array([21]))[0] == pytest.approx(half_popular, rel=1e-6)  # who bought nothing


def test_of_items_bought_as_often_the_popular_comes_first_however_old_another_purchase() -> None:
    bought = purchases((0, 2, 0), (0, 0, 400), (0, 1, 400), (1, 1, 400), users=2, items=3)
    scores = PersonalFrequency(half_life_days=10).fit(bought).scores(np.array([0]))[0]
    assert scores == pytest.approx([1 + 1 / 4, 1 + 1 / 2, 0], rel=1e-6, abs=1e-11)  # the old one weighs 0.5^40
    assert scores[2] > 0


def test_scores_are_the_same_whoever_else_is_asked_about() -> None:
    model = PersonalFrequency(half_life_days=10).fit(BOUGHT)
    together = model.scores(np.array([2, 0, 1, 0]))
    for place, user in enumerate([2, 0, 1, 0]):
        assert np.array_equal(together[place], model.scores(np.array([user]))[0])
    assert model.scores(np.empty(0, np.int64)).shape == (0, 4)


def test_tifu_fades_baskets_within_a_group_and_groups() -> None:
    model = TifuKnn(group_baskets=2, within_decay=0.5, group_decay=0.25, neighbours=1, own_share=1.0).fit(BOUGHT)
    # Ages 2, 1, 0: the group of two newest by 1/2 and 1, the one before by 1/4; the mean of three baskets.
    expected = np.array([1 / 4, 1 / 4 + 1 / 2 + 1, 0, 1]) / 3
    assert model.scores(np.array([0]))[0] == pytest.approx(expected, abs=1e-5)


def test_tifu_mixes_in_the_nearest_others() -> None:
    alike = purchases((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 3, 0))
    scores = TifuKnn(neighbours=1, own_share=0.75).fit(alike).scores(np.arange(3))
    assert scores[0] == pytest.approx([1, 1, 1 / 4, 0], abs=1e-5)  # user 1 is nearest, and nobody is their own


def test_who_bought_nothing_gets_what_is_popular() -> None:
    scores = TifuKnn(neighbours=1, own_share=1.0).fit(BOUGHT).scores(np.array([2]))[0]
    assert np.argsort(-scores, kind="stable").tolist() == [1, 0, 2, 3]
