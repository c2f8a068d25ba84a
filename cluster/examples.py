"""The examples folder: pointwise training rows in Parquet, of any number, local or in an object store.

    URI/examples.json      what it is: rows, and whether ids are table rows already
        part-*.parquet     user_id, item_id int · history list<int> · label 0…1 · ts_us int (optional)
        heldout.parquet    the same columns, never trained on (optional)
        ids/               external id of each number, as `recloop examples` made them (optional)

In:  a folder or an object-store URI that `pyarrow.fs` opens.  Out: `Examples`: its files, their row groups, its marks.
Reads footers only: opening 10⁹ rows takes as long as opening a hundred files.
Knows nothing of the order in which rows are trained on, or of what a row group holds.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cluster.errors import DataError

INFO_FILE = "examples.json"
HELDOUT_FILE = "heldout.parquet"
SCHEMA_VERSION = 1
ID_KINDS = ("rows", "any")
COLUMNS = ("user_id", "item_id", "history", "label")
"""What every part must have; further columns are left alone."""
_FOOTER_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamplesInfo:
    """What `examples.json` says."""

    schema_version: int
    name: str
    rows: int
    ids: str
    """`rows`: ids are table rows from 0; `any`: ids are any whole numbers from 0 below 2⁶³."""
    users: int | None = None
    """Rows that the user table needs, where ids are rows."""
    items: int | None = None
    facts: Mapping[str, float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version={self.schema_version}: this recloop reads {SCHEMA_VERSION}")
        if self.ids not in ID_KINDS:
            raise ValueError(f"ids={self.ids!r}: is none of {', '.join(ID_KINDS)}")
        if self.ids == "rows" and not (self.users and self.items):
            raise ValueError('ids="rows" needs "users" and "items", the numbers of table rows')


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One Parquet file."""

    path: str
    """Within the file system."""
    group_rows: tuple[int, ...]
    """Rows of each row group."""
    mark: str
    """Digest of the file's size, time of change and shape: one that was written anew (or copied) has another."""


@dataclass(frozen=True)
class Examples:
    """An examples folder, opened."""

    uri: str
    info: ExamplesInfo
    filesystem: pafs.FileSystem
    parts: tuple[Part, ...]
    heldout: Part | None

    @cached_property
    def marks(self) -> dict[str, str]:
        """File name to mark, for the training rows: what a checkpoint remembers of its data."""
        return {part.path.rsplit("/", 1)[-1]: part.mark for part in self.parts}


def write_info(folder: Path, info: ExamplesInfo) -> None:
    """Write `examples.json`, which makes a folder of parts an examples folder."""
    (folder / INFO_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")


def is_examples(uri: str) -> bool:
    """Return whether an examples folder is there."""
    filesystem, root = open_filesystem(uri)
    return filesystem.get_file_info(f"{root}/{INFO_FILE}").type == pafs.FileType.File


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a folder or URI and the path within it. Raises `DataError` for one it cannot open."""
    try:
        if "://" in uri:
            filesystem, root = pafs.FileSystem.from_uri(uri)
        else:
            filesystem, root = pafs.LocalFileSystem(), str(Path(uri).resolve())
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{uri}: cannot be opened ({error})") from error
    return filesystem, root.rstrip("/")


def load_examples(uri: str) -> Examples:
    """Open an examples folder. Raises `DataError` naming the file that is missing, torn or of another schema."""
    filesystem, root = open_filesystem(uri)
    info = _read_info(filesystem, f"{root}/{INFO_FILE}")
    try:
        listed = filesystem.get_file_info(pafs.FileSelector(root))
    except OSError as error:
        raise DataError(f"{uri}: cannot be listed ({error})") from error
    files = {entry.path: entry for entry in listed if entry.base_name.endswith(".parquet")}
    heldout = f"{root}/{HELDOUT_FILE}"
    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footer") as pool:
        read = dict(zip(files, pool.map(lambda entry: _read_part(filesystem, entry), files.values()), strict=True))
    parts = tuple(read[path] for path in sorted(read) if path != heldout)
    if not parts:
        raise DataError(f"{uri}: holds no part-*.parquet")
    rows = sum(sum(part.group_rows) for part in parts)
    if rows != info.rows:
        raise DataError(f"{uri}: {INFO_FILE} states {info.rows:,} rows, the files hold {rows:,}; a part is missing")
    if not rows:
        raise DataError(f"{uri}: holds no rows to train on")
    return Examples(uri, info, filesystem, parts, read.get(heldout))


def open_part(filesystem: pafs.FileSystem, path: str) -> pq.ParquetFile:
    """Open a part for reading row groups. Raises `DataError` naming the file."""
    try:
        return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=False)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error


def _read_info(filesystem: pafs.FileSystem, path: str) -> ExamplesInfo:
    try:
        with filesystem.open_input_stream(path) as stream:
            return ExamplesInfo(**json.loads(stream.read()))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); `recloop examples` makes an examples folder") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}") from error


def _read_part(filesystem: pafs.FileSystem, entry: pafs.FileInfo) -> Part:
    path = entry.path
    with open_part(filesystem, path) as file:
        _check_schema(path, file.schema_arrow)
        footer = file.metadata
        groups = tuple(footer.row_group(index).num_rows for index in range(footer.num_row_groups))
        marked = (entry.size, entry.mtime_ns, groups, footer.serialized_size, str(file.schema_arrow))
        mark = hashlib.sha256(repr(marked).encode()).hexdigest()[:16]
        return Part(path=path, group_rows=groups, mark=mark)


def _check_schema(path: str, schema: pa.Schema) -> None:
    for name in COLUMNS:
        if name not in schema.names:
            raise DataError(f"{path}: column {name!r} is missing; present: {', '.join(schema.names)}")
    history = schema.field("history").type
    wanted = {
        "user_id": (schema.field("user_id").type, pa.types.is_integer, "a whole number"),
        "item_id": (schema.field("item_id").type, pa.types.is_integer, "a whole number"),
        "history": (
            history,
            lambda kind: (
                (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)
            ),
            "a list of whole numbers",
        ),
        "label": (
            schema.field("label").type,
            lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind),
            "a number",
        ),
    }
    for name, (kind, is_right, described) in wanted.items():
        if not is_right(kind):
            raise DataError(f"{path}: column {name!r} is {kind}, must be {described}")
