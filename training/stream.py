"""Interactions become batches of sequences.

In:  a dataset's events and the vocabularies.  Out: `Batch` after `Batch`, the same ones for any number of workers.
Knows nothing of the model. No per-row Python: windows are cut with array arithmetic over columns sorted by user.

    events (by time) ──▶ History: columns sorted by user, then time
    user 20   a b c d e f g h        window of 4 at a random offset: [a b c]→[b c d], [d e f g]→[e f g h]
                                     an epoch's windows cover every interaction as a target once
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import ConfigError, DataError
from cluster.events import INTERACTION_KINDS, KINDS
from embeddings.batch import PAD, Batch, Sequences, build_batch
from embeddings.vocabulary import UNKNOWN_ROW, Vocabulary

SPLITS = ("time", "leave_one_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """How events are split and batched."""

    split: str = "time"
    """`time`: training sees the first share of the events; `leave_one_out`: all but each user's last interaction, and
    the last but one is for validation."""
    train_fraction: float = 0.9
    """Share of events, by time, that training may see; the rest is for replay."""
    validation_fraction: float = 0.03
    """Share of these, the newest, held out for early stopping until the last epochs."""
    batch_sequences: int = 64
    """Sequences a step, over all workers together."""
    negatives: int = 2048
    """Sampled negatives a step and worker; where the catalogue has no more, every item, which is a full softmax."""
    negative_power: float = 0.75
    """Negatives are drawn with probability ∝ (count + 1)^power."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"data.split={self.split!r}: is none of {', '.join(SPLITS)}")
        for name in ("train_fraction", "validation_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)}: must be between 0 and 1")
        for name in ("batch_sequences", "negatives"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Interactions as columns sorted by user, then by time; all [rows]."""

    user_row: np.ndarray
    item_row: np.ndarray
    kind: np.ndarray
    value: np.ndarray
    ts_s: np.ndarray
    order: np.ndarray
    """Position of the interaction in the events it came from, which are in time order."""
    starts: np.ndarray
    """First index of each user who has any interaction."""
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.item_row)

    def first_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the index of the first interaction of each one's user."""
        return self.starts[np.searchsorted(self.starts, indices, side="right") - 1]


def build_history(events: pa.Table, items: Vocabulary, users: Vocabulary) -> History:
    """Sort the interactions among `events` (in time order) by user. Raises `DataError` for an id without a row."""
    position = np.flatnonzero(pc.is_in(events["kind"], pa.array(sorted(INTERACTION_KINDS))).to_numpy())
    chosen = events.take(position)
    user_row, item_row = users.rows(chosen["user_id"]), items.rows(chosen["item_id"])
    for name, rows in (("user_id", user_row), ("item_id", item_row)):
        if (rows == UNKNOWN_ROW).any():
            first = chosen[name][int(np.argmax(rows == UNKNOWN_ROW))]
            raise DataError(f"{name} {first} occurs in the events but not in the vocabulary")
    by_user = np.argsort(user_row, kind="stable")
    sorted_users = user_row[by_user]
    starts = np.flatnonzero(np.r_[True, sorted_users[1:] != sorted_users[:-1]]) if len(by_user) else by_user
    return History(
        user_row=sorted_users,
        item_row=item_row[by_user],
        kind=pc.index_in(chosen["kind"], pa.array(KINDS)).to_numpy().astype(np.int64)[by_user],
        value=pc.cast(chosen["value"], pa.float32()).to_numpy()[by_user],
        ts_s=chosen["ts_us"].to_numpy()[by_user] // 1_000_000,
        order=position[by_user],
        starts=starts,
        ends=np.r_[starts, len(by_user)][1:].astype(np.int64),
    )


@dataclass(frozen=True, slots=True)
class Windows:
    """Slices of a `History`: interactions [first, last) are seen, each next one is a target."""

    first: np.ndarray
    last: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def pick(self, indices: np.ndarray) -> "Windows":
        """Return the windows at these indices."""
        return Windows(self.first[indices], self.last[indices])


def cut_windows(history: History, length: int, rng: np.random.Generator) -> Windows:
    """Tile every user's interactions with windows of at most `length`, at a random offset; shuffled.

    Users with a single interaction have no next one and get no window.
    """
    sizes = history.ends - history.starts - 1
    offsets = np.where(sizes > length, rng.integers(0, length, len(sizes)), 0)
    counts = np.where(sizes > 0, -(-(sizes + offsets) // length), 0)
    owner = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = history.starts[owner] - offsets[owner] + number * length
    last = np.minimum(first + length, history.ends[owner] - 1)
    return Windows(np.maximum(first, history.starts[owner]), last).pick(rng.permutation(len(owner)))


def windows_before(history: History, targets: np.ndarray, length: int) -> Windows:
    """Return for each target (an index into the history, not a user's first) the window that ends just before it."""
    return Windows(np.maximum(targets - length, history.first_of(targets)), targets)


def build_sequences(history: History, windows: Windows) -> Sequences:
    """Lay the windows out right-aligned; the interaction after each one seen is its target."""
    length = int((windows.last - windows.first).max())
    cell_BL = windows.last[:, None] - length + np.arange(length)
    seen_BL = cell_BL >= windows.first[:, None]
    cell_BL = np.where(seen_BL, cell_BL, 0)
    next_BL = np.minimum(cell_BL + 1, len(history) - 1)
    rated_BL = seen_BL & (history.kind[next_BL] == KINDS.index("rating"))
    return Sequences(
        user_row_B=history.user_row[windows.first],
        item_row_BL=np.where(seen_BL, history.item_row[cell_BL], PAD),
        kind_BL=np.where(seen_BL, history.kind[cell_BL], 0),
        value_BL=np.where(seen_BL, history.value[cell_BL], np.nan),
        ts_BL=np.where(seen_BL, history.ts_s[cell_BL], 0),
        target_row_BL=np.where(seen_BL, history.item_row[next_BL], PAD),
        target_rating_BL=np.where(rated_BL, history.value[next_BL], np.nan),
        weight_BL=np.ones(seen_BL.shape, np.float32),
    )


class NegativeSampler:
    """Draws item rows by smoothed popularity and knows with which probability; a small catalogue it gives whole."""

    def __init__(self, counts: np.ndarray, config: DataConfig) -> None:
        """`counts` [items] are interactions an item; every item can be drawn."""
        self._draws = config.negatives if config.negatives < len(counts) else None
        weights = (counts + 1.0) ** (0.0 if self._draws is None else config.negative_power)
        probability = weights / weights.sum()
        self.log_q = np.log(probability).astype(np.float32)
        self._cumulative = np.cumsum(probability)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return item rows, drawn independently; of a small catalogue each item once, in any order."""
        if self._draws is None:
            return rng.permutation(len(self._cumulative))
        drawn = np.searchsorted(self._cumulative, rng.random(self._draws), side="right")
        return np.minimum(drawn, len(self._cumulative) - 1)


BUCKET_BATCHES = 8
"""Batches whose windows are sorted by length together, so that a batch pads little."""


def stream_batches(
    history: History,
    text: np.ndarray,
    sampler: NegativeSampler,
    config: DataConfig,
    *,
    max_history: int,
    seed: int,
    epoch: int,
    rank: int,
    workers: int,
) -> Iterator[Batch]:
    """Yield one epoch of this worker's batches.

    The epoch's order depends on seed and epoch only; each global batch is dealt out over the workers, so every
    worker yields equally many and any number of workers sees the same global batches. Nothing is yielded where they
    are smaller than the number of workers.
    """
    rng = np.random.default_rng((seed, epoch))
    windows = cut_windows(history, max_history, rng)
    for step, chosen in enumerate(_global_batches(windows, config.batch_sequences, rng)):
        if len(chosen) < workers:
            continue
        mine = windows.pick(chosen[rank::workers])
        negatives = sampler.draw(np.random.default_rng((seed, epoch, step, rank)))
        yield build_batch(build_sequences(history, mine), negatives, text, sampler.log_q)


def count_batches(history: History, config: DataConfig, max_history: int) -> int:
    """Return about how many global batches an epoch has."""
    sizes = history.ends - history.starts - 1
    return max(1, int(np.ceil(sizes / max_history).sum()) // config.batch_sequences)


def _global_batches(windows: Windows, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Cut the epoch into batches of equal size but for one window: a small last one could not be dealt out."""
    lengths = windows.last - windows.first
    count = -(-len(windows) // size)
    bounds = np.arange(count + 1) * len(windows) // max(count, 1)
    for first in range(0, count, BUCKET_BATCHES):
        edges = bounds[first : first + BUCKET_BATCHES + 1]
        bucket = np.arange(edges[0], edges[-1])
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        cuts = np.split(bucket, edges[1:-1] - edges[0])
        for index in rng.permutation(len(cuts)):
            yield cuts[index]
