"""Which version is served, and every move of that choice.

In:  a `VersionRef` to promote.  Out: the current one, the history of moves.
Knows nothing of what a version holds or whether it exists.

`current.json` moves by one atomic write. `promotions.jsonl` has one line a move, written first: nothing is ever served
that the record does not name. Of old moves, those from delta to delta are forgotten after a while.
"""

import json
import time
from dataclasses import dataclass

from cluster.errors import CorruptVersionError, NoVersionError
from cluster.manifest import VersionRef
from cluster.storage import Storage

POINTER_FILE = "current.json"
PROMOTIONS_FILE = "promotions.jsonl"
DELTA_MOVE = "delta"
"""Reason of a move to the next delta: two a second, while events come."""
LONG_RECORD_BYTES = 1 << 20
NEWEST_MOVES = 1_000
"""Moves that stay whatever their reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """One move of the pointer."""

    at_us: int
    ref: VersionRef
    previous: VersionRef | None
    reason: str


class Pointer:
    """The registry's one choice of what is served."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def current(self) -> VersionRef:
        """Return the promoted version; raises `NoVersionError` before the first one."""
        path = f"{self._storage.uri}/{POINTER_FILE}"
        try:
            raw = self._storage.read(POINTER_FILE)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NoVersionError(f"{path}: no version is published yet; train one and publish it") from error
        try:
            pointer = json.loads(raw)
            return VersionRef(int(pointer["version"]), int(pointer["delta"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CorruptVersionError(f"{path}: not a pointer ({error!r:.200}); promote a version again") from error

    def is_at(self, ref: VersionRef) -> bool:
        """Tell whether this version is the current one."""
        return self.readable() == ref

    def move(self, ref: VersionRef, reason: str) -> None:
        """Make this version the current one. Call it under the storage's lock."""
        previous = self.readable()
        record = {
            "at_us": time.time_ns() // 1_000,
            "ref": str(ref),
            "previous": str(previous) if previous else None,
            "reason": reason,
        }
        self._storage.append_line(PROMOTIONS_FILE, json.dumps(record))
        self._shorten()
        self._storage.write(POINTER_FILE, json.dumps({"version": ref.version, "delta": ref.delta}).encode())

    def history(self) -> list[Promotion]:
        """Return every move, oldest first."""
        if not self._storage.exists(PROMOTIONS_FILE):
            return []
        whole, _, _torn = self._storage.read(PROMOTIONS_FILE).rpartition(b"\n")
        return [self._promotion(line) for line in whole.splitlines()]

    def _shorten(self) -> None:
        """Forget old moves to the next delta, which the deltas themselves state, once there are very many."""
        if self._storage.size(PROMOTIONS_FILE) < LONG_RECORD_BYTES:
            return
        lines = self._storage.read(PROMOTIONS_FILE).splitlines(keepends=True)
        old, new = lines[:-NEWEST_MOVES], lines[-NEWEST_MOVES:]
        chosen = [line for line in old if self._promotion(line).reason != DELTA_MOVE]
        self._storage.write(PROMOTIONS_FILE, b"".join([*chosen, *new]))

    def readable(self) -> VersionRef | None:
        """Return the current version, or none where there is none or the pointer is damaged."""
        try:
            return self.current()
        except (NoVersionError, CorruptVersionError):  # the next move mends either
            return None

    def _promotion(self, line: bytes) -> Promotion:
        try:
            raw = json.loads(line)
            return Promotion(
                at_us=raw["at_us"],
                ref=VersionRef.parse(raw["ref"]),
                previous=VersionRef.parse(raw["previous"]) if raw["previous"] else None,
                reason=raw["reason"],
            )
        except (ValueError, KeyError, TypeError) as error:
            path = f"{self._storage.uri}/{PROMOTIONS_FILE}"
            raise CorruptVersionError(f"{path}: not a promotion: {line!r:.120}") from error
