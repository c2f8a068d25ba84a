"""A ranker that learns from visits: it finds a rhythm that no count can, and sees nothing of what it is to name."""

import numpy as np
import pytest

from cluster.errors import ConfigError, DataError
from training.baselines.baskets import PersonalFrequency
from training.baskets.features import DAY_S
from training.baskets.purchases import Purchases, Visits
from training.baskets.ranker import BasketConfig, BasketRanker

CONFIG = BasketConfig(cuts=6, days_between_cuts=5, rounds=40, least_in_leaf=5)
USERS, DAYS = 60, 120


def rhythm() -> Purchases:
    """Every user shops every five days: items 0 and 1 in turns, and one of the others at random."""
    rng = np.random.default_rng(0)
    bought = []
    for visit, day in enumerate(range(0, DAYS, 5)):
        for user in range(USERS):
            bought += [(user, (visit + user) % 2, day), (user, int(rng.integers(2, 12)), day)]
    rows = np.array(bought)
    return Purchases(user_row=rows[:, 0], item_row=rows[:, 1], ts_s=rows[:, 2] * DAY_S, users=USERS, items=12)


@pytest.fixture(scope="module")
def fitted() -> BasketRanker:
    return BasketRanker(np.zeros(12, np.int64), CONFIG).fit(rhythm())


def test_learns_whose_turn_it_is_where_counts_are_a_draw(fitted: BasketRanker) -> None:
    users, turn = np.arange(USERS), (DAYS // 5 + np.arange(USERS)) % 2
    named = fitted.scores(users, np.full(USERS, DAYS * DAY_S)).argmax(axis=1)
    assert (named == turn).mean() > 0.95
    counted = PersonalFrequency().fit(rhythm()).scores(users).argmax(axis=1)
    assert (counted == turn).mean() < 0.7


def test_same_seed_gives_the_same_scores_and_batches_do_not_matter(fitted: BasketRanker) -> None:
    again = BasketRanker(np.zeros(12, np.int64), CONFIG).fit(rhythm())
    at_s = np.full(3, DAYS * DAY_S)
    together = fitted.scores(np.array([5, 2, 9]), at_s)
    assert np.array_equal(again.scores(np.array([5, 2, 9]), at_s), together)
    for place, user in enumerate([5, 2, 9]):
        assert np.array_equal(fitted.scores(np.array([user]), at_s[:1])[0], together[place])


def test_visits_are_the_first_after_the_cut_of_those_known_before_it() -> None:
    rows = np.array([(0, 0, 1), (1, 1, 2), (0, 2, 5), (0, 3, 5), (2, 0, 6), (0, 4, 8), (1, 4, 9)])
    bought = Purchases(user_row=rows[:, 0], item_row=rows[:, 1], ts_s=rows[:, 2], users=3, items=5)
    visits = Visits.after(bought, 5, 9)
    assert visits.known.ts_s.tolist() == [1, 2]
    assert (visits.users.tolist(), visits.at_s.tolist()) == ([0], [5])  # user 1 comes too late, user 2 is not known
    assert visits.item_row.tolist() == [2, 3]


def test_without_a_second_visit_there_is_nothing_to_learn() -> None:
    once = Purchases(user_row=np.arange(2), item_row=np.arange(2), ts_s=np.arange(2), users=2, items=2)
    with pytest.raises(DataError, match="no user came again"):
        BasketRanker(np.zeros(2, np.int64), CONFIG).fit(once)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"cuts": 0}, "baskets.cuts=0: must be at least 1"),
        ({"leaves": 1}, "baskets.leaves=1: must be at least 2"),
        ({"learning_rate": 0.0}, "baskets.learning_rate=0.0: must be above 0"),
    ],
)
def test_a_setting_out_of_range_is_named(setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BasketConfig(**setting)


def test_the_newest_purchases_of_each_user_are_kept_in_order() -> None:
    rows = np.array([(0, 5, 1), (1, 6, 2), (0, 7, 3), (0, 8, 3), (1, 9, 4)])
    bought = Purchases(user_row=rows[:, 0], item_row=rows[:, 1], ts_s=rows[:, 2], users=2, items=10)
    assert bought.newest(2).item_row.tolist() == [6, 7, 8, 9]
    assert bought.newest(1).item_row.tolist() == [8, 9]
    assert bought.newest(9).item_row.tolist() == bought.item_row.tolist()


def test_of_too_many_visits_some_are_learned() -> None:
    visits = Visits.after(rhythm(), 50 * DAY_S, DAYS * DAY_S)
    some = visits.some(7, seed=1)
    assert len(some.users) == 7
    assert set(some.user_row.tolist()) == set(some.users.tolist())
    assert some.at_s.tolist() == visits.at_s_of(some.users).tolist()
    assert sorted(some.item_row.tolist()) == sorted(visits.item_row[np.isin(visits.user_row, some.users)].tolist())
    assert visits.some(60, seed=1) is visits
