"""Which items are of which categories and domain: what slates are narrowed to.

In:  a version's items as they are told, items put since.  Out: the items of any of some categories, in a domain.
Knows nothing of requests. What an item that was put is of is in the log alone, not in versions that learned it.

Shapes: I items.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.catalogue import Item

IntArray = npt.NDArray[np.int64]
COLUMNS = ("categories", "domain")
"""Of the table that a version keeps: the categories and the domain of its first items, by row."""


@dataclass(frozen=True)  # without slots, which leave no room for what is computed when it is asked for
class Tags:
    """What a version's items were told to be; shared by all states of the version, and sorted once."""

    table: pa.Table
    """`COLUMNS`, by row."""

    @cached_property
    def of_category(self) -> Mapping[str, IntArray]:
        """Rows by category."""
        categories = self.table["categories"].combine_chunks()
        row_N = np.repeat(np.arange(len(categories)), np.diff(categories.offsets.to_numpy()))
        first, last = categories.offsets[0].as_py(), categories.offsets[-1].as_py()
        return _by_name(categories.values[first:last], row_N)

    @cached_property
    def of_domain(self) -> Mapping[str, IntArray]:
        """Rows by domain."""
        return _by_name(self.table["domain"].combine_chunks(), np.arange(len(self.table)))

    def of_row(self, row: int) -> tuple[list[str], str | None]:
        """Return one item's categories and domain; none of an item that the version was not told of."""
        if row >= len(self.table):
            return [], None
        return self.table["categories"][row].as_py() or [], self.table["domain"][row].as_py()

    def mask(self, categories: Sequence[str], domain: str | None, items: int) -> npt.NDArray[np.bool_]:
        """Return which of so many items are of any of the categories, where some are given, and of the domain."""
        is_within_I = np.ones(items, np.bool_)
        for names, rows_of in ((categories, self.of_category), ([domain] if domain else [], self.of_domain)):
            if names:
                is_one_I = np.zeros(items, np.bool_)
                for name in names:
                    rows = rows_of.get(name, np.empty(0, np.int64))
                    is_one_I[rows[rows < items]] = True
                is_within_I &= is_one_I
        return is_within_I


def _by_name(names: pa.Array, row_N: IntArray) -> dict[str, IntArray]:
    is_told_N = names.is_valid().to_numpy(zero_copy_only=False)
    coded, row_N = names.drop_null().dictionary_encode(), row_N[is_told_N]
    if not len(row_N):
        return {}
    code_N = coded.indices.to_numpy()
    order = np.argsort(code_N, kind="stable")
    ends = np.cumsum(np.bincount(code_N, minlength=len(coded.dictionary)))
    return dict(zip(coded.dictionary.to_pylist(), np.split(row_N[order], ends[:-1]), strict=True))


@dataclass(frozen=True, slots=True)
class PutTags:
    """Of the items put while serving, whose newest description counts, whatever a version was told of them."""

    item_ids: frozenset[str] = frozenset()
    of_category: Mapping[str, frozenset[str]] = field(default_factory=dict)
    of_domain: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def with_items(self, items: Iterable[Item], before: Mapping[str, Item]) -> "PutTags":
        """Return them with these items too, given what was put before; of an item given twice the last counts."""
        newest = {item.item_id: item for item in items}
        old = [before[item_id] for item_id in newest if item_id in before]
        of_category = _moved(
            self.of_category,
            [(name, item.item_id) for item in old for name in item.categories],
            [(name, item.item_id) for item in newest.values() for name in item.categories],
        )
        of_domain = _moved(
            self.of_domain,
            [(item.domain, item.item_id) for item in old],
            [(item.domain, item.item_id) for item in newest.values()],
        )
        return PutTags(self.item_ids | frozenset(newest), of_category, of_domain)

    def within(self, categories: Sequence[str], domain: str | None) -> frozenset[str]:
        """Return those of any of the categories, where some are given, and of the domain."""
        found = self.item_ids
        if categories:
            found = found & frozenset[str]().union(*(self.of_category.get(name, frozenset()) for name in categories))
        return found & self.of_domain.get(domain, frozenset()) if domain else found


def _moved(
    of_name: Mapping[str, frozenset[str]], gone: Iterable[tuple[str, str]], come: Iterable[tuple[str, str]]
) -> dict[str, frozenset[str]]:
    """Return sets of ids by name, each touched set made anew once."""
    leaving, coming = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for names, pairs in ((leaving, gone), (coming, come)):
        for name, item_id in pairs:
            names[name].add(item_id)
    touched = {
        name: (of_name.get(name, frozenset()) - leaving.get(name, set())) | coming.get(name, set())
        for name in leaving.keys() | coming.keys()
    }
    return {**of_name, **touched}
