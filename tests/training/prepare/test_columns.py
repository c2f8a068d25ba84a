"""Anyone's CSV or Parquet: what is accepted, what is refused and why, and that nothing gets lost."""

import bz2
import gzip
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from cluster.dataset import Dataset, load_dataset
from cluster.errors import ConfigError, DataError
from cluster.events import KINDS
from training.prepare.columns import prepare_columns

NAMES = {"user": "u", "item": "i", "time": "t"}
ALL = {**NAMES, "kind": "k", "value": "v", "event_id": "id"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "dataset"


def csv_file(tmp_path: Path, content: str | bytes, name: str = "shop.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rejected(dataset: Dataset) -> list[tuple[str, int, str]]:
    path = dataset.path / "rejected.parquet"
    rows = pq.read_table(path).to_pylist() if path.is_file() else []
    return [(row["file"], row["row"], row["reason"]) for row in rows]


def column(dataset: Dataset, name: str) -> list[object]:
    return dataset.events([name])[name].to_pylist()


def test_a_plain_file_becomes_events_items_and_users(tmp_path: Path, out: Path) -> None:
    events = csv_file(tmp_path, "u,i,t,k,v,id\nann,x,200,purchase,9.5,a1\nbob,y,100,click,,a2\nann,y,100,like,,a3\n")
    dataset = prepare_columns(events, ALL, out=out)
    assert column(dataset, "event_id") == ["a2", "a3", "a1"]
    assert column(dataset, "ts_us") == [100_000_000, 100_000_000, 200_000_000]
    assert column(dataset, "kind") == ["click", "like", "purchase"]
    assert column(dataset, "value") == [None, None, 9.5]
    assert column(dataset, "domain") == ["default"] * 3
    assert sorted(dataset.users()["user_id"].to_pylist()) == ["ann", "bob"]
    assert {item["item_id"]: item["text"] for item in dataset.items().to_pylist()} == {"x": "", "y": ""}
    assert dataset.info == load_dataset(out).info
    assert dataset.info.rejected == {}
    assert not (out / "rejected.parquet").exists()


def test_every_malformed_row_is_kept_with_its_number_and_reason(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soon = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%S")
    lines: list[tuple[str | bytes, str | None]] = [
        ("ann,x,2020-01-01,click,,e1", None),
        (",x,2020-01-01,click,,", "missing user"),
        ("ann,  ,2020-01-01,click,,", "missing item"),
        ("ann,x,,click,,", "missing time"),
        ("ann,x,yesterday,click,,", "bad time"),
        (f"ann,x,{soon},click,,", "time in the future"),
        ("ann,x,2020-01-01,glance,,", "unknown kind"),
        ("ann,x,2020-01-01,,,", "unknown kind"),
        ("ann,x,2020-01-01,rating,five,", "bad value"),
        ("ann,x,2020-01-01,rating,,", "rating without value"),
        (f"{'a' * 1_025},x,2020-01-01,click,,", "id too long"),
        ("ann,x,2020-01-01,click,,e1", "duplicate event id"),
        ("ann,x", "torn line"),
        ("ann,x,2020-01-01,click,,,,", "torn line"),
        (b"\xff\xfe,x,2020-01-01,click,,", "not UTF-8"),
        ("an\0n,x,2020-01-01,click,,", "NUL in id"),
        (f"{'a' * 1_024},x,2020-01-01,click,,", None),
        ("ann,x,2020", "torn line"),
    ]
    content = b"\n".join([b"u,i,t,k,v,id", *(line if isinstance(line, bytes) else line.encode() for line, _ in lines)])
    with caplog.at_level(logging.WARNING):
        dataset = prepare_columns(csv_file(tmp_path, content), ALL, out=out)
    expected = [("events", row, reason) for row, (_line, reason) in enumerate(lines, start=1) if reason]
    assert rejected(dataset) == expected
    assert dataset.info.events + sum(dataset.info.rejected.values()) == len(lines) == dataset.info.facts["rows_read"]
    assert dataset.info.rejected["torn line"] == 3
    assert dataset.info.rejected["unknown kind"] == 2
    assert "16 rows refused" in caplog.text
    kept = {row["row"]: row for row in pq.read_table(out / "rejected.parquet").to_pylist()}
    assert kept[5]["time"] == "yesterday"
    assert kept[13]["line"] == "ann,x"
    assert kept[15]["user"] == "��"


def test_quotes_line_breaks_and_foreign_ids_come_through(tmp_path: Path, out: Path) -> None:
    content = '\ufeffu,i,t,note\r\n"Åsa, ""the"" 1st","two\nlines",5,""\r\n\r\n用户,🎬,6,"a,b"\r\nann,x\r\n'
    dataset = prepare_columns(csv_file(tmp_path, content), NAMES, out=out)
    assert column(dataset, "user_id") == ['Åsa, "the" 1st', "用户"]
    assert column(dataset, "item_id") == ["two\nlines", "🎬"]
    assert rejected(dataset) == [("events", 3, "torn line")]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".csv.bz2", ".tsv", ".parquet"])
def test_every_format_gives_the_same_events(tmp_path: Path, out: Path, suffix: str) -> None:
    table = pa.table({"u": ["7", "7", "8"], "i": [1, 2, 1], "t": [1_600_000_002, 1_600_000_001, 1_600_000_003]})
    path = tmp_path / f"shop{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        delimiter = "\t" if suffix == ".tsv" else ","
        pa_csv.write_csv(table, tmp_path / "plain", pa_csv.WriteOptions(delimiter=delimiter))
        pack = {".csv.gz": gzip.compress, ".csv.bz2": bz2.compress}.get(suffix, bytes)
        path.write_bytes(pack((tmp_path / "plain").read_bytes()))
    dataset = prepare_columns(path, NAMES, out=out)
    assert column(dataset, "event_id") == ["shop-2", "shop-1", "shop-3"]
    assert column(dataset, "user_id") == ["7", "7", "8"]
    assert column(dataset, "item_id") == ["2", "1", "1"]
    assert column(dataset, "ts_us") == [1_600_000_001_000_000, 1_600_000_002_000_000, 1_600_000_003_000_000]


def test_parquet_types_are_understood(tmp_path: Path, out: Path) -> None:
    table = pa.table(
        {
            "u": pa.array([1.0, None, 3.0]),
            "i": pa.array(["x", "y", "x"]).dictionary_encode(),
            "t": pa.array([datetime(2020, 1, 1, tzinfo=UTC)] * 3, pa.timestamp("ns", "UTC")),
            "v": pa.array([4, 5, None], pa.int8()),
            "k": ["rating"] * 3,
        }
    )
    pq.write_table(table, tmp_path / "shop.parquet")
    dataset = prepare_columns(tmp_path / "shop.parquet", {**NAMES, "value": "v", "kind": "k"}, out=out)
    assert column(dataset, "user_id") == ["1"]
    assert column(dataset, "value") == [4.0]
    assert rejected(dataset) == [("events", 2, "missing user"), ("events", 3, "rating without value")]


def test_impression_fields_are_carried_and_checked(tmp_path: Path, out: Path) -> None:
    names = ("domain", "request_id", "position", "propensity", "version")
    content = (
        f"u,i,t,{','.join(names)}\nann,x,1,shop,r1,0,0.25,1.3\nann,y,2,,,,,\nann,z,3,shop,r1,1.5,1,\n"
        "ann,z,4,shop,r1,-1,1,\nann,z,5,shop,r1,2,0,\nann,z,6,shop,r1,2,1.01,\nann,z,7,shop,r1,first,1,\n"
    )
    roles = {**NAMES, **{name: name for name in names}}
    dataset = prepare_columns(csv_file(tmp_path, content), roles, out=out, default_kind="impression")
    first, second = dataset.events().to_pylist()
    assert [first[name] for name in names] == ["shop", "r1", 0, 0.25, "1.3"]
    assert [second[name] for name in names] == ["default", None, None, None, None]
    assert first["kind"] == "impression"
    assert [reason for _file, _row, reason in rejected(dataset)] == [
        *["bad position"] * 2, *["bad propensity"] * 2, "bad position"
    ]  # fmt: skip


def test_described_items_keep_their_text_and_mentioned_ones_get_none(tmp_path: Path, out: Path) -> None:
    events = csv_file(tmp_path, "u,i,t\nann,x,1\nann,z,2\n")
    items = csv_file(
        tmp_path,
        "item_id,text,categories,available_from\nx,A red shirt,shirts | red||,2020-01-01\ny,,,\n,lost,,\n"
        "x,again,,\nw,hat,,never\nv,torn\n",
        "items.csv",
    )
    dataset = prepare_columns(events, NAMES, items=items, out=out)
    table = {item["item_id"]: item for item in dataset.items().to_pylist()}
    assert list(table) == ["x", "y", "z"]
    assert table["x"]["text"] == "A red shirt"
    assert table["x"]["categories"] == ["shirts", "red"]
    assert table["x"]["available_from_us"] == 1_577_836_800_000_000
    assert (table["y"]["text"], table["y"]["categories"], table["y"]["available_from_us"]) == ("", [], None)
    assert (table["z"]["text"], table["z"]["categories"]) == ("", [])
    assert rejected(dataset) == [
        ("items", 3, "missing item_id"),
        ("items", 4, "duplicate item_id"),
        ("items", 5, "bad available_from"),
        ("items", 6, "torn line"),
    ]
    assert dataset.info.rejected["items: torn line"] == 1
    assert dataset.info.facts["item_rows_read"] == 6


def test_items_may_be_mapped_and_hold_lists(tmp_path: Path, out: Path) -> None:
    events = csv_file(tmp_path, "u,i,t\nann,1,1\n")
    table = pa.table({"asin": [1, 2], "title": ["One", None], "tags": [["a", "b"], None]})
    pq.write_table(table, tmp_path / "items.parquet")
    mapping = {"item_id": "asin", "text": "title", "categories": "tags"}
    dataset = prepare_columns(events, NAMES, items=tmp_path / "items.parquet", item_columns=mapping, out=out)
    assert [(item["item_id"], item["text"], item["categories"]) for item in dataset.items().to_pylist()] == [
        ("1", "One", ["a", "b"]),
        ("2", "", []),
    ]


def test_items_have_their_files_and_those_that_are_not_there_are_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(b"a picture")
    events = csv_file(tmp_path, "user,item,time\nu1,i1,10\nu1,i2,20\n")
    items = csv_file(tmp_path, "item_id,text,image\ni1,one,pictures/1.png\ni2,two,\ni3,three,gone.png\n", "items.csv")
    mapping = {"item_id": "item_id", "text": "text", "image": "image"}
    of_events = {"user": "user", "item": "item", "time": "time"}
    unasked = prepare_columns(events, of_events, out=tmp_path / "unasked", items=items)
    assert unasked.media("image") == [""] * 3
    dataset = prepare_columns(events, of_events, out=out, items=items, item_columns=mapping)
    assert dataset.media("image") == [str(tmp_path / "pictures" / "1.png"), ""]
    assert dataset.media("audio") == ["", ""]
    assert dataset.info.rejected == {"items: no such image file": 1}


def test_a_missing_column_is_named_with_those_present(tmp_path: Path, out: Path) -> None:
    events = csv_file(tmp_path, "user_id,i,t\nann,x,1\n")
    with pytest.raises(DataError, match=r"column 'u' \(for user\) is missing; present: user_id, i, t"):
        prepare_columns(events, NAMES, out=out)
    items = csv_file(tmp_path, "sku,text\n1,x\n", "items.csv")
    with pytest.raises(DataError, match=r"column 'item_id' \(for item_id\) is missing; present: sku, text"):
        prepare_columns(events, {**NAMES, "user": "user_id"}, items=items, out=out)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "shop.parquet")
    with pytest.raises(DataError, match=r"column 'u' \(for user\) is missing; present: a"):
        prepare_columns(tmp_path / "shop.parquet", NAMES, out=out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("shop.csv", b"", "is empty; a header line"),
        ("shop.csv", b"\n\n", "is empty; a header line"),
        ("shop.csv", b"u,i,t\n", "a header and no rows"),
        ("shop.csv", b"u,i,t,u\n1,2,3,4\n", "2 columns are named 'u'"),
        ("shop.csv.gz", b"u,i,t\n1,2,3\n", "cannot be read"),
        ("shop.csv.gz", gzip.compress(b"u,i,t\n" + b"1,2,3\n" * 999)[:-20], "cannot be read"),
        ("shop.parquet", b"u,i,t\n", "cannot be read"),
        ("shop.xlsx", b"PK", r"neither \.csv, \.tsv nor \.parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_clear_error(
    tmp_path: Path, out: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare_columns(csv_file(tmp_path, content, name), NAMES, out=out)
    assert not out.exists()


def test_no_usable_row_is_an_error_that_leaves_the_rejected_rows_to_read(tmp_path: Path, out: Path) -> None:
    with pytest.raises(DataError, match=r"none of 2 rows is usable \(missing user: 1, bad time: 1\)"):
        prepare_columns(csv_file(tmp_path, "u,i,t\n,x,1\nann,x,never\n"), NAMES, out=out)
    assert pq.read_table(out / "rejected.parquet").num_rows == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": "u", "item": "i"}, "columns.time: is not given"),
        ({**NAMES, "stars": "v"}, "columns.stars=v: unknown role; known: user, item, time, kind"),
    ],
)
def test_a_mapping_that_makes_no_sense_is_refused(
    tmp_path: Path, out: Path, columns: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_columns(csv_file(tmp_path, "u,i,t\nann,x,1\n"), columns, out=out)


def test_an_unknown_default_kind_or_nested_column_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(ConfigError, match="default_kind=view: is none of impression"):
        prepare_columns(csv_file(tmp_path, "u,i,t\nann,x,1\n"), NAMES, out=out, default_kind="view")
    pq.write_table(pa.table({"u": ["a"], "i": [["x"]], "t": [1]}), tmp_path / "shop.parquet")
    with pytest.raises(DataError, match=r"column 'i' \(for item\) is list"):
        prepare_columns(tmp_path / "shop.parquet", NAMES, out=out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_accepted_in_any_case(tmp_path: Path, out: Path, kind: str) -> None:
    content = f"u,i,t,k,v\nann,x,1, {kind.upper()} ,3\n"
    dataset = prepare_columns(csv_file(tmp_path, content), {**NAMES, "kind": "k", "value": "v"}, out=out)
    assert column(dataset, "kind") == [kind]


def test_torn_lines_are_numbered_rightly_across_read_blocks(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.prepare.raw_table.BLOCK_BYTES", 200)
    lines = [f"ann,x{row},{row}" if row % 97 else "torn" for row in range(1, 1_000)]
    dataset = prepare_columns(csv_file(tmp_path, "u,i,t\n" + "\n".join(lines)), NAMES, out=out)
    assert [row for _file, row, _reason in rejected(dataset)] == list(range(97, 1_000, 97))
    rows = [int(str(event_id).removeprefix("shop-")) for event_id in column(dataset, "event_id")]
    assert column(dataset, "item_id") == [f"x{row}" for row in rows]
