"""Rows by category and domain, and items put since, whose newest description counts."""

import pyarrow as pa
import pytest

from cluster.catalogue import Item
from training.models.tags import PutTags, Tags

TOLD = pa.table(
    {
        "categories": [["crime", "nordic"], [], ["crime"], ["comedy"]],
        "domain": ["films", "films", "books", "films"],
    }
)


@pytest.mark.parametrize(
    ("categories", "domain", "rows"),
    [
        ([], None, [0, 1, 2, 3, 4]),
        (["crime"], None, [0, 2]),
        (["nordic", "comedy"], None, [0, 3]),
        (["crime"], "films", [0]),
        ([], "films", [0, 1, 3]),
        (["unheard of"], None, []),
        ([], "unheard of", []),
    ],
)
def test_any_of_the_categories_and_the_domain(categories, domain, rows) -> None:
    # A fifth item was learned since: of it nothing is told.
    assert Tags(TOLD).mask(categories, domain, 5).nonzero()[0].tolist() == rows


def test_a_slice_of_a_table_has_rows_of_its_own() -> None:
    assert Tags(TOLD.slice(2)).mask(["crime"], None, 2).tolist() == [True, False]


def test_where_nothing_is_told_nothing_is_of_any_category() -> None:
    untold = Tags(pa.table({"categories": pa.array([[], []], pa.list_(pa.string())), "domain": ["films", "films"]}))
    assert not untold.mask(["crime"], None, 2).any()
    assert untold.mask([], "films", 2).all()
    gaps = Tags(pa.table({"categories": [["crime", None], None], "domain": pa.array([None, "films"], pa.string())}))
    assert gaps.mask(["crime"], None, 2).tolist() == [True, False]
    assert gaps.mask([], "films", 2).tolist() == [False, True]


def item(item_id: str, *categories: str, domain: str = "default") -> Item:
    return Item(item_id=item_id, text="told", categories=categories, domain=domain)


def test_of_items_put_the_newest_description_counts() -> None:
    first = [item("a", "crime"), item("b", "crime", "nordic"), item("c", domain="books")]
    tags = PutTags().with_items(first, {})
    assert tags.within(["crime"], None) == {"a", "b"}
    assert tags.within(["nordic", "unheard of"], "default") == {"b"}
    assert tags.within([], "books") == {"c"}
    again = tags.with_items(
        [item("a", "comedy"), item("b"), item("b", "comedy", domain="books")], {i.item_id: i for i in first}
    )
    assert again.within(["crime"], None) == frozenset()
    assert again.within(["comedy"], None) == {"a", "b"}
    assert again.within(["comedy"], "books") == {"b"}
    assert tags.within(["crime"], None) == {"a", "b"}  # as it was
    assert again.item_ids == {"a", "b", "c"}
