"""The interaction event: one schema for history on disk and for live feedback.

In:  mappings from JSON, CSV or Parquet.  Out: validated `Event` objects and Arrow tables of `EVENT_SCHEMA`.
Knows nothing of where events are stored or what is learned from them.

`event_id` is the client's idempotency key: posting it again is not a second event. Times are microseconds UTC.
"""

import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa

from cluster.errors import InvalidEventError

KINDS = ("impression", "click", "like", "cart", "purchase", "rating", "dwell", "share", "skip", "dislike")
"""Every kind of feedback."""

KIND_INDEX = {kind: index for index, kind in enumerate(KINDS)}
"""A kind's place in `KINDS`: the number that models know it by."""

INTERACTION_KINDS = frozenset({"click", "like", "cart", "purchase", "rating", "dwell", "share"})
"""Kinds that say the user chose the item: they enter the history and are what retrieval learns to predict."""

MAX_ID_CHARS = 1_024
MAX_CONTEXT_ENTRIES = 64
MAX_FUTURE_US = 5 * 60 * 1_000_000
"""How far ahead of the server's clock an event may be stamped: five minutes."""

EVENT_SCHEMA = pa.schema(
    [
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("ts_us", pa.int64(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("request_id", pa.string()),
        pa.field("position", pa.int32()),
        pa.field("propensity", pa.float64()),
        pa.field("version", pa.string()),
        pa.field("context", pa.map_(pa.string(), pa.string())),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One interaction, as a client reported it."""

    user_id: str
    item_id: str
    kind: str
    ts_us: int
    event_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    domain: str = "default"
    value: float | None = None
    """Rating in stars, dwell in seconds, purchase in currency units."""
    request_id: str | None = None
    position: int | None = None
    propensity: float | None = None
    version: str | None = None
    context: Mapping[str, str] = field(default_factory=dict)


_FIELDS = frozenset(f.name for f in fields(Event))
_OPTIONAL_IDS = ("request_id", "version")


def parse_event(raw: Mapping[str, Any], *, now_us: int | None = None) -> Event:  # Any: values come from JSON
    """Check one raw mapping and return the event it states.

    Missing `ts_us` becomes the time of arrival and missing `event_id` is minted. Raises `InvalidEventError` naming
    the field for anything unknown, absent, of another type or out of range.
    """
    now_us = now_us if now_us is not None else time.time_ns() // 1_000
    if unknown := sorted(set(raw) - _FIELDS):
        raise InvalidEventError(unknown[0], f"unknown field; known: {', '.join(sorted(_FIELDS))}")
    known = {name: value for name, value in raw.items() if value is not None}
    for name in ("user_id", "item_id"):
        known[name] = _identifier(name, known.get(name))
    for name in ("event_id", "domain", *_OPTIONAL_IDS):
        if name in known:
            known[name] = _identifier(name, known[name])
    if known.get("kind") not in KINDS:
        raise InvalidEventError("kind", f"{known.get('kind')!r:.80} is none of {', '.join(KINDS)}")
    known["ts_us"] = _timestamp(known.get("ts_us", now_us), now_us)
    if "value" in known:
        known["value"] = _number("value", known["value"])
    if known["kind"] == "rating" and "value" not in known:
        raise InvalidEventError("value", "a rating needs its value")
    if "position" in known and (type(known["position"]) is not int or not 0 <= known["position"] < 2**31):
        raise InvalidEventError("position", "must be a whole number from 0")
    if "propensity" in known:
        known["propensity"] = _number("propensity", known["propensity"])
        if not 0 < known["propensity"] <= 1:
            raise InvalidEventError("propensity", f"{known['propensity']} is not in (0, 1]")
    known["context"] = _context(known.get("context", {}))
    return Event(**known)


def events_table(events: Iterable[Event]) -> pa.Table:
    """Return the events as an Arrow table of `EVENT_SCHEMA`, in the order given."""
    listed = list(events)
    columns = {
        name: [list(e.context.items()) for e in listed] if name == "context" else [getattr(e, name) for e in listed]
        for name in EVENT_SCHEMA.names
    }
    return pa.table(columns, schema=EVENT_SCHEMA)


def _identifier(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidEventError(name, "must be a non-empty string")
    if len(value) > MAX_ID_CHARS:
        raise InvalidEventError(name, f"has {len(value):,} characters; at most {MAX_ID_CHARS:,}")
    if "\x00" in value or (not value.isprintable() and any(0xD800 <= ord(c) <= 0xDFFF for c in value)):
        raise InvalidEventError(name, "holds a NUL or a lone surrogate")
    return value


def _timestamp(value: object, now_us: int) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise InvalidEventError("ts_us", "must be microseconds since 1970 (UTC), a whole number")
    if value > now_us + MAX_FUTURE_US:
        ahead_s = (value - now_us) / 1e6
        raise InvalidEventError("ts_us", f"is {ahead_s:,.0f} s in the future; at most {MAX_FUTURE_US // 10**6} s")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InvalidEventError(name, "must be a finite number")
    return float(value)


def _context(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) > MAX_CONTEXT_ENTRIES:
        raise InvalidEventError("context", f"must be an object of at most {MAX_CONTEXT_ENTRIES} entries")
    for key, entry in value.items():
        if not isinstance(key, str) or not isinstance(entry, str) or len(key) + len(entry) > MAX_ID_CHARS:
            raise InvalidEventError("context", f"entries must be short strings; {key!s:.40} is not")
    return dict(value)
