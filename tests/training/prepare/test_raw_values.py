"""Text, numbers and times as files hold them."""

from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import DataError
from training.prepare.raw_values import parse_numbers, parse_text, parse_times

NEW_YEAR_2020_US = 1_577_836_800_000_000


def column(values: list[object], kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, kind)])


@pytest.mark.parametrize(
    ("text", "after_new_year_us"),
    [
        ("2020-01-01", 0),
        ("2020-01-01T00:00", 0),
        ("2020-01-01 00:00:01", 1_000_000),
        ("2020-01-01T00:00:00Z", 0),
        (" 2020-01-01 00:00:00 UTC ", 0),
        ("2020-01-01T02:00:00+02:00", 0),
        ("2020-01-01T00:00:00-0530", (5 * 60 + 30) * 60 * 1_000_000),
        ("2020-01-01T00:00:00.5", 500_000),
        ("2020-01-01T00:00:00.123456789Z", 123_456),
        ("2020-02-29", 59 * 86_400 * 1_000_000),
    ],
)
def test_iso_8601_is_read_as_utc_unless_it_names_its_zone(text: str, after_new_year_us: int) -> None:
    times_us, missing, bad = parse_times(column([text]))
    assert times_us.tolist() == [NEW_YEAR_2020_US + after_new_year_us]
    assert not missing.any()
    assert not bad.any()


@pytest.mark.parametrize(
    "text", ["yesterday", "2020-02-30", "2020-13-01", "2020-01-01T24:01", "01/02/2020", "-5", "1969-12-31", "1e300"]
)
def test_what_is_no_time_is_bad(text: str) -> None:
    _times_us, missing, bad = parse_times(column([text]))
    assert bad.tolist() == [True]
    assert not missing.any()


@pytest.mark.parametrize("per_second", [1, 10**3, 10**6, 10**9], ids=["s", "ms", "us", "ns"])
@pytest.mark.parametrize("as_text", [True, False], ids=["text", "integer"])
def test_numbers_tell_their_unit_by_their_size(per_second: int, as_text: bool) -> None:
    numbers = [(1_577_836_800 + second) * per_second for second in range(3)]
    times_us, _missing, bad = parse_times(column([str(n) for n in numbers] if as_text else numbers))
    assert times_us.tolist() == [NEW_YEAR_2020_US + second * 1_000_000 for second in range(3)]
    assert not bad.any()


def test_a_column_has_one_unit_even_where_a_value_is_small() -> None:
    times_us, _missing, _bad = parse_times(column(["1577836800000", "1577836800001", "5"]))
    assert times_us.tolist() == [NEW_YEAR_2020_US, NEW_YEAR_2020_US + 1_000, 5_000]


def test_fractions_of_a_second_and_microseconds_are_exact() -> None:
    assert parse_times(column(["1577836800.25"]))[0].tolist() == [NEW_YEAR_2020_US + 250_000]
    assert parse_times(column([NEW_YEAR_2020_US + 1]))[0].tolist() == [NEW_YEAR_2020_US + 1]


def test_arrow_times_and_dates_are_taken_as_they_are() -> None:
    moment = datetime(2020, 1, 1, tzinfo=UTC)
    for kind in (pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("ms", "America/New_York")):
        assert parse_times(column([moment], kind))[0].tolist() == [NEW_YEAR_2020_US]
    times_us, missing, bad = parse_times(column([date(2020, 1, 1), None, date(1960, 1, 1)]))
    assert times_us.tolist() == [NEW_YEAR_2020_US, 0, 0]
    assert missing.tolist() == [False, True, False]
    assert bad.tolist() == [False, False, True]


def test_blank_and_null_are_missing_and_not_bad() -> None:
    for parse in (parse_times, parse_numbers):
        _values, missing, bad = parse(column(["", "  ", None], pa.string()))
        assert missing.all()
        assert not bad.any()


def test_numbers_must_be_finite() -> None:
    numbers, missing, bad = parse_numbers(
        column(["1", "-2.5", ".5", "1e3", "nan", "inf", "1e999", "1_0", "0x1", "five"])
    )
    np.testing.assert_array_equal(numbers[:4], [1, -2.5, 0.5, 1000])
    assert bad.tolist() == [False] * 4 + [True] * 6
    assert not missing.any()
    _numbers, missing, bad = parse_numbers(column([1.0, float("nan"), float("inf"), None]))
    assert missing.tolist() == [False, True, False, True]
    assert bad.tolist() == [False, False, True, False]


def test_ids_read_as_text_whatever_their_type() -> None:
    assert parse_text(column(["a", " ", "", None, "日本"])).to_pylist() == ["a", None, None, None, "日本"]
    assert parse_text(column([1, None, 3])).to_pylist() == ["1", None, "3"]
    assert parse_text(column([1.0, None, float("nan"), 3.0])).to_pylist() == ["1", None, None, "3"]
    assert parse_text(column([1.5, 2.0])).to_pylist() == ["1.5", "2"]


def test_empty_columns_are_read() -> None:
    for parse in (parse_times, parse_numbers):
        assert [part.tolist() for part in parse(column([], pa.string()))] == [[], [], []]
    assert parse_text(column([], pa.string())).to_pylist() == []


def test_a_type_that_holds_no_time_is_an_error() -> None:
    with pytest.raises(DataError, match="list<item: int64>"):
        parse_times(column([[1]]))
