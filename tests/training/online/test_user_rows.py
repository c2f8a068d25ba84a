"""A user's row follows their interactions by the exact gradient, and moves nobody else's."""

import pytest
import torch

from cluster.log import Interaction
from embeddings.batch import PAD
from embeddings.tables import ITEM, USER
from embeddings.vocabulary import Vocabulary
from training.models.two_stage import ModelConfig, TwoStage
from training.online.predictions import Towers, predict
from training.online.sequences import LiveHistory, build_live_sequences
from training.online.user_rows import learn_user_rows

ITEMS = Vocabulary(["a", "b", "c", "d", "e"], 5)


@pytest.fixture
def dense() -> TwoStage:
    torch.manual_seed(0)
    return TwoStage(ModelConfig(max_history=4, layers=1, ranker_hidden=4), 8, text_dim=3).eval()


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {ITEM: torch.randn(5, 8, generator=generator), USER: torch.randn(3, 8, generator=generator)}


TEXT = torch.eye(5, 3)


def sequences_of(*users: tuple[int, str], first_new_seq: int = 1, weights: dict[int, float] | None = None):
    histories = [
        LiveHistory(row, [Interaction(item, "click", None, n, n) for n, item in enumerate(items, 1)], first_new_seq)
        for row, items in users
    ]
    return build_live_sequences(histories, ITEMS, weights)


def test_one_interaction_moves_the_row_down_the_gradient_of_its_loss(dense, rows):
    sequences = sequences_of((1, "abc"), first_new_seq=3)
    towers = Towers.build(dense, rows, TEXT)
    item_ID = towers.item_ID
    row_D = rows[USER][1].clone().requires_grad_()
    user_1D = towers.before_targets(sequences).detach().clone() + row_D
    (-(user_1D @ item_ID.T).log_softmax(1)[0, 2]).backward()  # item c is row 2
    expected_D = row_D.detach() - 0.5 / item_ID.square().sum(1).mean() * row_D.grad
    learn_user_rows(Towers.build(dense, rows, TEXT), sequences, rate=0.5)
    torch.testing.assert_close(rows[USER][1], expected_D)


def test_interactions_of_one_step_are_learned_one_after_the_other(dense, rows):
    apart = {name: tensor.clone() for name, tensor in rows.items()}
    learn_user_rows(Towers.build(dense, rows, TEXT), sequences_of((0, "abcd"), (2, "ea")), rate=0.5)
    for alone in (2, 3, 4):  # number of the one that counts
        weights = {number: float(number == alone) for number in (2, 3, 4)}
        learn_user_rows(
            Towers.build(dense, apart, TEXT), sequences_of((0, "abcd"), (2, "ea"), weights=weights), rate=0.5
        )
    torch.testing.assert_close(rows[USER], apart[USER])


def test_what_was_chosen_is_held_more_likely_afterwards(dense, rows):
    sequences = sequences_of((0, "abcd"))
    before = predict(Towers.build(dense, rows, TEXT), sequences).loss_P
    for _ in range(20):
        learn_user_rows(Towers.build(dense, rows, TEXT), sequences, rate=0.1)
    assert predict(Towers.build(dense, rows, TEXT), sequences).loss_P.sum() < before.sum()


def test_nobody_else_moves_and_no_item_does(dense, rows):
    before = {name: tensor.clone() for name, tensor in rows.items()}
    learn_user_rows(Towers.build(dense, rows, TEXT), sequences_of((1, "ab"), (PAD, "cd")), rate=0.5)
    assert torch.equal(rows[ITEM], before[ITEM])
    assert torch.equal(rows[USER][[0, 2]], before[USER][[0, 2]])
    assert not torch.equal(rows[USER][1], before[USER][1])


def test_an_interaction_counts_by_its_weight(dense, rows):
    before_D = rows[USER][1].clone()
    half = {name: tensor.clone() for name, tensor in rows.items()}
    none = {name: tensor.clone() for name, tensor in rows.items()}
    learn_user_rows(Towers.build(dense, rows, TEXT), sequences_of((1, "ab"), first_new_seq=2), rate=0.5)
    for found, weight in ((half, 0.5), (none, 0.0)):
        learn_user_rows(
            Towers.build(dense, found, TEXT), sequences_of((1, "ab"), first_new_seq=2, weights={2: weight}), rate=0.5
        )
    torch.testing.assert_close(half[USER][1] - before_D, (rows[USER][1] - before_D) / 2)
    assert torch.equal(none[USER][1], before_D)
