"""The tables of the embedded log, and connections to them.

In:  the file's path.  Out: SQLite connections with the pragmas that make a commit durable; who has the file open.
Knows nothing of events as objects, of threads or of group commit.

WAL with `synchronous=FULL` syncs the log file on every commit; `NORMAL` would lose acked events to a power loss.

    events        the newest events, those that are not sealed
    segments      the files that hold the older ones
    sealed_ids    the hash of each sealed event's id, so that a duplicate is still known
    sealed_users  each user's newest sealed event
    absences      ranges that the log no longer holds: dropped by retention, or lost to damage

A user's newest event is found by `others_of_user` or in user history, which has the interactions: each event dirties
one page by its user, and no more than one by its id.
"""

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cluster.errors import EngineError
from cluster.events import INTERACTION_KINDS
from cluster.log.swap import finish_swap
from cluster.log.wal import describe_damage

SCHEMA_VERSION = 4
BUSY_TIMEOUT_S = 30.0
"""How long to wait for another process's transaction."""

CHOSEN = ", ".join(f"'{kind}'" for kind in sorted(INTERACTION_KINDS))
OTHERS_OF_USER = f"CREATE INDEX others_of_user ON events (user_id) WHERE kind NOT IN ({CHOSEN});"
LIVE_TABLES = f"""
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, event_id TEXT NOT NULL UNIQUE, acked_us INTEGER NOT NULL,
    ts_us INTEGER NOT NULL, domain TEXT NOT NULL, user_id TEXT NOT NULL, item_id TEXT NOT NULL, kind TEXT NOT NULL,
    value REAL, request_id TEXT, position INTEGER, propensity REAL, version TEXT, context TEXT
);
{OTHERS_OF_USER}
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
SEALED_TABLES = """
CREATE TABLE segments (
    first_seq INTEGER PRIMARY KEY, last_seq INTEGER NOT NULL UNIQUE, rows INTEGER NOT NULL, sha256 TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, last_acked_us INTEGER NOT NULL
);
CREATE TABLE sealed_ids (id_hash BLOB PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE sealed_users (user_id TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE absences (first_seq INTEGER PRIMARY KEY, last_seq INTEGER NOT NULL, reason TEXT NOT NULL);
"""
USERS_TABLE = """
CREATE TABLE users (user_seq INTEGER PRIMARY KEY, user_id TEXT NOT NULL UNIQUE, attributes TEXT NOT NULL);
"""
REPLACE_INDEX = f"DROP INDEX events_of_user; {OTHERS_OF_USER}"
UPGRADES = {
    0: LIVE_TABLES + SEALED_TABLES + USERS_TABLE,
    1: SEALED_TABLES + REPLACE_INDEX + USERS_TABLE,
    2: REPLACE_INDEX + USERS_TABLE,
    3: USERS_TABLE,
}
"""What each older schema lacks; 0 is a file that is not there yet."""


def connect(path: Path, *, cache_bytes: int) -> sqlite3.Connection:
    """Open the log's file, which `create` has made; transactions are the caller's to begin."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA cache_size = {-(cache_bytes // 1024)}")
    return connection


def create(path: Path) -> None:
    """Make the file and its tables where there are none; raises `EngineError` for a file that is something else."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found in UPGRADES:
            connection.execute("PRAGMA journal_mode = WAL")
            tables = UPGRADES[found]
            connection.executescript(f"BEGIN IMMEDIATE; {tables} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif found != SCHEMA_VERSION:
            raise EngineError(f"{path}: schema {found}, this build reads {SCHEMA_VERSION}; use a new log file")
    finally:
        connection.close()


def enter(path: Path) -> BinaryIO:
    """Make the log usable and return a handle; while it is open, nobody may repair the log.

    The first to enter finishes a repair that was cut short, and raises `EngineError` where opening the file would
    lose acked events: SQLite ignores all that follows a damaged part of the write-ahead log, then writes over it.
    """
    with _turns(path):
        use = _use_file(path)
        try:
            if _try_lock(use):
                finish_swap(path)
                if damage := describe_damage(path):
                    raise EngineError(f"{damage}; `recloop events verify --repair` saves what can be read")
            create(path)
            fcntl.flock(use, fcntl.LOCK_SH)
        except BaseException:
            use.close()
            raise
        return use


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep everyone else out meanwhile; raises `EngineError` where the log is in use."""
    with _turns(path), _use_file(path) as use:
        if not _try_lock(use):
            raise EngineError(f"{path}: is in use by another process; stop the server, then try again")
        finish_swap(path)
        yield


@contextmanager
def _turns(path: Path) -> Iterator[None]:
    """Let one process at a time in; switching to WAL does not wait for other connections."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _use_file(path: Path) -> BinaryIO:
    return path.with_name(f"{path.name}.use").open("ab")


def _try_lock(stream: BinaryIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
