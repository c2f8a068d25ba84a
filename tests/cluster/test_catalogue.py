"""What an item may say, and how a refusal names the field."""

import pytest

from cluster.catalogue import MAX_TEXT_CHARS, Item, parse_item
from cluster.errors import InvalidEventError


def test_the_least_item_is_an_id_and_a_text():
    assert parse_item({"item_id": "m1", "text": "Alien (1979)"}) == Item(item_id="m1", text="Alien (1979)")


def test_a_full_item_keeps_every_field():
    raw = {
        "item_id": "ä/1",
        "text": "Ran",
        "domain": "films",
        "categories": ["war", "drama"],
        "available_from_us": 1,
        "available_until_us": 2,
    }
    assert parse_item(raw) == Item(**{**raw, "categories": ("war", "drama")})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("item_id", None),
        ("item_id", ""),
        ("item_id", "x" * 1_025),
        ("item_id", "a\x00b"),
        ("text", None),
        ("text", " "),
        ("text", 7),
        ("text", "x" * (MAX_TEXT_CHARS + 1)),
        ("text", "\ud800"),
        ("domain", 3),
        ("categories", "war"),
        ("categories", [1]),
        ("categories", ["x"] * 257),
        ("available_from_us", 1.5),
        ("available_from_us", True),
        ("available_until_us", -1),
        ("available_until_us", 0),
        ("price", 1),
    ],
)
def test_a_refusal_names_the_field(field, value):
    with pytest.raises(InvalidEventError) as refused:
        parse_item({"item_id": "m1", "text": "Alien", field: value})
    assert refused.value.field == field


def test_an_item_is_not_available_until_before_from():
    with pytest.raises(InvalidEventError, match="later than"):
        parse_item({"item_id": "m1", "text": "Alien", "available_from_us": 5, "available_until_us": 5})


def test_the_longest_text_passes():
    assert len(parse_item({"item_id": "m1", "text": "x" * MAX_TEXT_CHARS}).text) == 20_000
