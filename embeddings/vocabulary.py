"""External ids to table rows, one to one.

In:  external ids (strings).  Out: rows (int64), -1 for an id that has none.
Knows nothing of what a row holds, nor which id should give its row up. Rows are handed out in order of first sight.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

UNKNOWN_ROW = -1


class Vocabulary:
    """The ids of one table, up to the table's capacity."""

    def __init__(self, ids: Iterable[str], capacity: int) -> None:
        """Give the ids rows 0, 1, … in the order listed. Raises ValueError when they repeat or do not fit."""
        self.ids = list(ids)
        self.capacity = capacity
        self._row_of = {external: row for row, external in enumerate(self.ids)}
        if len(self._row_of) != len(self.ids):
            raise ValueError(f"{len(self.ids) - len(self._row_of)} ids repeat")
        if len(self.ids) > capacity:
            raise ValueError(f"{len(self.ids)} ids do not fit into {capacity} rows")

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, external: str) -> int:
        """Return the id's row, or `UNKNOWN_ROW`."""
        return self._row_of.get(external, UNKNOWN_ROW)

    def rows(self, externals: Sequence[str] | pa.ChunkedArray) -> np.ndarray:
        """Return the rows of many ids, int64, without a loop per id for Arrow columns."""
        if isinstance(externals, pa.ChunkedArray):
            found = pc.fill_null(pc.index_in(externals, pa.array(self.ids, pa.string())), UNKNOWN_ROW)
            return found.to_numpy().astype(np.int64)
        return np.fromiter((self.row(external) for external in externals), np.int64, len(externals))

    def assign(self, external: str) -> int:
        """Return the id's row, giving it the next free one on first sight; `UNKNOWN_ROW` when the table is full."""
        row = self._row_of.get(external)
        if row is not None:
            return row
        if len(self.ids) == self.capacity:
            return UNKNOWN_ROW
        row = len(self.ids)
        self.ids.append(external)
        self._row_of[external] = row
        return row

    def reuse(self, row: int, external: str) -> None:
        """Give a row in use to another id; the one that had it has none from here on.

        Raises ValueError when the new id has a row already.
        """
        if external in self._row_of:
            raise ValueError(f"id {external!r} has row {self._row_of[external]} already")
        del self._row_of[self.ids[row]]
        self.ids[row] = external
        self._row_of[external] = row
