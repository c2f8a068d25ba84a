"""The version that a share of users is served while it is on trial, and every trial's beginning and end.

In:  a version, a share.  Out: the running trial, whether a user takes part; a record.
Knows nothing of how a trial is judged (training/online/canary.py).

`canary.json` is there while a trial runs; it changes by one atomic write. `canaries.jsonl` has a line for each start
and end, written first. A user takes part by a hash of the user's id and the trial's name: in every process the same,
and others with every trial.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

from cluster.errors import CorruptVersionError, RegistryError
from cluster.manifest import VersionRef
from cluster.storage import Storage

CANARY_FILE = "canary.json"
CANARIES_FILE = "canaries.jsonl"
_HASH_RANGE = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A running trial."""

    ref: VersionRef
    share: float
    """Of users, above 0 and below 1."""
    from_seq: int
    """Newest event of the log when it began; what counts comes after."""
    started_us: int

    def takes(self, user_id: str) -> bool:
        """Whether the user is served the version on trial."""
        digest = hashlib.sha256(f"{self.ref} {self.started_us} {user_id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.share * _HASH_RANGE


class CanaryPointer:
    """The registry's one running trial, if any. Writers hold the storage's lock."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def current(self) -> Canary | None:
        """Return the running trial; raises `CorruptVersionError` where its file does not hold."""
        try:
            raw = self._storage.read(CANARY_FILE)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            stated = json.loads(raw)
            return Canary(
                ref=VersionRef.parse(stated["ref"]),
                share=float(stated["share"]),
                from_seq=int(stated["from_seq"]),
                started_us=int(stated["started_us"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            path = f"{self._storage.uri}/{CANARY_FILE}"
            raise CorruptVersionError(
                f"{path}: not a trial ({error!r:.200}); `recloop versions canary --stop`"
            ) from error

    def start(self, ref: VersionRef, share: float, from_seq: int) -> Canary:
        """Begin a trial; raises `RegistryError` while another one runs or for a share that is none."""
        if not 0 < share < 1:
            raise RegistryError(f"a canary share of {share}: must be above 0 and below 1")
        if (running := self.current()) is not None:
            raise RegistryError(f"version {running.ref} is on trial; end that with `recloop versions canary --stop`")
        canary = Canary(ref=ref, share=share, from_seq=from_seq, started_us=time.time_ns() // 1_000)
        stated = {"ref": str(ref), "share": share, "from_seq": from_seq, "started_us": canary.started_us}
        self._record("started", {**stated})
        self._storage.write(CANARY_FILE, json.dumps(stated).encode())
        return canary

    def end(self, outcome: str, reason: str) -> None:
        """End the trial, if one runs; one whose file is damaged too."""
        if self._storage.exists(CANARY_FILE):
            running = self.readable()
            self._record(outcome, {"ref": str(running.ref) if running else None, "reason": reason})
            self._storage.delete(CANARY_FILE)

    def readable(self) -> Canary | None:
        """Return the running trial, or none where there is none or its file is damaged."""
        try:
            return self.current()
        except CorruptVersionError:  # replicas say so, and serve nobody from it
            return None

    def history(self) -> list[dict[str, Any]]:  # Any: JSON
        """Return the start and end of every trial, oldest first."""
        if not self._storage.exists(CANARIES_FILE):
            return []
        whole, _, _torn = self._storage.read(CANARIES_FILE).rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()]

    def _record(self, outcome: str, stated: dict[str, Any]) -> None:
        line = {"at_us": time.time_ns() // 1_000, "outcome": outcome, **stated}
        self._storage.append_line(CANARIES_FILE, json.dumps(line))
