"""What tells whether somebody buys an item on their next visit: how often, lately and regularly, and who else does.

In:  purchases before a time, and when each user visits next.  Out: candidates of each user, a row of features each.
Knows nothing of models, labels or ids.

Candidates are what a user bought, as far as it has not faded, and what everyone buys. Of an item that the user never
bought, the features of own purchases are NaN.

Shapes: N purchases, U users, I items, P pairs of user and item (or category), C candidates, F features.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.baselines.baskets import Purchases
from training.baselines.interface import IntArray

FloatArray = npt.NDArray[np.float64]

DAY_S, HOUR_S = 86_400, 3_600
HALF_LIVES_DAYS = (7, 30, 120)
BASKET_DECAYS = (0.8, 0.93, 0.98)
"""Of a purchase's weight with each later basket."""
RECENT_BASKETS = (5, 15)
CHOOSING_HALF_LIFE_DAYS = 45
OWN, POPULAR = 150, 60
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

NAMES = (
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
        is_about = np.abs(hours[:, None] - hours) < ABOUT_HOURS
        return cls(
            category_I=category_I,
            feature_IF=feature_IF,
            usual_I=usual_I,
            weekday_lift_I7=_lift(_counts(bought.item_row, bought.ts_s // DAY_S % 7, bought.items, 7)),
            hour_lift_C24=_lift(about_CH @ is_about),
            popular=popular[month_I[popular] > 0],
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


class _Pairs:
    """A user's purchases of one item, or of one category, taken together."""

    def __init__(self, user_N: IntArray, thing_N: IntArray, things: int, day_N: FloatArray, visit_N: IntArray) -> None:
        """Take purchases in order of time; `day_N` is how many days before the user's next visit each was."""
        self.key_P, self.pair_N, self.count_P = np.unique(
            user_N * things + thing_N, return_inverse=True, return_counts=True
        )
        self.user_P, self.thing_P = np.divmod(self.key_P, things)
        self.last_P, self.first_P = np.empty(len(self.key_P)), np.empty(len(self.key_P))
        self.last_P[self.pair_N] = day_N  # of equal pairs the last assignment stays
        self.first_P[self.pair_N[::-1]] = day_N[::-1]
        visits = int(visit_N.max(initial=0)) + 1
        visited = np.unique(self.pair_N * visits + visit_N)
        self.visits_P = np.bincount(visited // visits, minlength=len(self.key_P))

    def total(self, weight_N: npt.NDArray[np.floating] | npt.NDArray[np.bool_]) -> FloatArray:
        """Return the weights added up by pair."""
        return np.bincount(self.pair_N, weights=weight_N, minlength=len(self.key_P)).astype(np.float64)

    def gap_days(self) -> FloatArray:
        """Return the mean days between visits that bought it; NaN where there was one."""
        gap_P = (self.first_P - self.last_P) / np.maximum(self.visits_P - 1, 1)
        return np.where(self.visits_P > 1, np.maximum(gap_P, LEAST_GAP_DAYS), np.nan)


def find_candidates(bought: Purchases, visit_s_U: IntArray, facts: ItemFacts) -> Candidates:
    """Return the candidates of each user of `bought`, whose next visits are after all of it.

    Users who bought nothing have what is popular.
    """
    user_N, item_N = bought.user_row, bought.item_row
    day_N = (visit_s_U[user_N] - bought.ts_s) / DAY_S
    since_N = bought.ages()
    baskets_U = np.zeros(bought.users)
    np.maximum.at(baskets_U, user_N, since_N + 1)
    own = _Pairs(user_N, item_N, bought.items, day_N, since_N)
    categories = int(facts.category_I.max(initial=0)) + 1
    category = _Pairs(user_N, facts.category_I[item_N], categories, day_N, since_N)
    fading_N = 0.5 ** (day_N / CHOOSING_HALF_LIFE_DAYS)
    faded_P = own.total(fading_N)
    own_PF = _own_features(own, bought, visit_s_U, day_N, since_N, baskets_U, facts.usual_I)
    chosen_K, popular_user, popular_item = _choose(own, faded_P, bought.users, facts.popular)
    user_C = np.concatenate([own.user_P[chosen_K], popular_user])
    item_C = np.concatenate([own.thing_P[chosen_K], popular_item])
    nothing = np.full((len(popular_user), own_PF.shape[1]), np.nan)
    own_CF = np.concatenate([own_PF[chosen_K], nothing])
    faded_C = np.concatenate([faded_P[chosen_K], np.full(len(popular_user), np.nan)])
    order = np.argsort(user_C, kind="stable")
    user_C, item_C, own_CF, faded_C = user_C[order], item_C[order], own_CF[order], faded_C[order]
    category_CF = _category_features(category, category.total(fading_N), categories, user_C, facts.category_I[item_C])
    category_CF[:, 3] /= np.maximum(baskets_U[user_C], 1)
    most_U = np.full(bought.users, LEAST)
    np.fmax.at(most_U, user_C, own_CF[:, 0])
    beside_C2 = np.stack([faded_C / np.maximum(category_CF[:, 0], LEAST), own_CF[:, 0] / most_U[user_C]], axis=1)
    user_UF = _user_features(bought, visit_s_U, day_N, baskets_U)
    weekday_U, hour_U = visit_s_U // DAY_S % 7, visit_s_U % DAY_S // HOUR_S
    lift_C2 = np.stack(
        [
            facts.weekday_lift_I7[item_C, weekday_U[user_C]],
            facts.hour_lift_C24[facts.category_I[item_C], hour_U[user_C]],
        ],
        axis=1,
    )
    parts = [own_CF, beside_C2, category_CF, facts.feature_IF[item_C], lift_C2, user_UF[user_C]]
    feature_CF = np.concatenate(parts, axis=1).astype(np.float32)
    assert feature_CF.shape[1] == len(NAMES)
    return Candidates(user_C=user_C, item_C=item_C, feature_CF=feature_CF)


def _own_features(
    own: _Pairs,
    bought: Purchases,
    visit_s_U: IntArray,
    day_N: FloatArray,
    since_N: IntArray,
    baskets_U: FloatArray,
    usual_I: FloatArray,
) -> FloatArray:
    baskets_since_P = np.empty(len(own.key_P))
    baskets_since_P[own.pair_N] = since_N  # of equal pairs the last assignment stays
    gap_P = own.gap_days()
    visit_s_N = visit_s_U[bought.user_row]
    same_weekday_N = bought.ts_s // DAY_S % 7 == visit_s_N // DAY_S % 7
    apart_N = np.abs(bought.ts_s % DAY_S - visit_s_N % DAY_S) / HOUR_S
    over_N = np.full(len(day_N), np.nan)
    if bought.paid is not None:
        over_N = np.log(np.where(bought.paid > 0, bought.paid, np.nan)) - usual_I[bought.item_row]
    columns = [
        *(own.total(0.5 ** (day_N / half)) for half in HALF_LIVES_DAYS),
        *(own.total(decay**since_N) for decay in BASKET_DECAYS),
        own.count_P,
        own.last_P,
        baskets_since_P,
        gap_P,
        own.last_P / gap_P,
        own.visits_P / baskets_U[own.user_P],
        own.count_P / (own.first_P + 7),
        *(own.total(since_N < count) for count in RECENT_BASKETS),
        own.total(same_weekday_N) / own.count_P,
        own.total(apart_N < ABOUT_HOURS) / own.count_P,
        own.total(over_N) / own.count_P,
    ]
    return np.stack(columns, axis=1)


def _choose(own: _Pairs, faded_P: FloatArray, users: int, popular: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Return which own pairs are candidates, and users and items of the popular ones that are not among own pairs."""
    order = np.lexsort((-faded_P, own.user_P))
    place = np.arange(len(order)) - np.searchsorted(own.user_P[order], own.user_P[order])
    chosen_K = np.sort(order[place < OWN])
    user, item = np.repeat(np.arange(users), len(popular)), np.tile(popular, users)
    things = int(max(own.thing_P.max(initial=0), popular.max(initial=0))) + 1
    is_own = np.isin(user * things + item, own.user_P * things + own.thing_P)
    return chosen_K, user[~is_own], item[~is_own]


def _category_features(
    category: _Pairs, faded_P: FloatArray, categories: int, user_C: IntArray, category_C: IntArray
) -> FloatArray:
    """Return fading purchases, days since the last, the same over the usual gap, and visits that bought of it."""
    wanted = user_C * categories + category_C
    place = np.minimum(np.searchsorted(category.key_P, wanted), max(len(category.key_P) - 1, 0))
    if not len(category.key_P):
        return np.tile([0.0, np.nan, np.nan, 0.0], (len(wanted), 1))
    is_met = category.key_P[place] == wanted
    last_C = np.where(is_met, category.last_P[place], np.nan)
    return np.stack(
        [
            np.where(is_met, faded_P[place], 0),
            last_C,
            last_C / category.gap_days()[place],
            np.where(is_met, category.visits_P[place], 0.0),
        ],
        axis=1,
    )


def _user_features(bought: Purchases, visit_s_U: IntArray, day_N: FloatArray, baskets_U: FloatArray) -> FloatArray:
    newest_U, oldest_U = np.full(bought.users, np.nan), np.full(bought.users, np.nan)
    newest_U[bought.user_row] = day_N
    oldest_U[bought.user_row[::-1]] = day_N[::-1]
    purchases_U = np.bincount(bought.user_row, minlength=bought.users)
    _, opens = np.unique(bought.user_row * (2**40) + bought.ts_s, return_index=True)  # a purchase of each basket
    user_V, ts_V = bought.user_row[opens], bought.ts_s[opens]
    on_weekday_V = ts_V // DAY_S % 7 == visit_s_U[user_V] // DAY_S % 7
    about_V = np.abs(ts_V % DAY_S - visit_s_U[user_V] % DAY_S) < ABOUT_HOURS * HOUR_S
    return np.stack(
        [
            baskets_U,
            newest_U,
            (oldest_U - newest_U) / np.maximum(baskets_U - 1, 1),
            purchases_U / np.maximum(baskets_U, 1),
            *(
                np.bincount(user_V, weights=is_so_V, minlength=bought.users) / np.maximum(baskets_U, 1)
                for is_so_V in (on_weekday_V, about_V)
            ),
            visit_s_U // DAY_S % 7,
            visit_s_U % DAY_S / HOUR_S,
        ],
        axis=1,
    )
