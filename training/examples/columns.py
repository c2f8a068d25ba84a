"""One row group's columns as arrays, every row judged: what may be trained on and what may not, and why.

In:  an Arrow table of an examples part.  Out: `Columns`; rows that cannot be used are marked, or an error names them.
Knows nothing of the order of training. No per-row Python.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster.errors import DataError

BEYOND, MISSING, NO_ROW, NOT_A_LABEL = "id beyond 2^63 or below 0", "value missing", "id without a table row", "label"
UNREADABLE = "row group unreadable"
REASONS = (BEYOND, MISSING, NO_ROW, NOT_A_LABEL, UNREADABLE)
"""Why a row is skipped, where the recipe allows skips."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows of one or more row groups."""

    user_id: np.ndarray
    """int32 or int64 [rows]."""
    item_id: np.ndarray
    history: np.ndarray
    """Item ids of all rows, one after the other."""
    offset: np.ndarray
    """int64 [rows + 1]: row r has history[offset[r]:offset[r + 1]], newest last."""
    label: np.ndarray
    """float32 [rows]."""
    refused: np.ndarray
    """int8 [rows]: 0 for a row to train on, else 1 + the index into `REASONS`."""

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True, slots=True)
class Limits:
    """What ids must stay below; none where any number is an id."""

    users: int | None
    items: int | None


def read_columns(table: pa.Table, limits: Limits, max_history: int) -> Columns:
    """Return the table's columns; of longer histories the newest `max_history` ids."""
    rows = table.num_rows
    refused = np.zeros(rows, np.int8)
    user_id = _ids(table["user_id"], limits.users, refused)
    item_id = _ids(table["item_id"], limits.items, refused)
    history, offset = _lists(table["history"], limits.items, refused, max_history)
    label = _labels(table["label"], refused)
    return Columns(user_id, item_id, history, offset, label, refused)


def assert_all_accepted(columns: Columns, where: str) -> None:
    """Raise `DataError` naming place, row and reason of the first refused row."""
    if columns.refused.any():
        row = int(np.argmax(columns.refused > 0))
        reasons = count_refused(columns)
        total = ", ".join(f"{count:,} × {reason}" for reason, count in reasons.items())
        raise DataError(
            f"{where}: row {row}: {REASONS[columns.refused[row] - 1]}; of its rows {total}; "
            'stream.bad_rows="skip" leaves such rows out and counts them'
        )


def count_refused(columns: Columns) -> Mapping[str, int]:
    """Return the refused rows by reason."""
    counts = np.bincount(columns.refused, minlength=len(REASONS) + 1)[1:]
    return {reason: int(count) for reason, count in zip(REASONS, counts, strict=True) if count}


def no_columns(rows: int) -> Columns:
    """Return rows of which none could be read."""
    empty = np.zeros(rows, np.int64)
    refused = np.full(rows, 1 + REASONS.index(UNREADABLE), np.int8)
    return Columns(empty, empty, empty[:0], np.zeros(rows + 1, np.int64), np.zeros(rows, np.float32), refused)


def concatenate(columns: list[Columns]) -> Columns:
    """Return the rows of several, one after the other."""
    if len(columns) == 1:
        return columns[0]
    starts = np.cumsum([0, *(len(c.history) for c in columns)])
    offsets = [c.offset[:-1] + start for c, start in zip(columns, starts, strict=False)]
    return Columns(
        np.concatenate([c.user_id for c in columns]),
        np.concatenate([c.item_id for c in columns]),
        np.concatenate([c.history for c in columns]),
        np.concatenate([*offsets, starts[-1:]]),
        np.concatenate([c.label for c in columns]),
        np.concatenate([c.refused for c in columns]),
    )


def cut(columns: Columns, first: int, last: int) -> Columns:
    """Return rows [first, last)."""
    if first == 0 and last == len(columns):
        return columns
    begin, end = columns.offset[first], columns.offset[last]
    return Columns(
        columns.user_id[first:last],
        columns.item_id[first:last],
        columns.history[begin:end],
        columns.offset[first : last + 1] - begin,
        columns.label[first:last],
        columns.refused[first:last],
    )


def _ids(column: pa.ChunkedArray, limit: int | None, refused: np.ndarray) -> np.ndarray:
    missing, values = _numbers(column)
    if missing is not None:
        _refuse(refused, missing, MISSING)
    ids, beyond, no_row = _as_ids(values, limit)
    _refuse(refused, beyond, BEYOND)
    _refuse(refused, no_row, NO_ROW)
    return ids


def _lists(
    column: pa.ChunkedArray, limit: int | None, refused: np.ndarray, max_history: int
) -> tuple[np.ndarray, np.ndarray]:
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        if lists.num_chunks:  # too many values for one
            raise DataError(f"the histories of {len(lists):,} rows do not fit one array; write smaller row groups")
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    if lists.null_count:
        _refuse(refused, lists.is_null().to_numpy(zero_copy_only=False), MISSING)
        lists = lists.fill_null([])
    offset = lists.offsets.to_numpy().astype(np.int64)
    missing, values = _numbers(lists.values.slice(offset[0], offset[-1] - offset[0]))
    offset -= offset[0]
    ids, beyond, no_row = _as_ids(values, limit)
    for wrong, reason in ((missing, MISSING), (beyond, BEYOND), (no_row, NO_ROW)):
        if wrong is not None and wrong.any():
            owner = np.searchsorted(offset, np.flatnonzero(wrong), side="right") - 1
            mask = np.zeros(len(refused), bool)
            mask[owner] = True
            _refuse(refused, mask, reason)
    length = np.diff(offset)
    if len(length) and length.max() > max_history:
        kept = np.minimum(length, max_history)
        start = np.cumsum(kept) - kept
        ids = ids[np.arange(kept.sum()) + np.repeat(offset[1:] - kept - start, kept)]
        offset = np.concatenate([[0], np.cumsum(kept)])
    return ids, offset


def _labels(column: pa.ChunkedArray, refused: np.ndarray) -> np.ndarray:
    kind = pa.float32()
    if column.null_count:
        _refuse(refused, column.is_null().to_numpy(), MISSING)
        column = column.fill_null(0)
    label = column.cast(pa.uint8() if pa.types.is_boolean(column.type) else column.type).cast(kind, safe=False)
    values = label.to_numpy()
    with np.errstate(invalid="ignore"):
        _refuse(refused, ~((values >= 0) & (values <= 1)), NOT_A_LABEL)  # NaN is neither
    return values


def _numbers(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray | None, np.ndarray]:
    """Return which values are missing, if any, and the values with 0 in their place."""
    if not column.null_count:
        return None, column.to_numpy()
    missing = column.is_null()
    return missing.to_numpy(zero_copy_only=False) if isinstance(missing, pa.Array) else missing.to_numpy(), (
        column.fill_null(0).to_numpy()
    )


def _as_ids(values: np.ndarray, limit: int | None) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return ids (0 for an unusable one), and which are beyond the numbers, and which beyond the table."""
    beyond = no_row = None
    if len(values):
        if values.dtype.kind == "u":
            if int(values.max()) >= 2**63:
                beyond = values >= np.uint64(2**63)
        elif int(values.min()) < 0:
            beyond = values < 0
        if beyond is not None:
            values = np.where(beyond, 0, values)
        if limit is not None and int(values.max()) >= limit:
            no_row = values >= limit
            values = np.where(no_row, 0, values)
    ids = values if values.dtype in (np.int32, np.int64) else values.astype(np.int64)
    return ids, beyond, no_row


def _refuse(refused: np.ndarray, wrong: np.ndarray | None, reason: str) -> None:
    """Mark rows that are not marked yet: the first reason counts."""
    if wrong is not None and wrong.any():
        refused[wrong & (refused == 0)] = 1 + REASONS.index(reason)
