"""`recloop prepare` of anyone's files, as it is typed."""

import json

import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from cluster.commands.parser import KNOWN_SOURCES
from cluster.dataset import load_dataset
from training.prepare.command import SOURCES

CLICKS = """member,sku,at,stars,how
ann,a,2024-01-01T00:00:00Z,5,rating
bob,"b, large",2024-01-01 00:01:00,,click
ann,b,1704067320,4.5,rating
ann,c,yesterday,,click
,c,2024-01-01T00:03:00Z,,click
bob,c,2024-01-01T00:04:00Z,,teleport
bob,c,2024-01-01T00:05:00Z,many,rating
"""
COLUMNS = "user=member,item=sku,time=at,value=stars,kind=how"


@pytest.fixture
def clicks(tmp_path):
    path = tmp_path / "clicks.csv"
    path.write_text(CLICKS)
    return path


def prepare(tmp_path, capsys, *words: str) -> tuple[int, str, str]:
    code = main(["prepare", "--home", str(tmp_path / "home"), *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_refused_rows_are_counted_by_reason_and_kept(clicks, tmp_path, capsys):
    code, out, _ = prepare(tmp_path, capsys, "--events", str(clicks), "--columns", COLUMNS, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["dataset"] == str(tmp_path / "home" / "datasets" / "clicks")
    assert (result["events"], result["items"], result["users"]) == (3, 3, 2)
    assert result["rejected"] == {"bad time": 1, "missing user": 1, "unknown kind": 1, "bad value": 1}
    assert result["rows_read"] == result["events"] + sum(result["rejected"].values())
    rejected = pq.read_table(result["rejected_rows"]).to_pylist()
    assert [row["reason"] for row in rejected] == ["bad time", "missing user", "unknown kind", "bad value"]
    dataset = load_dataset(result["dataset"])
    assert dataset.events()["item_id"].to_pylist() == ["a", "b, large", "b"]


def test_sound_files_leave_no_rejected_rows(clicks, tmp_path, capsys):
    clicks.write_text("".join(CLICKS.splitlines(keepends=True)[:4]))
    code, out, _ = prepare(tmp_path, capsys, "--events", str(clicks), "--columns", COLUMNS, "--json")
    assert code == 0
    assert (json.loads(out)["rejected"], json.loads(out)["rejected_rows"]) == ({}, None)


def test_items_are_described_by_the_columns_named_for_them(clicks, tmp_path, capsys):
    items = tmp_path / "items.csv"
    items.write_text("sku,title\na,a red ball\nz,a blue ball\n")
    words = ["--events", str(clicks), "--columns", COLUMNS, "--items", str(items), "--item-columns"]
    code, out, _ = prepare(tmp_path, capsys, *words, "item=sku,text=title", "--out", str(tmp_path / "shop"), "--json")
    assert code == 0
    assert json.loads(out)["dataset"] == str(tmp_path / "shop")
    described = load_dataset(tmp_path / "shop").items()
    texts = dict(zip(described["item_id"].to_pylist(), described["text"].to_pylist(), strict=True))
    assert texts == {"a": "a red ball", "z": "a blue ball", "b, large": "", "b": ""}


def test_the_result_is_readable_without_json(clicks, tmp_path, capsys):
    code, out, _ = prepare(tmp_path, capsys, "--events", str(clicks), "--columns", COLUMNS)
    assert code == 0
    assert "bad time 1" in out


@pytest.mark.parametrize(
    ("columns", "exit_code", "message"),
    [
        ("user=member,item=sku,time=when", 3, "when"),
        ("user=member,item=sku", 2, "columns.time: is not given"),
        ("user=member,item=sku,time=at,mood=how", 2, "columns.mood=how: unknown role"),
    ],
)
def test_a_wrong_mapping_is_an_error_that_names_it(clicks, tmp_path, capsys, columns, exit_code, message):
    code, out, err = prepare(tmp_path, capsys, "--events", str(clicks), "--columns", columns)
    assert (code, out) == (exit_code, "")
    assert message in err
    assert "Traceback" not in err


def test_a_missing_column_is_named_beside_those_present(clicks, tmp_path, capsys):
    _, _, err = prepare(tmp_path, capsys, "--events", str(clicks), "--columns", "user=member,item=sku,time=when")
    assert "'when'" in err
    assert all(name in err for name in ("member", "sku", "at", "stars", "how"))
    assert not (tmp_path / "home" / "datasets" / "clicks").exists()


def test_events_without_columns_and_files_that_are_not_there_are_said(clicks, tmp_path, capsys):
    code, _, err = prepare(tmp_path, capsys, "--events", str(clicks))
    assert code == 2
    assert "--columns user=" in err
    code, _, err = prepare(tmp_path, capsys, "--events", str(tmp_path / "none.csv"), "--columns", COLUMNS)
    assert code == 3
    assert "none.csv" in err


def test_a_file_without_a_usable_row_is_an_error_that_says_why(clicks, tmp_path, capsys):
    clicks.write_text("member,sku,at\nann,a,yesterday\nbob,b,tomorrow\n")
    code, _, err = prepare(tmp_path, capsys, "--events", str(clicks), "--columns", "user=member,item=sku,time=at")
    assert code == 3
    assert "none of 2 rows is usable (bad time: 2)" in err


def test_the_sources_offered_are_those_that_can_be_prepared():
    assert tuple(SOURCES) == KNOWN_SOURCES
