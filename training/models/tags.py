"""Which items are of which categories and domain: what slates are narrowed to.

In:  a version's items as they are told, items put since.  Out: the items of any of some categories, in a domain.
Knows nothing of requests.

Shapes: I items.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.catalogue import Item

IntArray = npt.NDArray[np.int64]
COLUMNS = ("categories", "domain")
"""Of the table that a version keeps: the categories and the domain of its first items, by row."""


@dataclass(frozen=True, slots=True)
class Tags:
    """Rows by what is told of them."""

    of_category: Mapping[str, IntArray]
    of_domain: Mapping[str, IntArray]

    @classmethod
    def of(cls, told: pa.Table | None) -> Self:
        """Sort rows by category and by domain; none where nothing is told."""
        if told is None:
            return cls({}, {})
        categories = told["categories"].combine_chunks()
        row_N = np.repeat(np.arange(len(categories)), np.diff(categories.offsets.to_numpy()))
        first, last = categories.offsets[0].as_py(), categories.offsets[-1].as_py()
        return cls(
            _by_name(categories.values[first:last], row_N),
            _by_name(told["domain"].combine_chunks(), np.arange(len(told))),
        )

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
    coded = names.dictionary_encode()
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
        of_category, of_domain = dict(self.of_category), dict(self.of_domain)
        for old in (before[item_id] for item_id in newest if item_id in before):
            for name in old.categories:
                of_category[name] = of_category[name] - {old.item_id}
            of_domain[old.domain] = of_domain[old.domain] - {old.item_id}
        for item in newest.values():
            for name in item.categories:
                of_category[name] = of_category.get(name, frozenset()) | {item.item_id}
            of_domain[item.domain] = of_domain.get(item.domain, frozenset()) | {item.item_id}
        return PutTags(self.item_ids | frozenset(newest), of_category, of_domain)

    def within(self, categories: Sequence[str], domain: str | None) -> frozenset[str]:
        """Return those of any of the categories, where some are given, and of the domain."""
        found = self.item_ids
        if categories:
            found = found & frozenset[str]().union(*(self.of_category.get(name, frozenset()) for name in categories))
        return found & self.of_domain.get(domain, frozenset()) if domain else found
