"""Anyone's own interactions, as CSV or Parquet with a column mapping, into a dataset folder.

In:  a file of events, which column plays which role, and optionally a file of items.
Out: a `Dataset`; refused rows with their reason and number in rejected.parquet. Accepted + rejected = rows read.
Knows nothing of models or of any particular data source.

A row is refused for the first reason that applies, in the order of `_judge`. The rules that live feedback obeys
(`cluster.events.parse_event`) hold here too. How a time is understood is written in `raw_values`.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.dataset import ITEM_SCHEMA, MEDIA_SCHEMA, USER_SCHEMA, Dataset, Source, write_dataset
from cluster.errors import ConfigError, DataError
from cluster.events import EVENT_SCHEMA, INTERACTION_KINDS, KINDS, MAX_FUTURE_US
from training.prepare.item_columns import ITEM_ROLES, NEEDED_ITEM_ROLES, read_item_columns
from training.prepare.raw_table import RawTable, read_raw_table
from training.prepare.raw_values import parse_numbers, parse_text, parse_times
from training.prepare.verdict import Verdict

NEEDED_ROLES = ("user", "item", "time")
TEXT_ROLES = ("event_id", "domain", "request_id", "version")
NUMBER_ROLES = ("value", "position", "propensity")
ROLES = (*NEEDED_ROLES, "kind", *NUMBER_ROLES, *TEXT_ROLES)
DEFAULT_DOMAIN = "default"

_log = logging.getLogger(__name__)


def prepare_columns(
    events: Path,
    columns: Mapping[str, str],
    *,
    out: Path,
    items: Path | None = None,
    item_columns: Mapping[str, str] | None = None,
    default_kind: str = "click",
) -> Dataset:
    """Write the dataset that a file of events states.

    `columns` maps `ROLES` (user, item and time are needed) to columns of `events`. Without a kind column every event is
    a `default_kind`; an event without id is named after file and row. `item_columns` maps `ITEM_ROLES` likewise; by
    default the columns of `items` that are named as the roles are taken. Items that only events mention get an empty
    text.

    Raises `ConfigError` for an unknown role or kind, `DataError` for a file or column that is missing and when no row
    is usable (rejected.parquet then says why).
    """
    _check_roles("columns", columns, ROLES, NEEDED_ROLES)
    if item_columns is not None:
        _check_roles("item_columns", item_columns, ITEM_ROLES, NEEDED_ITEM_ROLES)
    if default_kind not in KINDS:
        raise ConfigError(f"default_kind={default_kind}: is none of {', '.join(KINDS)}")
    name = events.name.split(".")[0]
    raw = read_raw_table(events, columns)
    if raw.rows_read == 0:
        raise DataError(f"{events}: holds a header and no rows")
    table, verdict = _judge(raw, default_kind, minted_prefix=name)
    rejected = verdict.rejected_rows("events")
    described, media = ITEM_SCHEMA.empty_table(), MEDIA_SCHEMA.empty_table()
    facts = {"rows_read": raw.rows_read, "rows_accepted": table.num_rows}
    if items is not None:
        described, media, item_verdict, raw_items = read_item_columns(items, item_columns, DEFAULT_DOMAIN)
        rejected = pa.concat_tables([rejected, item_verdict.rejected_rows("items")], promote_options="default")
        facts |= {"item_rows_read": raw_items.rows_read, "item_rows_accepted": described.num_rows}
    reasons = _reasons(rejected)
    dataset = write_dataset(
        out,
        name=name,
        events=table,
        items=_with_undescribed(described, table),
        users=_users(table),
        label=f"positive interactions are those of kind {', '.join(sorted(INTERACTION_KINDS))}",
        sources=[Source(name=path.name, licence="not stated", url="") for path in (events, items) if path],
        rejected=reasons,
        rejected_rows=rejected,
        facts=facts,
        media=media,
    )
    if rejected.num_rows:
        _log.warning("%d rows refused (%s): %s", rejected.num_rows, _listed(reasons), out / "rejected.parquet")
    if table.num_rows == 0:
        raise DataError(f"{events}: none of {raw.rows_read:,} rows is usable ({_listed(reasons)}); see {out}")
    return dataset


def _check_roles(key: str, mapping: Mapping[str, str], known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    if unknown := [role for role in mapping if role not in known]:
        raise ConfigError(f"{key}.{unknown[0]}={mapping[unknown[0]]}: unknown role; known: {', '.join(known)}")
    if missing := [role for role in needed if role not in mapping]:
        raise ConfigError(f"{key}.{missing[0]}: is not given; say which column it is: {missing[0]}=COLUMN")


def _judge(raw: RawTable, default_kind: str, minted_prefix: str) -> tuple[pa.Table, Verdict]:
    """Parse every column and refuse the rows that are not events; return the events and the verdict on all rows."""
    rows = raw.columns.num_rows
    cells = {role: _cells(raw, role) for role in ROLES}
    user_id, item_id = parse_text(cells["user"]), parse_text(cells["item"])
    texts = {role: parse_text(cells[role]) for role in TEXT_ROLES}
    verdict = Verdict(raw)
    verdict.refuse("missing user", user_id.is_null().to_numpy())
    verdict.refuse("missing item", item_id.is_null().to_numpy())
    verdict.refuse_bad_ids(user_id, item_id, *texts.values())
    ts_us, no_time, bad_time = parse_times(cells["time"])
    verdict.refuse("missing time", no_time)
    verdict.refuse("bad time", bad_time)
    verdict.refuse("time in the future", ts_us > time.time_ns() // 1_000 + MAX_FUTURE_US)
    kind = pc.utf8_lower(pc.utf8_trim_whitespace(parse_text(cells["kind"])))
    if "kind" not in raw.columns.column_names:
        kind = pc.fill_null(kind, default_kind)
    verdict.refuse("unknown kind", ~pc.is_in(kind, value_set=pa.array(KINDS)).to_numpy())
    numbers, absent = {}, {}
    for role in NUMBER_ROLES:
        numbers[role], absent[role], bad = parse_numbers(cells[role])
        verdict.refuse(f"bad {role}", bad)
    verdict.refuse("rating without value", absent["value"] & pc.fill_null(pc.equal(kind, "rating"), False).to_numpy())
    position, propensity = numbers["position"], numbers["propensity"]
    is_position = (position >= 0) & (position < 2**31) & (position == np.floor(position))
    verdict.refuse("bad position", ~absent["position"] & ~is_position)
    verdict.refuse("bad propensity", ~absent["propensity"] & ~((propensity > 0) & (propensity <= 1)))
    minted_id = pc.binary_join_element_wise(minted_prefix, pa.array(raw.row_numbers).cast(pa.string()), "-")
    event_id = pc.coalesce(texts["event_id"], minted_id)
    verdict.refuse_repeated("duplicate event id", event_id)
    table = pa.table(
        {
            "event_id": event_id,
            "ts_us": ts_us,
            "domain": pc.fill_null(texts["domain"], DEFAULT_DOMAIN),
            "user_id": user_id,
            "item_id": item_id,
            "kind": kind,
            "value": pa.array(numbers["value"], mask=absent["value"]),
            "request_id": texts["request_id"],
            "position": pa.array(np.where(is_position, position, 0).astype(np.int32), mask=~is_position),
            "propensity": pa.array(propensity, mask=absent["propensity"]),
            "version": texts["version"],
            "context": pa.array([[]], EVENT_SCHEMA.field("context").type).take(pa.array(np.zeros(rows, np.int64))),
        }
    )
    return table.filter(pa.array(verdict.accepted)).cast(EVENT_SCHEMA), verdict


def _cells(raw: RawTable, role: str) -> pa.ChunkedArray:
    if role in raw.columns.column_names:
        return raw.columns[role]
    return pa.chunked_array([pa.nulls(raw.columns.num_rows, pa.string())])


def _with_undescribed(described: pa.Table, events: pa.Table) -> pa.Table:
    """Add the items that events mention and nobody described, in order of appearance."""
    seen = events.select(["item_id", "domain"]).group_by("item_id", use_threads=False).aggregate([("domain", "first")])
    new = seen.filter(pc.invert(pc.is_in(seen["item_id"], value_set=described["item_id"])))
    bare = {name: pa.nulls(new.num_rows, ITEM_SCHEMA.field(name).type) for name in ITEM_SCHEMA.names}
    bare |= {
        "item_id": new["item_id"],
        "domain": new["domain_first"],
        "text": pa.array([""] * new.num_rows, pa.string()),
    }
    bare["categories"] = pa.array([[]] * new.num_rows, ITEM_SCHEMA.field("categories").type)
    return pa.concat_tables([described, pa.table(bare).cast(ITEM_SCHEMA)])


def _users(events: pa.Table) -> pa.Table:
    user_ids = pc.unique(events["user_id"])
    return pa.table({"user_id": user_ids, "attributes": [[]] * len(user_ids)}, schema=USER_SCHEMA)


def _reasons(rejected: pa.Table) -> dict[str, int]:
    counted = rejected.group_by(["file", "reason"], use_threads=False).aggregate([([], "count_all")]).to_pylist()
    return {
        entry["reason"] if entry["file"] == "events" else f"items: {entry['reason']}": entry["count_all"]
        for entry in counted
    }


def _listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())
