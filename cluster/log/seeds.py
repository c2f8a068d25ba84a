"""The imported past: interactions from before the log's first event, in user history at seq <= 0.

In:  tables of past events, a connection inside a transaction.  Out: rows of user history and of `seeds`.
Knows nothing of threads or of where the past comes from.

    seeds          past:3f…  │ more:91…       in order of import, named KIND:SOURCE or CONTENT
    user_history   seq -2^40 … │ … │ 0        then the log's own events from 1

Each seed continues those before it, so replacing one removes it and what was imported after it; live rows stay.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import hashlib
import math
import sqlite3
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cluster.events import EVENT_SCHEMA, INTERACTION_KINDS

FIRST_SEED_SEQ = -(2**40)
"""Where imported history starts: room for a trillion interactions before the log's first event."""
CHUNK_ROWS = 50_000
CONTENT_DIGITS = 12
COLUMNS = ("user_id", "item_id", "kind", "value", "ts_us")
INSERT_ROWS = f"INSERT INTO user_history (seq, {', '.join(COLUMNS)}) VALUES (?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """Past interactions, ready to be imported."""

    kind: str
    """What they are, such as the past that a version was trained on; a log holds one seed of a kind."""
    name: str
    """The kind and what the rows hold."""
    rows: pa.Table
    """`COLUMNS` of the interactions, ordered by time."""


def build_seed(kind: str, events: pa.Table, source: str = "") -> Seed:
    """Pick the interactions among past events and name them by their source, or else by what they hold."""
    chosen = events.filter(pc.field("kind").isin(sorted(INTERACTION_KINDS))).select(COLUMNS)
    chosen = chosen.sort_by("ts_us")  # stable: simultaneous interactions keep their order
    return Seed(kind=kind, name=f"{kind}:{source or _content(chosen)}", rows=chosen)


def write_seed(connection: sqlite3.Connection, seed: Seed) -> int:
    """Import a seed in place of another one of its kind; return how many rows were written, 0 where it is there."""
    found = _find(connection, seed.kind)
    if found is not None:
        place, name, first_seq, _ = found
        if name == seed.name:
            return 0
        connection.execute("DELETE FROM user_history WHERE seq BETWEEN ? AND 0", (first_seq,))
        connection.execute("DELETE FROM seeds WHERE rowid >= ?", (place,))
    first_seq = connection.execute(
        "SELECT coalesce(max(first_seq + rows), ?) FROM seeds", (FIRST_SEED_SEQ,)
    ).fetchone()[0]
    seq = first_seq
    for batch in seed.rows.to_batches(max_chunksize=CHUNK_ROWS):
        columns = (column.to_pylist() for column in batch.columns)
        connection.executemany(INSERT_ROWS, zip(range(seq, seq + batch.num_rows), *columns, strict=True))
        seq += batch.num_rows
    connection.execute("INSERT INTO seeds VALUES (?, ?, ?)", (seed.name, first_seq, seed.rows.num_rows))
    return seed.rows.num_rows


def is_seeded(connection: sqlite3.Connection, kind: str, source: str) -> bool:
    """Whether the seed of a kind is there and comes from this source."""
    found = _find(connection, kind)
    return found is not None and found[1] == f"{kind}:{source}"


def count_seeded(connection: sqlite3.Connection, kind: str) -> int:
    """Return how many interactions the seed of a kind holds; 0 where there is none."""
    found = _find(connection, kind)
    return found[3] if found else 0


def _find(connection: sqlite3.Connection, kind: str) -> tuple[int, str, int, int] | None:
    """Return the place, name, first sequence number and rows of the seed of a kind."""
    seeds = connection.execute("SELECT rowid, name, first_seq, rows FROM seeds ORDER BY rowid").fetchall()
    return next((seed for seed in seeds if seed[1].partition(":")[0] == kind), None)


def _content(rows: pa.Table) -> str:
    plain = rows.cast(pa.schema([pa.field(name, EVENT_SCHEMA.field(name).type) for name in COLUMNS]))
    without_nulls = plain.set_column(3, "value", pc.fill_null(plain["value"], math.nan))
    digest = hashlib.sha256()
    for batch in without_nulls.combine_chunks().to_batches(max_chunksize=CHUNK_ROWS):
        digest.update(batch.serialize())
    return digest.hexdigest()[:CONTENT_DIGITS]
