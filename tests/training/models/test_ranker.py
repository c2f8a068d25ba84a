"""The ranker: one contract for every interaction."""

import pytest
import torch

from training.models.ranker import CLICK, HEADS, INTERACTIONS, RATING, RATING_CENTRE, Ranker, build_interaction

DIM = 6


@pytest.fixture(params=INTERACTIONS)
def ranker(request: pytest.FixtureRequest) -> Ranker:
    torch.manual_seed(0)
    return Ranker(DIM, hidden=8, interaction=request.param, dropout=0.5).eval()


class TestEveryInteraction:
    def test_untrained_it_changes_nothing(self, ranker: Ranker) -> None:
        score = torch.randn(3, 4)
        heads = ranker(torch.randn(3, 4, DIM), torch.randn(3, 4, DIM), score)
        assert heads.keys() == set(HEADS)
        assert torch.equal(heads[CLICK], score)
        assert torch.equal(heads[RATING], torch.full((3, 4), RATING_CENTRE))

    def test_leading_dimensions_are_free(self, ranker: Ranker) -> None:
        torch.nn.init.normal_(ranker.heads.weight)
        user, item, score = torch.randn(2, 3, 4, DIM), torch.randn(2, 3, 4, DIM), torch.randn(2, 3, 4)
        many = ranker(user, item, score)
        one = ranker(user[1, 2, 3], item[1, 2, 3], score[1, 2, 3])
        for head in HEADS:
            torch.testing.assert_close(many[head][1, 2, 3], one[head])

    def test_user_and_item_both_matter(self, ranker: Ranker) -> None:
        torch.nn.init.normal_(ranker.heads.weight)
        user, item, score = torch.randn(DIM), torch.randn(DIM), torch.zeros(())
        heads = [
            ranker(*pair, score)[CLICK]
            for pair in ((user, item), (user, item * torch.randn(DIM)), (user * torch.randn(DIM), item))
        ]
        assert len({head.item() for head in heads}) == 3

    def test_it_can_learn_what_the_score_does_not_say(self, ranker: Ranker) -> None:
        # Liked where the sign of the first entries agrees: no linear function of the score, 0, tells them apart.
        generator = torch.Generator().manual_seed(1)
        user, item = torch.randn(400, DIM, generator=generator), torch.randn(400, DIM, generator=generator)
        liked = (user[:, 0] * item[:, 0] > 0).float()
        adam = torch.optim.Adam(ranker.parameters(), lr=0.03)
        for _ in range(150):
            logit = ranker(user, item, torch.zeros(400))[CLICK]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, liked)
            adam.zero_grad()
            loss.backward()
            adam.step()
        assert loss.item() < 0.3


def test_interactions_are_as_written() -> None:
    user, item = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert build_interaction("mlp", 2)(user, item).tolist() == [1, 2, 3, 5, 3, 10]
    assert build_interaction("deepfm", 2)(user, item).tolist() == [1, 2, 3, 5]
    bilinear = build_interaction("bilinear", 2)
    torch.nn.init.eye_(bilinear.weight.weight)
    assert bilinear(user, item).tolist() == [3, 10]


def test_a_cross_layer_multiplies_by_the_input_and_adds() -> None:
    # W = I and b = 0: x₁ = x ⊙ x + x, x₂ = x ⊙ x₁ + x₁; of x = 2: 6, then 18.
    dcn = build_interaction("dcn", 1)
    for layer in dcn.layers:
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert dcn(torch.tensor([2.0]), torch.tensor([1.0])).tolist() == [18.0, 4.0]
