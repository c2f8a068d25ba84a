"""Parts of what is evaluated, on which the same metrics are told again: cold and warm, by activity, by any attribute.

In:  the user and item rows of events, counts of what was trained on, columns of users.parquet and items.parquet.
Out: by name, which of the events belong to a segment; only segments that have any.
Knows nothing of metrics or systems. Segments may overlap: an item has several categories.

Shapes: N events, U users, I items, R rows of whom an attribute is.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.dataset import Dataset
from cluster.errors import DataError
from training.evaluation.lists import IntArray

Segments = dict[str, npt.NDArray[np.bool_]]

ALL = "all"
QUARTERS = 4
MOST_VALUES = 50
"""Values of one attribute; more are not segments but names."""


def segments_by_history(user_N: IntArray, item_N: IntArray, count_U: IntArray, count_I: IntArray) -> Segments:
    """Return all events, those of users and items with and without events in training, and by users' activity.

    Quarters are of the warm users that are evaluated, by their number of events in training, the least active first.
    """
    activity_N, trained_N = count_U[user_N], count_I[item_N]
    found = {
        ALL: np.ones(len(user_N), bool),
        "warm users": activity_N > 0,
        "cold users": activity_N == 0,
        "warm items": trained_N > 0,
        "cold items": trained_N == 0,
    }
    activity_U = count_U[np.unique(user_N)]
    warm_U = activity_U[activity_U > 0]
    if len(warm_U) >= QUARTERS:
        quarter_N = np.searchsorted(np.quantile(warm_U, np.arange(1, QUARTERS) / QUARTERS), activity_N)
        for quarter in range(QUARTERS):
            found[f"activity {quarter + 1} of {QUARTERS}"] = (activity_N > 0) & (quarter_N == quarter)
    return _some(found)


def segments_by_attribute(name: str, row_N: IntArray, value_R: pa.Array) -> Segments:
    """Return a segment for each value of an attribute of the rows, a text or a list of texts; `row_N` are the events'.

    Of more than `MOST_VALUES` numbers, quarters of the rows. Raises `DataError` when there are as many other values.
    """
    if pa.types.is_list(value_R.type):
        owner_V, value_V = pc.list_parent_indices(value_R).to_numpy(), pc.list_flatten(value_R)
    else:
        owner_V, value_V = np.arange(len(value_R)), value_R
    encoded = value_V.dictionary_encode()
    order = pc.array_sort_indices(encoded.dictionary).to_pylist()
    if len(encoded.dictionary) > MOST_VALUES:
        encoded, order = _quarters(name, value_V), range(QUARTERS)
    code_V = pc.fill_null(encoded.indices, -1).to_numpy()
    found: Segments = {}
    for code in order:
        has_R = np.zeros(len(value_R), bool)
        has_R[owner_V[code_V == code]] = True
        found[f"{name}={encoded.dictionary[code].as_py()}"] = has_R[row_N]
    return _some(found)


def read_attribute(dataset: Dataset, name: str, user_ids: Sequence[str], item_ids: Sequence[str]) -> pa.Array:
    """Return an attribute such as `user.gender`, `item.domain` or `item.categories` of each of these users or items.

    Null where the dataset says nothing. Raises `DataError` for one that it does not have.
    """
    kind, _, column = name.partition(".")
    if kind == "user":
        table, ids = dataset.users(), user_ids
        attributes = table["attributes"].combine_chunks()
        known = attributes.keys.unique().to_pylist()
        value_R = pc.map_lookup(attributes, pa.scalar(column), "first")
    else:
        table, ids = dataset.items(), item_ids
        known = ["domain", "categories"]
        value_R = table[column if column in known else "domain"].combine_chunks()
    if kind not in ("user", "item") or column not in known:
        raise DataError(f"{name}: is no attribute of {dataset.path}; {kind}s have {', '.join(sorted(known)) or 'none'}")
    return value_R.take(pc.index_in(pa.array(ids, pa.string()), table[f"{kind}_id"]))


def _quarters(name: str, value_V: pa.Array) -> pa.DictionaryArray:
    """Return in which quarter each number is, such as `24 to 31`."""
    try:
        number_V = pc.cast(value_V, pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise DataError(f"{name}: has more than {MOST_VALUES} values that are no numbers; these are names") from error
    edges = np.nanquantile(number_V, np.arange(QUARTERS + 1) / QUARTERS, method="lower")
    labels = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    quarter_V = np.searchsorted(edges[1:-1], number_V)
    return pa.DictionaryArray.from_arrays(pa.array(quarter_V, mask=np.isnan(number_V)), labels)


def _some(segments: Segments) -> Segments:
    return {name: chosen for name, chosen in segments.items() if chosen.any()}
