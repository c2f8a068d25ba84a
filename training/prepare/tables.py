"""A known source's columns as the tables of a dataset.

In:  what a source states, as columns.  Out: tables of the events', items' and users' schemas.
Knows nothing of any source. Anyone's own files, whose rows may be refused, go through columns.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA
from cluster.events import EVENT_SCHEMA


def build_events(source: str, domain: str, columns: Mapping[str, Any]) -> pa.Table:  # Any: whatever Arrow takes
    """Return events in the order given, `user_id` among their columns; their ids are minted from the source's name."""
    rows = len(columns["user_id"])
    stated = {
        "event_id": [f"{source}-{row}" for row in range(1, rows + 1)],
        "domain": [domain] * rows,
        "context": [[]] * rows,
        **columns,
    }
    missing = {field.name: pa.nulls(rows, field.type) for field in EVENT_SCHEMA if field.name not in stated}
    return pa.table({**stated, **missing}, schema=EVENT_SCHEMA)


def build_items(
    domain: str, item_ids: Sequence[str], texts: Sequence[str], categories: Sequence[Sequence[str]]
) -> pa.Table:
    """Return items that are available at any time."""
    columns = {
        "item_id": item_ids,
        "domain": [domain] * len(item_ids),
        "text": texts,
        "categories": categories,
        "available_from_us": [None] * len(item_ids),
        "available_until_us": [None] * len(item_ids),
    }
    return pa.table(columns, schema=ITEM_SCHEMA)


def build_users(attributes: Mapping[str, Sequence[tuple[str, str]]]) -> pa.Table:
    """Return users by id with their attributes."""
    return pa.table({"user_id": list(attributes), "attributes": list(attributes.values())}, schema=USER_SCHEMA)
