"""Small examples folders whose rows can be told apart."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.examples import Examples, ExamplesInfo, load_examples, write_info

USERS, ITEMS = 40, 20


def numbered_table(first: int, rows: int) -> pa.Table:
    """Row n is of user n mod USERS and item n mod ITEMS, has n mod 4 history items and label n mod 2."""
    n = np.arange(first, first + rows)
    return pa.table(
        {
            "user_id": pa.array(n % USERS, pa.int32()),
            "item_id": pa.array(n % ITEMS, pa.int32()),
            "history": pa.array([[(one + k) % ITEMS for k in range(one % 4)] for one in n], pa.list_(pa.int32())),
            "label": pa.array(n % 2, pa.int8()),
        }
    )


def write_parts(folder: Path, parts: Sequence[pa.Table], *, group_rows: int = 7, ids: str = "rows") -> Examples:
    folder.mkdir(parents=True)
    for number, table in enumerate(parts):
        pq.write_table(table, folder / f"part-{number:05d}.parquet", row_group_size=group_rows)
    rows = sum(table.num_rows for table in parts)
    counts = {"users": USERS, "items": ITEMS} if ids == "rows" else {}
    write_info(folder, ExamplesInfo(schema_version=1, name="numbered", rows=rows, ids=ids, **counts))
    return load_examples(str(folder))


def bad_table(column: str, value: object, kind: pa.DataType | None = None) -> pa.Table:
    """Ten numbered rows, of which row 4 has this value."""
    table = numbered_table(0, 10)
    values = table[column].to_pylist()
    values[4] = value
    return table.set_column(table.column_names.index(column), column, pa.array(values, kind or pa.float32()))


@pytest.fixture
def write_numbered(tmp_path: Path) -> Callable[..., Examples]:
    """Write parts of so many numbered rows each."""

    def write(*rows: int, group_rows: int = 7, name: str = "rows") -> Examples:
        starts = np.cumsum([0, *rows])
        parts = [numbered_table(int(start), count) for start, count in zip(starts, rows, strict=False)]
        return write_parts(tmp_path / name, parts, group_rows=group_rows)

    return write
