"""Sessionising: the events of some users become examples, each with the history that its user had then.

In:  rows of `ROW_SCHEMA`, all those of each user, in any order.  Out: rows of `EXAMPLE_SCHEMA`, to be copied by
     `expand` into what is written: each positive followed by the items drawn against it.
Knows nothing of files, of Ray or of external ids. No per-row Python; the result does not depend on the rows' order.

    one user's events by time    click a · impression b · click c · skip d · impression e · click e
    examples                     a 1 []  ·  b 0 [a]     · c 1 [a] · d 0 [a c] · (followed) · e 1 [a c]
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from cluster.errors import DataError
from cluster.events import INTERACTION_KINDS, KINDS

LISTED, IMPRESSION, UNWANTED, CHOSEN = range(4)
"""Roles of a row: a user's number in the vocabulary, an impression, a skip or dislike, an interaction."""

ROLE_OF_KIND = np.array(
    [CHOSEN if kind in INTERACTION_KINDS else IMPRESSION if kind == "impression" else UNWANTED for kind in KINDS],
    dtype=np.int8,
)
NO_REQUEST = -1
LISTED_POSITION = -1
"""Sorts a user's number before the user's events."""

ROW_SCHEMA = pa.schema(
    [
        ("bucket", pa.int32()),  # of the user: what is grouped by
        ("user", pa.int64()),  # digest of the external id
        ("position", pa.int64()),  # of the event in the dataset
        ("item", pa.int32()),  # row in the item vocabulary
        ("role", pa.int8()),
        ("request", pa.int64()),  # digest of the request id, or NO_REQUEST
        ("value", pa.int64()),  # ts_us of an event; a LISTED row's user number
    ]
)
EXAMPLE_SCHEMA = pa.schema(
    [
        ("part", pa.int32()),  # file that it is written to: what is grouped by
        ("position", pa.int64()),
        ("user_id", pa.int64()),
        ("item", pa.int32()),
        ("label", pa.int8()),
        ("ts_us", pa.int64()),
        ("draw", pa.uint64()),  # seed of the negatives, of this user and this event alone
        ("history", pa.list_(pa.int32())),  # item rows, newest last
    ]
)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemTable:
    """The item vocabulary as arrays, by row: what an item is called in the examples and how likely it is drawn."""

    digest: np.ndarray
    """Digests of external ids, ascending, int64 [items]."""
    row: np.ndarray
    """Row of each of these, int32 [items]."""
    id: np.ndarray
    """What the examples call a row, int64 [items]."""
    cumulative: np.ndarray
    """Cumulative weight (count + 1)^power of the rows, float64 [items]."""

    @classmethod
    def build(cls, digest: np.ndarray, id: np.ndarray, count: np.ndarray, *, power: float) -> Self:
        """Build from columns in the order of rows."""
        order = np.argsort(digest)
        weights = (count + 1.0) ** power
        return cls(digest=digest[order], row=order.astype(np.int32), id=id, cumulative=np.cumsum(weights))

    def save(self, folder: Path) -> None:
        """Write the arrays to a new folder."""
        folder.mkdir()
        for field in fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map the arrays into memory; the workers of one machine share its pages."""
        return cls(**{field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r") for field in fields(cls)})

    def rows(self, digest: np.ndarray) -> np.ndarray:
        """Return the rows of digests that are all known, int32."""
        return self.row[np.searchsorted(self.digest, digest)]

    def draw(self, uniform: np.ndarray, excluded: np.ndarray) -> np.ndarray:
        """Return rows drawn by weight among all but `excluded`, one for each number of [0, 1); needs two items.

        Excluding is exact: the number is scaled to the remaining weight and steps over the excluded item's interval.
        """
        before = np.where(excluded > 0, self.cumulative[np.maximum(excluded, 1) - 1], 0.0)
        gap = self.cumulative[excluded] - before
        target = uniform * (self.cumulative[-1] - gap)
        target = np.where(target >= before, target + gap, target)
        last = len(self.cumulative) - 1
        drawn = np.minimum(np.searchsorted(self.cumulative, target, side="right"), last)
        # Rounding may still land on the excluded item's edge; its neighbour is as near.
        return np.where(drawn != excluded, drawn, np.where(excluded < last, excluded + 1, excluded - 1))


def build_examples(rows: pa.Table, *, history: int, part_events: int, seed: int) -> pa.Table:
    """Turn the events of whole users into examples; `history` bounds each one's length.

    A user that has a LISTED row is called by its value, any other by its digest. Event `position` belongs to part
    `position // part_events`.
    """
    if not rows.num_rows:
        return EXAMPLE_SCHEMA.empty_table()
    user, position = rows["user"].to_numpy(), rows["position"].to_numpy()
    order = np.lexsort((position, user))
    user, position = user[order], position[order]
    item, role, request, value = (rows[name].to_numpy()[order] for name in ("item", "role", "request", "value"))
    starts = np.flatnonzero(np.r_[True, user[1:] != user[:-1]])
    owner = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(user)]))
    listed = role[starts] == LISTED
    user_id = np.where(listed, value[starts], user[starts])[owner]

    chosen = role == CHOSEN
    end = np.cumsum(chosen) - chosen  # interactions of this and of earlier users before each row
    first = end[starts][owner]
    start = np.maximum(end - history, first)
    shown = role == IMPRESSION
    kept = chosen | (role == UNWANTED)
    kept[shown] = ~followed(user, item, request, position, shown, chosen)[shown]
    length = (end - start)[kept]
    offsets = _list_offsets(length)
    index = np.repeat(start[kept] - offsets[:-1], length) + np.arange(offsets[-1])
    ordinal = (np.arange(len(user)) - (starts + listed)[owner]).astype(np.uint64)  # of the event; LISTED rows aside
    draw = mix(mix(user.astype(np.uint64) ^ mix(np.array([seed], dtype=np.uint64))) + ordinal * _GOLDEN)
    columns = {
        "part": (position[kept] // part_events).astype(np.int32),
        "position": position[kept],
        "user_id": user_id[kept],
        "item": item[kept],
        "label": chosen[kept].astype(np.int8),
        "ts_us": value[kept],
        "draw": draw[kept],
        "history": pa.ListArray.from_arrays(pa.array(offsets), pa.array(item[chosen][index])),
    }
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


def followed(
    user: np.ndarray,
    item: np.ndarray,
    request: np.ndarray,
    position: np.ndarray,
    shown: np.ndarray,
    chosen: np.ndarray,
) -> np.ndarray:
    """Tell which rows have a later interaction of the same user with the same item; only those `shown` are asked for.

    Where both name their request, it must be the same one.
    """
    result = np.zeros(len(user), dtype=bool)
    if not shown.any():
        return result
    at = np.flatnonzero(shown | chosen)
    user, item, request, position, chosen = (column[at] for column in (user, item, request, position, chosen))
    when = np.where(chosen, position, LISTED_POSITION)
    anyhow = _latest(when, item, user)
    unnamed = _latest(np.where(request == NO_REQUEST, when, LISTED_POSITION), item, user)
    alike = _latest(when, request, item, user)
    result[at] = np.where(request == NO_REQUEST, anyhow, np.maximum(alike, unnamed)) > position
    return result


def expand(examples: pa.Table, copies_from: int, copies_to: int, items: ItemTable, *, negatives: int) -> pa.Table:
    """Return the written rows [copies_from, copies_to) of a part's examples, which are in order of position.

    Every positive is followed by `negatives` rows of the same user, history and time, with another item and label 0.
    """
    ends = count_rows(examples, negatives)
    index = np.arange(copies_from, copies_to)
    source = np.searchsorted(ends, index, side="right")
    place = index - np.r_[0, ends][source]
    drawn = np.flatnonzero(place)
    low, high = (int(source[0]), int(source[-1]) + 1) if len(source) else (0, 0)
    own = examples.slice(low, high - low).combine_chunks()
    source = source - low
    item, label = own["item"].to_numpy()[source], own["label"].to_numpy()[source]
    label[drawn] = 0
    if len(drawn):
        seeds = own["draw"].to_numpy()[source[drawn]] + place[drawn].astype(np.uint64) * _GOLDEN
        item[drawn] = items.draw((mix(seeds) >> np.uint64(11)) * 2.0**-53, item[drawn])
    lists = own["history"].combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    starts = lists.offsets.to_numpy().astype(np.int64)
    length = np.diff(starts)[source]
    offsets = _list_offsets(length)
    seen = lists.values.to_numpy()[np.repeat(starts[source] - offsets[:-1], length) + np.arange(offsets[-1])]
    return pa.table(
        {
            "user_id": own["user_id"].to_numpy()[source],
            "item_id": items.id[item],
            "history": pa.ListArray.from_arrays(pa.array(offsets), pa.array(items.id[seen])),
            "label": label,
            "ts_us": own["ts_us"].to_numpy()[source],
        }
    )


def count_rows(examples: pa.Table, negatives: int) -> np.ndarray:
    """Return the number of written rows up to and with each example."""
    return np.cumsum(np.where(examples["label"].to_numpy() == 1, 1 + negatives, 1))


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit numbers (the finaliser of SplitMix64, Steele et al., OOPSLA 2014): random access randomness."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _latest(when: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Return for each row the greatest `when` among the rows of equal keys."""
    order = np.lexsort(keys)
    changed = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    starts = np.r_[0, np.flatnonzero(changed) + 1]
    latest = np.empty_like(when)
    latest[order] = np.repeat(np.maximum.reduceat(when[order], starts), np.diff(np.r_[starts, len(when)]))
    return latest


def _list_offsets(length: np.ndarray) -> np.ndarray:
    """Return where each list starts, int32 as Arrow's lists have it. Raises `DataError` for more than they hold."""
    total = int(length.sum())
    if total > np.iinfo(np.int32).max:
        raise DataError(f"{len(length):,} examples of one partition have {total:,} history items; lower --history")
    return np.r_[0, np.cumsum(length)].astype(np.int32)
