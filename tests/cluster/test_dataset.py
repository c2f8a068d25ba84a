"""A dataset folder reads back as it was written, or says which part of it does not hold."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import dataset as dataset_module
from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, Dataset, Source, load_dataset, write_dataset
from cluster.errors import DataError
from cluster.events import EVENT_SCHEMA, Event, events_table

SOURCE = Source(name="hand-made", licence="CC0-1.0", url="https://example.org")


def event(number: int, ts_us: int, kind: str = "click") -> Event:
    return Event(event_id=f"e{number}", user_id="u1", item_id=f"i{number}", kind=kind, ts_us=ts_us, context={"a": "b"})


def items(*item_ids: str) -> pa.Table:
    rows = [
        {"item_id": item_id, "domain": "d", "text": "t", "categories": ["c1", "c2"], "available_from_us": 7}
        for item_id in item_ids
    ]
    return pa.Table.from_pylist(rows, schema=ITEM_SCHEMA)


def users(*user_ids: str) -> pa.Table:
    return pa.Table.from_pylist([{"user_id": u, "attributes": [("age", "24")]} for u in user_ids], schema=USER_SCHEMA)


def write(path: Path, *events: Event, **overrides: object) -> Dataset:
    tables = {"events": events_table(events), "items": items("i1", "i2"), "users": users("u1")}
    settings = {"name": "tiny", "label": "clicks", "sources": [SOURCE], "rejected": {"bad time": 2}}
    return write_dataset(path, **{**tables, **settings, **overrides})


def test_tables_and_description_read_back_as_written(tmp_path: Path) -> None:
    written = write(tmp_path / "d", event(1, 10), event(2, 20, "like"), facts={"join": 0.5})
    loaded = load_dataset(tmp_path / "d")
    assert loaded.info == written.info
    assert (loaded.info.events, loaded.info.items, loaded.info.users) == (2, 2, 1)
    assert (loaded.info.first_ts_us, loaded.info.last_ts_us) == (10, 20)
    assert loaded.info.kinds == {"click": 1, "like": 1}
    assert loaded.info.sources == (SOURCE,)
    assert loaded.info.rejected == {"bad time": 2}
    assert loaded.info.facts == {"join": 0.5}
    assert loaded.events().equals(events_table([event(1, 10), event(2, 20, "like")]))
    assert loaded.items().equals(items("i1", "i2"))
    assert loaded.users().equals(users("u1"))


def test_events_come_back_in_time_order_and_equal_times_keep_theirs(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", event(1, 30), event(2, 10), event(3, 30), event(4, 10), event(5, 20))
    assert dataset.events(["event_id"])["event_id"].to_pylist() == ["e2", "e4", "e5", "e1", "e3"]


def test_events_spread_over_several_files_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "ROWS_PER_PART", 2)
    dataset = write(tmp_path / "d", *(event(number, number) for number in range(5)))
    assert len(list((tmp_path / "d" / "events").iterdir())) == 3
    assert dataset.events(["ts_us"])["ts_us"].to_pylist() == [0, 1, 2, 3, 4]


def test_a_dataset_without_events_is_written_and_read(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d")
    assert dataset.events().schema.equals(EVENT_SCHEMA)
    assert dataset.info.events == 0
    assert dataset.info.first_ts_us is None


def test_preparing_again_replaces_the_dataset_and_leaves_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "d", event(1, 1), rejected_rows=pa.table({"row": [1]}))
    assert (tmp_path / "d" / "rejected.parquet").is_file()
    assert write(tmp_path / "d", event(2, 2)).events()["event_id"].to_pylist() == ["e2"]
    assert not (tmp_path / "d" / "rejected.parquet").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_dataset_prepared_alike_keeps_its_fingerprint_and_one_of_other_events_has_another(tmp_path: Path) -> None:
    first, alike = (write(tmp_path / name, event(1, 1), event(2, 9)) for name in ("first", "alike"))
    assert first.fingerprint() == alike.fingerprint()
    swapped = Event(event_id="e1", user_id="u1", item_id="i2", kind="click", ts_us=1, context={"a": "b"})
    other = write(tmp_path / "other", swapped, event(2, 9))
    assert replace(other.info, events_sha256=first.info.events_sha256) == first.info
    assert other.fingerprint() != first.fingerprint()


def test_a_dataset_from_before_its_events_were_digested_is_read(tmp_path: Path) -> None:
    write(tmp_path / "d", event(1, 1))
    path = tmp_path / "d" / "dataset.json"
    raw = json.loads(path.read_text())
    assert len(raw.pop("events_sha256")) == 64
    path.write_text(json.dumps(raw))
    assert load_dataset(tmp_path / "d").info.events_sha256 == ""


def test_a_failed_write_leaves_the_dataset_that_was_there(tmp_path: Path) -> None:
    write(tmp_path / "d", event(1, 1))
    with pytest.raises(TypeError):
        write(tmp_path / "d", event(2, 2), facts={"not json": object()})
    assert load_dataset(tmp_path / "d").events()["event_id"].to_pylist() == ["e1"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_folder_with_other_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"no dataset\.json"):
        write(tmp_path, event(1, 1))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"events": events_table([event(1, 1), event(1, 2)])}, "events.event_id: 1 of 2 rows repeat"),
        ({"items": items("i1", "i1")}, "items.item_id: 1 of 2"),
        ({"users": users("u1").drop_columns(["attributes"])}, "column 'attributes' is missing; present: user_id"),
        ({"users": users("u1").set_column(0, "user_id", pa.array([None], pa.string()))}, "user_id"),
        ({"items": items("i1").set_column(4, "available_from_us", pa.array(["soon"]))}, "items: .*soon"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path / "d", event(1, 1), **overrides)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["dataset.json", "items.parquet", "users.parquet", "events/part-00000.parquet"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut"])
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path / "d", event(1, 1))
    path = tmp_path / "d" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(DataError, match=Path(name).parts[0]):
        load_dataset(tmp_path / "d")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema_version=99"),
        ({"label": None}, "'label' is missing"),
        ({"events": 5}, "states 5 events, the files hold 1"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_description_that_does_not_hold_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write(tmp_path / "d", event(1, 1))
    path = tmp_path / "d" / "dataset.json"
    raw = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path / "d")


def test_a_missing_column_in_a_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "d", event(1, 1))
    pq.write_table(items("i1", "i2").drop_columns(["text"]), tmp_path / "d" / "items.parquet")
    with pytest.raises(DataError, match="column 'text' is missing; present: item_id"):
        load_dataset(tmp_path / "d")


def test_reading_a_column_that_events_do_not_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'stars'"):
        write(tmp_path / "d", event(1, 1)).events(["stars"])


def promoted(*rows: tuple[str, str, str, int, int]) -> pa.Table:
    names = dataset_module.PROMOTION_SCHEMA.names
    return pa.table([list(column) for column in zip(*rows, strict=True)], names=names)


def test_promotions_are_read_back_by_kind_and_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    rows = [("i1", "mailer", "s1", 0, 10), ("i1", "mailer", "s1", 10, 20), ("i2", "display", "s1", 5, 9)]
    dataset = write(tmp_path / "d", event(1, 1), promotions=promoted(*rows))
    assert dataset.promotion_kinds() == ["display", "mailer"]
    assert [tuple(row.values()) for row in dataset.promotions("mailer").to_pylist()] == rows[:2]
    without = write(tmp_path / "without", event(1, 1))
    assert (without.promotion_kinds(), without.promotions("mailer").num_rows) == ([], 0)
    assert without.fingerprint() != dataset.fingerprint()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("i1", "mailer", "s1", 0, 10), ("i1", "mailer", "s1", 9, 20)], "overlap"),
        ([("i1", "mailer", "s1", 5, 5)], "ends before it begins"),
        ([("i1", "mailer", None, 0, 10)], "promotions.*place"),
    ],
)
def test_promotions_that_cannot_be_are_refused(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path / "d", event(1, 1), promotions=promoted(*rows))
    assert not (tmp_path / "d").exists()


def with_media(path: Path, *rows: tuple[str, str, str]) -> Dataset:
    columns = zip(*rows, strict=True)
    return write(path, event(1, 10), media=pa.table(dict(zip(("item_id", "kind", "path"), columns, strict=True))))


def test_files_of_items_are_read_back_by_kind_in_the_items_order(tmp_path: Path) -> None:
    rows = (("i2", "image", "/pictures/2.png"), ("i1", "audio", "sounds/1.wav"), ("i2", "audio", "/sounds/2.wav"))
    dataset = with_media(tmp_path / "d", *rows)
    assert dataset.media("image") == ["", "/pictures/2.png"]
    assert dataset.media("audio") == [str(tmp_path / "d" / "sounds/1.wav"), "/sounds/2.wav"]
    without = write(tmp_path / "e", event(1, 10))
    assert without.media("image") == ["", ""]
    assert without.fingerprint() != dataset.fingerprint()
    assert without.fingerprint() == write(tmp_path / "f", event(1, 10)).fingerprint()


def test_an_item_with_two_files_of_a_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="media: an item has two files of one kind"):
        with_media(tmp_path / "d", ("i1", "image", "a"), ("i1", "image", "b"))
