"""Several models in one: whose rows are whose, and what is averaged."""

import math
from dataclasses import replace

import pytest
import torch

from cluster.errors import ConfigError
from embeddings.batch import Batch
from training.models.ensemble import Ensemble, build_two_stage
from training.models.ranker import CLICK
from training.models.two_stage import ModelConfig, Stages, TwoStage

MEMBERS, DIM, TEXT_DIM, ITEMS, LENGTH = 2, 8, 3, 5, 4
CONFIG = ModelConfig(members=MEMBERS, dropout=0.0, user_row_dropout=0.0)


@pytest.fixture
def ensemble() -> Ensemble:
    """Two members, each with half of every row."""
    torch.manual_seed(0)
    model = build_two_stage(CONFIG, DIM, TEXT_DIM)
    assert isinstance(model, Ensemble)
    return model.eval()


@pytest.fixture
def members(ensemble: Ensemble) -> list[TwoStage]:
    """The same as models of their own."""
    alone = []
    for number, member in enumerate(ensemble.members):
        model = TwoStage(replace(CONFIG, members=1), DIM // MEMBERS, TEXT_DIM).eval()
        own = half(ensemble.project.weight.T, number).T
        model.load_state_dict({"project.weight": own} | dict(member.state_dict()))
        alone.append(model)
    return alone


def half(rows: torch.Tensor, number: int) -> torch.Tensor:
    """Return one member's share of rows."""
    return rows[..., number * DIM // MEMBERS : (number + 1) * DIM // MEMBERS]


def batch() -> Batch:
    """One user with four interactions, each but the last with the next as its target."""
    return Batch(
        item_rows_N=torch.arange(ITEMS),
        text_NE=torch.rand(ITEMS, TEXT_DIM, generator=torch.Generator().manual_seed(1)),
        log_q_N=torch.full((ITEMS,), 1 / ITEMS).log(),
        user_row_B=torch.tensor([0]),
        has_user_B=torch.tensor([True]),
        history_BL=torch.tensor([[0, 1, 2, 3]]),
        present_BL=torch.ones(1, LENGTH, dtype=torch.bool),
        kind_BL=torch.zeros(1, LENGTH, dtype=torch.int64),
        value_BL=torch.full((1, LENGTH), math.nan),
        ts_BL=torch.arange(LENGTH).unsqueeze(0) * 60,
        target_BL=torch.tensor([[1, 2, 3, 4]]),
        target_rating_BL=torch.full((1, LENGTH), math.nan),
        weight_BL=torch.ones(1, LENGTH),
        negative_S=torch.arange(ITEMS),
    )


def vectors(model: TwoStage, row_ID: torch.Tensor, user_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the items' vectors and the user's at the end."""
    given = batch()
    item_ID = model.item_vectors(row_ID, given.text_NE)
    user_BLD = model.user_vectors(
        item_ID[given.history_BL], given.kind_BL, given.value_BL, given.ts_BL, given.present_BL, user_D.unsqueeze(0)
    )
    return item_ID, user_BLD[0, -1]


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of items and of the user."""
    drawn = torch.Generator().manual_seed(2)
    return torch.randn(ITEMS, DIM, generator=drawn), torch.randn(DIM, generator=drawn)


@torch.no_grad()
def test_scores_are_the_means_of_the_members(
    ensemble: Ensemble, members: list[TwoStage], rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    row_ID, user_D = rows
    item_ID, whole_D = vectors(ensemble, row_ID, user_D)
    alone = [vectors(model, half(row_ID, n), half(user_D, n)) for n, model in enumerate(members)]
    mean_I = torch.stack([item @ user for item, user in alone]).mean(0)
    torch.testing.assert_close(item_ID @ whole_D, mean_I)


@torch.no_grad()
def test_heads_add_the_mean_of_what_the_members_correct(
    ensemble: Ensemble, members: list[TwoStage], rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for member in ensemble.members:
        assert isinstance(member, Stages)
        torch.nn.init.normal_(member.ranker.heads.weight)
    for model, member in zip(members, ensemble.members, strict=True):
        model.load_state_dict(dict(member.state_dict()), strict=False)
    row_ID, user_D = rows
    item_ID, whole_D = vectors(ensemble, row_ID, user_D)
    corrected_I = torch.stack(
        [
            model.order(user, item) - item @ user
            for n, model in enumerate(members)
            for item, user in [vectors(model, half(row_ID, n), half(user_D, n))]
        ]
    ).mean(0)
    assert corrected_I.abs().min() > 0.01
    torch.testing.assert_close(ensemble.order(whole_D, item_ID), item_ID @ whole_D + corrected_I)


def test_losses_are_the_means_of_the_members(
    ensemble: Ensemble, members: list[TwoStage], rows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    row_ID, user_D = rows
    found = ensemble(batch(), row_ID, user_D.unsqueeze(0))
    alone = [model(batch(), half(row_ID, n), half(user_D, n).unsqueeze(0)) for n, model in enumerate(members)]
    for name in ("total", "retrieval", CLICK, "rating"):
        mean = torch.stack([getattr(losses, name) for losses in alone]).mean()
        torch.testing.assert_close(getattr(found, name), mean)


def test_members_start_apart_and_learn_apart(ensemble: Ensemble, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    first, second = (member.state_dict() for member in ensemble.members)
    assert not torch.equal(first["history.blocks.0.qkv.weight"], second["history.blocks.0.qkv.weight"])
    given, user_D = batch(), rows[1]
    row_ID = rows[0].clone().requires_grad_()
    item_ND = ensemble.item_vectors(row_ID, given.text_NE)
    member, own = ensemble.members[0], ensemble._split(item_ND)[0]
    assert isinstance(member, Stages)
    member.losses(given, own, half(user_D, 0).unsqueeze(0)).total.backward()
    assert row_ID.grad is not None
    assert half(row_ID.grad, 0).any()
    assert not half(row_ID.grad, 1).any()


@pytest.mark.parametrize(
    ("config", "dim", "said"),
    [
        (CONFIG, 7, "model.members=2: must divide tables.dim=7"),
        (replace(CONFIG, heads=3), 8, "model.heads=3: must divide tables.dim/model.members=4"),
    ],
)
def test_shares_that_do_not_come_out_even_are_refused(config: ModelConfig, dim: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_two_stage(config, dim, TEXT_DIM)
