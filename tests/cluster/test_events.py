"""What an event may say, what is filled in, and how a refusal names the field."""

import pytest

from cluster.errors import InvalidEventError
from cluster.events import EVENT_SCHEMA, INTERACTION_KINDS, KINDS, MAX_FUTURE_US, Event, events_table, parse_event

NOW_US = 1_700_000_000_000_000
LEAST = {"user_id": "u1", "item_id": "m1", "kind": "click"}


def test_the_least_event_gets_its_arrival_time_and_an_id():
    event = parse_event(LEAST, now_us=NOW_US)
    assert event.ts_us == NOW_US
    assert len(event.event_id) == 32
    assert event.domain == "default"
    assert parse_event(LEAST, now_us=NOW_US).event_id != event.event_id


def test_a_full_event_keeps_every_field():
    raw = {
        **LEAST,
        "event_id": "e1",
        "ts_us": NOW_US - 1,
        "domain": "films",
        "value": 3.5,
        "request_id": "r1",
        "position": 0,
        "propensity": 0.25,
        "version": "1.37",
        "context": {"device": "tv"},
    }
    assert parse_event(raw, now_us=NOW_US) == Event(**raw)


def test_null_means_absent():
    event = parse_event({**LEAST, "value": None, "event_id": None, "context": None}, now_us=NOW_US)
    assert event.value is None
    assert event.event_id
    assert event.context == {}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_accepted(kind):
    assert parse_event({**LEAST, "kind": kind, "value": 4}, now_us=NOW_US).kind == kind


def test_only_choices_are_interactions():
    assert set(KINDS) - INTERACTION_KINDS == {"impression", "skip", "dislike"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user_id", None),
        ("user_id", ""),
        ("user_id", 7),
        ("item_id", "x" * 10_000),
        ("item_id", "a\x00b"),
        ("event_id", "\ud800"),
        ("kind", None),
        ("kind", "bought"),
        ("kind", ["click"]),
        ("ts_us", "now"),
        ("ts_us", 1.5),
        ("ts_us", True),
        ("ts_us", -1),
        ("ts_us", 2**63),
        ("ts_us", NOW_US + MAX_FUTURE_US + 1),
        ("value", "five"),
        ("value", float("nan")),
        ("value", float("inf")),
        ("value", True),
        ("position", -1),
        ("position", 2**31),
        ("propensity", 0),
        ("propensity", 1.01),
        ("context", ["a"]),
        ("context", {"a": 1}),
        ("context", {str(n): "" for n in range(65)}),
        ("colour", "red"),
    ],
)
def test_a_refusal_names_the_field(field, value):
    with pytest.raises(InvalidEventError) as refused:
        parse_event({**LEAST, field: value}, now_us=NOW_US)
    assert refused.value.field == field


def test_a_rating_needs_its_value():
    with pytest.raises(InvalidEventError, match="value"):
        parse_event({**LEAST, "kind": "rating"}, now_us=NOW_US)


def test_a_clock_five_minutes_ahead_is_still_accepted():
    assert parse_event({**LEAST, "ts_us": NOW_US + MAX_FUTURE_US}, now_us=NOW_US).ts_us == NOW_US + MAX_FUTURE_US


def test_a_table_of_events_has_the_schema_and_the_order():
    events = [Event(**LEAST, ts_us=2, event_id="b", context={"k": "v"}), Event(**LEAST, ts_us=1, event_id="a")]
    table = events_table(events)
    assert table.schema == EVENT_SCHEMA
    assert table["event_id"].to_pylist() == ["b", "a"]
    assert table["context"].to_pylist() == [[("k", "v")], []]
    assert events_table([]).schema == EVENT_SCHEMA
