"""The dataset folder: what `prepare` writes and everything that trains or evaluates reads.

    DIR/dataset.json           what it is, its counts and where it comes from; it makes the folder a dataset
        events/part-*.parquet  EVENT_SCHEMA, ordered by time; equal times keep the order they were given in
        items.parquet          ITEM_SCHEMA, one row an item
        users.parquet          USER_SCHEMA, one row a user
        promotions.parquet     PROMOTION_SCHEMA: what was on display or in a mailer, where and when (only where told)
        media.parquet          MEDIA_SCHEMA: files of items' pictures and sounds (only where told)
        rejected.parquet       raw rows that were refused, with the reason (only where there are any)

In:  Arrow tables.  Out: `Dataset`, which reads them back.
Knows nothing of raw files, of vocabularies or of models.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.events import EVENT_SCHEMA

SCHEMA_VERSION = 1
ROWS_PER_PART = 5_000_000
HASH_BLOCK_BYTES = 1 << 20

ITEM_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("categories", pa.list_(pa.string()), nullable=False),
        pa.field("available_from_us", pa.int64()),
        pa.field("available_until_us", pa.int64()),
    ]
)
USER_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("attributes", pa.map_(pa.string(), pa.string()), nullable=False),
    ]
)
PROMOTION_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("place", pa.string(), nullable=False),
        pa.field("from_us", pa.int64(), nullable=False),
        pa.field("until_us", pa.int64(), nullable=False),
    ]
)
"""`place` is what events say in their context under the same name. One item's of a kind at a place do not overlap."""
PROMOTIONS = "promotions.parquet"
MEDIA_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
    ]
)
"""An item has one file of a kind at most; paths are absolute, or begin at the dataset's folder."""
MEDIA = "media.parquet"
OPTIONAL = (PROMOTIONS, MEDIA)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where data came from and under which terms."""

    name: str
    licence: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """What `dataset.json` says."""

    schema_version: int
    name: str
    label: str
    """What counts as a positive interaction, in words."""
    events: int
    items: int
    users: int
    kinds: Mapping[str, int] = field(default_factory=dict)
    """Events of each kind."""
    first_ts_us: int | None = None
    last_ts_us: int | None = None
    sources: tuple[Source, ...] = ()
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Raw rows refused, by reason; the rows themselves are in rejected.parquet."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Further figures of the preparation, such as join coverage."""
    events_sha256: str = ""
    """Of the event files, one after the other; empty in a dataset from before it was stated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A dataset on disk; tables are read when asked for."""

    path: Path
    info: DatasetInfo

    def events(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the events in time order, all columns or those named."""
        parts = sorted((self.path / "events").glob("*.parquet"))
        return pa.concat_tables(_read_parquet(part, EVENT_SCHEMA, columns) for part in parts)

    def fingerprint(self) -> str:
        """Identify the content; a dataset prepared anew alike keeps it. The description states the events' digest."""
        digest = hashlib.sha256()
        for name in ("dataset.json", "items.parquet", "users.parquet", *OPTIONAL):
            if name not in OPTIONAL or (self.path / name).exists():
                digest.update((self.path / name).read_bytes())
        return digest.hexdigest()

    def items(self) -> pa.Table:
        """Read the item table."""
        return _read_parquet(self.path / "items.parquet", ITEM_SCHEMA)

    def users(self) -> pa.Table:
        """Read the user table."""
        return _read_parquet(self.path / "users.parquet", USER_SCHEMA)

    def promotions(self, kind: str) -> pa.Table:
        """Read the promotions of a kind; none where nothing is told."""
        return self._promotions(["item_id", "place"], kind=kind)

    def promotion_kinds(self) -> list[str]:
        """Return the kinds of promotions that are told, in order."""
        return sorted(self._promotions(["kind"], columns=["kind"])["kind"].unique().to_pylist())

    def media(self, kind: str) -> list[str]:
        """Return the path of each item's file of a kind, in the order of `items()`; empty where it has none."""
        if not (self.path / MEDIA).exists():
            return [""] * self.info.items
        told = _read_parquet(self.path / MEDIA, MEDIA_SCHEMA).filter(pc.field("kind") == kind)
        paths = dict(zip(told["item_id"].to_pylist(), told["path"].to_pylist(), strict=True))
        given = (paths.get(item_id) for item_id in self.items()["item_id"].to_pylist())
        return [str(self.path / path) if path else "" for path in given]

    def _promotions(self, coded: list[str], *, kind: str | None = None, columns: list[str] | None = None) -> pa.Table:
        path = self.path / PROMOTIONS
        if not path.exists():
            return PROMOTION_SCHEMA.empty_table()
        try:
            wanted = None if kind is None else [("kind", "=", kind)]
            return pq.read_table(path, columns=columns, filters=wanted, read_dictionary=coded)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read ({error}); prepare the dataset again") from error


def write_dataset(
    path: str | Path,
    *,
    name: str,
    events: pa.Table,
    items: pa.Table,
    users: pa.Table,
    label: str,
    sources: Sequence[Source],
    rejected: Mapping[str, int],
    rejected_rows: pa.Table | None = None,
    facts: Mapping[str, float] | None = None,
    promotions: pa.Table | None = None,
    media: pa.Table | None = None,
) -> Dataset:
    """Write a dataset folder whole or not at all, replacing the dataset that was there.

    Events are sorted by time, stably. Raises `DataError` when a table does not fit its schema, an id appears twice in
    its table, or `path` holds something that is not a dataset.
    """
    path = Path(path)
    events = _sorted_by_time(_conform("events", events, EVENT_SCHEMA, "event_id"))
    items = _conform("items", items, ITEM_SCHEMA, "item_id")
    users = _conform("users", users, USER_SCHEMA, "user_id")
    if promotions is not None:
        promotions = _conform("promotions", promotions, PROMOTION_SCHEMA)
        _refuse_overlaps(promotions)
    if media is not None:
        media = _conform("media", media, MEDIA_SCHEMA)
        _refuse_two_files(media)
    kinds = events["kind"].value_counts().to_pylist()
    info = DatasetInfo(
        schema_version=SCHEMA_VERSION,
        name=name,
        label=label,
        events=events.num_rows,
        items=items.num_rows,
        users=users.num_rows,
        kinds={entry["values"]: entry["counts"] for entry in kinds},
        first_ts_us=pc.min(events["ts_us"]).as_py(),
        last_ts_us=pc.max(events["ts_us"]).as_py(),
        sources=tuple(sources),
        rejected=dict(rejected),
        facts=dict(facts or {}),
    )
    _refuse_foreign_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}); name another folder") from error
    try:
        info = replace(info, events_sha256=_write_events(events, draft / "events"))
        pq.write_table(items, draft / "items.parquet", compression="zstd")
        pq.write_table(users, draft / "users.parquet", compression="zstd")
        if rejected_rows is not None and rejected_rows.num_rows:
            pq.write_table(rejected_rows, draft / "rejected.parquet", compression="zstd")
        if promotions is not None:
            pq.write_table(promotions, draft / PROMOTIONS, compression="zstd")
        if media is not None and media.num_rows:
            pq.write_table(media, draft / MEDIA, compression="zstd")
        text = json.dumps(asdict(info), indent=2, ensure_ascii=False)
        (draft / "dataset.json").write_text(text + "\n", encoding="utf-8")
        replace_folder(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return load_dataset(path)


def load_dataset(path: str | Path) -> Dataset:
    """Open a dataset folder. Raises `DataError` naming the file, key or count that is missing or does not hold."""
    path = Path(path)
    info = _read_info(path / "dataset.json")
    parts = sorted((path / "events").glob("*.parquet"))
    if not parts:
        raise DataError(f"{path / 'events'}: holds no *.parquet; prepare the dataset again")
    counted = {
        "events": sum(_check_parquet(part, EVENT_SCHEMA) for part in parts),
        "items": _check_parquet(path / "items.parquet", ITEM_SCHEMA),
        "users": _check_parquet(path / "users.parquet", USER_SCHEMA),
    }
    for optional, schema in zip(OPTIONAL, (PROMOTION_SCHEMA, MEDIA_SCHEMA), strict=True):
        if (path / optional).exists():
            _check_parquet(path / optional, schema)
    for table, rows in counted.items():
        stated = getattr(info, table)
        if rows != stated:
            raise DataError(f"{path}: dataset.json states {stated:,} {table}, the files hold {rows:,}; prepare again")
    return Dataset(path=path, info=info)


def _read_info(path: Path) -> DatasetInfo:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); `recloop prepare` makes a dataset") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); prepare the dataset again") from error
    if not isinstance(raw, dict):
        raise DataError(f"{path}: must be a JSON object")
    if missing := [key for key in ("schema_version", "name", "label", "events", "items", "users") if key not in raw]:
        raise DataError(f"{path}: key {missing[0]!r} is missing; present: {', '.join(sorted(raw))}")
    if raw["schema_version"] != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version={raw['schema_version']}: this recloop reads {SCHEMA_VERSION}")
    try:
        return DatasetInfo(**{**raw, "sources": tuple(Source(**source) for source in raw.get("sources", ()))})
    except TypeError as error:
        raise DataError(f"{path}: {error}") from error


def _conform(table_name: str, table: pa.Table, schema: pa.Schema, key: str | None = None) -> pa.Table:
    if missing := [name for name in schema.names if name not in table.column_names]:
        raise DataError(f"{table_name}: column {missing[0]!r} is missing; present: {', '.join(table.column_names)}")
    try:
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{table_name}: {error}") from error
    for column in schema:
        if not column.nullable and table[column.name].null_count:
            raise DataError(f"{table_name}.{column.name}: holds {table[column.name].null_count:,} nulls")
    if key is not None and (distinct := pc.count_distinct(table[key]).as_py()) != table.num_rows:
        raise DataError(f"{table_name}.{key}: {table.num_rows - distinct:,} of {table.num_rows:,} rows repeat an id")
    return table


def _refuse_overlaps(promotions: pa.Table) -> None:
    """Raise `DataError` where a promotion ends before it begins, or begins before the one before it has ended."""
    from_us, until_us = (promotions[name].to_numpy() for name in ("from_us", "until_us"))
    whose = np.zeros(len(from_us), np.int64)
    for name in ("kind", "place", "item_id"):
        coded = promotions[name].dictionary_encode().unify_dictionaries().combine_chunks()
        whose = whose * max(len(coded.dictionary), 1) + coded.indices.to_numpy()
    order = np.lexsort((from_us, whose))
    whose, starts_us, ends_us = whose[order], from_us[order], until_us[order]
    if (ends_us <= starts_us).any():
        raise DataError("promotions: one ends before it begins")
    if ((whose[1:] == whose[:-1]) & (starts_us[1:] < ends_us[:-1])).any():
        raise DataError("promotions: two of one kind, item and place overlap")


def _refuse_two_files(media: pa.Table) -> None:
    if media.group_by(["item_id", "kind"]).aggregate([]).num_rows < media.num_rows:
        raise DataError("media: an item has two files of one kind")


def _sorted_by_time(events: pa.Table) -> pa.Table:
    times = events["ts_us"].to_numpy()
    if times.size < 2 or np.all(times[1:] >= times[:-1]):
        return events
    return events.take(np.argsort(times, kind="stable"))


def _write_events(events: pa.Table, folder: Path) -> str:
    """Write the part files and return the digest of their bytes, in order."""
    folder.mkdir()
    digest = hashlib.sha256()
    for part in range(max(1, -(-events.num_rows // ROWS_PER_PART))):
        path = folder / f"part-{part:05d}.parquet"
        pq.write_table(events.slice(part * ROWS_PER_PART, ROWS_PER_PART), path, compression="zstd")
        with path.open("rb") as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _refuse_foreign_folder(path: Path) -> None:
    if path.is_file():
        raise DataError(f"{path}: is a file; name a folder for the dataset")
    if path.is_dir() and any(path.iterdir()) and not (path / "dataset.json").is_file():
        raise DataError(f"{path}: holds files but no dataset.json; name a new or empty folder")


def replace_folder(draft: Path, path: Path) -> None:
    """Put a finished draft, beside it on the same file system, in the place of a folder that may be there already."""
    draft.chmod(0o755)
    if path.is_dir():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
        os.replace(path, old)
        os.replace(draft, path)
        shutil.rmtree(old)
    else:
        os.replace(draft, path)


def _check_parquet(path: Path, schema: pa.Schema) -> int:
    try:
        metadata = pq.read_metadata(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare the dataset again") from error
    present = metadata.schema.to_arrow_schema().names
    if missing := [name for name in schema.names if name not in present]:
        raise DataError(f"{path}: column {missing[0]!r} is missing; present: {', '.join(present)}")
    return metadata.num_rows


def _read_parquet(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    names = list(columns) if columns is not None else schema.names
    if unknown := [name for name in names if name not in schema.names]:
        raise DataError(f"{path}: no column {unknown[0]!r}; there are: {', '.join(schema.names)}")
    try:
        with pq.ParquetFile(path) as file:
            return file.read(columns=names).select(names).cast(pa.schema([schema.field(name) for name in names]))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare the dataset again") from error
