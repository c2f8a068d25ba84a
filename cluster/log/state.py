"""User state: the question, and what the log's own file answers.

In:  a user's id, perhaps a bound.  Out: their newest interactions and every item they had.
Knows nothing of how events are written, or of Redis (shared.py).
"""

import itertools
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

from cluster.log.records import Interaction, Row, UserState
from cluster.log.schema import CHOSEN
from cluster.log.sealing import HEAD

NO_BOUND = 2**63 - 1
NEWEST_OF_USER = f"""
SELECT max(
    coalesce((SELECT max(seq) FROM events WHERE user_id = :user AND kind NOT IN ({CHOSEN}) AND seq < :bound), 0),
    coalesce((SELECT seq FROM sealed_users WHERE user_id = :user AND seq < :bound), 0),
    coalesce((SELECT max(seq) FROM user_history WHERE user_id = :user AND seq < :bound), 0)
)
"""
RECENT = (
    "SELECT item_id, kind, value, ts_us, seq FROM user_history WHERE user_id = ? AND seq < ? ORDER BY seq DESC LIMIT ?"
)
SEEN = "SELECT item_id FROM user_history WHERE user_id = ? AND seq < ?"
NEWEST_OF_ALL = f"""
SELECT user_id, max(seq) FROM (
    SELECT user_id, max(seq) AS seq FROM events WHERE kind NOT IN ({CHOSEN}) GROUP BY user_id
    UNION ALL SELECT user_id, seq FROM sealed_users
    UNION ALL SELECT user_id, max(seq) FROM user_history WHERE seq > 0 GROUP BY user_id
) GROUP BY user_id ORDER BY user_id
"""
LIVE_OF_ALL = "SELECT user_id, item_id, kind, value, ts_us, seq FROM user_history WHERE seq > 0 ORDER BY user_id, seq"
LAST_DROPPED = "SELECT coalesce(max(last_seq), 0) FROM absences WHERE reason = 'dropped'"


class UserStates(Protocol):
    """Whoever answers what a user did; every method may be called from any thread."""

    def user_state(self, user_id: str, max_history: int, before_seq: int | None = None) -> UserState:
        """Return the user's last interactions and newest event, as they were before `before_seq` if that is given.

        With a `max_history` of 0, that is the newest event alone, at a fraction of the cost.
        """
        ...

    def seen_items(self, user_id: str, before_seq: int | None = None) -> frozenset[str]:
        """Return every item the user has interacted with."""
        ...


class LiveState(NamedTuple):
    """What one user did in the log itself, without the imported past."""

    user_id: str
    seq: int
    """Their newest event, of any kind."""
    history: list[Interaction]
    """Oldest first."""


class FileStates:
    """User state as it is in the log's file, where each event's own transaction has written it."""

    def __init__(self, reader: Callable[[], AbstractContextManager[sqlite3.Connection]]) -> None:
        self._reader = reader

    def user_state(self, user_id: str, max_history: int, before_seq: int | None = None) -> UserState:
        """Answer as `UserStates` says.

        Where `before_seq` is among sealed events, the newest event is the newest interaction.
        """
        seq = self.newest_seq(user_id, before_seq)  # first, so that the history holds at least up to it
        return UserState(history=tuple(self.history(user_id, max_history, before_seq)), seq=seq)

    def seen_items(self, user_id: str, before_seq: int | None = None) -> frozenset[str]:
        """Answer as `UserStates` says."""
        return frozenset(item_id for (item_id,) in self._rows(SEEN, (user_id, _bound(before_seq))))

    def newest_seq(self, user_id: str, before_seq: int | None = None) -> int:
        """Return the user's newest event of any kind; 0 where there is none."""
        return self._rows(NEWEST_OF_USER, {"user": user_id, "bound": _bound(before_seq)})[0][0]

    def history(self, user_id: str, max_history: int, before_seq: int | None = None) -> list[Interaction]:
        """Return the user's last interactions, oldest first."""
        if max_history == 0:
            return []
        rows = self._rows(RECENT, (user_id, _bound(before_seq), max_history))
        return [Interaction(*row) for row in reversed(rows)]

    def head_seq(self) -> int:
        """Return the newest sequence number; 0 for an empty log."""
        return self._rows(HEAD)[0][0]

    def dropped_seq(self) -> int:
        """Return the last event that retention has dropped: what it did is in user history alone."""
        return self._rows(LAST_DROPPED)[0][0]

    @contextmanager
    def everyone(self) -> Iterator[tuple[int, Iterator[LiveState]]]:
        """Yield the head, and every user's live state up to it."""
        with self._reader() as connection:
            connection.execute("BEGIN")
            try:
                yield connection.execute(HEAD).fetchone()[0], _merge(connection)
            finally:
                connection.execute("COMMIT")

    def _rows(self, statement: str, values: Row | dict[str, Any] = ()) -> list[Row]:
        with self._reader() as connection:
            return connection.execute(statement, values).fetchall()


def _merge(connection: sqlite3.Connection) -> Iterator[LiveState]:
    """Join the newest events with the histories, both in order of users."""
    histories = itertools.groupby(connection.execute(LIVE_OF_ALL), key=lambda row: row[0])
    upcoming = next(histories, None)
    for user_id, seq in connection.execute(NEWEST_OF_ALL):
        history = []
        if upcoming is not None and upcoming[0] == user_id:
            history = [Interaction(*row[1:]) for row in upcoming[1]]
            upcoming = next(histories, None)
        yield LiveState(user_id, seq, history)


def _bound(before_seq: int | None) -> int:
    return NO_BOUND if before_seq is None else before_seq
