"""External ids counted and told apart by digest, over event files of any size.

In:  Parquet files in row groups.  Out: batches of them, digests of their ids, and counts that merge exactly.
Knows nothing of Ray, of examples or of who calls: every function works on one batch or one group.

A digest is 63 bits of BLAKE2b over the id's UTF-8. That no two ids of one column share a digest is checked against the
ids themselves, where their counts are merged: equal digests always meet in one group.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import DataError

RowGroup = dict[str, str | int]
"""Its `path`, its number `group` and the position `first` of its first row."""

BATCH_ROWS = 262_144
COUNTED_COLUMNS = ("user_id", "item_id", "kind")
COUNT_SCHEMA = pa.schema(
    [
        ("bucket", pa.int32()),  # of the digest: what is grouped by
        ("column", pa.int8()),  # place in COUNTED_COLUMNS
        ("external_id", pa.string()),
        ("digest", pa.int64()),
        ("count", pa.int64()),
    ]
)


def list_row_groups(paths: Iterable[Path]) -> list[RowGroup]:
    """Return the row groups of some files that hold rows, in order. Raises `DataError` naming a file that is none."""
    groups: list[RowGroup] = []
    first = 0
    for path in paths:
        try:
            metadata = pq.read_metadata(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read ({error}); prepare the dataset again") from error
        for group in range(metadata.num_row_groups):
            if rows := metadata.row_group(group).num_rows:
                groups.append({"path": str(path), "group": group, "first": first})
                first += rows
    return groups


def read_row_group(path: str, group: int, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield a row group's columns, some rows at a time. Raises `DataError` naming a file that is torn or has nulls."""
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns)):
                table = pa.table(batch).select(list(columns))
                for name in columns:
                    if name != "request_id" and table[name].null_count:
                        raise DataError(f"{path}: column {name!r} holds nulls; prepare the dataset again")
                yield table
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare the dataset again") from error


def encode(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Return the distinct ids of a column and for each of its rows the place among them; nulls have place -1."""
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    distinct = encoded.dictionary.cast(pa.string()).to_pylist()
    return distinct, pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)


def digests(ids: Iterable[str]) -> np.ndarray:
    """Return the digest of each id, int64 from 0."""
    joined = b"".join([blake2b(text.encode(), digest_size=8).digest() for text in ids])
    return (np.frombuffer(joined, dtype="<u8") >> np.uint64(1)).astype(np.int64)


def count_ids(events: pa.Table, buckets: int) -> pa.Table:
    """Count the ids of each of `COUNTED_COLUMNS` among some events; rows of `COUNT_SCHEMA`."""
    counts = []
    for number, name in enumerate(COUNTED_COLUMNS):
        distinct, place = encode(events[name])
        digest = digests(distinct)
        columns = {
            "bucket": (digest % buckets).astype(np.int32),
            "column": np.full(len(distinct), number, dtype=np.int8),
            "external_id": pa.array(distinct, pa.string()),
            "digest": digest,
            "count": np.bincount(place, minlength=len(distinct)).astype(np.int64),
        }
        counts.append(pa.table(columns, schema=COUNT_SCHEMA))
    return pa.concat_tables(counts)


def merge_counts(counts: pa.Table) -> pa.Table:
    """Add up the counts of equal ids of one bucket. Raises `DataError` naming two ids that share a digest."""
    keys = ["column", "digest", "external_id"]
    merged = (
        counts.group_by(keys, use_threads=False).aggregate([("count", "sum")]).sort_by([(k, "ascending") for k in keys])
    )
    column, digest = merged["column"].to_numpy(), merged["digest"].to_numpy()
    same = np.flatnonzero((column[1:] == column[:-1]) & (digest[1:] == digest[:-1]))
    if len(same):
        at = int(same[0])
        one, other = merged["external_id"][at].as_py(), merged["external_id"][at + 1].as_py()
        raise DataError(f"{COUNTED_COLUMNS[column[at]]}: {one!r} and {other!r} have one digest; rename one of them")
    return merged.select([*keys, "count_sum"]).rename_columns([*keys, "count"])
