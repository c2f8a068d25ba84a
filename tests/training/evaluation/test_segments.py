"""Segments, by hand: who is in them, and what has none."""

import numpy as np
import pyarrow as pa
import pytest

from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, write_dataset
from cluster.errors import DataError
from cluster.events import Event, events_table
from training.evaluation.segments import MOST_VALUES, read_attribute, segments_by_attribute, segments_by_history

USERS = np.array([0, 0, 1, 2, 3, 4])
ITEMS = np.array([0, 1, 1, 0, 0, 2])


def places(segments):
    return {name: np.flatnonzero(chosen).tolist() for name, chosen in segments.items()}


def test_users_and_items_are_cold_without_events_in_training_and_quarters_are_of_warm_users():
    segments = segments_by_history(USERS, ITEMS, np.array([10, 1, 3, 0, 7]), np.array([4, 0, 1]))
    assert places(segments) == {
        "all": [0, 1, 2, 3, 4, 5],
        "warm users": [0, 1, 2, 3, 5],
        "cold users": [4],
        "warm items": [0, 3, 4, 5],
        "cold items": [1, 2],
        "activity 1 of 4": [2],
        "activity 2 of 4": [3],
        "activity 3 of 4": [5],
        "activity 4 of 4": [0, 1],
    }


def test_nobody_in_a_segment_leaves_it_out():
    segments = segments_by_history(USERS[:2], ITEMS[:2], np.array([10, 1, 3, 0, 7]), np.array([4, 1, 1]))
    assert list(segments) == ["all", "warm users", "warm items"]


def test_each_value_of_an_attribute_is_a_segment_and_lists_are_in_several():
    genders = pa.array(["f", "m", None, "f", "m"])
    assert places(segments_by_attribute("user.gender", USERS, genders)) == {
        "user.gender=f": [0, 1, 4],
        "user.gender=m": [2, 5],
    }
    categories = pa.array([["war", "drama"], [], ["drama"]])
    assert places(segments_by_attribute("item.categories", ITEMS, categories)) == {
        "item.categories=drama": [0, 3, 4, 5],
        "item.categories=war": [0, 3, 4],
    }


def test_of_many_numbers_quarters_are_segments():
    ages = pa.array([*(str(n) for n in range(80)), None])
    segments = segments_by_attribute("user.age", np.arange(81), ages)
    assert {name: (rows[0], len(rows)) for name, rows in places(segments).items()} == {
        "user.age=0 to 19": (0, 20),
        "user.age=19 to 39": (20, 20),
        "user.age=39 to 59": (40, 20),
        "user.age=59 to 79": (60, 20),
    }


def test_names_are_no_segments():
    with pytest.raises(DataError, match=r"user\.id: has more than 50 values that are no numbers"):
        segments_by_attribute("user.id", np.array([0]), pa.array([f"u{n}" for n in range(MOST_VALUES + 1)]))


def test_attributes_come_from_the_dataset_by_id(tmp_path):
    dataset = write_dataset(
        tmp_path / "data",
        name="shop",
        events=events_table([Event(user_id="a", item_id="x", kind="click", ts_us=1)]),
        items=pa.Table.from_pylist(
            [
                {"item_id": "x", "domain": "books", "text": "", "categories": ["war", "drama"]},
                {"item_id": "y", "domain": "films", "text": "", "categories": []},
            ],
            schema=ITEM_SCHEMA,
        ),
        users=pa.Table.from_pylist(
            [{"user_id": "a", "attributes": [("age", "30")]}, {"user_id": "b", "attributes": [("city", "Ulm")]}],
            schema=USER_SCHEMA,
        ),
        label="clicks",
        sources=[],
        rejected={},
    )
    users, items = ["b", "stranger", "a"], ["y", "x"]
    assert read_attribute(dataset, "user.age", users, items).to_pylist() == [None, None, "30"]
    assert read_attribute(dataset, "item.domain", users, items).to_pylist() == ["films", "books"]
    assert read_attribute(dataset, "item.categories", users, items).to_pylist() == [[], ["war", "drama"]]
    for name, said in (
        ("user.size", "users have age, city"),
        ("item.age", "categories, domain"),
        ("age", "age: is no"),
    ):
        with pytest.raises(DataError, match=said):
            read_attribute(dataset, name, users, items)
