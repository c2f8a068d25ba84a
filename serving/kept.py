"""Candidates of users who ask again: kept until the user's state, or anything that answers, is another.

In:  a user, an arm, and the basis that candidates stand on.  Out: candidates that were found on the same basis.
Knows nothing of how candidates are found, or of what a request excludes: only what everyone is asked alike is kept.
"""

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass

from serving.refresh import Residents
from training.models.resident import Candidates


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """What candidates were found from."""

    residents: Residents
    seq: int
    """The user's newest event."""
    fallback: bool
    """Whether the state was the node's own because the shared one did not answer."""


@dataclass(frozen=True, slots=True)
class _Entry:
    residents: "weakref.ref[Residents]"  # weak: what was swapped out is not held in memory by who has not asked since
    seq: int
    fallback: bool
    candidates: Candidates


class KeptCandidates:
    """The newest candidates of so many users and arms; those asked for longest ago go first. Any thread may call."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._changing = threading.Lock()

    def find(self, user_id: str, arm: str, basis: Basis) -> Candidates | None:
        """Return what was kept of the user on this very basis."""
        with self._changing:
            entry = self._entries.get((user_id, arm))
            if entry is None or entry.residents() is not basis.residents:
                return None
            if (entry.seq, entry.fallback) != (basis.seq, basis.fallback):
                return None
            self._entries.move_to_end((user_id, arm))
            return entry.candidates

    def keep(self, user_id: str, arm: str, basis: Basis, candidates: Candidates) -> None:
        """Keep what was found."""
        entry = _Entry(weakref.ref(basis.residents), basis.seq, basis.fallback, candidates)
        with self._changing:
            self._entries[user_id, arm] = entry
            self._entries.move_to_end((user_id, arm))
            if len(self._entries) > self._most:
                self._entries.popitem(last=False)
