"""What tells whether somebody buys an item on their next visit: how often, lately and regularly, and who else does.

In:  purchases before a time, and when each user visits next.  Out: candidates of each user, a row of features each.
Knows nothing of models, labels or ids.

Candidates are what a user bought, as far as it has not faded, and what everyone buys. Of an item that the user never
bought, the features of own purchases are NaN.

Shapes: N purchases, U users, I items, P pairs of user and item (or category), C candidates, F features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from training.baselines.interface import IntArray
from training.baskets.promotions import Promotions
from training.baskets.purchases import FloatArray, Purchases

DAY_S, HOUR_S = 86_400, 3_600
HALF_LIVES_DAYS = (7, 30, 120)
BASKET_DECAYS = (0.8, 0.93, 0.98)
"""Of a purchase's weight with each later basket."""
RECENT_BASKETS = (5, 15)
CHOOSING_HALF_LIFE_DAYS = 45
OWN, POPULAR = 80, 30
"""Most candidates of a user from own purchases, and from everybody's."""
WINDOWS_DAYS = (7, 28, 90)
"""Back from the present, in which buyers of an item are counted."""
ABOUT_HOURS = 3.0
PAID_DAYS = (90, 4)
"""Back from the present: what an item costs as a rule, and lately."""
LATELY_DAYS = 3
LIFT_PRIOR = 20.0
"""Purchases as all are, that are added to an item's."""
LEAST_GAP_DAYS = 0.5
LEAST = 1e-9
"""What nothing divides by."""
WEEK_S = 7 * DAY_S
FACTS = ("feature_IF", "usual_I", "weekday_lift_I7", "hour_lift_C24", "popular")
BESIDES = "besides."
"""What is known of items, as a version keeps it."""

GENERAL = (
    *(f"own_decay_{days}d" for days in HALF_LIVES_DAYS),
    *(f"own_decay_{decay}_a_basket" for decay in BASKET_DECAYS),
    "own_count",
    "own_days_since",
    "own_baskets_since",
    "own_gap_days",
    "own_days_since_over_gap",
    "own_share_of_baskets",
    "own_count_a_day",
    *(f"own_in_last_{count}_baskets" for count in RECENT_BASKETS),
    "own_share_on_weekday",
    "own_share_about_hour",
    "own_paid_over_usual",
    "own_share_of_category",
    "own_decay_over_most",
    "category_decay",
    "category_days_since",
    "category_days_since_over_gap",
    "category_share_of_baskets",
    *(f"buyers_{days}d" for days in WINDOWS_DAYS),
    "buyers",
    "purchases_a_buyer",
    "trend",
    "days_trend",
    "paid_lately_over_usual",
    "weekday_lift",
    "category_hour_lift",
    "baskets",
    "days_since_visit",
    "days_between_visits",
    "purchases_a_basket",
    "share_of_baskets_on_weekday",
    "share_of_baskets_about_hour",
    "weekday",
    "hour",
)


def feature_names(besides: Iterable[str], promotions: Iterable[str]) -> list[str]:
    """Return the names of the features, given what else is known of purchases and which promotions are."""
    return [
        *GENERAL,
        *(f"{whose}_{name}" for name in besides for whose in ("own", "user", "item", "item_lately")),
        *(f"{when}_{name}" for name in promotions for when in ("here", "here_a_week_before", "share_of_places")),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemFacts:
    """What is known of items alone, at a time."""

    category_I: IntArray
    feature_IF: FloatArray
    """Buyers in each window, buyers ever, purchases a buyer; the trend: this week's buyers over four weeks', and the
    last three days' over this week's; what it cost lately over what it costs as a rule, as a logarithm."""
    usual_I: FloatArray
    """The logarithm of what it costs as a rule; NaN where that is not known."""
    weekday_lift_I7: FloatArray
    """How much likelier its purchases are on a day of the week than all are."""
    hour_lift_C24: FloatArray
    """How much likelier those of a category are about an hour."""
    popular: IntArray
    """What most users bought in the last four weeks, most first."""
    besides: Mapping[str, FloatArray]
    """The mean of what else is known of purchases, ever and lately, [I, 2] each; NaN where there were none."""

    @classmethod
    def of(cls, bought: Purchases, category_I: IntArray) -> "ItemFacts":
        """Count; the newest purchase of all is the present."""
        now_s = int(bought.ts_s.max(initial=0))

        def buyers(days: int | None) -> FloatArray:
            chosen = bought.ts_s > (-1 if days is None else now_s - days * DAY_S)
            pairs = np.unique(bought.user_row[chosen] * bought.items + bought.item_row[chosen])
            return np.bincount(pairs % bought.items, minlength=bought.items).astype(np.float64)

        week_I, month_I, quarter_I = (buyers(days) for days in WINDOWS_DAYS)
        ever_I = buyers(None)
        times_I = np.bincount(bought.item_row, minlength=bought.items) / np.maximum(ever_I, 1)
        usual_I, lately_I = (_mean_paid(bought.where(bought.ts_s > now_s - days * DAY_S)) for days in PAID_DAYS)
        trends = [week_I / (month_I + 1), buyers(LATELY_DAYS) / (week_I + 1), lately_I - usual_I]
        feature_IF = np.stack([week_I, month_I, quarter_I, ever_I, times_I, *trends], axis=1)
        popular = np.argsort(-month_I, kind="stable")[:POPULAR]
        about_CH = _counts(
            category_I[bought.item_row], bought.ts_s % DAY_S // HOUR_S, int(category_I.max(initial=0)) + 1, 24
        )
        hours = np.arange(24)
        lately = int(np.searchsorted(bought.ts_s, now_s - PAID_DAYS[1] * DAY_S, "right"))
        is_about = np.abs(hours[:, None] - hours) < ABOUT_HOURS
        return cls(
            category_I=category_I,
            feature_IF=feature_IF,
            usual_I=usual_I,
            weekday_lift_I7=_lift(_counts(bought.item_row, bought.ts_s // DAY_S % 7, bought.items, 7)),
            hour_lift_C24=_lift(about_CH @ is_about),
            popular=popular[month_I[popular] > 0],
            besides={
                name: np.stack(
                    [_means(bought.item_row[since:], value_N[since:], bought.items) for since in (0, lately)], axis=1
                )
                for name, value_N in bought.besides.items()
            },
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what is known of items, their categories left out, for `restore`."""
        besides = {BESIDES + name: value_I2 for name, value_I2 in self.besides.items()}
        return {name: getattr(self, name) for name in FACTS} | besides

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray], category_I: IntArray) -> Self:
        """Return what `arrays` were taken of; others among them are left alone."""
        besides = {name.removeprefix(BESIDES): a for name, a in arrays.items() if name.startswith(BESIDES)}
        return cls(category_I=category_I, besides=besides, **{name: arrays[name] for name in FACTS})


def _means(row_N: IntArray, value_N: FloatArray, rows: int) -> FloatArray:
    """Return the mean of each row's values that are known, [R]; NaN for one without."""
    is_known_N = np.isfinite(value_N)
    count_R = np.bincount(row_N[is_known_N], minlength=rows)
    return np.where(
        count_R > 0, np.bincount(row_N[is_known_N], value_N[is_known_N], rows) / np.maximum(count_R, 1), np.nan
    )


def _counts(row_N: IntArray, column_N: IntArray, rows: int, columns: int) -> FloatArray:
    found = np.bincount(row_N * columns + column_N, minlength=rows * columns)
    return found.reshape(rows, columns).astype(np.float64)


def _lift(count_RC: FloatArray) -> FloatArray:
    """Return each row's shares over those of all rows, drawn to 1 where a row has few."""
    all_C = count_RC.sum(axis=0)
    share_C = (all_C + 1) / (all_C + 1).sum()
    total_R1 = count_RC.sum(axis=1, keepdims=True)
    return (count_RC + LIFT_PRIOR * share_C) / (total_R1 + LIFT_PRIOR) / share_C


def _mean_paid(bought: Purchases) -> FloatArray:
    """Return the mean logarithm of what each item cost; NaN where nobody says."""
    if bought.paid is None:
        return np.full(bought.items, np.nan)
    told = bought.where(bought.paid > 0)
    assert told.paid is not None, "it comes with it"
    count_I = np.bincount(told.item_row, minlength=bought.items)
    sum_I = np.bincount(told.item_row, weights=np.log(told.paid), minlength=bought.items)
    return np.where(count_I > 0, sum_I / np.maximum(count_I, 1), np.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Items that users may buy, in order of users."""

    user_C: IntArray
    item_C: IntArray
    feature_CF: npt.NDArray[np.float32]


class _Past:
    """Purchases, each as seen from its user's next visit."""

    def __init__(self, bought: Purchases, visit_s_U: IntArray) -> None:
        visit_s_N = visit_s_U[bought.user_row]
        self.bought, self.visit_s_U = bought, visit_s_U
        self.days_N: FloatArray = (visit_s_N - bought.ts_s) / DAY_S
        self.baskets_since_N = bought.ages()
        self.on_weekday_N = bought.ts_s // DAY_S % 7 == visit_s_N // DAY_S % 7
        self.about_hour_N = np.abs(bought.ts_s % DAY_S - visit_s_N % DAY_S) < ABOUT_HOURS * HOUR_S
        self.fading_N = 0.5 ** (self.days_N / CHOOSING_HALF_LIFE_DAYS)
        self.baskets_U = np.zeros(bought.users)
        np.maximum.at(self.baskets_U, bought.user_row, self.baskets_since_N + 1)


class _Pairs:
    """A user's purchases of one item, or of one category, taken together."""

    def __init__(self, past: _Past, thing_N: IntArray, things: int) -> None:
        self.key_P, self._pair_N, self.count_P = np.unique(
            past.bought.user_row * things + thing_N, return_inverse=True, return_counts=True
        )
        self.user_P, self.thing_P = np.divmod(self.key_P, things)
        self.days_since_P, self.baskets_since_P = self._newest(past.days_N), self._newest(past.baskets_since_N)
        self.days_known_P = np.empty(len(self.key_P))
        self.days_known_P[self._pair_N[::-1]] = past.days_N[::-1]
        baskets = int(past.baskets_since_N.max(initial=0)) + 1
        together = np.unique(self._pair_N * baskets + past.baskets_since_N)
        self.baskets_P = np.bincount(together // baskets, minlength=len(self.key_P))
        gap_P = (self.days_known_P - self.days_since_P) / np.maximum(self.baskets_P - 1, 1)
        self.gap_days_P = np.where(self.baskets_P > 1, np.maximum(gap_P, LEAST_GAP_DAYS), np.nan)
        """Mean time between baskets with it; NaN where there was one."""
        self.faded_P = self.total(past.fading_N)

    def total(self, weight_N: npt.NDArray[np.floating] | npt.NDArray[np.bool_]) -> FloatArray:
        """Return the weights added up by pair."""
        return np.bincount(self._pair_N, weights=weight_N, minlength=len(self.key_P)).astype(np.float64)

    def _newest(self, value_N: FloatArray | IntArray) -> FloatArray:
        value_P = np.empty(len(self.key_P))
        value_P[self._pair_N] = value_N  # in order of time: of equal pairs the last assignment stays
        return value_P


def find_candidates(
    bought: Purchases, visit_s_U: IntArray, facts: ItemFacts, promotions: Mapping[str, Promotions] | None = None
) -> Candidates:
    """Return the candidates of each user of `bought`, whose next visits are after all of it.

    Users who bought nothing have what is popular. Where somebody will buy is taken to be where they mostly do.
    """
    past = _Past(bought, visit_s_U)
    own = _Pairs(past, bought.item_row, bought.items)
    chosen_K = _newest_own(own)
    user_X, item_X = _popular_others(own, bought, facts.popular)
    user_C, item_C = np.concatenate([own.user_P[chosen_K], user_X]), np.concatenate([own.thing_P[chosen_K], item_X])
    own_KF = np.concatenate([_own_features(own, past, facts.usual_I), _own_besides(own, bought)], axis=1)[chosen_K]
    own_CF = np.concatenate([own_KF, np.full((len(user_X), own_KF.shape[1]), np.nan)])
    faded_C = np.concatenate([own.faded_P[chosen_K], np.full(len(user_X), np.nan)])
    order = np.argsort(user_C, kind="stable")
    user_C, item_C, own_CF, faded_C = user_C[order], item_C[order], own_CF[order], faded_C[order]
    category_C = facts.category_I[item_C]
    category_CF = _category_features(past, facts.category_I, user_C, category_C)
    most_U = np.full(bought.users, LEAST)
    np.fmax.at(most_U, user_C, own_CF[:, 0])
    weekday_C, hour_C = (visit_s_U // DAY_S % 7)[user_C], (visit_s_U % DAY_S // HOUR_S)[user_C]
    beside = [faded_C / np.maximum(category_CF[:, 0], LEAST), own_CF[:, 0] / most_U[user_C]]
    lifts = [facts.weekday_lift_I7[item_C, weekday_C], facts.hour_lift_C24[category_C, hour_C]]
    general_CF, own_besides_CX = np.split(own_CF, [own_CF.shape[1] - len(bought.besides)], axis=1)
    parts = [general_CF, np.stack(beside, 1), category_CF, facts.feature_IF[item_C], np.stack(lifts, 1)]
    parts.append(_user_features(past)[user_C])
    for column, (name, value_N) in enumerate(bought.besides.items()):
        user_mean_U = _means(bought.user_row, value_N, bought.users)
        parts += [own_besides_CX[:, [column]], user_mean_U[user_C, None], facts.besides[name][item_C]]
    place_C, at_s_C = bought.usual_places()[user_C], visit_s_U[user_C]
    for kind in (promotions or {}).values():
        here = [kind.at(place_C, item_C, at_s) for at_s in (at_s_C, at_s_C - WEEK_S)]
        parts.append(np.stack([*here, kind.share_of_places(item_C, at_s_C)], axis=1))
    feature_CF = np.concatenate(parts, axis=1).astype(np.float32)
    assert feature_CF.shape[1] == len(feature_names(bought.besides, promotions or ()))
    return Candidates(user_C=user_C, item_C=item_C, feature_CF=feature_CF)


def _newest_own(own: _Pairs) -> IntArray:
    """Return which own pairs have faded least, up to so many a user, in order."""
    order = np.lexsort((-own.faded_P, own.user_P))
    place = np.arange(len(order)) - np.searchsorted(own.user_P[order], own.user_P[order])
    return np.sort(order[place < OWN])


def _popular_others(own: _Pairs, bought: Purchases, popular: IntArray) -> tuple[IntArray, IntArray]:
    """Return users and items of what is popular and not their own."""
    user, item = np.repeat(np.arange(bought.users), len(popular)), np.tile(popular, bought.users)
    is_other = ~np.isin(user * bought.items + item, own.key_P)
    return user[is_other], item[is_other]


def _own_features(own: _Pairs, past: _Past, usual_I: FloatArray) -> FloatArray:
    paid_N, item_N = past.bought.paid, past.bought.item_row
    over_N = np.full(len(item_N), np.nan)
    if paid_N is not None:
        over_N = np.log(np.where(paid_N > 0, paid_N, np.nan)) - usual_I[item_N]
    columns = [
        *(own.total(0.5 ** (past.days_N / half)) for half in HALF_LIVES_DAYS),
        *(own.total(decay**past.baskets_since_N) for decay in BASKET_DECAYS),
        own.count_P,
        own.days_since_P,
        own.baskets_since_P,
        own.gap_days_P,
        own.days_since_P / own.gap_days_P,
        own.baskets_P / past.baskets_U[own.user_P],
        own.count_P / (own.days_known_P + 7),
        *(own.total(past.baskets_since_N < count) for count in RECENT_BASKETS),
        *(own.total(weight_N) / own.count_P for weight_N in (past.on_weekday_N, past.about_hour_N, over_N)),
    ]
    return np.stack(columns, axis=1)


def _own_besides(own: _Pairs, bought: Purchases) -> FloatArray:
    columns = [own.total(value_N) / own.count_P for value_N in bought.besides.values()]
    return np.stack(columns, axis=1) if columns else np.empty((len(own.count_P), 0))


def _category_features(past: _Past, category_I: IntArray, user_C: IntArray, category_C: IntArray) -> FloatArray:
    """Return fading purchases, days since the last, the same over the usual gap, and the share of baskets with any."""
    if not len(past.days_N):
        return np.tile([0.0, np.nan, np.nan, 0.0], (len(user_C), 1))
    categories = int(category_I.max()) + 1
    met = _Pairs(past, category_I[past.bought.item_row], categories)
    wanted = user_C * categories + category_C
    place = np.minimum(np.searchsorted(met.key_P, wanted), len(met.key_P) - 1)
    is_met = met.key_P[place] == wanted
    days_since_C = np.where(is_met, met.days_since_P[place], np.nan)
    share_C = met.baskets_P[place] / np.maximum(past.baskets_U[user_C], 1)
    columns = [np.where(is_met, met.faded_P[place], 0), days_since_C, days_since_C / met.gap_days_P[place]]
    return np.stack([*columns, np.where(is_met, share_C, 0)], axis=1)


def _user_features(past: _Past) -> FloatArray:
    bought, visit_s_U, baskets_U = past.bought, past.visit_s_U, np.maximum(past.baskets_U, 1)
    newest_U, oldest_U = np.full(bought.users, np.nan), np.full(bought.users, np.nan)
    newest_U[bought.user_row] = past.days_N
    oldest_U[bought.user_row[::-1]] = past.days_N[::-1]
    purchases_U = np.bincount(bought.user_row, minlength=bought.users)
    pairs = np.stack([bought.user_row, bought.ts_s])
    opens = np.unique(pairs, axis=1, return_index=True)[1]  # a purchase of each basket
    likes = [
        np.bincount(bought.user_row[opens], weights=is_so_N[opens], minlength=bought.users) / baskets_U
        for is_so_N in (past.on_weekday_N, past.about_hour_N)
    ]
    gap_U = (oldest_U - newest_U) / np.maximum(past.baskets_U - 1, 1)
    visit = [visit_s_U // DAY_S % 7, visit_s_U % DAY_S / HOUR_S]
    return np.stack([past.baskets_U, newest_U, gap_U, purchases_U / baskets_U, *likes, *visit], axis=1)
