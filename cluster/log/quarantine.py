"""Events that were acknowledged and are not learned from: why, and what became of them since.

In:  sequence numbers with reasons; later, who is released or dropped.  Out: what is held, what waits to be learned.
Knows nothing of who judges or learns. A file of its own beside the log: the events themselves stay in the log.

    held ──release──▶ released ──learned──▶ learned
      └────drop─────▶ dropped
"""

import json
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import EngineError

STATES = ("held", "released", "learned", "dropped")
TABLE = """
CREATE TABLE IF NOT EXISTS quarantine (
    seq INTEGER PRIMARY KEY, user_id TEXT NOT NULL, item_id TEXT NOT NULL, kind TEXT NOT NULL, score REAL NOT NULL,
    reasons TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'held'
)
"""
COLUMNS = "seq, user_id, item_id, kind, score, reasons, state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """One event."""

    seq: int
    user_id: str
    item_id: str
    kind: str
    score: float
    reasons: tuple[str, ...]
    state: str = "held"


class Quarantine:
    """The quarantine of one log; every method may be called from any thread and process."""

    def __init__(self, log_path: Path) -> None:
        """Open or make it. Raises `EngineError` where the file is something else."""
        self.path = log_path.with_name(f"{log_path.name}.quarantine")
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute(TABLE)
        except sqlite3.Error as error:
            raise EngineError(f"{self.path}: {error}") from error

    def add(self, events: Iterable[Quarantined]) -> None:
        """Hold events; those that are known stay as they are."""
        rows = [(e.seq, e.user_id, e.item_id, e.kind, e.score, json.dumps(e.reasons), e.state) for e in events]
        self._write(f"INSERT OR IGNORE INTO quarantine ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def release(self, seqs: Iterable[int]) -> None:
        """Let held events be learned."""
        self._write("UPDATE quarantine SET state = 'released' WHERE seq = ? AND state = 'held'", [(n,) for n in seqs])

    def drop(self, seqs: Iterable[int]) -> None:
        """Decide that held events are never learned."""
        self._write("UPDATE quarantine SET state = 'dropped' WHERE seq = ? AND state = 'held'", [(n,) for n in seqs])

    def mark_learned(self, seqs: Iterable[int]) -> None:
        """Note that released events have been learned, and are not to be learned again."""
        rows = [(n,) for n in seqs]
        self._write("UPDATE quarantine SET state = 'learned' WHERE seq = ? AND state IN ('held', 'released')", rows)

    def find(
        self,
        *,
        states: Sequence[str] = STATES,
        user_id: str | None = None,
        item_id: str | None = None,
        first_seq: int = 0,
        last_seq: int = 2**62,
        limit: int = -1,
    ) -> list[Quarantined]:
        """Return events in order of their numbers."""
        marks = ", ".join("?" * len(states))
        wanted = f"state IN ({marks}) AND seq BETWEEN ? AND ?"
        values: list[object] = [*states, first_seq, last_seq]
        for column, value in (("user_id", user_id), ("item_id", item_id)):
            if value is not None:
                wanted += f" AND {column} = ?"
                values.append(value)
        statement = f"SELECT {COLUMNS} FROM quarantine WHERE {wanted} ORDER BY seq LIMIT ?"
        with self._lock, closing(self._connection.execute(statement, [*values, limit])) as rows:
            return [
                Quarantined(
                    seq=seq,
                    user_id=user,
                    item_id=item,
                    kind=kind,
                    score=score,
                    reasons=tuple(json.loads(reasons)),
                    state=state,
                )
                for seq, user, item, kind, score, reasons, state in rows
            ]

    def counts(self) -> dict[str, int]:
        """Return how many events are in each state."""
        with self._lock, closing(self._connection.execute("SELECT state, count(*) FROM quarantine GROUP BY 1")) as rows:
            found = dict(rows.fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        if not rows:
            return
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany(statement, rows)
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
