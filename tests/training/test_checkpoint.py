"""A checkpoint goes from any number of workers to any other, and training goes on as if nothing had happened."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from cluster.errors import DataError
from training.checkpoint import read_checkpoint

Dump = Callable[[int, str], dict[str, torch.Tensor]]


def worst_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], prefix: str) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one if name.startswith(prefix))


@pytest.mark.parametrize(("writer", "reader"), [(2, 1), (1, 2)])
def test_loaded_by_another_number_of_workers_it_is_bit_equal(sharded: Dump, writer: int, reader: int) -> None:
    written, loaded = sharded(writer, "first_step"), sharded(reader, "loaded")
    assert written.keys() == loaded.keys()
    assert {"item", "user", "item.momentum", "user.momentum"} < written.keys()
    assert [name for name in written if not torch.equal(written[name], loaded[name])] == []


@pytest.mark.parametrize(("writer", "reader"), [(2, 1), (1, 2)])
def test_the_step_after_loading_is_the_step_that_would_have_come(sharded: Dump, writer: int, reader: int) -> None:
    stayed, resumed = sharded(writer, "second_step"), sharded(reader, "continued")
    for prefix, bar in {"item": 1e-5, "user": 1e-5, "dense_optimizer.": 1e-6, "dense.": 2e-4}.items():
        assert worst_difference(stayed, resumed, prefix) <= bar, prefix


def test_the_loaded_state_replaced_another_one(sharded: Dump) -> None:
    assert worst_difference(sharded(1, "second_step"), sharded(1, "loaded"), "item") > 1e-3


@pytest.mark.parametrize("writer", [1, 2])
def test_one_process_reads_it_whole(sharded: Dump, checkpoint_of: Callable[[int], Path], writer: int) -> None:
    expected = {
        name if name.startswith("dense") else f"tables.{name}": value
        for name, value in sharded(writer, "first_step").items()
    }
    whole = read_checkpoint(checkpoint_of(writer))
    assert whole.keys() == expected.keys()
    assert [name for name in whole if not torch.equal(whole[name], expected[name])] == []


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}: is not a checkpoint"):
        read_checkpoint(tmp_path)
