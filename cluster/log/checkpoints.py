"""Copy the write-ahead log into the database beside the commits, which else do so and are slow every so often.

In:  the database's path, how many rows its writer has changed.  Out: a write-ahead log that starts again in time.
Knows nothing of tables.

What was committed meanwhile is copied too, and at last the little that is left, with the writer kept out: only with
nothing left to copy does SQLite write from the file's start again. The more seldom, the fewer commits wait for it, and
the more changes of a page are copied at once. Where that does not happen in time, the commit that passes
`MOST_WAL_PAGES` copies all there is, so that opening a log that was left by a crash has no more than that to read.
"""

import logging
import sqlite3
import threading
from pathlib import Path

from cluster.log import schema

ROWS_BETWEEN = 8_000
"""Changed rows after which it is time again; each takes about a page of the write-ahead log."""
MOST_WAL_PAGES = 16_384
PATIENCE_MS = 20
"""How long to wait for the writer to be between two transactions."""
CACHE_BYTES = 1 << 20

logger = logging.getLogger(__name__)


class Checkpointer:
    """Copies when it is time, on a thread that starts when it is first needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next_rows = ROWS_BETWEEN
        self._wanted = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def note(self, rows: int) -> None:
        """Say how many rows are changed by now; called by the writer's thread alone."""
        if rows < self._next_rows:
            return
        self._next_rows = rows + ROWS_BETWEEN
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()
        self._wanted.set()

    def close(self) -> None:
        """End the thread; called once the writer has ended."""
        self._closing = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._wanted.wait() and not self._closing:
            self._wanted.clear()
            try:
                self._copy()
            except sqlite3.Error:
                logger.exception("%s: could not copy the write-ahead log; commits will", self._path)

    def _copy(self) -> None:
        connection = schema.connect(self._path, cache_bytes=CACHE_BYTES)
        try:
            connection.execute(f"PRAGMA busy_timeout = {PATIENCE_MS}")
            for mode in ("PASSIVE", "PASSIVE", "FULL"):
                connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        finally:
            connection.close()
