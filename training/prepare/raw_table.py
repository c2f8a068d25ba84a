"""Raw CSV and Parquet files, read whole with nothing lost: torn lines and undecodable rows are kept and numbered.

In:  a .csv, .tsv (also .gz, .bz2, .zst) or .parquet file and which of its columns play which role.
Out: a `RawTable` with a column a role.  Knows nothing of what the values mean.

Rows are counted from 1 without the header; a quoted line break does not start a row, and a blank line is none.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import csv
import io
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from cluster.errors import DataError

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

BLOCK_BYTES = 16 * 2**20
_COMPRESSED = frozenset({".gz", ".bz2", ".zst", ".lz4"})
_READ_ERRORS = (OSError, EOFError, ValueError, csv.Error, pa.ArrowException)

# The whole value is UTF-8 (Unicode 15, table 3-7). Arrow has no kernel that tests it; RE2 reads binary byte by byte.
_UTF8 = (
    r"^(?:[\x00-\x7F]|[\xC2-\xDF][\x80-\xBF]|\xE0[\xA0-\xBF][\x80-\xBF]|[\xE1-\xEC\xEE\xEF][\x80-\xBF]{2}"
    r"|\xED[\x80-\x9F][\x80-\xBF]|\xF0[\x90-\xBF][\x80-\xBF]{2}|[\xF1-\xF3][\x80-\xBF]{3}|\xF4[\x80-\x8F][\x80-\xBF]{2})*$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTable:
    """What a file holds, before any of it is believed."""

    columns: pa.Table
    """A column a role: strings from CSV, their own types from Parquet; undecodable bytes show as U+FFFD."""
    row_numbers: IntArray
    """The number each row has in the file."""
    undecodable: BoolArray
    """Rows with a value that is not UTF-8."""
    torn_lines: dict[int, str]
    """Row number → text of the lines with too few or too many fields."""

    @property
    def rows_read(self) -> int:
        """Rows of the file, readable or not."""
        return self.columns.num_rows + len(self.torn_lines)


def column_names(path: Path) -> list[str]:
    """Return the names of the file's columns. Raises `DataError` when it cannot be read or its format is not known."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        return pq.read_schema(path).names if _suffix(path) == ".parquet" else _header(path)
    except _READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_raw_table(path: Path, roles: Mapping[str, str], *, list_roles: Collection[str] = ()) -> RawTable:
    """Read the columns named by `roles` (role → column); those of `list_roles` may hold lists.

    Raises `DataError` when the file cannot be read, its format is not known, or a column is missing.
    """
    _require(path, roles, column_names(path))
    columns = sorted(set(roles.values()))
    try:
        if _suffix(path) == ".parquet":
            with pq.ParquetFile(path) as file:
                table, torn_lines = file.read(columns=columns), {}
        else:
            table, torn_lines = _read_csv(path, columns)
        decoded = [_decode(table[column]) for column in roles.values()]
    except _READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    for role, (column, _bad) in zip(roles, decoded, strict=True):
        if pa.types.is_nested(column.type) and not (role in list_roles and pa.types.is_list(column.type)):
            raise DataError(
                f"{path}: column {roles[role]!r} (for {role}) is {column.type}; one plain value a row is needed"
            )
    numbers = np.arange(1, table.num_rows + len(torn_lines) + 1, dtype=np.int64)
    return RawTable(
        columns=pa.table({role: column for role, (column, _bad) in zip(roles, decoded, strict=True)}),
        row_numbers=np.delete(numbers, np.array(sorted(torn_lines), dtype=np.int64) - 1),
        undecodable=np.logical_or.reduce([bad for _column, bad in decoded]),
        torn_lines=torn_lines,
    )


def _require(path: Path, roles: Mapping[str, str], present: list[str]) -> None:
    counted = Counter(present)
    for role, column in roles.items():
        if counted[column] == 0:
            listed = ", ".join(present) or "none"
            raise DataError(f"{path}: column {column!r} (for {role}) is missing; present: {listed}")
        if counted[column] > 1:
            raise DataError(f"{path}: {counted[column]} columns are named {column!r} (for {role}); rename all but one")


def _suffix(path: Path) -> str:
    suffix = path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix
    if suffix not in (".csv", ".tsv", ".parquet"):
        raise DataError(f"{path}: is neither .csv, .tsv nor .parquet; rename or convert it")
    return suffix


def _delimiter(path: Path) -> str:
    return "\t" if _suffix(path) == ".tsv" else ","


def _header(path: Path) -> list[str]:
    with pa.input_stream(str(path), compression="detect") as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        for fields in csv.reader(lines, delimiter=_delimiter(path)):
            if fields:
                return fields
    raise DataError(f"{path}: is empty; a header line with the column names is expected")


def _read_csv(path: Path, columns: list[str]) -> tuple[pa.Table, dict[int, str]]:
    torn_lines: dict[int, str] = {}

    def keep_torn(row: pa_csv.InvalidRow) -> str:
        torn_lines[row.number - 1] = row.text
        return "skip"

    table = pa_csv.read_csv(
        path,
        # One thread: only then does Arrow number the invalid rows.
        read_options=pa_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse_options=pa_csv.ParseOptions(
            delimiter=_delimiter(path), newlines_in_values=True, invalid_row_handler=keep_torn
        ),
        convert_options=pa_csv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(columns, pa.binary()), strings_can_be_null=False
        ),
    )
    return table, torn_lines


def _decode(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, BoolArray]:
    """Return a text column as valid strings and the rows whose bytes are not UTF-8; other types as they are."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
        return column, np.zeros(len(column), dtype=np.bool_)
    raw = column.cast(pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())
    try:
        return raw.cast(pa.string()), np.zeros(len(column), dtype=np.bool_)
    except pa.ArrowInvalid:
        raw = pa.concat_arrays(raw.chunks)
        bad = pc.invert(pc.fill_null(pc.match_substring_regex(raw, _UTF8), True))
        shown = pa.array([value.decode(errors="replace").encode() for value in raw.filter(bad).to_pylist()], raw.type)
        text = pc.replace_with_mask(raw, bad, shown).cast(pa.string())
        return pa.chunked_array([text]), bad.to_numpy(zero_copy_only=False)
