"""Number the external ids that a dataset mentions: the vocabulary files beside its examples.

In:  counts of ids (`external_ids.COUNT_SCHEMA`) as a Ray Data pipeline.  Out: ids/user.parquet, ids/item.parquet and
     the item table that every later task looks up.
Knows nothing of events or of what the numbers are for.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training.prepare.external_ids import COUNTED_COLUMNS, merge_counts
from training.prepare.sessions import ItemTable

if TYPE_CHECKING:
    import ray.data

ROW_GROUP_ROWS = 131_072
NEGATIVE_POWER = 0.75
"""Items are drawn with probability ∝ (count + 1)^power."""
USER_FILE, ITEM_FILE = "ids/user.parquet", "ids/item.parquet"
ITEM_FOLDER = "items"
"""Of the draft: the item table as arrays."""
ID_SCHEMA = pa.schema([("external_id", pa.string()), ("id", pa.int64()), ("count", pa.int64())])


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbered:
    """How many there are of each kind of id."""

    users: int
    items: int
    impressions: int


def number_ids(counts: "ray.data.Dataset", draft: Path, ids: str, buckets: int) -> Numbered:
    """Write the vocabularies, the most frequent id first, and the item table that every task looks up.

    Equal counts are in order of the external id. The driver sees one block at a time; it keeps the item's numbers.
    """
    (draft / "ids").mkdir()
    merged = counts.groupby("bucket", num_partitions=buckets).map_groups(merge_counts, batch_format="pyarrow")
    ordered = merged.sort(["column", "count", "external_id"], descending=[False, True, False])
    kinds: dict[str, int] = {}
    items: list[pa.Table] = []
    with _IdFile(draft / USER_FILE, ids) as user_file, _IdFile(draft / ITEM_FILE, ids) as item_file:
        for block in ordered.iter_batches(batch_size=None, batch_format="pyarrow"):
            of_column = [block.filter(pc.equal(block["column"], number)) for number in range(len(COUNTED_COLUMNS))]
            user_file.write(of_column[0])
            items.append(item_file.write(of_column[1]))
            kinds |= dict(zip(of_column[2]["external_id"].to_pylist(), of_column[2]["count"].to_pylist(), strict=True))
    digest, number, count = (pa.concat_tables(items)[name].to_numpy() for name in ("digest", "id", "count"))
    ItemTable.build(digest, number, count, power=NEGATIVE_POWER).save(draft / ITEM_FOLDER)
    return Numbered(users=user_file.rows, items=item_file.rows, impressions=kinds.get("impression", 0))


class _IdFile:
    """A vocabulary being written; its row groups do not show the blocks that it came in."""

    def __init__(self, path: Path, ids: str) -> None:
        self.rows = 0
        self._pending = ID_SCHEMA.empty_table()
        self._ids = ids
        self._writer = pq.ParquetWriter(path, ID_SCHEMA, compression="zstd")

    def __enter__(self) -> "_IdFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._write_pending(self._pending.num_rows)
        self._writer.close()

    def write(self, counted: pa.Table) -> pa.Table:
        """Number these ids, write them, and return their digest, number and count."""
        following = np.arange(self.rows, self.rows + counted.num_rows)
        number = pa.chunked_array([following]) if self._ids == "rows" else counted["digest"]
        self.rows += counted.num_rows
        numbered = counted.append_column("id", number)
        self._pending = pa.concat_tables([self._pending, numbered.select(ID_SCHEMA.names).cast(ID_SCHEMA)])
        while self._pending.num_rows >= ROW_GROUP_ROWS:
            self._write_pending(ROW_GROUP_ROWS)
        return numbered.select(["digest", "id", "count"])

    def _write_pending(self, rows: int) -> None:
        self._writer.write_table(self._pending.slice(0, rows).combine_chunks())
        self._pending = self._pending.slice(rows)
