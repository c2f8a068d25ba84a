"""Embedding tables: their settings, and whole tables in and out of a process group of one.

Lookup, steps and resharding over two workers: tests/training/test_step.py and test_checkpoint.py.
"""

from typing import Any

import pytest
import torch
from torch import nn

from cluster.errors import ConfigError, EngineError
from embeddings.tables import TablesConfig, build_tables, gather_tables, load_tables, local_shards, shard

CPU = torch.device("cpu")


class Holder(nn.Module):
    """Tables within a module, as a recommender holds them."""

    def __init__(self, rows: dict[str, int], dim: int = 4) -> None:
        super().__init__()
        self.tables = build_tables(rows, dim, learning_rate=0.1)


@pytest.mark.usefixtures("process_group")
def test_rows_start_at_zero() -> None:
    sharded = shard(Holder({"item": 5, "user": 3}), TablesConfig(dim=4), CPU)
    whole = gather_tables(sharded, ["item", "user", "item.momentum"])
    assert {name: (tuple(t.shape), t.abs().sum().item()) for name, t in whole.items()} == {
        "item": ((5, 4), 0.0),
        "user": ((3, 4), 0.0),
        "item.momentum": ((5,), 0.0),
    }


@pytest.mark.usefixtures("process_group")
def test_a_table_loaded_is_the_table_gathered() -> None:
    sharded = shard(Holder({"item": 5, "user": 3}), TablesConfig(dim=4), CPU)
    given = {"item": torch.randn(5, 4), "item.momentum": torch.rand(5)}
    load_tables(sharded, given)
    whole = gather_tables(sharded, ["item", "item.momentum", "user"])
    assert torch.equal(whole["item"], given["item"])
    assert torch.equal(whole["item.momentum"], given["item.momentum"])
    assert whole["user"].count_nonzero() == 0


@pytest.mark.usefixtures("process_group")
def test_rows_beyond_a_shorter_table_stay_as_they_are() -> None:
    sharded = shard(Holder({"item": 5}), TablesConfig(dim=4), CPU)
    load_tables(sharded, {"item": torch.ones(5, 4)})
    load_tables(sharded, {"item": torch.full((2, 4), 7.0)})
    assert gather_tables(sharded, ["item"])["item"][:, 0].tolist() == [7, 7, 1, 1, 1]


@pytest.mark.usefixtures("process_group")
def test_writing_into_a_local_shard_writes_the_table() -> None:
    sharded = shard(Holder({"item": 5}), TablesConfig(dim=4), CPU)
    (piece,) = local_shards(sharded)["item"]
    piece.values[3] = 2.0
    assert (piece.first_row, piece.first_column) == (0, 0)
    assert gather_tables(sharded, ["item"])["item"][:, 0].tolist() == [0, 0, 0, 2, 0]


@pytest.mark.usefixtures("process_group")
def test_tables_larger_than_memory_are_an_error_that_says_so() -> None:
    with pytest.raises(EngineError, match="tables do not fit 1 workers"):
        shard(Holder({"item": 10**12}), TablesConfig(dim=4), CPU)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dim": 6}, "tables.dim=6: must be a multiple of 4; try 8"),
        ({"dim": 0}, "tables.dim=0: must be a multiple of 4; try 4"),
        ({"learning_rate": 0.0}, "tables.learning_rate=0.0"),
        ({"spare_rows": -1}, "tables.spare_rows=-1"),
        ({"memory_fraction": 1.5}, "tables.memory_fraction=1.5"),
        ({"sharding": ()}, "tables.sharding=\\[\\]: must be some of row_wise, table_wise, column_wise"),
        ({"sharding": ("data_parallel",)}, "tables.sharding=\\['data_parallel'\\]: must be some of row_wise"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TablesConfig(**setting)
