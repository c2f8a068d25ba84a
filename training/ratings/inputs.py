"""What the rating model reads of a dataset: ratings as columns, split at random, and batches of them.

In:  a dataset, item text vectors.  Out: `RatingInputs`, the same in every worker; `RatingBatch`es.
Knows nothing of models. No per-row Python: bags are laid out with array arithmetic over ratings sorted by user and by
item.

Shapes: N ratings, B of a batch.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cluster.dataset import Dataset
from cluster.errors import DataError
from embeddings.tables import ITEM, USER, build_bag_lookup
from training.models.rating import (
    ATTRIBUTE,
    ITEM_ATTRIBUTE,
    NAMES,
    RATED,
    RATER,
    USER_ATTRIBUTE,
    RatingBatch,
    RatingConfig,
)

MAX_LEVELS = 20
"""Distinct values that ratings may have."""
MAX_VALUES = 1_000
"""Distinct values an attribute may have to be one; a name or an address has more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """A list of numbers for each row, end to end."""

    values: np.ndarray
    starts: np.ndarray
    """[rows + 1]."""

    def lengths(self, rows_B: np.ndarray) -> np.ndarray:
        """Return how long the rows' lists are."""
        return self.starts[rows_B + 1] - self.starts[rows_B]

    def newest(self, rows_B: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the last `most` values of each row's list, end to end, and how many each has."""
        length_B = np.minimum(self.lengths(rows_B), most)
        ends = np.cumsum(length_B)
        cell = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.starts[rows_B + 1] - ends, length_B)
        return self.values[cell], length_B


@dataclass(frozen=True, slots=True, kw_only=True)
class RatingInputs:
    """Ratings in order of time, and what is known of users and items."""

    user_N: np.ndarray
    item_N: np.ndarray
    level_N: np.ndarray
    levels: np.ndarray
    """Stars of each level, ascending."""
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    """Indices of ratings."""
    of_user: Lists
    """Each user's ratings to learn from, as indices."""
    of_item: Lists
    user_attributes: Lists
    item_attributes: Lists
    text: np.ndarray
    """Encoder vectors, float32 [items, E], memory-mapped."""
    rows: Mapping[str, int]
    """Rows that each table needs."""

    def mean_stars(self) -> float:
        """Return the mean of what is learned."""
        return float(self.levels[self.level_N[self.train]].mean())


def load_rating_inputs(dataset: Dataset, config: RatingConfig, text_path: Path) -> RatingInputs:
    """Read a dataset's ratings. Raises `DataError` where there are none, or too many kinds of them."""
    events = dataset.events(["user_id", "item_id", "kind", "value"])
    events = events.filter(pc.and_(pc.equal(events["kind"], "rating"), pc.is_valid(events["value"])))
    if len(events) < 3:
        raise DataError(f"{dataset.path}: holds {len(events)} ratings; a rating model learns from `rating` events")
    levels, level_N = np.unique(events["value"].to_numpy(), return_inverse=True)
    if len(levels) > MAX_LEVELS:
        raise DataError(
            f"{dataset.path}: ratings have {len(levels):,} distinct values; at most {MAX_LEVELS} are levels"
        )
    items, users = dataset.items(), dataset.users()
    user_N, item_N = (
        pc.index_in(events[name], table[name].combine_chunks()).to_numpy().astype(np.int64)
        for name, table in (("user_id", users), ("item_id", items))
    )
    order = np.random.default_rng(config.split_seed).permutation(len(events))
    first = int(len(events) * config.train_fraction)
    last = int(len(events) * (config.train_fraction + config.validation_fraction))
    train = np.sort(order[:first])
    user_attributes, item_attributes, attributes = _attributes(users, items)
    return RatingInputs(
        user_N=user_N,
        item_N=item_N,
        level_N=level_N,
        levels=levels,
        train=train,
        validation=np.sort(order[first:last]),
        test=np.sort(order[last:]),
        of_user=grouped(user_N[train], train, len(users)),
        of_item=grouped(item_N[train], train, len(items)),
        user_attributes=user_attributes,
        item_attributes=item_attributes,
        text=np.load(text_path, mmap_mode="r"),
        rows={
            USER: len(users),
            ITEM: len(items),
            RATED: len(items) * len(levels),
            RATER: len(users) * len(levels),
            ATTRIBUTE: max(attributes, 1),
        },
    )


def build_rating_batch(inputs: RatingInputs, chosen_B: np.ndarray, bag: int, global_ratings: int) -> RatingBatch:
    """Lay ratings out as a batch; a rating is left out of its own user's and item's bags."""
    user_B, item_B = inputs.user_N[chosen_B], inputs.item_N[chosen_B]
    rated, rated_B = _others(inputs.of_user, user_B, chosen_B, bag)
    raters, rater_B = _others(inputs.of_item, item_B, chosen_B, bag)
    stars = len(inputs.levels)
    one_B = np.ones(len(chosen_B), np.int64)
    lists = {
        USER: (user_B, one_B),
        ITEM: (item_B, one_B),
        RATED: (inputs.item_N[rated] * stars + inputs.level_N[rated], rated_B),
        RATER: (inputs.user_N[raters] * stars + inputs.level_N[raters], rater_B),
        USER_ATTRIBUTE: inputs.user_attributes.newest(user_B, MAX_VALUES),
        ITEM_ATTRIBUTE: inputs.item_attributes.newest(item_B, MAX_VALUES),
    }
    return RatingBatch(
        lookup=build_bag_lookup({name: lists[name] for name in NAMES}),
        text_BE=torch.from_numpy(np.asarray(inputs.text[item_B], np.float32)),
        stars_B=torch.from_numpy(inputs.levels[inputs.level_N[chosen_B]].astype(np.float32)),
        level_B=torch.from_numpy(inputs.level_N[chosen_B].astype(np.int64)),
        global_ratings=global_ratings,
    )


def _others(lists: Lists, rows_B: np.ndarray, own_B: np.ndarray, bag: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's newest ratings but the one of its own, end to end, and how many each has."""
    values, length_B = lists.newest(rows_B, bag)
    other = values != np.repeat(own_B, length_B)
    owner = np.repeat(np.arange(len(rows_B)), length_B)
    return values[other], np.bincount(owner[other], minlength=len(rows_B))


def grouped(rows: np.ndarray, values: np.ndarray, count: int) -> Lists:
    """Return the values of each of `count` rows, in the order given."""
    by_row = np.argsort(rows, kind="stable")
    return Lists(values=values[by_row], starts=np.r_[0, np.cumsum(np.bincount(rows, minlength=count))])


def _attributes(users: pa.Table, items: pa.Table) -> tuple[Lists, Lists, int]:
    """Return the attribute rows of users and of items, and how many there are."""
    rows: dict[str, int] = {}
    told = [[f"{name}={value}" for name, value in pairs] for pairs in users["attributes"].to_pylist()]
    by_name: dict[str, set[str]] = {}
    for attribute in (attribute for attributes in told for attribute in attributes):
        by_name.setdefault(attribute.split("=", 1)[0], set()).add(attribute)
    kept = {name for name, values in by_name.items() if len(values) <= MAX_VALUES}
    of_users = [[attribute for attribute in attributes if attribute.split("=", 1)[0] in kept] for attributes in told]
    of_items = [[f"category={category}" for category in categories] for categories in items["categories"].to_pylist()]
    return _numbered(of_users, rows), _numbered(of_items, rows), len(rows)


def _numbered(told: Iterable[list[str]], rows: dict[str, int]) -> Lists:
    numbered = [[rows.setdefault(attribute, len(rows)) for attribute in attributes] for attributes in told]
    lengths = [len(attributes) for attributes in numbered]
    return Lists(
        values=np.array([row for attributes in numbered for row in attributes], np.int64),
        starts=np.r_[0, np.cumsum(lengths)].astype(np.int64),
    )
