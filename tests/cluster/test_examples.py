"""The examples folder: what opening it finds, and what it refuses by name."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from cluster.examples import ExamplesInfo, is_examples, load_examples, write_info

TABLE = pa.table(
    {
        "user_id": pa.array([0, 1, 1], pa.int32()),
        "item_id": pa.array([2, 0, 1], pa.int64()),
        "history": pa.array([[], [2], [2, 0]], pa.list_(pa.int32())),
        "label": pa.array([1, 0, 1], pa.int8()),
    }
)


def info(rows: int, **changed: object) -> ExamplesInfo:
    values = {"schema_version": 1, "name": "three", "rows": rows, "ids": "rows", "users": 2, "items": 3}
    return ExamplesInfo(**(values | changed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two parts of three rows and as many held out, in row groups of two."""
    for name in ("part-00000", "part-00001", "heldout"):
        pq.write_table(TABLE, tmp_path / f"{name}.parquet", row_group_size=2)
    write_info(tmp_path, info(6))
    return tmp_path


def test_parts_are_in_order_of_their_names_and_held_out_rows_apart(folder: Path) -> None:
    examples = load_examples(str(folder))
    assert [Path(part.path).name for part in examples.parts] == ["part-00000.parquet", "part-00001.parquet"]
    assert [part.group_rows for part in examples.parts] == [(2, 1), (2, 1)]
    assert examples.heldout is not None
    assert examples.heldout.group_rows == (2, 1)
    assert examples.info == info(6)
    assert is_examples(str(folder))
    assert not is_examples(str(folder.parent))


def test_a_uri_and_a_path_open_the_same_files(folder: Path) -> None:
    assert load_examples(f"file://{folder}").marks == load_examples(str(folder)).marks


def test_a_part_written_anew_with_other_rows_has_another_mark(folder: Path) -> None:
    before = load_examples(str(folder)).marks
    pq.write_table(TABLE.slice(1), folder / "part-00001.parquet", row_group_size=2)
    write_info(folder, info(5))
    after = load_examples(str(folder)).marks
    assert [name for name in before if before[name] != after[name]] == ["part-00001.parquet"]


def test_a_part_written_anew_at_the_same_size_has_another_mark(folder: Path) -> None:
    before = load_examples(str(folder)).marks
    other = TABLE.set_column(3, "label", pa.array([0, 1, 0], pa.int8()))
    pq.write_table(other, folder / "part-00001.parquet", row_group_size=2)
    assert load_examples(str(folder)).marks["part-00001.parquet"] != before["part-00001.parquet"]


def test_no_rows_are_refused(folder: Path) -> None:
    for name in ("part-00000", "part-00001"):
        pq.write_table(TABLE.slice(0, 0), folder / f"{name}.parquet")
    write_info(folder, info(0))
    with pytest.raises(DataError, match="holds no rows to train on"):
        load_examples(str(folder))


def test_a_truncated_part_is_named(folder: Path) -> None:
    part = folder / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"part-00001.parquet: cannot be read as Parquet"):
        load_examples(str(folder))


def test_an_empty_file_is_named(folder: Path) -> None:
    (folder / "part-00001.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"part-00001.parquet: cannot be read as Parquet"):
        load_examples(str(folder))


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("label", None, "column 'label' is missing; present: user_id, item_id, history"),
        ("user_id", pa.array(["a", "b", "c"]), "column 'user_id' is string, must be a whole number"),
        ("history", pa.array([1, 2, 3]), "column 'history' is int64, must be a list of whole numbers"),
        ("label", pa.array(["yes", "no", "no"]), "column 'label' is string, must be a number"),
    ],
)
def test_another_schema_is_named_with_file_and_column(
    folder: Path, column: str, values: pa.Array | None, said: str
) -> None:
    table = TABLE.drop_columns(column)
    if values is not None:
        table = table.append_column(column, values)
    pq.write_table(table, folder / "part-00001.parquet")
    with pytest.raises(DataError) as error:
        load_examples(str(folder))
    assert f"part-00001.parquet: {said}" in str(error.value)


def test_a_missing_part_is_noticed(folder: Path) -> None:
    (folder / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"examples.json states 6 rows, the files hold 3; a part is missing"):
        load_examples(str(folder))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schema_version": 2}, "schema_version=2: this recloop reads 1"),
        ({"ids": "some"}, "ids='some': is none of rows, any"),
        ({"users": None}, 'ids="rows" needs "users" and "items"'),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_description_that_cannot_be_used_is_named(folder: Path, changed: dict, said: str) -> None:
    path = folder / "examples.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(DataError, match=r"examples.json") as error:
        load_examples(str(folder))
    assert said in str(error.value)


@pytest.mark.parametrize("uri", ["nowhere", "nosuch://bucket/rows"])
def test_a_folder_or_scheme_that_is_not_there_is_named(uri: str) -> None:
    with pytest.raises(DataError, match=uri.partition(":")[0]):
        load_examples(uri)
