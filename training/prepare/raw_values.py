"""Raw columns of any type into text, numbers and times, a whole column at once.

In:  Arrow columns as files hold them.  Out: values and, for each row, whether its value could be read.
Knows nothing of events or files. Nothing is raised for a bad value: the caller counts it.

Times. Arrow timestamps and dates are taken as they are; one without a zone is UTC. Text is ISO 8601 (a date alone is
its midnight; no zone is UTC). Numbers are time since 1970, and the median of the column tells their unit: below 1e11
seconds (the year 5138), below 1e14 milliseconds, below 1e17 microseconds, above nanoseconds. One unit a column.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DataError

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_NUMBER = r"^-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?$"
_ISO_8601 = (
    r"^(?P<day>\d{4}-\d{2}-\d{2})(?:[T ](?P<minute>\d{2}:\d{2})(?::(?P<second>\d{2})(?:[.,](?P<fraction>\d{1,9}))?)?"
    r" ?(?P<zone>Z|UTC|[+-]\d{2}(?::?\d{2})?)?)?$"
)
_SECONDS_FORMAT = "%Y-%m-%dT%H:%M:%S"
_UNITS_US = ((1e11, 1e6), (1e14, 1e3), (1e17, 1.0), (np.inf, 1e-3))
"""(median below, microseconds a unit)."""
_MAX_US = 2.0**62


def parse_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return strings, null where nothing but blanks is there. Whole floats lose their '.0', as ids with gaps do."""
    if pa.types.is_floating(column.type):
        known = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.all(pc.equal(pc.floor(known), known)).as_py()
        column = known.cast(pa.int64()) if whole else known
    text = column if pa.types.is_string(column.type) else _cast(column, pa.string())
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(text), ""), None, text)


def parse_numbers(column: pa.ChunkedArray) -> tuple[FloatArray, BoolArray, BoolArray]:
    """Return (numbers, missing, bad); a number that is missing or bad is NaN, and a float that is NaN is missing."""
    if pa.types.is_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        missing = pc.fill_null(pc.equal(text, ""), True).to_numpy()
        number = pc.if_else(pc.match_substring_regex(text, _NUMBER), text, None).cast(pa.float64())
    else:
        missing = column.is_null(nan_is_null=True).to_numpy()
        number = _cast(column, pa.float64())
    numbers = number.fill_null(np.nan).to_numpy()
    bad = ~np.isfinite(numbers) & ~missing
    return np.where(bad, np.nan, numbers), missing, bad


def parse_times(column: pa.ChunkedArray) -> tuple[IntArray, BoolArray, BoolArray]:
    """Return (microseconds since 1970, missing, bad); a time that is missing, bad or before 1970 is 0."""
    if pa.types.is_temporal(column.type):
        missing = column.is_null().to_numpy()
        times = _cast(_cast(column, pa.timestamp("us")), pa.int64()).fill_null(-1).to_numpy()
        bad = (times < 0) & ~missing
        return np.where(times < 0, 0, times), missing, bad
    numbers, missing, bad = parse_numbers(column)
    times_us = np.rint(numbers * _us_per_unit(numbers))
    if pa.types.is_string(column.type) and bad.any():
        times_us = np.where(bad, _parse_iso_8601(column), times_us)
    known = (times_us >= 0) & (times_us < _MAX_US)
    return np.where(known, times_us, 0).astype(np.int64), missing, ~known & ~missing


def _cast(column: pa.ChunkedArray, to: pa.DataType) -> pa.ChunkedArray:
    try:
        return column.cast(to, safe=False)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise DataError(f"a column of type {column.type} cannot be read as {to}; convert it to text first") from error


def _us_per_unit(numbers: FloatArray) -> float:
    known = numbers[np.isfinite(numbers)]
    median = float(np.median(np.abs(known))) if known.size else 0.0
    return next(us for limit, us in _UNITS_US if median < limit)


def _parse_iso_8601(column: pa.ChunkedArray) -> FloatArray:
    """Return microseconds, NaN where the text is no date and time."""
    parts = pc.extract_regex(pc.utf8_trim_whitespace(column), _ISO_8601).combine_chunks()
    day, minute, second, fraction, zone = (parts.field(index) for index in range(5))
    minute = pc.if_else(pc.equal(minute, ""), "00:00", minute)
    second = pc.if_else(pc.equal(second, ""), "00", second)
    text = pc.binary_join_element_wise(pc.binary_join_element_wise(day, minute, "T"), second, ":")
    stamp = pc.strptime(text, format=_SECONDS_FORMAT, unit="s", error_is_null=True)
    # strptime turns 30 February into 1 March; a real date reads back as it was written.
    real = pc.and_(parts.is_valid(), pc.fill_null(pc.equal(pc.strftime(stamp, format=_SECONDS_FORMAT), text), False))
    seconds = pc.cast(stamp, pa.int64()).fill_null(0).to_numpy() - _offset_s(zone)
    fraction_ns = pc.utf8_rpad(fraction, 9, "0").cast(pa.int64()).to_numpy()
    return np.where(real.to_numpy(zero_copy_only=False), seconds * 1e6 + fraction_ns // 1_000, np.nan)


def _offset_s(zone: pa.Array) -> IntArray:
    """Return the seconds a zone such as '+02:00', '-0530' or '+01' is ahead of UTC; 0 for 'Z' and none."""
    digits = pc.replace_substring(pc.if_else(pc.is_in(zone, pa.array(["", "Z", "UTC"])), "+", zone), ":", "")
    padded = pc.utf8_rpad(digits, 5, "0")
    hours = pc.utf8_slice_codeunits(padded, 1, 3).cast(pa.int64()).to_numpy()
    minutes = pc.utf8_slice_codeunits(padded, 3, 5).cast(pa.int64()).to_numpy()
    sign = np.where(pc.equal(pc.utf8_slice_codeunits(padded, 0, 1), "-").to_numpy(zero_copy_only=False), -1, 1)
    return sign * (hours * 3_600 + minutes * 60)
