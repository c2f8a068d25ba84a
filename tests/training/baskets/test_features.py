"""What tells of the next basket, in figures that can be worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from training.baskets.features import DAY_S, GENERAL, Candidates, ItemFacts, feature_names, find_candidates
from training.baskets.promotions import Promotions
from training.baskets.purchases import Purchases

HOUR_S = 3_600
CATEGORY_I = np.array([0, 0, 1, 1, 2])


def purchases(*bought: tuple[int, int, float], users: int = 3, items: int = 5) -> Purchases:
    """Of (user, item, day)."""
    rows = np.array(bought, np.float64).reshape(-1, 3)
    ts_s = (rows[:, 2] * DAY_S).astype(np.int64)
    return Purchases(
        user_row=rows[:, 0].astype(np.int64), item_row=rows[:, 1].astype(np.int64), ts_s=ts_s, users=users, items=items
    )


BOUGHT = purchases((0, 0, 0), (0, 1, 0), (1, 2, 1), (0, 0, 10), (1, 2, 15), (1, 3, 15), (0, 0, 20), (0, 2, 20))
"""User 0: {0 1}, {0}, {0 2} on days 0, 10 and 20; user 1: {2}, {2 3} on days 1 and 15; user 2 bought nothing."""
VISIT_S_U = np.array([24, 22, 30]) * DAY_S + 5 * HOUR_S


@pytest.fixture(scope="module")
def found() -> Candidates:
    return find_candidates(BOUGHT, VISIT_S_U, ItemFacts.of(BOUGHT, CATEGORY_I))


def features(found: Candidates, user: int, item: int) -> dict[str, float]:
    (place,) = np.flatnonzero((found.user_C == user) & (found.item_C == item))
    return dict(zip(GENERAL, found.feature_CF[place].tolist(), strict=True))


def test_candidates_are_what_was_bought_and_what_is_popular_once_each(found: Candidates) -> None:
    pairs = list(zip(found.user_C.tolist(), found.item_C.tolist(), strict=True))
    assert sorted(pairs) == [(user, item) for user in range(3) for item in range(4)]  # nobody bought item 4
    assert found.user_C.tolist() == sorted(found.user_C.tolist())


def test_own_purchases_are_counted_aged_and_spaced(found: Candidates) -> None:
    often = features(found, 0, 0)
    since = np.array([24, 14, 4]) + 5 / 24
    assert often["own_count"] == 3
    assert often["own_days_since"] == pytest.approx(since[2])
    assert often["own_baskets_since"] == 0
    assert often["own_gap_days"] == pytest.approx(10)
    assert often["own_days_since_over_gap"] == pytest.approx(since[2] / 10)
    assert often["own_share_of_baskets"] == 1
    assert often["own_count_a_day"] == pytest.approx(3 / (since[0] + 7))
    assert often["own_decay_30d"] == pytest.approx((0.5 ** (since / 30)).sum())
    assert often["own_decay_0.8_a_basket"] == pytest.approx(1 + 0.8 + 0.64)
    assert often["own_in_last_5_baskets"] == 3
    once = features(found, 0, 1)
    assert (once["own_count"], once["own_baskets_since"]) == (1, 2)
    assert np.isnan(once["own_gap_days"])
    assert np.isnan(once["own_days_since_over_gap"])
    assert once["own_decay_over_most"] == pytest.approx(0.5 ** (since[0] / 7) / (0.5 ** (since / 7)).sum(), rel=1e-5)


def test_day_of_the_week_and_hour_are_those_of_the_visit() -> None:
    bought = purchases((0, 0, 0), (0, 0, 7), (0, 0, 8), (0, 0, 8 + 6 / 24), users=1)
    visit_s = np.array([14 * DAY_S + 2 * HOUR_S])
    (first, *_) = find_candidates(bought, visit_s, ItemFacts.of(bought, CATEGORY_I)).feature_CF.tolist()
    told = dict(zip(GENERAL, first, strict=True))
    assert told["own_share_on_weekday"] == 2 / 4
    assert told["own_share_about_hour"] == 3 / 4
    assert (told["weekday"], told["hour"]) == (0, 2)


def test_category_tells_of_items_that_were_never_bought(found: Candidates) -> None:
    other = features(found, 0, 3)  # item 2 is of its category
    assert np.isnan(other["own_count"])
    assert other["category_days_since"] == pytest.approx(4 + 5 / 24)
    assert other["category_share_of_baskets"] == pytest.approx(1 / 3)
    assert np.isnan(other["category_days_since_over_gap"])  # a single visit
    spaced = features(found, 0, 1)  # visits with item 0 or 1 on days 0, 10 and 20
    assert spaced["category_days_since_over_gap"] == pytest.approx((4 + 5 / 24) / 10)
    assert spaced["own_share_of_category"] == pytest.approx(
        0.5 ** ((24 + 5 / 24) / 45)
        / (0.5 ** ((24 + 5 / 24) / 45) * 2 + 0.5 ** ((14 + 5 / 24) / 45) + 0.5 ** ((4 + 5 / 24) / 45)),
        rel=1e-5,
    )


def test_items_are_told_by_who_bought_them_lately_and_ever(found: Candidates) -> None:
    told = features(found, 2, 2)
    assert (told["buyers_7d"], told["buyers_28d"], told["buyers"]) == (2, 2, 2)  # on days 15 and 20
    assert told["purchases_a_buyer"] == 3 / 2
    assert told["trend"] == pytest.approx(2 / 3)


def test_what_was_paid_is_held_against_what_it_costs_as_a_rule() -> None:
    paid = np.array([4.0, 1.0, np.nan, 4.0, 2.0, 0.0, 1.0, 2.0])
    bought = replace(BOUGHT, paid=paid)
    told = find_candidates(bought, VISIT_S_U, ItemFacts.of(bought, CATEGORY_I))
    rule = np.log([4, 4, 1]).mean()
    assert features(told, 0, 0)["paid_lately_over_usual"] == pytest.approx(0 - rule, rel=1e-5)  # bought for 1 on day 20
    assert features(told, 0, 0)["own_paid_over_usual"] == pytest.approx(0, abs=1e-6)  # all of its purchases are theirs
    assert np.isnan(features(told, 0, 1)["paid_lately_over_usual"])  # not bought lately
    assert np.isnan(features(told, 1, 3)["own_paid_over_usual"])  # cost nothing
    without = find_candidates(BOUGHT, VISIT_S_U, ItemFacts.of(BOUGHT, CATEGORY_I))
    assert np.isnan(features(without, 0, 0)["own_paid_over_usual"])


def test_days_and_hours_are_told_as_shares_over_everybodys() -> None:
    mornings = [(0, 0, day + 8 / 24) for day in range(0, 70, 7)]  # of one weekday
    evenings = [(1, 2, day + 20 / 24) for day in range(70)]
    bought = purchases(*sorted(mornings + evenings, key=lambda one: one[2]), users=2)
    facts = ItemFacts.of(bought, CATEGORY_I)
    morning, evening = (np.full(2, 70 * DAY_S + hour * HOUR_S) for hour in (8, 20))
    early, late = (find_candidates(bought, visit_s, facts) for visit_s in (morning, evening))
    share = (10 + 10 + 1) / (80 + 7)  # of all purchases on that day, one added to each day
    assert features(early, 0, 0)["weekday_lift"] == pytest.approx((10 + 20 * share) / 30 / share, rel=1e-5)
    assert features(early, 0, 0)["category_hour_lift"] > 1.5 > 1 > features(late, 0, 0)["category_hour_lift"]
    assert (
        features(early, 0, 0)["share_of_baskets_on_weekday"],
        features(late, 0, 0)["share_of_baskets_about_hour"],
    ) == (1, 0)
    assert features(early, 1, 2)["share_of_baskets_on_weekday"] == pytest.approx(1 / 7)


def test_what_else_is_known_of_purchases_is_told_as_means_of_the_pair_the_user_and_the_item() -> None:
    saved = np.array([0.5, 0.0, 0.2, 0.1, 0.4, 0.0, 0.0, 0.3])
    bought = replace(BOUGHT, besides={"saved": saved})
    told = find_candidates(bought, VISIT_S_U, ItemFacts.of(bought, CATEGORY_I))
    names = feature_names(["saved"], [])
    (place,) = np.flatnonzero((told.user_C == 0) & (told.item_C == 2))
    found = dict(zip(names, told.feature_CF[place].tolist(), strict=True))
    assert found["own_saved"] == pytest.approx(0.3)
    assert found["user_saved"] == pytest.approx((0.5 + 0.0 + 0.1 + 0.0 + 0.3) / 5)
    assert found["item_saved"] == pytest.approx((0.2 + 0.4 + 0.3) / 3)
    assert found["item_lately_saved"] == pytest.approx(0.3)  # since day 16
    (never,) = np.flatnonzero((told.user_C == 2) & (told.item_C == 2))
    assert np.isnan(told.feature_CF[never, names.index("own_saved")])


def test_promotions_are_those_where_the_user_mostly_buys_when_they_come() -> None:
    bought = replace(BOUGHT, place=np.array([1, 1, 0, 1, 0, 0, 0, 1]))
    on = Promotions.of(
        np.array([1, 0]),
        np.array([0, 0]),
        np.array([20, 10]) * DAY_S,
        np.array([27, 17]) * DAY_S,
        places=2,
        items=5,
    )
    told = find_candidates(bought, VISIT_S_U, ItemFacts.of(bought, CATEGORY_I), {"mailer": on})
    names = feature_names([], ["mailer"])
    place = {(user, item): n for n, (user, item) in enumerate(zip(told.user_C, told.item_C, strict=True))}
    last = [told.feature_CF[place[user, 0], -3:].tolist() for user in range(3)]
    assert names[-3:] == ["here_mailer", "here_a_week_before_mailer", "share_of_places_mailer"]
    # User 0 buys at place 1 and comes on day 24; user 1 at place 0, on day 22; of user 2 nothing is known.
    assert last == [[1, 0, 0.5], [0, 1, 0.5], [0, 0, 0]]


def test_user_who_bought_nothing_has_what_is_popular_and_nothing_of_their_own(found: Candidates) -> None:
    told = features(found, 2, 0)
    assert (told["baskets"], told["category_decay"]) == (0, 0)
    assert np.isnan([told[name] for name in GENERAL if name.startswith("own_")]).all()
    nothing = purchases(users=2)
    alone = find_candidates(nothing, np.zeros(2, np.int64), ItemFacts.of(BOUGHT, CATEGORY_I))
    assert len(alone.user_C) == 8


def test_features_of_a_user_are_the_same_whoever_else_is_asked_about(found: Candidates) -> None:
    facts = ItemFacts.of(BOUGHT, CATEGORY_I)
    mine = BOUGHT.where(BOUGHT.user_row == 1)
    alone = replace(mine, user_row=np.zeros(len(mine.ts_s), np.int64), users=1)
    of_one = find_candidates(alone, VISIT_S_U[1:2], facts)
    assert np.array_equal(of_one.item_C, found.item_C[found.user_C == 1])
    np.testing.assert_array_equal(of_one.feature_CF, found.feature_CF[found.user_C == 1])
