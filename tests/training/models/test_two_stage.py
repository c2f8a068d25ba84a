"""The two-stage model's losses, computed by hand, and how its parts fit."""

import math
from dataclasses import replace

import pytest
import torch

from cluster.errors import ConfigError
from embeddings.batch import PAD, Batch
from training.models.ranker import CLICK, RATING
from training.models.two_stage import Losses, ModelConfig, TwoStage

DIM = 4
Q = (1 / 2, 1 / 4, 1 / 8, 1 / 8)
"""With which probability each of four items is drawn as a negative."""


@pytest.fixture
def model() -> TwoStage:
    """Its history encoder says nothing, so that the user vector is the user's row."""
    torch.manual_seed(0)
    model = TwoStage(ModelConfig(history="pool", dropout=0.0, user_row_dropout=0.0), DIM, text_dim=2).eval()
    torch.nn.init.zeros_(model.bilinear.weight)
    return model


def batch(
    *,
    targets: list[int],
    negatives: list[int],
    ratings: list[float] | None = None,
    q: tuple[float, ...] = Q,
    weights: list[float] | None = None,
) -> Batch:
    """One user with a history of item 0 whose next items are `targets`; every row is named by its own index."""
    length = len(targets)
    return Batch(
        item_rows_N=torch.arange(len(q)),
        text_NE=torch.zeros(len(q), 2),
        log_q_N=torch.tensor(q).log(),
        user_row_B=torch.tensor([0]),
        has_user_B=torch.tensor([True]),
        history_BL=torch.zeros(1, length, dtype=torch.int64),
        present_BL=torch.ones(1, length, dtype=torch.bool),
        kind_BL=torch.zeros(1, length, dtype=torch.int64),
        value_BL=torch.full((1, length), math.nan),
        ts_BL=torch.zeros(1, length, dtype=torch.int64),
        target_BL=torch.tensor([targets]),
        target_rating_BL=torch.tensor([ratings or [math.nan] * length]),
        weight_BL=torch.tensor([weights or [1.0] * length]),
        negative_S=torch.tensor(negatives),
    )


def losses(model: TwoStage, scores: tuple[float, ...], of: Batch) -> Losses:
    """Return the losses where the user's score of each item is log of `scores`."""
    item_ND = torch.zeros(len(scores), DIM)
    item_ND[:, 0] = torch.tensor(scores).log()
    return model(of, item_ND, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_sampled_softmax_divides_by_the_probability_of_the_draw(model: TwoStage) -> None:
    # e^s / Q: target 0 is 1 / (1/2) = 2, negative 1 is 3 / (1/4) = 12, negative 2 is 1 / (1/8) = 8: −log 2/22.
    found = losses(model, (1, 3, 1, 1), batch(targets=[0], negatives=[1, 2]))
    assert found.retrieval.item() == pytest.approx(math.log(11), rel=1e-6)


def test_every_item_once_is_the_full_softmax(model: TwoStage) -> None:
    # e^s: 1 of 1 + 3 + 2 + 4, in whatever order the items come.
    found = losses(model, (1, 3, 2, 4), batch(targets=[0], negatives=[2, 0, 3, 1], q=(1 / 4,) * 4))
    assert found.retrieval.item() == pytest.approx(math.log(10), rel=1e-6)


def test_bce_asks_of_target_and_draws_each_whether_it_was_chosen(model: TwoStage) -> None:
    # Odds e^s / (S Q) of S = 2 draws: target 1 / (2 · 1/2) = 1, draws 3 / (2 · 1/4) = 6 and 1 / (2 · 1/8) = 4:
    # −log of 1/2, of 1/7 and of 1/5. A draw of the target counts for nothing.
    model.config = replace(model.config, retrieval="bce")
    found = losses(model, (1, 3, 1, 1), batch(targets=[0], negatives=[1, 2]))
    assert found.retrieval.item() == pytest.approx(math.log(2 * 7 * 5), rel=1e-6)
    found = losses(model, (1, 3, 1, 1), batch(targets=[0], negatives=[1, 0]))
    assert found.retrieval.item() == pytest.approx(math.log(2 * 7), rel=1e-6)


def test_a_perturbation_is_learned_where_it_hurts_most(model: TwoStage) -> None:
    # The user's vector is (1, 0, 0, 0), the target's 0 and the draw's (log 3, 0, 0, 0), each drawn by 1/4: the loss is
    # log(1 + e^margin) of the margin log 3. Items move by r along ∓ the user's vector, the user by r along the draw's.
    model.config = replace(model.config, adversarial_radius=0.1, adversarial_weight=0.5)
    of = batch(targets=[0], negatives=[1], q=(1 / 4,) * 4)
    assert losses(model, (1, 3, 1, 1), of).total.item() == pytest.approx(
        sum(losses(model, (1, 3, 1, 1), of)[1:]).item()
    )  # where nothing is learned, nothing is moved
    model.train()
    found = losses(model, (1, 3, 1, 1), of)
    margin = 1.1 * (math.log(3) + 0.1) + 1.1 * 0.1
    expected = found.retrieval + found.click + found.rating + 0.5 * math.log1p(math.exp(margin))
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_hidden_item_rows_leave_the_text_to_speak(model: TwoStage) -> None:
    model.config = replace(model.config, item_row_dropout=0.999999)
    of = batch(targets=[0], negatives=[1], q=(1 / 4,) * 4)
    assert losses(model, (1, 3, 1, 1), of).retrieval.item() == pytest.approx(math.log(4))  # not while it answers
    model.train()
    # No text either: both scores are 0.
    assert losses(model, (1, 3, 1, 1), of).retrieval.item() == pytest.approx(math.log(2))


def test_a_draw_of_the_target_itself_is_no_negative(model: TwoStage) -> None:
    # Negatives 0 fall away: 2 / (2 + 12).
    found = losses(model, (1, 3, 1, 1), batch(targets=[0], negatives=[0, 1, 0]))
    assert found.retrieval.item() == pytest.approx(math.log(7), rel=1e-6)


def test_the_retrieval_loss_is_the_mean_over_targets(model: TwoStage) -> None:
    # Target 0: 2 / (2 + 12). Target 3: 1 / (1/8) = 8, so 8 / (8 + 12).
    found = losses(model, (1, 3, 1, 1), batch(targets=[0, 3], negatives=[1]))
    assert found.retrieval.item() == pytest.approx((math.log(7) + math.log(5 / 2)) / 2, rel=1e-6)


def test_a_target_counts_as_much_as_it_weighs(model: TwoStage) -> None:
    whole = [losses(model, (1, 3, 1, 1), batch(targets=[0, 3], negatives=[1], weights=w)) for w in ([1, 0.0], [0.0, 1])]
    half = losses(model, (1, 3, 1, 1), batch(targets=[0, 3], negatives=[1], ratings=[2.0, 4.0], weights=[1, 0.5]))
    assert half.retrieval.item() == pytest.approx(whole[0].retrieval.item() + 0.5 * whole[1].retrieval.item(), rel=1e-6)
    assert half.click.item() == pytest.approx(whole[0].click.item() + 0.5 * whole[1].click.item(), rel=1e-6)


@pytest.mark.parametrize("q", [Q, (1 / 4,) * 4])
def test_the_draws_partition_is_unbiased_whatever_they_are_drawn_by(model: TwoStage, q: tuple[float, ...]) -> None:
    # One draw: e^loss − 1 = (e^s / Q)_draw / (e^s / Q)_target, whose mean over draws is Σ e^s of the others, 5.
    mean = 0.0
    for drawn in (1, 2, 3):
        found = losses(model, (1, 3, 1, 1), batch(targets=[0], negatives=[drawn], q=q))
        mean += q[drawn] * (found.retrieval.exp().item() - 1) / q[0]
    assert mean == pytest.approx(5, rel=1e-5)


def test_click_is_noise_contrastive_estimation(model: TwoStage) -> None:
    # log p = s − log Z with Z ≈ (12 + 8) / 2 = 10; against C = 2 draws the odds are p / (2 Q).
    # Target 0: (1/10) / (2 · 1/2) = 1/10. Draw 1: (3/10) / (2 · 1/4) = 3/5. Draw 2: (1/10) / (2 · 1/8) = 2/5.
    # −log of 1/11, of 5/8 and of 5/7.
    found = losses(model, (1, 3, 1, 1), batch(targets=[0], negatives=[1, 2]))
    assert found.click.item() == pytest.approx(math.log(11) + math.log(8 / 5) + math.log(7 / 5), rel=1e-5)


def test_click_does_not_count_a_draw_of_the_target(model: TwoStage) -> None:
    # Z ≈ 12 / 2 = 6 over two draws, one of them masked. Target: (1/6) / (2 · 1/2) = 1/6; draw 1: (1/2) / (1/2) = 1.
    found = losses(model, (1, 3, 1, 1), batch(targets=[0], negatives=[0, 1]))
    assert found.click.item() == pytest.approx(math.log(7) + math.log(2), rel=1e-5)


def test_rating_is_the_squared_error_in_stars_over_what_was_rated(model: TwoStage) -> None:
    # An untrained head says 3 stars: (5 − 3)² and (2 − 3)² over two ratings; the third target has none.
    found = losses(model, (1, 3, 1, 1), batch(targets=[1, 2, 3], negatives=[0], ratings=[5.0, math.nan, 2.0]))
    assert found.rating.item() == pytest.approx(5 / 2)
    assert found.total.item() == pytest.approx((found.retrieval + found.click + found.rating).item())


def test_a_batch_with_nothing_to_learn_costs_nothing(model: TwoStage) -> None:
    found = losses(model, (1, 3, 1, 1), batch(targets=[PAD], negatives=[1, 2]))
    assert [loss.item() for loss in found] == [0, 0, 0, 0]


def test_losses_stay_finite_where_every_draw_is_the_target(model: TwoStage) -> None:
    item_ND, user_BD = torch.randn(1, DIM, requires_grad=True), torch.randn(1, DIM)
    found: Losses = model(batch(targets=[0], negatives=[0, 0], q=(1.0,)), item_ND, user_BD)
    found.total.backward()
    assert all(loss.isfinite() for loss in found)
    assert item_ND.grad is not None
    assert item_ND.grad.isfinite().all()


def test_the_ranker_s_gradient_does_not_reach_the_towers(model: TwoStage) -> None:
    item_ND, user_BD = torch.randn(4, DIM, requires_grad=True), torch.randn(1, DIM, requires_grad=True)
    found: Losses = model(batch(targets=[1], negatives=[2, 3], ratings=[5.0]), item_ND, user_BD)
    (found.click + found.rating).backward()
    assert item_ND.grad is None
    assert user_BD.grad is None
    assert model.ranker.heads.weight.grad is not None


def test_a_new_item_is_placed_by_its_text(model: TwoStage) -> None:
    text_NE = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    placed = model.item_vectors(torch.zeros(2, DIM), text_NE)
    assert placed.count_nonzero() == 2 * DIM
    torch.testing.assert_close(model.item_vectors(torch.ones(2, DIM), text_NE) - placed, torch.ones(2, DIM))


def test_a_user_without_a_row_is_read_from_the_history_alone(model: TwoStage) -> None:
    torch.nn.init.eye_(model.bilinear.weight)
    item_ND, known = torch.randn(4, DIM), batch(targets=[1], negatives=[2, 3])
    stranger = replace(known, has_user_B=torch.tensor([False]))
    rows = [torch.randn(1, DIM), torch.randn(1, DIM)]
    assert model(known, item_ND, rows[0]).retrieval != model(known, item_ND, rows[1]).retrieval
    assert model(stranger, item_ND, rows[0]).retrieval == model(stranger, item_ND, rows[1]).retrieval


def test_user_rows_are_hidden_in_training_only(model: TwoStage) -> None:
    model.config = replace(model.config, user_row_dropout=0.75)
    rows_BD, known_B = torch.ones(4_000, DIM), torch.ones(4_000, dtype=torch.bool)
    assert torch.equal(model.eval()._visible(rows_BD, known_B), rows_BD)
    shown = model.train()._visible(rows_BD, known_B)[:, 0]
    assert shown.mean().item() == pytest.approx(1 / 4, abs=0.03)


def test_untrained_the_order_is_that_of_retrieval(model: TwoStage) -> None:
    user_BD, item_BKD = torch.randn(3, DIM), torch.randn(3, 5, DIM)
    score_BK = (item_BKD * user_BD.unsqueeze(1)).sum(-1)
    torch.testing.assert_close(model.order(user_BD, item_BKD), score_BK)


def test_stars_weigh_in_the_order_as_the_recipe_says(model: TwoStage) -> None:
    torch.nn.init.normal_(model.ranker.heads.weight)
    user_D, item_KD = torch.randn(DIM), torch.randn(5, DIM)
    heads = model.ranker(user_D.expand(5, -1), item_KD, item_KD @ user_D)
    model.config = replace(model.config, rating_weight=0.5)
    torch.testing.assert_close(model.order(user_D, item_KD), heads[CLICK] + heads[RATING] / 2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"history": "cnn"}, r"model\.history='cnn': is none of pool, lstm, transformer, hstu"),
        ({"retrieval": "hinge"}, r"model\.retrieval='hinge': is none of softmax, bce"),
        ({"adversarial_radius": -1.0}, r"model\.adversarial_radius=-1\.0: must be 0 or more"),
        ({"interaction": "sum"}, r"model\.interaction='sum': is none of mlp, dcn, bilinear, deepfm"),
        ({"layers": 0}, r"model\.layers=0"),
        ({"dropout": 1.0}, r"model\.dropout=1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**setting)


def test_heads_that_do_not_divide_the_dimension_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.heads=3: must divide tables\.dim=8"):
        TwoStage(ModelConfig(heads=3), dim=8, text_dim=2)
