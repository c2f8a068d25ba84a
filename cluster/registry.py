"""Versions and deltas on storage: drafted, published in one step, verified on read, promoted by one pointer.

In:  tensors, tables and texts by name.  Out: checked tensors, tables and texts of a `VersionRef`.
Knows nothing of what a model is, who trains it or who serves it.

    versions/000001/NAME.safetensors NAME.parquet NAME.json … manifest.json
    versions/000001/deltas/000001/…                          manifest.json
    current.json        {"version": 1, "delta": 37}: what is served
    promotions.jsonl    every move of that pointer, oldest first
    canary.json canaries.jsonl        the version on trial, and every trial's start and end

A draft is written in a scratch folder and becomes a numbered folder when it is published; a folder without a manifest
is nobody's. Deltas are numbered from 1 without gaps. Publishers of one registry exclude each other (`Storage.lock`).
"""

import io
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from cluster.canary import Canary, CanaryPointer
from cluster.errors import CorruptVersionError, RegistryError
from cluster.manifest import MANIFEST_FILE, FileEntry, Manifest, VersionRef
from cluster.pointer import DELTA_MOVE, Pointer, Promotion
from cluster.storage import Storage

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""By the names that safetensors has for them."""
FILE_NAME = re.compile(r"\w[\w.-]{0,99}")


class Registry:
    """All versions below one folder or URI."""

    def __init__(self, root: str | Path | Storage, *, before_read: Callable[[], None] | None = None) -> None:
        """Open it; `before_read` is called before each file of a version, by who lets more urgent work go first."""
        self._storage = root if isinstance(root, Storage) else Storage(root)
        self._before_read = before_read
        self._pointer = Pointer(self._storage)
        self._canary = CanaryPointer(self._storage)
        self.uri = self._storage.uri

    def paced(self, before_read: Callable[[], None]) -> "Registry":
        """Return the same registry for a reader that pauses before each file."""
        return Registry(self._storage, before_read=before_read)

    def draft_version(self) -> "VersionDraft":
        """Return an empty draft of the next version; nothing is visible until it is published."""
        return VersionDraft(self, self._storage, self._pointer)

    def draft_delta(self, base: int) -> "DeltaDraft":
        """Return an empty draft of the next delta of version `base`."""
        self.manifest(VersionRef(base))
        return DeltaDraft(self, self._storage, self._pointer, base)

    def current(self) -> VersionRef:
        """Return the promoted version; raises `NoVersionError` before the first one."""
        return self._pointer.current()

    def readable_current(self) -> VersionRef | None:
        """Return the promoted version, or none where there is none or the pointer is damaged."""
        return self._pointer.readable()

    def promote(self, ref: VersionRef, reason: str = "") -> None:
        """Move the pointer to a published version, forwards or back."""
        self.manifest(ref)
        with self._storage.lock():
            self._pointer.move(ref, reason)

    def history(self) -> list[Promotion]:
        """Return every move of the pointer, oldest first."""
        return self._pointer.history()

    def previous(self) -> VersionRef:
        """Return the newest promoted version before the current one, skipping this version's own deltas.

        Raises `RegistryError` where there is none.
        """
        current = self.current()
        for move in reversed(self.history()):
            if move.ref.version != current.version:
                return move.ref
        if current.delta:
            return VersionRef(current.version)
        raise RegistryError(f"{current} is the first that was promoted; there is none before it to roll back to")

    def canary(self) -> Canary | None:
        """Return the running trial, if any; raises `CorruptVersionError` where what is stated of it does not hold."""
        return self._canary.current()

    def readable_canary(self) -> Canary | None:
        """Return the running trial, or none where there is none or what is stated of it does not hold."""
        return self._canary.readable()

    def start_canary(self, ref: VersionRef, share: float, from_seq: int) -> Canary:
        """Begin to serve a published version to a share of users; raises `RegistryError` where that cannot be."""
        self.manifest(ref)
        if self._pointer.is_at(ref):
            raise RegistryError(f"version {ref}: is promoted, so there is nothing to try")
        with self._storage.lock():
            return self._canary.start(ref, share, from_seq)

    def end_canary(self, canary: Canary | None, reason: str, *, promote: bool = False) -> bool:
        """End this trial, or with none whichever runs, and promote its version if it passed.

        Returns whether it did: someone else may have ended it meanwhile.
        """
        with self._storage.lock():
            if canary is not None and self._canary.readable() != canary:
                return False
            self._canary.end("promoted" if promote else "ended", reason)
            if promote and canary is not None:
                self._pointer.move(canary.ref, f"canary: {reason}")
        return True

    def canaries(self) -> list[dict[str, Any]]:  # Any: JSON
        """Return the start and end of every trial, oldest first."""
        return self._canary.history()

    def numbers(self) -> list[int]:
        """Return the numbers of all published versions, oldest first."""
        return _published(self._storage, "versions")

    def versions(self) -> list[Manifest]:
        """Return the manifests of all published versions, oldest first."""
        return [self.manifest(VersionRef(number)) for number in self.numbers()]

    def deltas(self, version: int, after: int = 0) -> list[Manifest]:
        """Return the manifests of a version's deltas `after + 1 …`, each checked to be its predecessor's child.

        Raises `CorruptVersionError` naming the delta that is missing or does not continue the chain.
        """
        previous = self.manifest(VersionRef(version, after))
        chain = []
        numbers = _published(self._storage, f"{VersionRef(version).folder}/deltas")
        for expected, number in enumerate((n for n in numbers if n > after), after + 1):
            if number != expected:
                raise CorruptVersionError(f"{self._path(VersionRef(version, expected))}: missing from the chain")
            manifest = self.manifest(VersionRef(version, number))
            if manifest.parent_sha256 != previous.sha256:
                raise CorruptVersionError(f"{self._path(manifest.ref)}: is not a child of {previous.ref} as it is now")
            chain.append(manifest)
            previous = manifest
        return chain

    def manifest(self, ref: VersionRef) -> Manifest:
        """Return the manifest of a version or delta; raises `RegistryError` where it is not published."""
        try:
            data = self._storage.read(f"{ref.folder}/{MANIFEST_FILE}")
        except FileNotFoundError as error:
            have = ", ".join(map(str, _published(self._storage, "versions"))) or "none"
            raise RegistryError(f"{self._path(ref)}: {ref} is not published; versions here: {have}") from error
        manifest = Manifest.decode(data, self._path(ref))
        if manifest.ref != ref:
            raise CorruptVersionError(f"{self._path(ref)}: is the manifest of {manifest.ref}")
        return manifest

    def open_version(self, version: int) -> "VersionReader":
        """Return the reader of a version's own files; raises `RegistryError` where it is not published."""
        return VersionReader(self._storage, self.manifest(VersionRef(version)), self._before_read)

    def open_delta(self, version: int, number: int) -> "VersionReader":
        """Return the reader of one delta's files; raises `RegistryError` where it is not published."""
        return VersionReader(self._storage, self.manifest(VersionRef(version, number)), self._before_read)

    def prune(self, older_than_s: float = 86_400.0) -> tuple[str, ...]:
        """Remove drafts untouched for so long, which their writers did not live to publish; return their names."""
        with self._storage.lock():
            return self._storage.clear_scratch(older_than_s)

    def drop_deltas(self, version: int) -> int:
        """Remove a version's deltas, newest first; return how many. Raises `RegistryError` for the promoted version."""
        with self._storage.lock():
            current = self._pointer.readable()
            if current is not None and current.version == version:
                raise RegistryError(f"version {version}: is promoted, so its deltas stay")
            numbers = _published(self._storage, f"{VersionRef(version).folder}/deltas")
            for number in reversed(numbers):
                self._remove(VersionRef(version, number))
        return len(numbers)

    def drop_version(self, version: int) -> None:
        """Remove a version with its deltas. Raises `RegistryError` for the promoted one and for the newest."""
        if version == max(_published(self._storage, "versions"), default=0):
            raise RegistryError(f"version {version}: is the newest, and its number may not be given again")
        self.drop_deltas(version)
        with self._storage.lock():
            self._remove(VersionRef(version))

    def _remove(self, ref: VersionRef) -> None:
        """Remove the manifest, then the files: cut short, it leaves a folder that is nobody's."""
        self._storage.delete(f"{ref.folder}/{MANIFEST_FILE}")
        self._storage.delete_folder(ref.folder)

    def _path(self, ref: VersionRef) -> str:
        return f"{self.uri}/{ref.folder}/{MANIFEST_FILE}"


class _Draft:
    """Files that nobody sees yet."""

    def __init__(self, registry: Registry, storage: Storage, pointer: Pointer) -> None:
        self._registry = registry
        self._storage = storage
        self._pointer = pointer
        self._folder = storage.new_scratch_folder()
        self._files: dict[str, FileEntry] = {}

    def add_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write `name`.safetensors; tensors may not share memory."""
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self._add(f"{name}.safetensors", safetensors.torch.save(on_cpu))

    def add_table(self, name: str, table: pa.Table) -> None:
        """Write `name`.parquet."""
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self._add(f"{name}.parquet", sink.getvalue())

    def add_text(self, file_name: str, text: str) -> None:
        """Write a text under its full name, such as recipe.toml."""
        self._add(file_name, text.encode())

    def _add(self, file_name: str, data: bytes) -> None:
        if not FILE_NAME.fullmatch(file_name) or file_name == MANIFEST_FILE or file_name in self._files:
            raise RegistryError(
                f"draft file {file_name!r:.120}: must be a plain, unused name other than the manifest's"
            )
        self._storage.write(f"{self._folder}/{file_name}", data)
        self._files[file_name] = FileEntry.of(data)

    def _place(
        self, ref: VersionRef, parent: Manifest | None, first_seq: int | None, last_seq: int, metrics: Mapping[str, Any]
    ) -> None:
        """Write the manifest and make the folder visible. Holds the lock."""
        manifest = Manifest(
            ref=ref,
            created_us=time.time_ns() // 1_000,
            first_seq=first_seq,
            last_seq=last_seq,
            parent=parent.ref if parent else None,
            parent_sha256=parent.sha256 if parent else None,
            metrics=_plain_json(metrics),
            files=self._files,
        )
        self._storage.write(f"{self._folder}/{MANIFEST_FILE}", manifest.encode())
        try:
            self._storage.place(self._folder, ref.folder, last=MANIFEST_FILE)
        except FileExistsError as error:
            raise RegistryError(f"{error}: holds files without a manifest; remove that folder and publish") from error


class VersionDraft(_Draft):
    """A version that is being written."""

    def publish(
        self,
        offset: int,
        metrics: Mapping[str, Any],  # Any: whatever JSON holds
        parent: VersionRef | None = None,
        promote: bool = True,
        promote_from: VersionRef | None = None,
    ) -> VersionRef:
        """Make the draft the next version, which has learned events up to `offset`; return its name.

        With `promote_from` the pointer follows only from there: once someone has moved it, the version waits.
        """
        with self._storage.lock():
            taken = [int(name) for name in self._storage.list("versions") if name.isdecimal()]
            ref = VersionRef(max(taken, default=0) + 1)
            self._place(ref, self._registry.manifest(parent) if parent else None, None, offset, metrics)
            if promote and (promote_from is None or self._pointer.is_at(promote_from)):
                self._pointer.move(ref, "published")
        return ref


class DeltaDraft(_Draft):
    """A delta that is being written."""

    def __init__(self, registry: Registry, storage: Storage, pointer: Pointer, base: int) -> None:
        super().__init__(registry, storage, pointer)
        self._base = base

    def publish(
        self,
        first_seq: int,
        last_seq: int,
        metrics: Mapping[str, Any] | None = None,  # Any: whatever JSON holds
        promote: bool = True,
    ) -> VersionRef:
        """Make the draft the version's next delta, which learned events `first_seq … last_seq`; return its name.

        The pointer follows only from the delta's parent: once someone has rolled back, new deltas wait for `promote`.
        Raises `RegistryError` when an event would be learned twice along the chain, or left out of it.
        """
        with self._storage.lock():
            numbers = _published(self._storage, f"{VersionRef(self._base).folder}/deltas")
            parent = self._registry.manifest(VersionRef(self._base, max(numbers, default=0)))
            if first_seq != parent.last_seq + 1 or last_seq < parent.last_seq:
                raise RegistryError(
                    f"delta of events {first_seq}…{last_seq}: {parent.ref} has learned up to {parent.last_seq}; "
                    f"start at {parent.last_seq + 1}"
                )
            ref = VersionRef(self._base, parent.ref.delta + 1)
            self._place(ref, parent, first_seq, last_seq, metrics or {})
            if promote and self._pointer.is_at(parent.ref):
                self._pointer.move(ref, DELTA_MOVE)
        return ref


class VersionReader:
    """The files of one version or delta, checked against its manifest as they are read."""

    def __init__(self, storage: Storage, manifest: Manifest, before_read: Callable[[], None] | None = None) -> None:
        self._storage = storage
        self._before_read = before_read
        self.manifest = manifest

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of `name`.safetensors, on the CPU."""
        return _load_tensors(self._checked(f"{name}.safetensors"))

    def table(self, name: str) -> pa.Table:
        """Return the table of `name`.parquet."""
        return pq.ParquetFile(pa.BufferReader(self._checked(f"{name}.parquet"))).read()

    def count_rows(self, name: str) -> int:
        """Return how many rows `name`.parquet has, without reading them."""
        return pq.read_metadata(pa.BufferReader(self._checked(f"{name}.parquet"))).num_rows

    def text(self, file_name: str) -> str:
        """Return the text of a file by its full name."""
        return self._checked(file_name).decode()

    def _checked(self, file_name: str) -> bytes:
        entry = self.manifest.files.get(file_name)
        path = f"{self._storage.uri}/{self.manifest.ref.folder}/{file_name}"
        if entry is None:
            raise RegistryError(f"{path}: not part of {self.manifest.ref}, which has {', '.join(self.manifest.files)}")
        if self._before_read is not None:
            self._before_read()
        try:
            data = self._storage.read(f"{self.manifest.ref.folder}/{file_name}")
        except FileNotFoundError as error:
            raise CorruptVersionError(f"{path}: missing though its manifest names it") from error
        if len(data) != entry.size_bytes:
            raise CorruptVersionError(f"{path}: {len(data):,} bytes, its manifest says {entry.size_bytes:,}")
        if FileEntry.of(data) != entry:
            raise CorruptVersionError(f"{path}: checksum differs from its manifest's")
        return data


def _load_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """Do what `safetensors.torch.load` does, but into memory aligned as torch's own, and with the interpreter free.

    That one copies while it holds the interpreter's lock, a third of a second for half a gigabyte; and what it returns
    lies anywhere in memory, which products may depend on in their last bits.
    """
    header_bytes = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + header_bytes]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
            content = np.frombuffer(data, np.uint8, end - start, 8 + header_bytes + start)
            np.copyto(tensor.flatten().view(torch.uint8).numpy(), content)
            tensors[name] = tensor
    return tensors


def _plain_json(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics as they will be read back; raises `RegistryError` for what JSON cannot state."""
    try:
        return json.loads(json.dumps(metrics, allow_nan=False))
    except (ValueError, TypeError) as error:
        raise RegistryError(f"metrics: must be finite JSON values ({error}); leave out what is not") from error


def _published(storage: Storage, folder: str) -> list[int]:
    """Return the numbers below a folder that have a manifest, in order."""
    numbered = (name for name in storage.list(folder) if name.isdecimal())
    return sorted(int(name) for name in numbered if storage.exists(f"{folder}/{name}/{MANIFEST_FILE}"))
