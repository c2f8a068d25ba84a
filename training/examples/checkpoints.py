"""Checkpoints of a streaming run: written beside the training, whole or not at all, the newest whole one found again.

In:  a sharded model, its optimisers, arrays of this worker's own, the position in the stream.  Out: a folder a step.
Knows nothing of batches or of Ray.

    FOLDER/step-000012000/      .metadata, __R_0.distcp …    tables, dense weights, both optimisers (DCP; reshards)
                                worker-R.npz                 worker R's id table and random state
                                checkpoint.json              position, data, size and CRC of every file; written last
    FOLDER/spare/               files of the last one dropped    written over by the next

A save copies the state (the step after may change it) and returns; a thread writes the copy, over a process group of
its own. A folder without checkpoint.json was torn by a crash; one whose files differ from it is damaged: both are
passed over for the one before. Like Check-N-Run (Eisenman et al., NSDI 2022), training waits for the copy only.
"""

import json
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from cluster.errors import DataError, EngineError
from training.checkpoint import StateCopy, write_state
from training.examples.background import yield_to_steps

MANIFEST = "checkpoint.json"
SPARE = "spare"
"""Where the files of a dropped checkpoint wait to be written over: new pages cost the kernel ten times what old do."""
_READ_BYTES = 1 << 22


@dataclass(slots=True, kw_only=True)
class Position:
    """Where a run is."""

    epoch: int = 0
    step: int = 0
    """Next step of the epoch."""
    steps: int = 0
    """Steps done, all epochs."""
    examples: int = 0
    """Examples trained on, all workers and epochs."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCheckpoint:
    """What `checkpoint.json` says."""

    position: Position
    stream: Mapping[str, object]
    """What decides which rows a step holds: settings and data marks. A run goes on only where they are the same."""
    workers: int
    files: Mapping[str, tuple[int, int]]
    """File name to size in bytes and CRC-32."""

    @classmethod
    def read(cls, folder: Path) -> "SavedCheckpoint":
        """Raises `DataError` when the folder holds no checkpoint or one that was torn."""
        try:
            raw = json.loads((folder / MANIFEST).read_text())
            return cls(**(raw | {"position": Position(**raw["position"])}))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{folder}: holds no whole checkpoint ({error})") from error

    def verify(self, folder: Path) -> None:
        """Read every file. Raises `DataError` naming the first that is not as it was written."""
        for name, (size, crc) in self.files.items():
            if (found := _size_and_crc(folder / name)) != (size, crc):
                raise DataError(f"{folder / name}: is damaged: size and CRC are {found}, were {(size, crc)}")


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints, whole or not, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint's folder, if any, and why newer ones were passed over."""
    passed_over = []
    for candidate in checkpoint_folders(folder):
        try:
            SavedCheckpoint.read(candidate).verify(candidate)
        except DataError as error:
            passed_over.append(str(error))
        else:
            return candidate, passed_over
    return None, passed_over


class CheckpointWriter:
    """Writes checkpoints one at a time on a thread of its own."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Collective. The newest `keep` checkpoints stay; the folder is one that all workers share."""
        self._folder, self._keep = folder, keep
        # Collective. Gloo also beside NCCL: what is agreed on here are file names.
        self._group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
        self._copy = StateCopy()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=yield_to_steps)
        self._pending: Future[None] | None = None

    def save(
        self,
        state: Mapping[str, torch.Tensor],
        arrays: Mapping[str, np.ndarray],
        position: Position,
        stream: Mapping[str, object],
    ) -> None:
        """Collective. Copy the state and have it written; waits for the checkpoint before, if that is still going on.

        `arrays` are this worker's own and must not change any more. Raises what went wrong with the one before.
        """
        self.wait()
        copied = self._copy.take(state)
        described = {"position": asdict(position), "stream": dict(stream), "workers": dist.get_world_size()}
        self._pending = self._pool.submit(self._write, copied, dict(arrays), described, position.steps)

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise what went wrong with the checkpoint being written, if it did already; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def close(self) -> None:
        """Wait, then end the thread; nothing is kept to be written over."""
        self.wait()
        self._pool.shutdown()
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder / SPARE, ignore_errors=True)

    def _write(
        self,
        state: Mapping[str, torch.Tensor],
        arrays: Mapping[str, np.ndarray],
        described: Mapping[str, object],
        steps: int,
    ) -> None:
        rank = dist.get_rank()
        folder = self._folder / f"step-{steps:012d}"
        if rank == 0:
            self._make_room(folder)
        dist.barrier(self._group)  # collective: nobody writes before the folder is empty
        write_state(state, folder, self._group)  # collective
        mine, failed = {}, ""
        try:
            np.savez(folder / worker_file(rank), **arrays)  # pyright: ignore[reportArgumentType]  # array names
            mine = {path.name: _size_and_crc(path) for path in folder.iterdir() if _is_of(path.name, rank)}
        except (OSError, DataError) as error:
            failed = f"worker {rank}: {error}"
        everyone: list[tuple[dict[str, tuple[int, int]], str]] = [({}, "")] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, (mine, failed), self._group)  # collective: every file is on disk, or why not
        if failures := [why for _, why in everyone if why]:
            raise EngineError(f"{folder}: cannot be written: {'; '.join(failures)}")
        if rank == 0:
            files = {name: entry for one, _ in everyone for name, entry in one.items()}
            draft = folder / f"{MANIFEST}.draft"
            draft.write_text(json.dumps({**described, "files": files}))
            draft.replace(folder / MANIFEST)
            self._prune()

    def _make_room(self, folder: Path) -> None:
        """Make the new checkpoint's folder, empty or with the tables' files of a dropped one, to be written over."""
        shutil.rmtree(folder, ignore_errors=True)  # of a crash
        spare = self._folder / SPARE
        if not spare.exists():
            folder.mkdir(parents=True)
            return
        spare.rename(folder)
        for path in folder.iterdir():
            if not any(path.name.startswith(f"__{rank}_") for rank in range(dist.get_world_size(self._group))):
                path.unlink()

    def _prune(self) -> None:
        whole = [one for one in checkpoint_folders(self._folder) if (one / MANIFEST).exists()]
        for old in whole[self._keep :]:
            (old / MANIFEST).unlink()  # from here on it is none, should the rest be interrupted
            shutil.rmtree(self._folder / SPARE, ignore_errors=True)
            old.rename(self._folder / SPARE)


def worker_file(rank: int) -> str:
    """Return the name of a worker's own file."""
    return f"worker-{rank}.npz"


def read_arrays(folder: Path, name: str, workers: int) -> list[np.ndarray]:
    """Return an array of every worker's own file, in the order of their ranks."""
    arrays = []
    for rank in range(workers):
        with np.load(folder / worker_file(rank)) as file:
            arrays.append(file[name])
    return arrays


def _is_of(name: str, rank: int) -> bool:
    return name == worker_file(rank) or name.startswith(f"__{rank}_") or (rank == 0 and name == ".metadata")


def _size_and_crc(path: Path) -> tuple[int, int]:
    size = crc = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    return size, crc
