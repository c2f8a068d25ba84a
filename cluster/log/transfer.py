"""Take events out of a log: into a dataset folder, or into another log.

In:  an open log, a range of sequence numbers, where to.  Out: a dataset, or counts of what was appended.
Knows nothing of segments: reading does not show where an event is.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from cluster.catalogue import Item
from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, Dataset, Source, write_dataset
from cluster.errors import DataError
from cluster.events import EVENT_SCHEMA, events_table
from cluster.log.records import LoggedEvent
from cluster.log.sqlite import EventLog

BATCH_EVENTS = 10_000
BATCH_ITEMS = 10_000
LABEL = "each kind of feedback as it was logged"


def read_range(log: EventLog, first_seq: int, last_seq: int | None) -> Iterator[list[LoggedEvent]]:
    """Yield the events of a range in order, some at a time; up to what is the head now where no end is given."""
    end = log.head_seq() if last_seq is None else last_seq
    after = first_seq - 1
    while after < end and (events := log.read(after, min(BATCH_EVENTS, end - after))):
        wanted = [logged for logged in events if logged.seq <= end]
        if wanted:
            yield wanted
        after = events[-1].seq


def export_events(log: EventLog, folder: Path, first_seq: int, last_seq: int | None) -> Dataset:
    """Write a range as a dataset, which trains like any other; the range is held in memory.

    An item that the log was never given has its id for text. Raises `DataError` where the range holds no event.
    """
    tables = [events_table(logged.event for logged in events) for events in read_range(log, first_seq, last_seq)]
    events = pa.concat_tables(tables) if tables else EVENT_SCHEMA.empty_table()
    if not events.num_rows:
        raise DataError(f"{log.path}: no events from {first_seq} to {last_seq or 'its head'}; try --from 1")
    users = pc.unique(events["user_id"]).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]  # made at import
    told = _attributes(log)
    return write_dataset(
        folder,
        name=folder.name,
        events=events,
        items=_items(log, events),
        users=pa.table(
            {"user_id": users, "attributes": [list(told.get(user_id, {}).items()) for user_id in users]},
            schema=USER_SCHEMA,
        ),
        label=LABEL,
        sources=[Source(name="event log", licence="the operator's own", url="")],
        rejected={},
    )


def replay_events(log: EventLog, target: EventLog, first_seq: int, last_seq: int | None) -> tuple[int, int]:
    """Append a range to another log; return how many events were new there, and how many it had before."""
    new = known = 0
    for events in read_range(log, first_seq, last_seq):
        duplicates = sum(ack.duplicate for ack in target.append([logged.event for logged in events]))
        new, known = new + len(events) - duplicates, known + duplicates
    return new, known


def _attributes(log: EventLog) -> dict[str, Mapping[str, str]]:
    """Return what the log was told of users."""
    told: dict[str, Mapping[str, str]] = {}
    user_seq = 0
    while batch := log.read_users(user_seq, BATCH_ITEMS):
        told |= {user.user_id: user.attributes for _, user in batch}
        user_seq = batch[-1][0]
    return told


def _items(log: EventLog, events: pa.Table) -> pa.Table:
    """Return the log's items and, for those it only has feedback on, their id and domain."""
    items: dict[str, Item] = {}
    item_seq = 0
    while batch := log.read_items(item_seq, BATCH_ITEMS):
        items |= {item.item_id: item for _, item in batch}
        item_seq = batch[-1][0]
    for item_id, domain in zip(events["item_id"].to_pylist(), events["domain"].to_pylist(), strict=True):
        if item_id not in items:
            items[item_id] = Item(item_id=item_id, text=item_id, domain=domain)
    columns = {name: [getattr(item, name) for item in items.values()] for name in ITEM_SCHEMA.names}
    return pa.table(columns, schema=ITEM_SCHEMA)
