"""Which raw rows are accepted, and the reason against each that is not.

In:  masks of bad rows, one reason at a time.  Out: the accepted mask, and the refused rows as a table.
Knows nothing of what the rows mean.

The refused rows' table has the columns `file` (events or items), `row` (its number in that file), `reason`, `line` (the
text of a torn line) and every role as it was read.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.events import MAX_ID_CHARS
from training.prepare.raw_table import BoolArray, RawTable


class Verdict:
    """The first reason against each row, if any."""

    def __init__(self, raw: RawTable) -> None:
        self._raw = raw
        self._reasons = [""]
        self._reason_N = np.zeros(raw.columns.num_rows, dtype=np.int64)
        self.refuse("not UTF-8", raw.undecodable)

    @property
    def accepted(self) -> BoolArray:
        """Rows nothing has been said against."""
        return self._reason_N == 0

    def refuse(self, reason: str, bad_N: BoolArray) -> None:
        """Refuse the rows of the mask that are accepted so far."""
        self._reasons.append(reason)
        self._reason_N[bad_N & self.accepted] = len(self._reasons) - 1

    def refuse_bad_ids(self, *columns: pa.ChunkedArray) -> None:
        """Refuse ids that are too long or hold a NUL."""
        for ids in columns:
            self.refuse("id too long", pc.fill_null(pc.greater(pc.utf8_length(ids), MAX_ID_CHARS), False).to_numpy())
            self.refuse("NUL in id", pc.fill_null(pc.match_substring(ids, "\x00"), False).to_numpy())

    def refuse_repeated(self, reason: str, ids: pa.ChunkedArray) -> None:
        """Refuse accepted rows whose id an earlier accepted row has."""
        codes = pc.index_in(ids, value_set=pc.unique(ids)).to_numpy()
        accepted_rows = np.flatnonzero(self.accepted)
        _codes, first = np.unique(codes[accepted_rows], return_index=True)
        repeated_N = self.accepted
        repeated_N[accepted_rows[first]] = False
        self.refuse(reason, repeated_N)

    def rejected_rows(self, file: str) -> pa.Table:
        """Return the refused rows and the torn lines in the order of the file."""
        refused = pa.array(~self.accepted)
        torn = self._raw.torn_lines
        rows = {
            "row": pa.array(self._raw.row_numbers).filter(refused),
            "reason": pa.array(self._reasons, pa.string()).take(pa.array(self._reason_N).filter(refused)),
            **{role: _shown(self._raw.columns[role].filter(refused)) for role in self._raw.columns.column_names},
        }
        lines = {
            "row": pa.array(torn, pa.int64()),
            "reason": pa.array(["torn line"] * len(torn), pa.string()),
            "line": pa.array(torn.values(), pa.string()),
        }
        table = pa.concat_tables([pa.table(rows), pa.table(lines)], promote_options="default").sort_by("row")
        return table.add_column(0, "file", pa.array([file] * table.num_rows, pa.string()))


def _shown(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.binary_join(column, "|") if pa.types.is_list(column.type) else column.cast(pa.string())
