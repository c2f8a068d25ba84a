"""Sealed segments: immutable Parquet files that hold the log's older events.

In:  events in order, or a segment and a place in it.  Out: a file with its description, or events.
Knows nothing of SQLite, of when to seal, or of consumers.

    segments/FIRST-LAST.parquet   SEGMENT_SCHEMA, ordered by seq, zstd, each page with its checksum
             FIRST-LAST.json      first and last seq, rows, sha256 and bytes of the file beside it

A description is written after its file, so a file without one is not finished.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import EngineError
from cluster.events import EVENT_SCHEMA, Event
from cluster.log.records import EVENT_COLUMNS, LoggedEvent
from cluster.log.swap import sync

SEGMENT_SCHEMA = pa.schema(
    [pa.field("seq", pa.int64(), nullable=False), pa.field("acked_us", pa.int64(), nullable=False), *EVENT_SCHEMA]
)
GROUP_ROWS = 8_192
"""Events that are read, and at worst lost to damage, together."""
CACHED_GROUPS = 4
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What a segment's description says."""

    first_seq: int
    last_seq: int
    rows: int
    sha256: str
    size_bytes: int
    last_acked_us: int

    @property
    def file_name(self) -> str:
        """The Parquet file's name."""
        return f"{self.first_seq:020d}-{self.last_seq:020d}.parquet"


def segments_folder(log_path: Path) -> Path:
    """Return the folder of a log's segments."""
    return log_path.with_name("segments" if log_path.stem == "events" else f"{log_path.stem}-segments")


def write_segment(folder: Path, events: Sequence[LoggedEvent]) -> Segment:
    """Write events durably as one segment, replacing what an earlier attempt left."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{events[0].seq:020d}-{events[-1].seq:020d}"
    draft, path = folder / f".{name}.draft", folder / f"{name}.parquet"
    pq.write_table(
        segment_table(events), draft, compression="zstd", row_group_size=GROUP_ROWS, write_page_checksum=True
    )
    sync(draft)
    segment = Segment(
        first_seq=events[0].seq,
        last_seq=events[-1].seq,
        rows=len(events),
        sha256=hash_file(draft),
        size_bytes=draft.stat().st_size,
        last_acked_us=max(logged.acked_us for logged in events),
    )
    draft.replace(path)
    draft.write_text(json.dumps(asdict(segment), indent=2) + "\n", encoding="utf-8")
    sync(draft)
    draft.replace(path.with_suffix(".json"))
    sync(folder)
    sync(folder.parent)
    return segment


def segment_table(events: Sequence[LoggedEvent]) -> pa.Table:
    """Return events as an Arrow table of `SEGMENT_SCHEMA`; raises `EngineError` for one that does not fit it."""
    columns: dict[str, list[Any]] = {"seq": [e.seq for e in events], "acked_us": [e.acked_us for e in events]}
    for name in EVENT_COLUMNS:
        columns[name] = [getattr(logged.event, name) for logged in events]
    columns["context"] = [list(context.items()) for context in columns["context"]]
    try:
        return pa.table(columns, schema=SEGMENT_SCHEMA)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        place = f"events {events[0].seq} to {events[-1].seq}"
        raise EngineError(f"{place}: do not fit the event schema ({error}); they stay unsealed") from error


def delete_segment(folder: Path, file_name: str) -> None:
    """Remove a segment's files, the description first."""
    path = folder / file_name
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """Return the content's checksum in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def name_range(path: Path) -> tuple[int, int] | None:
    """Return the range that a segment file's name states; none for another file."""
    first, dash, last = path.stem.partition("-")
    return (int(first), int(last)) if dash and first.isdecimal() and last.isdecimal() else None


def events_of(table: pa.Table) -> list[LoggedEvent]:
    """Read the rows of `SEGMENT_SCHEMA`."""
    events = []
    for row in table.to_pylist():
        seq, acked_us, context = row.pop("seq"), row.pop("acked_us"), dict(row.pop("context") or ())
        events.append(LoggedEvent(seq, Event(**row, context=context), acked_us))
    return events


class SegmentReader:
    """Reads from segments, keeping the parts that were read last; may be shared by threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._bounds: dict[str, list[tuple[int, int]]] = {}
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def read(self, segment: Segment, after_seq: int, max_events: int) -> list[LoggedEvent]:
        """Return a segment's next events after a sequence number. Raises `FileNotFoundError` where it was dropped."""
        events: list[LoggedEvent] = []
        try:
            with self._lock:
                for place, (_, last) in enumerate(self._find_bounds(segment)):
                    if last > after_seq and len(events) < max_events:
                        table = self._group(segment, place)
                        seqs = table["seq"].to_numpy()
                        start = int(seqs.searchsorted(after_seq, side="right"))
                        events += events_of(table.slice(start, max_events - len(events)))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise EngineError(
                f"{self.folder / segment.file_name}: events {segment.first_seq} to {segment.last_seq} cannot be read "
                f"({error}); `recloop events verify --repair` saves what can be"
            ) from error
        return events

    def read_table(self, segment: Segment, columns: Sequence[str]) -> pa.Table:
        """Return columns of a whole segment."""
        with pq.ParquetFile(self.folder / segment.file_name, page_checksum_verification=True) as file:
            return file.read(columns=list(columns))

    def _find_bounds(self, segment: Segment) -> list[tuple[int, int]]:
        if segment.file_name not in self._bounds:
            metadata = pq.read_metadata(self.folder / segment.file_name)
            statistics = [metadata.row_group(place).column(0).statistics for place in range(metadata.num_row_groups)]
            self._bounds[segment.file_name] = [(entry.min, entry.max) for entry in statistics]
        return self._bounds[segment.file_name]

    def _group(self, segment: Segment, place: int) -> pa.Table:
        key = (segment.file_name, place)
        if key not in self._groups:
            with pq.ParquetFile(self.folder / segment.file_name, page_checksum_verification=True) as file:
                self._groups[key] = file.read_row_group(place)
            while len(self._groups) > CACHED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]
