"""Decide who likes what in the planted data, and draw users, items, histories and clicks by it.

In:  a seed, the tables' sizes and a mean history length.
Out: `World`: arrays of drawn rows, and the true log-odds of a click for any user and item.
Knows nothing of files or of external ids. The distribution, in the order of drawing a row:

    user, item         Zipf, exponent 1: rank floor((N + 1)^u) − 1; a bijection spreads the ranks over the table
    archetypes         a(user), b(item) of 64 each, hashes of the table row
    history            0 to 2·mean items, each the better by affinity[a, b] of two Zipf draws: it shows the taste
    label              1 with probability sigmoid(affinity[a, b] + bias(item) + offset); 0.3 of all labels are 1

Random numbers: splitmix64 (Steele, Lea and Flood, OOPSLA 2014), one stream for each row group of each part.
B rows drawn, N history items of all of them.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

ARCHETYPES = 64
AFFINITY_STD = 1.5
BIAS_STD = 0.5
LABEL_RATE = 0.3
CALIBRATION_ROWS = 131_072

HELDOUT, CALIBRATION, AFFINITY = -1, -2, -3
"""Numbers that no part has: streams of random numbers of their own."""

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_BITS_27, _BITS_30, _BITS_31, _BITS_11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)
_USER_SALT, _ITEM_SALT, _BIAS_SALT = np.uint64(0x75736572), np.uint64(0x6974656D), np.uint64(0x62696173)
_ARCHETYPE_MASK = np.uint64(ARCHETYPES - 1)


@njit(nogil=True, cache=True)
def _mixed(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> _BITS_30)) * _MIX_1
    x = (x ^ (x >> _BITS_27)) * _MIX_2
    return x ^ (x >> _BITS_31)


@njit(nogil=True, cache=True)
def _fraction(bits: np.uint64) -> float:
    """Map 64 bits to [0, 1)."""
    return np.int64(bits >> _BITS_11) / 2.0**53


@njit(nogil=True, cache=True)
def _zipf_row(bits: np.uint64, count: int, log_count: float, stride: int) -> int:
    """Draw a rank and send it to its table row."""
    rank = min(int(math.exp(_fraction(bits) * log_count)) - 1, count - 1)
    return (rank * stride) % count


@njit(nogil=True, cache=True)
def _archetype(row: int, salt: np.uint64) -> np.uint64:
    return _mixed(np.uint64(row) + salt * _GAMMA) & _ARCHETYPE_MASK


@njit(nogil=True, cache=True)
def _pair_logit(user_row: int, item_row: int, affinity: np.ndarray) -> float:
    bias = (_fraction(_mixed(np.uint64(item_row) + _BIAS_SALT * _GAMMA)) - 0.5) * (BIAS_STD * math.sqrt(12.0))
    return affinity[_archetype(user_row, _USER_SALT), _archetype(item_row, _ITEM_SALT)] + bias


@njit(nogil=True, cache=True)
def _logits(user_B: np.ndarray, item_B: np.ndarray, affinity: np.ndarray) -> np.ndarray:
    logit_B = np.empty(len(user_B), np.float64)
    for n in range(len(user_B)):
        logit_B[n] = _pair_logit(user_B[n], item_B[n], affinity)
    return logit_B


@njit(nogil=True, cache=True)
def _draw(
    state: np.uint64,
    rows: int,
    users: int,
    user_stride: int,
    items: int,
    item_stride: int,
    longest: int,
    affinity: np.ndarray,
    offset: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return users, items, labels, the histories' ends and their items."""
    user_B, item_B, label_B = np.empty(rows, np.int32), np.empty(rows, np.int32), np.empty(rows, np.int8)
    end_B, history_N = np.zeros(rows + 1, np.int32), np.empty(rows * longest, np.int32)
    log_users, log_items = math.log(users + 1.0), math.log(items + 1.0)
    filled = 0
    for n in range(rows):
        user = _zipf_row(_mixed(state), users, log_users, user_stride)
        item = _zipf_row(_mixed(state + _GAMMA), items, log_items, item_stride)
        logit = _pair_logit(user, item, affinity) + offset
        label_B[n] = _fraction(_mixed(state + np.uint64(2) * _GAMMA)) * (1.0 + math.exp(-logit)) < 1.0
        length = np.int64(_fraction(_mixed(state + np.uint64(3) * _GAMMA)) * (longest + 1))
        state += np.uint64(4) * _GAMMA
        taste = affinity[_archetype(user, _USER_SALT)]
        for _ in range(length):
            one = _zipf_row(_mixed(state), items, log_items, item_stride)
            two = _zipf_row(_mixed(state + _GAMMA), items, log_items, item_stride)
            state += np.uint64(2) * _GAMMA
            better = taste[_archetype(one, _ITEM_SALT)] >= taste[_archetype(two, _ITEM_SALT)]
            history_N[filled] = one if better else two
            filled += 1
        user_B[n], item_B[n], end_B[n + 1] = user, item, filled
    return user_B, item_B, label_B, end_B, history_N[:filled]


def _stream(seed: int, part: int, group: int) -> np.uint64:
    """Return where the random numbers of a part's row group begin."""
    state = 0
    for number in (seed, part, group):
        state = int(np.random.SeedSequence([state, number % 2**64]).generate_state(1, np.uint64)[0])
    return np.uint64(state)


def _stride(count: int) -> int:
    """Return a step near the golden section of `count` that visits every row before it repeats one."""
    stride = max(1, round(count * 0.6180339887))
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Who likes what, and how often each comes up: all that a seed and the sizes of the tables decide."""

    seed: int
    users: int
    items: int
    history: int
    affinity: np.ndarray
    """Of user archetype and item archetype, [64, 64]."""
    offset: float
    """Added to every logit, so that LABEL_RATE of all labels are 1."""

    def logit(self, user_B: np.ndarray, item_B: np.ndarray) -> np.ndarray:
        """Return the true log-odds that a user's table row clicks an item's."""
        return _logits(user_B, item_B, self.affinity) + self.offset

    def draw(self, part: int, group: int, rows: int) -> tuple[np.ndarray, ...]:
        """Return users, items, labels, the ends of the histories (one more than rows) and their items."""
        start = _stream(self.seed, part, group)
        user_stride, item_stride = _stride(self.users), _stride(self.items)
        sizes = (rows, self.users, user_stride, self.items, item_stride, 2 * self.history)
        return _draw(start, *sizes, self.affinity, self.offset)


def build_world(*, seed: int, users: int, items: int, history: int = 4) -> World:
    """Draw the affinities and find the offset that gives the label rate."""
    shape = (ARCHETYPES, ARCHETYPES)
    normal = np.random.default_rng([seed, AFFINITY % 2**32]).normal(0.0, AFFINITY_STD, shape)
    world = World(seed=seed, users=users, items=items, history=history, affinity=normal, offset=0.0)
    user_B, item_B, *_ = world.draw(CALIBRATION, 0, CALIBRATION_ROWS)
    logit_B = world.logit(user_B, item_B)
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        rate = float(np.mean(1 / (1 + np.exp(-logit_B - middle))))
        low, high = (middle, high) if rate < LABEL_RATE else (low, middle)
    return replace(world, offset=low)
