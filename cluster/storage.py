"""Bytes under names, on a local folder or on any file system that pyarrow.fs has a URI for.

In:  a folder or a URI (s3://, gs://, hdfs://), names with forward slashes.  Out: bytes, names, checksums.
Knows nothing of versions, manifests or events.

On a local folder a write is atomic and survives a power loss (temporary file, fsync, rename, fsync of the folder), a
folder is placed by one rename and `lock` excludes other processes. Object stores put one object atomically but offer,
through pyarrow.fs, neither exclusive creation nor locks: there, one process at a time may write.
"""

import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from pyarrow import fs

from cluster.errors import EngineError

SCRATCH = ".scratch"
"""Folder of everything half-written; nothing in it is visible to readers."""

LOCK_FILE = ".lock"
HASH_CHUNK_BYTES = 1 << 20


class Storage:
    """Named bytes below one root."""

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri).rstrip("/")
        self._files, self._base = _open_root(self.uri)
        self._local = Path(self._base) if isinstance(self._files, fs.LocalFileSystem) else None

    def read(self, name: str) -> bytes:
        """Return the whole content; raises `FileNotFoundError` where there is none."""
        with self._files.open_input_stream(self._path(name)) as stream:
            return stream.read()

    def sha256(self, name: str) -> str:
        """Return the content's checksum in hex, reading it in pieces."""
        digest = hashlib.sha256()
        with self._files.open_input_stream(self._path(name)) as stream:
            while chunk := stream.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def exists(self, name: str) -> bool:
        """Tell whether a file or a folder has this name."""
        return self._files.get_file_info(self._path(name)).type != fs.FileType.NotFound

    def size(self, name: str) -> int:
        """Return how many bytes the content has; 0 where there is none."""
        return self._files.get_file_info(self._path(name)).size or 0

    def list(self, folder: str = "") -> list[str]:
        """Return the names in a folder (not their paths), sorted; empty where there is no such folder."""
        selector = fs.FileSelector(self._path(folder), allow_not_found=True)
        return sorted(entry.base_name for entry in self._files.get_file_info(selector))

    def write(self, name: str, data: bytes) -> None:
        """Replace the content in one step: readers see the old bytes or the new ones."""
        if self._local is None:
            self._upload(name, data)
            return
        temporary = self._local / SCRATCH / f"{uuid.uuid4().hex}.tmp"
        _make_folder(temporary.parent)
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            target = self._local / name
            _make_folder(target.parent)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)

    def append_line(self, name: str, line: str) -> None:
        """Add one line durably, cutting off what a crash left of an earlier one. Call it under `lock`."""
        if self._local is None:
            before = self.read(name) if self.exists(name) else b""
            self._upload(name, before + line.encode() + b"\n")
            return
        path = self._local / name
        _make_folder(path.parent)
        with path.open("a+b") as stream:
            _cut_torn_line(stream)
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        _sync_folder(path.parent)

    def new_scratch_folder(self) -> str:
        """Return the name of a folder that nobody else has; it comes into being with its first file."""
        return f"{SCRATCH}/{uuid.uuid4().hex}"

    def place(self, source: str, target: str, *, last: str) -> None:
        """Make a scratch folder visible as `target`; raises `FileExistsError` where that is taken.

        One rename on a local folder. Elsewhere files are copied, `last` after all others, so that its presence
        says that the folder is complete.
        """
        if self.list(target):
            raise FileExistsError(f"{self.uri}/{target}")
        if self._local is not None:
            goal = self._local / target
            _make_folder(goal.parent)
            (self._local / source).rename(goal)
            _sync_folder(goal.parent)
            return
        for name in sorted(self.list(source), key=lambda name: (name == last, name)):
            self._upload(f"{target}/{name}", self.read(f"{source}/{name}"))
        self.delete_folder(source)

    def delete(self, name: str) -> None:
        """Remove one file."""
        self._files.delete_file(self._path(name))

    def delete_folder(self, folder: str) -> None:
        """Remove a folder with its files."""
        self._files.delete_dir(self._path(folder))

    def age_s(self, name: str) -> float:
        """Return the seconds since anything of this file or folder was last written."""
        info = self._files.get_file_info(self._path(name))
        below = fs.FileSelector(self._path(name), recursive=True)
        entries = [info, *self._files.get_file_info(below)] if info.type == fs.FileType.Directory else [info]
        newest_ns = max((entry.mtime_ns for entry in entries if entry.mtime_ns is not None), default=0)
        return time.time() - newest_ns / 1e9

    def clear_scratch(self, older_than_s: float) -> tuple[str, ...]:
        """Remove what crashed writers left behind and return its names."""
        names = [f"{SCRATCH}/{name}" for name in self.list(SCRATCH)]
        stale = tuple(name for name in names if self.age_s(name) >= older_than_s)
        for name in stale:
            if self._files.get_file_info(self._path(name)).type == fs.FileType.Directory:
                self.delete_folder(name)
            else:
                self._files.delete_file(self._path(name))
        return stale

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Exclude other threads and processes; the kernel frees it when its holder dies. No-op on object stores."""
        if self._local is None:
            yield
            return
        _make_folder(self._local)
        with (self._local / LOCK_FILE).open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}".rstrip("/")

    def _upload(self, name: str, data: bytes) -> None:
        path = self._path(name)
        self._files.create_dir(path.rpartition("/")[0], recursive=True)
        with self._files.open_output_stream(path) as stream:
            stream.write(data)


def _open_root(uri: str) -> tuple[fs.FileSystem, str]:
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        files, base = fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise EngineError(f"storage {uri}: {error}") from error
    return files, base.rstrip("/")


def _cut_torn_line(stream: BinaryIO) -> None:
    """Truncate to the last line's end; reads the whole file only where a crash left a torn line."""
    size_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size_bytes - 1))
    if stream.read(1) not in (b"", b"\n"):
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
