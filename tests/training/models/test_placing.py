"""Items with few interactions are drawn to where their texts say, in figures that can be worked out by hand."""

import numpy as np
import pytest
import torch

from cluster.config import load_recipe
from cluster.manifest import VersionRef
from training.models.placing import (
    LEFT,
    PLACINGS,
    PROJECT,
    Placing,
    Regression,
    draw_to_text,
    place_items,
    regress_on_text,
)
from training.models.two_stage import TEXT_SCALE, ModelConfig, TwoStage
from training.models.version import COUNT_ROWS, ITEM_ROWS, TEXT_ROWS, VersionState

TEXT_IE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
"""Items 0 and 1 are told alike, item 3 has no text."""
COUNT_I = torch.tensor([9, 1, 0, 1])
VECTOR_ID = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 5.0], [3.0, 3.0]])
TOLD = regress_on_text(VECTOR_ID, TEXT_IE, COUNT_I)


def test_an_item_is_drawn_by_its_text_as_far_as_it_has_few_interactions() -> None:
    drawn, text_ED = draw_to_text(VECTOR_ID, TEXT_IE, COUNT_I, Placing(prior=3.0, ridge=1e-9), TOLD)
    # W of the first word: (9 · [2, 0] + 1 · [0, 1]) / 10; of the second nothing is known, as nobody met item 2.
    torch.testing.assert_close(text_ED, torch.tensor([[1.8, 0.1], [0.0, 0.0]]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn[0], torch.tensor([(9 * 2 + 3 * 1.8) / 12, 3 * 0.1 / 12]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn[1], torch.tensor([3 * 1.8 / 4, (1 + 3 * 0.1) / 4]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn[2], torch.zeros(2), rtol=0, atol=1e-4)
    assert drawn[3].tolist() == [3.0, 3.0]  # nothing is told of it


def test_the_ridge_is_a_share_of_the_mean_square() -> None:
    # Mean square of one column: (1 + 4) · weight 2 = 10; half of it: W = 2 · (1 · 3 + 2 · 6) / (10 + 5) = 2.
    found = Regression.of(np.array([[1.0], [2.0]]), np.array([[3.0], [6.0]]), np.array([2.0, 2.0])).solve(0.5)
    assert found.tolist() == [[pytest.approx(2.0)]]


@pytest.mark.parametrize("size", [1, 3])
def test_blocks_of_items_add_up(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(7, 3)), rng.normal(size=(7, 2)), rng.random(7)
    whole = Regression.of(x, y, weight).solve(0.1)
    monkeypatch.setattr("training.models.placing.BLOCK", size)
    np.testing.assert_allclose(Regression.of(x, y, weight).solve(0.1), whole, rtol=1e-5)


@pytest.fixture
def state() -> VersionState:
    dense = TwoStage(ModelConfig(heads=1), 4, text_dim=2).state_dict()
    rng = torch.Generator().manual_seed(0)
    return VersionState(
        ref=VersionRef(0),
        recipe=load_recipe("movielens"),
        learned_seq=0,
        item_ids=[f"i{n}" for n in range(4)],
        item_texts=["a", "a", "b", ""],
        user_ids=[],
        rows={ITEM_ROWS: torch.randn(4, 4, generator=rng), TEXT_ROWS: TEXT_IE, COUNT_ROWS: COUNT_I},
        dense=dense,
        optimizer={f"{PROJECT}.exp_avg": torch.ones(4, 2), "bilinear.weight.exp_avg": torch.ones(4, 4)},
    )


def vectors(state: VersionState) -> torch.Tensor:
    return state.rows[ITEM_ROWS] + TEXT_SCALE * state.rows[TEXT_ROWS] @ state.dense[PROJECT].T


def test_a_version_has_its_items_where_they_were_drawn_and_new_ones_where_their_texts_say(state) -> None:
    placing = Placing(prior=5.0, ridge=0.3)
    placed = place_items(state, placing)
    drawn, text_ED = draw_to_text(
        vectors(state), TEXT_IE, COUNT_I, placing, regress_on_text(vectors(state), TEXT_IE, COUNT_I)
    )
    torch.testing.assert_close(vectors(placed), drawn)
    torch.testing.assert_close(TEXT_SCALE * TEXT_IE @ placed.dense[PROJECT].T, TEXT_IE @ text_ED)  # without a row
    assert not placed.optimizer[f"{PROJECT}.exp_avg"].any()
    assert placed.optimizer["bilinear.weight.exp_avg"].all()
    assert set(placed.dense) == set(state.dense)


def test_left_where_they_are_nothing_changes(state) -> None:
    assert place_items(state, LEFT) is state
    assert draw_to_text(VECTOR_ID, TEXT_IE, COUNT_I, LEFT, TOLD)[0] is VECTOR_ID
    assert PLACINGS[0] == LEFT
    assert len(set(PLACINGS)) == len(PLACINGS)
