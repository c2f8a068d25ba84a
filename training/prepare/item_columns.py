"""The items of a CSV or Parquet file, with a column mapping, as an item table.

In:  a file and which column plays which role.  Out: tables of `ITEM_SCHEMA` and `MEDIA_SCHEMA`, and the verdict on
every row.
Knows nothing of events.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.dataset import ITEM_SCHEMA, MEDIA_SCHEMA
from training.prepare.raw_table import RawTable, column_names, read_raw_table
from training.prepare.raw_values import parse_text, parse_times
from training.prepare.verdict import Verdict

MEDIA_ROLES = ("image", "audio")
"""Paths of files, from the folder of the file of items."""
ITEM_ROLES = ("item_id", "text", "domain", "categories", "available_from", "available_until", *MEDIA_ROLES)
NEEDED_ITEM_ROLES = ("item_id", "text")
MAX_TEXT_CHARS = 20_000
CATEGORY_SEPARATOR = "|"


def read_item_columns(
    path: Path, columns: Mapping[str, str] | None, default_domain: str
) -> tuple[pa.Table, pa.Table, Verdict, RawTable]:
    """Read items and their media.

    Without a mapping, item_id and text are needed under these names and further roles but those of media are optional.
    """
    if columns is None:
        present = column_names(path)
        named = [role for role in ITEM_ROLES if role not in MEDIA_ROLES]  # what is called an image may be a link
        columns = {role: role for role in named if role in NEEDED_ITEM_ROLES or role in present}
    raw = read_raw_table(path, columns, list_roles=("categories",))
    absent = pa.chunked_array([pa.nulls(raw.columns.num_rows, pa.string())])
    cells = {role: raw.columns[role] if role in columns else absent for role in ITEM_ROLES}
    item_id, text, domain = (parse_text(cells[role]) for role in ("item_id", "text", "domain"))
    verdict = Verdict(raw)
    verdict.refuse("missing item_id", item_id.is_null().to_numpy())
    verdict.refuse_bad_ids(item_id, domain)
    too_long = pc.fill_null(pc.greater(pc.utf8_length(text), MAX_TEXT_CHARS), False)
    verdict.refuse(f"text of more than {MAX_TEXT_CHARS:,} characters", too_long.to_numpy())
    times: dict[str, pa.Array] = {}
    for role in ("available_from", "available_until"):
        ts_us, missing, bad = parse_times(cells[role])
        verdict.refuse(f"bad {role}", bad)
        times[f"{role}_us"] = pa.array(ts_us, mask=missing)
    files = {role: _files(path.parent, parse_text(cells[role])) for role in MEDIA_ROLES}
    for role, path_N in files.items():
        verdict.refuse(f"no such {role} file", np.array([bool(file) and not os.path.isfile(file) for file in path_N]))
    verdict.refuse_repeated("duplicate item_id", item_id)
    table = pa.table(
        {
            "item_id": item_id,
            "domain": pc.fill_null(domain, default_domain),
            "text": pc.fill_null(text, ""),
            "categories": _categories(cells["categories"]),
            **times,
        }
    )
    accepted = pa.array(verdict.accepted)
    media = [
        pa.table({"item_id": item_id, "kind": [role] * len(path_N), "path": pa.array(path_N, pa.string())})
        .filter(pc.and_(accepted, pc.not_equal(pa.array(path_N, pa.string()), "")))
        .cast(MEDIA_SCHEMA)
        for role, path_N in files.items()
    ]
    return table.filter(accepted).cast(ITEM_SCHEMA), pa.concat_tables(media), verdict, raw


def _files(folder: Path, names: pa.ChunkedArray) -> list[str]:
    """Return absolute paths; empty where no file is named."""
    return [os.path.join(folder.resolve(), name) if name else "" for name in names.to_pylist()]


def _categories(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Part text at '|', dropping blanks; lists stay as they are and nothing becomes the empty list."""
    kind = pa.list_(pa.string())
    if pa.types.is_list(column.type):
        lists = column.cast(kind)
    else:
        parted = pc.replace_substring_regex(parse_text(column), r"\s*\|[\s|]*", CATEGORY_SEPARATOR)
        trimmed = pc.utf8_trim(parted, CATEGORY_SEPARATOR + " ")
        lists = pc.split_pattern(pc.if_else(pc.equal(trimmed, ""), None, trimmed), CATEGORY_SEPARATOR).cast(kind)
    return pc.if_else(lists.is_valid(), lists, pa.scalar([], kind))
