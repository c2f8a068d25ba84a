"""`recloop examples`: a dataset of any size becomes pointwise training rows, by Ray Data on however many machines.

In:  a dataset folder.  Out: an examples folder (`cluster/examples.py`), rows in time order, ids numbered in `ids/`.
Knows nothing of models. Both folders must be on storage that all machines share; no process ever holds all events.

    events ─▶ count ids ─▶ by digest: merge ─▶ sort by count ─▶ ids/user.parquet, ids/item.parquet
       └────▶ rows of numbers, and each user's ─▶ by user: build_examples ─▶ by time: expand ─▶ part-*.parquet

Grouping is by bucket of the user and by part of the file, and each group is put in order before it is used: the same
dataset gives the same bytes, however many blocks, tasks and machines there were.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import argparse
import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.config import EngineConfig, load_recipe
from cluster.dataset import Dataset, load_dataset, replace_folder
from cluster.errors import ConfigError, DataError, EngineError, RecloopError
from cluster.events import KIND_INDEX, KINDS
from cluster.examples import ID_KINDS, INFO_FILE, SCHEMA_VERSION, ExamplesInfo, load_examples, write_info
from cluster.progress import progress
from cluster.ray_session import ray_session
from training.prepare.external_ids import (
    COUNTED_COLUMNS,
    RowGroup,
    count_ids,
    digests,
    encode,
    list_row_groups,
    read_row_group,
)
from training.prepare.numbering import ID_SCHEMA, ITEM_FOLDER, ROW_GROUP_ROWS, USER_FILE, Numbered, number_ids
from training.prepare.sessions import (
    LISTED,
    LISTED_POSITION,
    NO_REQUEST,
    ROLE_OF_KIND,
    ROW_SCHEMA,
    ItemTable,
    build_examples,
    count_rows,
    expand,
)

if TYPE_CHECKING:
    import ray.data

MAX_PARTITIONS = 1_000
"""Of one shuffle, which has an object for each task and partition."""
EVENT_COLUMNS = ("user_id", "item_id", "kind", "request_id", "ts_us")

OUT_SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("history", pa.list_(pa.int64())),
        ("label", pa.int8()),
        ("ts_us", pa.int64()),
    ]
)
SUMMARY_SCHEMA = pa.schema(
    [(name, pa.int64()) for name in ("part", "rows", "positives", "history_items", "first_ts_us", "last_ts_us")]
    + [("in_order", pa.bool_())]
)

BLOCK_BYTES = 32 * 2**20
SHUFFLE_BATCH_BYTES = 64 * 2**20
"""What one shuffle task takes in: Ray's default of 1 GiB would not fit a private session's object store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamplesConfig:
    """What the examples are to be."""

    history: int = 20
    """Items a history holds at most."""
    negatives: int = 4
    """Items drawn against each positive, where the dataset tells no impressions."""
    ids: str = "rows"
    """`rows`: numbered from 0 by descending count; `any`: the digests of external ids."""
    seed: int = 0
    """Of the items drawn."""
    part_rows: int = 8 * ROW_GROUP_ROWS
    """Rows a file holds at most: what one task has in memory while it writes."""
    bucket_events: int = 250_000
    """Events that one task sessionises, about; the result does not depend on it."""

    def __post_init__(self) -> None:
        for name, least in (("history", 1), ("negatives", 0), ("seed", 0), ("bucket_events", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.part_rows < 1 + self.negatives:
            raise ConfigError(f"part_rows={self.part_rows}: must hold a positive and its {self.negatives} negatives")
        if self.ids not in ID_KINDS:
            raise ConfigError(f"ids={self.ids!r}: is none of {', '.join(ID_KINDS)}")


def run(args: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Make an examples folder of a dataset: the `recloop examples` command."""
    config = ExamplesConfig(history=args.history, negatives=args.negatives, ids=args.ids, seed=args.seed)
    engine = load_recipe(args.recipe, args.overrides).section(EngineConfig)
    dataset, out = load_dataset(args.data or args.home.default_dataset), Path(args.out)
    _refuse_foreign_folder(out)
    with ray_session(engine.ray_address, logical_cpus=engine.logical_cpus, verbose=args.verbose):
        info = prepare_examples(dataset, out, config, verbose=args.verbose)
    counts = {"rows": info.rows, "users": info.users, "items": info.items}
    return {"examples": str(out), "ids": info.ids, **counts, **info.facts}


def prepare_examples(
    dataset: Dataset, out: Path, config: ExamplesConfig | None = None, *, verbose: bool = False
) -> ExamplesInfo:
    """Write the examples of a dataset within an open Ray session, whole or not at all, replacing those at `out`.

    Raises `DataError` naming the file that cannot be read, for events that are not in time order, for two ids of one
    digest and where there is nothing to learn from; `EngineError` when Ray fails.
    """
    config, out = config or ExamplesConfig(), out.expanduser().resolve()
    _refuse_foreign_folder(out)
    events = list_row_groups(sorted((dataset.path.resolve() / "events").glob("*.parquet")))
    if not dataset.info.events:
        raise DataError(f"{dataset.path}: holds no events")
    buckets = min(-(-dataset.info.events // config.bucket_events), MAX_PARTITIONS)
    with _draft_folder(out) as draft, _ray_data(verbose=verbose):
        numbered = number_ids(_read(events, partial(_count, buckets=buckets)), draft, config.ids, buckets)
        negatives = 0 if numbered.impressions else config.negatives
        if negatives and numbered.items < 2:
            raise DataError(f"{dataset.path}: has one item only, no other can be drawn; try --negatives 0")
        rows = _read(events, partial(_event_rows, items=draft / ITEM_FOLDER, buckets=buckets))
        if config.ids == "rows":
            users = list_row_groups([draft / USER_FILE])
            rows = rows.union(_read(users, partial(_user_rows, buckets=buckets)))
        part_events = config.part_rows // (1 + negatives)
        parts = -(-dataset.info.events // part_events)
        sessionise = partial(build_examples, history=config.history, part_events=part_events, seed=config.seed)
        sessions = rows.groupby("bucket", num_partitions=buckets).map_groups(sessionise, batch_format="pyarrow")
        write = partial(_write_part, draft=draft, negatives=negatives)
        by_part = sessions.groupby("part", num_partitions=min(parts, MAX_PARTITIONS))
        written = by_part.map_groups(write, batch_format="pyarrow")
        info = _describe(dataset, config, numbered, _collect(written, parts))
        shutil.rmtree(draft / ITEM_FOLDER)
        write_info(draft, info)
        load_examples(str(draft))  # or it says why
        replace_folder(draft, out)
    return info


def _read(row_groups: list[RowGroup], read: Callable[[pa.Table], Iterator[pa.Table]]) -> "ray.data.Dataset":
    """Read row groups, one a task."""
    import ray.data

    listed = ray.data.from_items(row_groups, override_num_blocks=len(row_groups))
    return listed.map_batches(read, batch_size=1, batch_format="pyarrow")


def _count(row_groups: pa.Table, *, buckets: int) -> Iterator[pa.Table]:
    for path, group, _ in _each(row_groups):
        for events in read_row_group(path, group, COUNTED_COLUMNS):
            yield count_ids(events, buckets)


def _event_rows(row_groups: pa.Table, *, items: Path, buckets: int) -> Iterator[pa.Table]:
    item_table = ItemTable.open(items)
    for path, group, position in _each(row_groups):
        for events in read_row_group(path, group, EVENT_COLUMNS):
            users, user_place = encode(events["user_id"])
            item_ids, item_place = encode(events["item_id"])
            requests, request_place = encode(events["request_id"])
            kinds, kind_place = encode(events["kind"])
            if unknown := [kind for kind in kinds if kind not in KIND_INDEX]:
                raise DataError(f"{path}: kind {unknown[0]!r} is none of {', '.join(KINDS)}")
            user = digests(users)[user_place]
            columns = {
                "bucket": (user % buckets).astype(np.int32),
                "user": user,
                "position": np.arange(position, position + events.num_rows),
                "item": item_table.rows(digests(item_ids))[item_place],
                "role": ROLE_OF_KIND[[KIND_INDEX[kind] for kind in kinds]][kind_place],
                "request": np.r_[digests(requests), NO_REQUEST][request_place],
                "value": events["ts_us"].to_numpy(),
            }
            yield pa.table(columns, schema=ROW_SCHEMA)
            position += events.num_rows


def _user_rows(row_groups: pa.Table, *, buckets: int) -> Iterator[pa.Table]:
    for path, group, _ in _each(row_groups):
        for numbered in read_row_group(path, group, ID_SCHEMA.names):
            user = digests(numbered["external_id"].to_pylist())
            columns = {
                "bucket": (user % buckets).astype(np.int32),
                "user": user,
                "position": np.full(len(user), LISTED_POSITION),
                "item": np.zeros(len(user), dtype=np.int32),
                "role": np.full(len(user), LISTED, dtype=np.int8),
                "request": np.full(len(user), NO_REQUEST),
                "value": numbered["id"].to_numpy(),
            }
            yield pa.table(columns, schema=ROW_SCHEMA)


def _each(row_groups: pa.Table) -> Iterator[tuple[str, int, int]]:
    for entry in row_groups.to_pylist():
        yield entry["path"], entry["group"], entry["first"]


def _write_part(examples: pa.Table, *, draft: Path, negatives: int) -> pa.Table:
    """Write one part file in order of position; return one row of `SUMMARY_SCHEMA`."""
    if not examples.num_rows:
        return SUMMARY_SCHEMA.empty_table()
    examples = examples.take(np.argsort(examples["position"].to_numpy())).combine_chunks()
    times, part = examples["ts_us"].to_numpy(), examples["part"][0].as_py()
    items, rows = ItemTable.open(draft / ITEM_FOLDER), int(count_rows(examples, negatives)[-1])
    lengths = pc.list_value_length(examples["history"]).to_numpy()
    positive = examples["label"].to_numpy() == 1
    path = draft / f"part-{part:05d}.parquet"
    unfinished = path.with_suffix(".unfinished")  # a task that Ray starts anew begins anew
    with pq.ParquetWriter(unfinished, OUT_SCHEMA, compression="lz4") as writer:
        for first in range(0, rows, ROW_GROUP_ROWS):
            last = min(first + ROW_GROUP_ROWS, rows)
            writer.write_table(
                expand(examples, first, last, items, negatives=negatives).cast(OUT_SCHEMA), ROW_GROUP_ROWS
            )
    unfinished.replace(path)
    summary = {
        "part": part,
        "rows": rows,
        "positives": int(positive.sum()),
        "history_items": int((lengths * np.where(positive, 1 + negatives, 1)).sum()),
        "first_ts_us": times[0],
        "last_ts_us": times[-1],
        "in_order": bool(np.all(times[1:] >= times[:-1])),
    }
    return pa.Table.from_pylist([summary], schema=SUMMARY_SCHEMA)


def _collect(written: "ray.data.Dataset", parts: int) -> list[dict[str, int]]:
    """Wait for all parts; return their summaries in order."""
    summaries = []
    with progress(parts, "writing examples", unit="part") as bar:
        for row in written.iter_rows():
            summaries.append(row)
            bar.update()
    return sorted(summaries, key=lambda summary: summary["part"])


def _describe(
    dataset: Dataset, config: ExamplesConfig, numbered: Numbered, parts: list[dict[str, int]]
) -> ExamplesInfo:
    """Add the parts up. Raises `DataError` where there are none, or where time ran backwards."""
    if not parts:
        raise DataError(f"{dataset.path}: no event makes an example")
    late = [one for one, other in pairwise(parts) if one["last_ts_us"] > other["first_ts_us"]]
    if late or not all(part["in_order"] for part in parts):
        raise DataError(f"{dataset.path / 'events'}: is not in order of ts_us; prepare the dataset again")
    rows, positives, history = (sum(part[name] for part in parts) for name in ("rows", "positives", "history_items"))
    rows_named = config.ids == "rows"
    return ExamplesInfo(
        schema_version=SCHEMA_VERSION,
        name=dataset.info.name,
        rows=rows,
        ids=config.ids,
        users=numbered.users if rows_named else None,
        items=numbered.items if rows_named else None,
        facts={
            "positives": positives,
            "negatives": rows - positives,
            "mean_history": round(history / rows, 4),
            "distinct_users": numbered.users,
            "distinct_items": numbered.items,
            "seed": config.seed,
            "dataset_fingerprint": dataset.fingerprint(),
        },
    )


@contextlib.contextmanager
def _ray_data(*, verbose: bool) -> Iterator[None]:
    """Set Ray Data up: quiet, in blocks that a small object store can hold, with errors as they were raised."""
    import ray.data
    from ray.exceptions import RayError, RayTaskError

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    context.raise_original_map_exception = True
    context.target_max_block_size = BLOCK_BYTES
    context.shuffle_input_batch_bytes = SHUFFLE_BATCH_BYTES
    context.execution_options.preserve_order = True  # the vocabularies are read in the order of the sort
    logger = logging.getLogger("ray.data")
    before = logger.level
    logger.setLevel(logging.INFO if verbose else logging.CRITICAL)
    try:
        with ray.data.DataContext.current(context):
            yield
    except RayTaskError as error:
        if isinstance(error.cause, RecloopError):
            raise error.cause from None
        raise EngineError(f"Ray Data failed: {error.cause}") from error
    except RayError as error:
        raise EngineError(f"Ray Data failed: {error}") from error
    finally:
        logger.setLevel(before)


def _refuse_foreign_folder(out: Path) -> None:
    if out.is_file():
        raise DataError(f"{out}: is a file; name a folder for the examples")
    if out.is_dir() and any(out.iterdir()) and not (out / INFO_FILE).is_file():
        raise DataError(f"{out}: holds files but no {INFO_FILE}; name a new or empty folder")


@contextlib.contextmanager
def _draft_folder(out: Path) -> Iterator[Path]:
    """Make a folder beside `out` for the block; what of it is still there afterwards goes."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); name another folder") from error
    try:
        yield draft
    finally:
        if draft.exists():  # renamed first: a task that is still running can then put no further file into it
            shutil.rmtree(draft.rename(f"{draft}-dropped"), ignore_errors=True)
