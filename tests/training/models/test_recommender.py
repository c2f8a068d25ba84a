"""The model with its tables, in a process group of one; over two workers: tests/training/test_step.py."""

import pytest
import torch

from embeddings.tables import TablesConfig, gather_tables
from embeddings.vocabulary import Vocabulary
from training.models.recommender import build_recommender, dense_part
from training.models.two_stage import ModelConfig, TwoStage
from training.step import dense_parameters

pytestmark = pytest.mark.usefixtures("process_group")


def build(seed: int) -> torch.nn.Module:
    return build_recommender(
        TablesConfig(dim=4, spare_rows=2),
        ModelConfig(history="pool", max_history=4),
        Vocabulary(["a", "b"], 4),
        Vocabulary(["u"], 3),
        text_dim=3,
        device=torch.device("cpu"),
        seed=seed,
    )


def test_tables_hold_the_vocabularies_spare_rows_too() -> None:
    whole = gather_tables(build(seed=1), ["item", "user"])
    assert {name: tuple(table.shape) for name, table in whole.items()} == {"item": (4, 4), "user": (3, 4)}


def test_the_dense_part_is_the_two_stage_model_with_its_own_names() -> None:
    model = build(seed=1)
    dense = dense_part(model)
    assert isinstance(dense, TwoStage)
    assert dict(dense_parameters(model)).keys() == dict(dense.named_parameters()).keys()


def test_the_seed_decides_the_dense_weights() -> None:
    first, same, other = (dense_part(build(seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["project.weight"], other["project.weight"])
