"""Save and load everything a training run needs to go on, with torch.distributed.checkpoint.

In:  a sharded model and its optimisers.  Out: a folder each worker writes its part of; whole tensors by name.
Knows nothing of epochs or versions. DCP reshards on load: a checkpoint of two workers loads into one.

Names: `tables.TABLE`, `tables.TABLE.momentum`, `dense.PARAMETER`, `dense_optimizer.PARAMETER.FIELD`.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils.serialization import config as serialization_config

from cluster.errors import DataError
from embeddings.tables import MOMENTUM, load_tables, one_a_row, table_state
from training.step import Optimizers

if TYPE_CHECKING:
    from torchrec.distributed.model_parallel import DistributedModelParallel

ADAM_FIELDS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(model: "DistributedModelParallel", optimizers: Optimizers, folder: Path) -> None:
    """Collective. Write this worker's part into `folder`, which may be another one on every worker."""
    with _quiet():
        dcp.save(training_state(model, optimizers), checkpoint_id=str(folder))


def load_checkpoint(model: "DistributedModelParallel", optimizers: Optimizers, folder: Path) -> None:
    """Collective. Load a checkpoint written by any number of workers, in place.

    Accumulators of a table that was split into other columns are read whole and taken apart by `load_tables`.
    """
    state = training_state(model, optimizers)
    saved = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    with _quiet():
        split_anew = {name for name, value in state.items() if _is_split_anew(name, value, saved.get(name))}
        dcp.load({name: state[name] for name in state.keys() - split_anew}, checkpoint_id=str(folder))
    load_state(model, optimizers, read_checkpoint(folder, split_anew))


def read_checkpoint(folder: Path, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint whole, or those named, in this process alone; accumulators one a row.

    Raises `DataError` when it is not one.
    """
    reader = dcp.FileSystemReader(str(folder))
    try:
        described = reader.read_metadata().state_dict_metadata
    except (OSError, EOFError) as error:
        raise DataError(f"{folder}: is not a checkpoint ({error})") from error
    whole = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if isinstance(entry, TensorStorageMetadata) and (names is None or name in names)
    }
    if whole:
        with _quiet():
            dcp.load(whole, storage_reader=reader, no_dist=True)
    return {name: one_a_row(value) if name.endswith(MOMENTUM) else value for name, value in whole.items()}


def _is_split_anew(name: str, now: torch.Tensor, saved: object) -> bool:
    if not name.endswith(MOMENTUM) or not isinstance(saved, TensorStorageMetadata):
        return False
    return saved.size != now.size() and saved.size[0] == now.size()[0]


@torch.no_grad()
def load_state(model: "DistributedModelParallel", optimizers: Optimizers, whole: dict[str, torch.Tensor]) -> None:
    """Copy whole tensors into a sharded model and its optimisers; names not given stay as they are."""
    load_tables(model, {name.removeprefix("tables."): value for name, value in whole.items()})
    for name, tensor in dense_state(optimizers).items():
        if name in whole:
            tensor.copy_(whole[name])


def training_state(model: "DistributedModelParallel", optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """Return everything that a step changes, by name: sharded tensors and dense ones that share memory."""
    tables = {f"tables.{name}": value for name, value in table_state(model).items()}
    return tables | dense_state(optimizers)


def dense_state(optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """Return the dense parameters and AdamW's moments, which exist from before the first step (as zeros)."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in optimizers.dense_parameters.items():
        state[f"dense.{name}"] = parameter.detach()
        moments = optimizers.dense.state[parameter]
        if not moments:
            moments["step"] = torch.zeros(())
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        for field in ADAM_FIELDS:
            state[f"dense_optimizer.{name}.{field}"] = moments[field]
    return state


def write_state(state: Mapping[str, torch.Tensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Collective over `group`. Write this worker's part of a state into a folder that all workers share.

    Without torch's own CRC-32, which takes most of the time of writing: the caller keeps one of each file. A file that
    is there already is written over in place: the kernel need not find pages for it.
    """
    writer = dcp.FileSystemWriter(str(folder), single_file_per_rank=True, thread_count=1)
    writer.fs = _OverwritingFileSystem()
    without_crc = serialization_config.patch({"save.compute_crc32": False})  # pyright: ignore[reportAttributeAccessIssue]
    with _quiet(), without_crc:
        dcp.save(dict(state), storage_writer=writer, process_group=group)


class _OverwritingFileSystem(FileSystem):
    """Writes over the old bytes of a file that is there."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode == "wb" and Path(path).exists():
            with _OverwrittenFile(io.FileIO(path, "r+b")) as stream:
                yield stream
        else:
            with super().create_stream(path, mode) as stream:
                yield stream


class _OverwrittenFile(io.BufferedWriter):
    """A file that ends where writing it ended."""

    def close(self) -> None:
        if not self.closed:
            self.truncate()
        super().close()


class StateCopy:
    """A copy of a state to write while training goes on; its memory is used again for the next one."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int], torch.Tensor] = {}

    @torch.no_grad()
    def take(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return `state` with every tensor copied to the host. The copy before is overwritten."""
        with _quiet():
            return {name: self._copied(name, value) for name, value in state.items()}

    def _copied(self, name: str, value: torch.Tensor) -> torch.Tensor:
        from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

        if not isinstance(value, ShardedTensor):
            return self._copied_part(name, 0, value)
        shards = [
            Shard(self._copied_part(name, number, shard.tensor), shard.metadata)
            for number, shard in enumerate(value.local_shards())
        ]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, sharded_tensor_metadata=value.metadata(), process_group=value._process_group
        )

    def _copied_part(self, name: str, number: int, part: torch.Tensor) -> torch.Tensor:
        copy = self._parts.get((name, number))
        if copy is None:
            copy = self._parts[name, number] = torch.empty_like(part, device="cpu")
        return copy.copy_(part)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # torchrec 1.8 shards with ShardedTensor, which torch 2.13 deprecates on every access.
        warnings.simplefilter("ignore", FutureWarning)
        # Reading a checkpoint in a process of its own is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
