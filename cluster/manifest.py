"""Names and manifests of versions: what a published folder says about itself.

In:  the manifest file's bytes.  Out: `Manifest` objects, and back.
Knows nothing of storage or of what the files mean.

A manifest states size and SHA-256 of every file beside it, the checksum of its own text, and its parent's checksum:
the deltas of a version form a chain in which no link can be altered or swapped unnoticed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cluster.errors import CorruptVersionError, RegistryError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
SYSTEM = "system"
"""Metric of a version that a classical system answers from: the system's name."""
TWO_STAGE = "two_stage"
"""The system of all others: the two-stage model, which learns while it serves."""


@dataclass(frozen=True, slots=True, order=True)
class VersionRef:
    """A version and how many of its deltas are applied: "1.37"; delta 0 is the version as published."""

    version: int
    delta: int = 0

    def __str__(self) -> str:
        return f"{self.version}.{self.delta}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "1.37" or "1"; raises `RegistryError` for anything else."""
        version, _, delta = text.partition(".")
        if not version.isdecimal() or not (delta or "0").isdecimal():
            raise RegistryError(f"version {text!r:.80}: write it as VERSION or VERSION.DELTA, such as 1 or 1.37")
        return cls(int(version), int(delta or "0"))

    @property
    def folder(self) -> str:
        """Return the folder that holds this version's, or this delta's, own files."""
        base = f"versions/{self.version:06d}"
        return f"{base}/deltas/{self.delta:06d}" if self.delta else base


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """What a manifest says of one file."""

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Describe these bytes."""
        return cls(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One published version or delta."""

    ref: VersionRef
    created_us: int
    first_seq: int | None
    """First event a delta learned from; None for a version."""
    last_seq: int
    """Last event of the log this has learned from."""
    parent: VersionRef | None
    parent_sha256: str | None
    metrics: Mapping[str, Any]  # Any: whatever JSON holds
    files: Mapping[str, FileEntry]

    @property
    def system(self) -> str:
        """Return the name of the system that it is a version of."""
        return self.metrics.get(SYSTEM, TWO_STAGE)

    @property
    def sha256(self) -> str:
        """Return the checksum of the manifest's text, which children name as their parent's."""
        return _checksum(self._body())

    def encode(self) -> bytes:
        """Return the file's bytes."""
        body = self._body()
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes, path: str) -> Self:
        """Read a manifest file; raises `CorruptVersionError` naming `path` when it does not hold."""
        try:
            body = json.loads(data)
            stated = body.pop("checksum")
            if stated != _checksum(body):
                raise CorruptVersionError(f"{path}: differs from its own checksum; publish the version again")
            if body["format"] != FORMAT:
                raise RegistryError(f"{path}: format {body['format']}, this build reads {FORMAT}")
            return cls(
                ref=VersionRef.parse(body["ref"]),
                created_us=body["created_us"],
                first_seq=body["first_seq"],
                last_seq=body["last_seq"],
                parent=VersionRef.parse(body["parent"]) if body["parent"] else None,
                parent_sha256=body["parent_sha256"],
                metrics=body["metrics"],
                files={n: FileEntry(size_bytes=f["bytes"], sha256=f["sha256"]) for n, f in body["files"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptVersionError(f"{path}: not a manifest ({error!r:.200})") from error

    def _body(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "ref": str(self.ref),
            "created_us": self.created_us,
            "first_seq": self.first_seq,
            "last_seq": self.last_seq,
            "parent": str(self.parent) if self.parent else None,
            "parent_sha256": self.parent_sha256,
            "metrics": dict(self.metrics),
            "files": {n: {"bytes": f.size_bytes, "sha256": f.sha256} for n, f in sorted(self.files.items())},
        }


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
