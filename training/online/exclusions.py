"""What of the log is not to be learned from: ranges of events that were set aside, and users whose learning is undone.

In:  a version's metrics.  Out: whether an event is left out; metrics again.
Knows nothing of logs or models. A version states what its successors leave out, so that whoever learns on from it,
after whatever crash, leaves out the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

EXCLUDED = "excluded"
"""Metric of a version: what learning leaves out from there on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusions:
    """Events that learning leaves out."""

    ranges: frozenset[tuple[int, int]] = frozenset()
    """First and last sequence number, both left out."""
    users: Mapping[str, int] = field(default_factory=dict)
    """User to the last sequence number of theirs that is left out: what they do later counts."""

    @classmethod
    def read(cls, metrics: Mapping[str, Any]) -> Self:  # Any: whatever JSON holds
        """Return what a version's metrics state."""
        stated = metrics.get(EXCLUDED, {})
        ranges = frozenset((first, last) for first, last in stated.get("ranges", ()))
        return cls(ranges=ranges, users=dict(stated.get("users", {})))

    def metrics(self) -> dict[str, Any]:  # Any: whatever JSON holds
        """Return the metric that states them; none where nothing is left out."""
        if not self.ranges and not self.users:
            return {}
        return {EXCLUDED: {"ranges": sorted(map(list, self.ranges)), "users": dict(sorted(self.users.items()))}}

    def covers(self, seq: int, user_id: str) -> bool:
        """Whether a user's event is left out; the history that training saw, numbered below 1, never is."""
        return 1 <= seq <= self.users.get(user_id, 0) or self.covers_everyone(seq)

    def covers_everyone(self, seq: int) -> bool:
        """Whether an event is left out, whoever's it is."""
        return any(first <= seq <= last for first, last in self.ranges)

    def joined(self, other: Self) -> Self:
        """Return what either leaves out."""
        users = dict(self.users)
        for user_id, last_seq in other.users.items():
            users[user_id] = max(last_seq, users.get(user_id, 0))
        return type(self)(ranges=self.ranges | other.ranges, users=users)
