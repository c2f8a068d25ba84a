"""The tables of the embedded log, and connections to them.

In:  the file's path.  Out: SQLite connections with the pragmas that make a commit durable.
Knows nothing of events as objects, of threads or of group commit.

WAL with `synchronous=FULL` syncs the log file on every commit; `NORMAL` would lose acked events to a power loss.
"""

import fcntl
import sqlite3
from pathlib import Path

from cluster.errors import EngineError

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 30.0
"""How long to wait for another process's transaction."""

TABLES = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, event_id TEXT NOT NULL UNIQUE, acked_us INTEGER NOT NULL,
    ts_us INTEGER NOT NULL, domain TEXT NOT NULL, user_id TEXT NOT NULL, item_id TEXT NOT NULL, kind TEXT NOT NULL,
    value REAL, request_id TEXT, position INTEGER, propensity REAL, version TEXT, context TEXT
);
CREATE INDEX events_of_user ON events (user_id);
CREATE TABLE user_history (
    user_id TEXT NOT NULL, seq INTEGER NOT NULL,
    item_id TEXT NOT NULL, kind TEXT NOT NULL, value REAL, ts_us INTEGER NOT NULL,
    PRIMARY KEY (user_id, seq)
) WITHOUT ROWID;
CREATE TABLE seeds (name TEXT PRIMARY KEY, first_seq INTEGER NOT NULL, rows INTEGER NOT NULL);
CREATE TABLE offsets (consumer TEXT PRIMARY KEY, seq INTEGER NOT NULL);
CREATE TABLE items (
    item_seq INTEGER PRIMARY KEY, item_id TEXT NOT NULL UNIQUE, domain TEXT NOT NULL, text TEXT NOT NULL,
    categories TEXT NOT NULL, available_from_us INTEGER, available_until_us INTEGER
);
"""


def connect(path: Path, *, cache_bytes: int) -> sqlite3.Connection:
    """Open the log's file, which `create` has made; transactions are the caller's to begin."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA cache_size = {-(cache_bytes // 1024)}")
    return connection


def create(path: Path) -> None:
    """Make the file and its tables where there are none; raises `EngineError` for a file that is something else.

    Switching to WAL does not wait for other connections, so first openers take turns on a lock file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            elif found != SCHEMA_VERSION:
                raise EngineError(f"{path}: schema {found}, this build reads {SCHEMA_VERSION}; use a new log file")
        finally:
            connection.close()
