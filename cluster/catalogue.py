"""The live catalogue: what `PUT /v1/items` and `PUT /v1/users` state.

In:  mappings from JSON, CSV or Parquet.  Out: validated `Item` and `User` objects.
Knows nothing of vectors, table rows or where they are stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cluster.errors import InvalidEventError
from cluster.events import MAX_ID_CHARS

MAX_TEXT_CHARS = 20_000
MAX_CATEGORIES = 256
MAX_ATTRIBUTES = 256
MAX_ATTRIBUTE_CHARS = 2_000
DELETED_US = 0
"""End of the availability of a deleted item; no item can be put with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One item as its owner describes it."""

    item_id: str
    text: str
    """What the encoder reads; it places an item nobody has met yet."""
    domain: str = "default"
    categories: tuple[str, ...] = ()
    available_from_us: int | None = None
    available_until_us: int | None = None

    @property
    def is_deleted(self) -> bool:
        """Whether it was deleted; putting it again brings it back."""
        return self.available_until_us == DELETED_US

    def as_deleted(self) -> "Item":
        """Return what stands in its place from now on."""
        return replace(self, available_from_us=None, available_until_us=DELETED_US)

    def is_available(self, now_us: int) -> bool:
        """Whether its availability has begun and is not over."""
        return (self.available_from_us or 0) <= now_us and (
            self.available_until_us is None or now_us < self.available_until_us
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """What is told of one user."""

    user_id: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Such as a country or a plan; they replace those told before."""


_FIELDS = frozenset(f.name for f in fields(Item))
_USER_FIELDS = frozenset(f.name for f in fields(User))


def parse_item(raw: Mapping[str, Any]) -> Item:  # Any: values come from JSON
    """Check one raw mapping and return the item it states; raises `InvalidEventError` naming the field."""
    if unknown := sorted(set(raw) - _FIELDS):
        raise InvalidEventError(unknown[0], f"unknown field; known: {', '.join(sorted(_FIELDS))}")
    available_from_us = _timestamp("available_from_us", raw.get("available_from_us"))
    available_until_us = _timestamp("available_until_us", raw.get("available_until_us"))
    if available_until_us is not None and available_until_us <= (available_from_us or 0):
        raise InvalidEventError("available_until_us", "must be later than available_from_us")
    return Item(
        item_id=_text("item_id", raw.get("item_id"), MAX_ID_CHARS),
        text=_text("text", raw.get("text"), MAX_TEXT_CHARS),
        domain=_text("domain", raw.get("domain", "default"), MAX_ID_CHARS),
        categories=_categories(raw.get("categories")),
        available_from_us=available_from_us,
        available_until_us=available_until_us,
    )


def parse_user(raw: Mapping[str, Any]) -> User:  # Any: values come from JSON
    """Check one raw mapping and return the user it states; raises `InvalidEventError` naming the field."""
    if unknown := sorted(set(raw) - _USER_FIELDS):
        raise InvalidEventError(unknown[0], f"unknown field; known: {', '.join(sorted(_USER_FIELDS))}")
    user_id = _text("user_id", raw.get("user_id"), MAX_ID_CHARS)
    stated = raw.get("attributes", {})
    if not isinstance(stated, Mapping) or len(stated) > MAX_ATTRIBUTES:
        raise InvalidEventError("attributes", f"must be an object of at most {MAX_ATTRIBUTES} texts by name")
    attributes = {
        _text("attributes", name, MAX_ID_CHARS): _text(f"attributes.{name:.100}", value, MAX_ATTRIBUTE_CHARS)
        for name, value in stated.items()
    }
    return User(user_id=user_id, attributes=attributes)


def _text(name: str, value: object, max_chars: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidEventError(name, "must be a non-empty string")
    if len(value) > max_chars:
        raise InvalidEventError(name, f"has {len(value):,} characters; at most {max_chars:,}")
    if "\x00" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidEventError(name, "holds a NUL or a lone surrogate")
    return value


def _categories(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or len(value) > MAX_CATEGORIES:
        raise InvalidEventError("categories", f"must be a list of at most {MAX_CATEGORIES} names")
    return tuple(_text("categories", name, MAX_ID_CHARS) for name in value)


def _timestamp(name: str, value: object) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 2**62:
        raise InvalidEventError(name, "must be microseconds since 1970 (UTC), a whole number")
    return value
