"""History encoders: one contract for all of them, and the interaction embedding before them."""

import pytest
import torch

from cluster.events import KINDS
from training.models.history import InteractionEmbedding, encode_by_length
from training.models.two_stage import ModelConfig, TwoStage, build_history_encoder

DIM, LENGTH = 8, 5
ENCODERS = {
    "pool": {"history": "pool"},
    "lstm": {"history": "lstm"},
    "transformer": {"history": "transformer"},
    "transformer, biased": {"history": "transformer", "interval_bias": True},
    "hstu": {"history": "hstu"},
}


class Encoded:
    """An encoder behind its interaction embedding, in evaluation: [B, L, D] of items to [B, L, D] of users."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        config = ModelConfig(**ENCODERS[name], max_history=16, layers=2)
        self.model = TwoStage(config, DIM, text_dim=3).eval()
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    @torch.inference_mode()
    def __call__(self, item_BLD: torch.Tensor, ts_BL: torch.Tensor, *, padding: int = 0) -> torch.Tensor:
        """Whatever stands in the padding must not matter: it is filled with noise."""
        B, L, _ = item_BLD.shape
        pad = torch.randn(B, padding, DIM)
        return self.model.user_vectors(
            torch.cat([pad, item_BLD], dim=1),
            torch.full((B, padding + L), KINDS.index("rating")),
            torch.cat([torch.full((B, padding), 7.0), torch.full((B, L), 4.0)], dim=1),
            torch.cat([torch.full((B, padding), 123), ts_BL], dim=1),
            (torch.arange(padding + L) >= padding).expand(B, -1),
            torch.zeros(B, DIM),
        )[:, padding:]


@pytest.fixture(params=ENCODERS)
def encode(request: pytest.FixtureRequest) -> Encoded:
    return Encoded(request.param)


@pytest.fixture
def items() -> torch.Tensor:
    return torch.randn(3, LENGTH, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def times() -> torch.Tensor:
    return torch.tensor([0, 10, 1_000, 1_001, 100_000]).expand(3, -1)


class TestEveryEncoder:
    def test_what_comes_later_does_not_change_the_user_vector(
        self, encode: Encoded, items: torch.Tensor, times: torch.Tensor
    ) -> None:
        before = encode(items, times)
        for seen in range(1, LENGTH):
            changed, later = items.clone(), times.clone()
            changed[:, seen:] = torch.randn(3, LENGTH - seen, DIM)
            later[:, seen:] += 10_000_000
            after = encode(changed, later)
            torch.testing.assert_close(after[:, :seen], before[:, :seen], rtol=0, atol=1e-6)
            assert not torch.allclose(after[:, seen:], before[:, seen:], atol=1e-3)

    def test_padding_in_front_changes_nothing(self, encode: Encoded, items: torch.Tensor, times: torch.Tensor) -> None:
        for padding in (1, 4, 11):
            torch.testing.assert_close(encode(items, times, padding=padding), encode(items, times), rtol=0, atol=1e-5)

    def test_a_batch_gives_what_single_histories_give(
        self, encode: Encoded, items: torch.Tensor, times: torch.Tensor
    ) -> None:
        one_by_one = torch.cat([encode(items[b : b + 1], times[b : b + 1]) for b in range(3)])
        torch.testing.assert_close(encode(items, times), one_by_one, rtol=0, atol=1e-5)

    def test_every_earlier_interaction_matters(self, encode: Encoded, items: torch.Tensor, times: torch.Tensor) -> None:
        before = encode(items, times)[:, -1]
        for place in range(LENGTH):
            changed = items.clone()
            changed[:, place] *= -1
            assert not torch.allclose(encode(changed, times)[:, -1], before, atol=1e-4), place

    def test_a_sequence_that_is_all_padding_is_finite(self, encode: Encoded) -> None:
        nothing = torch.zeros(2, 4, dtype=torch.bool)
        assert encode.model.history(torch.randn(2, 4, DIM), nothing, torch.zeros(2, 4)).isfinite().all()


@pytest.mark.parametrize("name", ["transformer, biased", "hstu"])
def test_how_long_ago_an_interaction_was_moves_attention(name: str, items: torch.Tensor) -> None:
    # The gap before each interaction stays within its bucket (1 … 2 s, 3 … 6 s); the time back to the first does not.
    encode = Encoded(name)
    near, far = (torch.tensor(seconds).expand(3, -1) for seconds in ([0, 1, 4, 7, 10], [0, 2, 8, 14, 20]))
    assert not torch.allclose(encode(items, near)[:, -1], encode(items, far)[:, -1], atol=1e-3)
    plain = Encoded("transformer")
    torch.testing.assert_close(plain(items, near), plain(items, far))


@pytest.mark.parametrize("name", ENCODERS)
def test_sequences_of_like_length_are_encoded_together_and_nothing_changes(name: str) -> None:
    torch.manual_seed(0)
    encode, widest = (
        build_history_encoder(ModelConfig(**ENCODERS[name], max_history=64, layers=2, dropout=0.0), DIM),
        64,
    )
    length_B = torch.tensor([3, 60, 0, 33, 1, 64, 2, 7, 31])
    present_BL = torch.arange(widest) >= widest - length_B.unsqueeze(1)
    item_BLD = torch.randn(len(length_B), widest, DIM, requires_grad=True)
    ts_BL = torch.randint(0, 1_000_000, present_BL.shape).sort(1).values
    shapes: list[tuple[int, int]] = []

    def encode_some(present_BL: torch.Tensor, item_BLD: torch.Tensor, ts_BL: torch.Tensor) -> torch.Tensor:
        shapes.append((present_BL.shape[0], present_BL.shape[1]))
        return encode(item_BLD, present_BL, ts_BL)

    apart = encode_by_length(encode_some, present_BL, item_BLD, ts_BL)[present_BL]
    together = encode_some(present_BL, item_BLD, ts_BL)[present_BL]
    assert shapes == [(3, 64), (1, 31), (5, 7), (9, 64)]
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halves = encode_by_length(encode_some, present_BL, item_BLD, ts_BL)[present_BL]
    torch.testing.assert_close(halves.float(), together, rtol=0, atol=0.1)
    gradients = [torch.autograd.grad(found.square().sum(), item_BLD)[0] for found in (apart, together)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4)


def test_the_pool_is_the_running_mean() -> None:
    pool = build_history_encoder(ModelConfig(history="pool"), 2)
    torch.nn.init.eye_(pool.project.weight)
    torch.nn.init.zeros_(pool.project.bias)
    pool.norm = torch.nn.Identity()
    inputs_BLD = torch.tensor([[[9.0, 9.0], [1.0, 4.0], [3.0, 0.0]]])
    means = pool(inputs_BLD, torch.tensor([[False, True, True]]), torch.zeros(1, 3))
    assert means[0, 1:].tolist() == [[1.0, 4.0], [2.0, 2.0]]


@pytest.fixture
def embedding() -> InteractionEmbedding:
    torch.manual_seed(0)
    return InteractionEmbedding(4, max_history=8, kinds=len(KINDS), dropout=0.0)


def embed(embedding: InteractionEmbedding, *, value: float = 4.0, gap_s: int = 10, kind: str = "rating") -> list[float]:
    """Return the second of two interactions, embedded."""
    ts_BL = torch.tensor([[1_000, 1_000 + gap_s]])
    kind_BL = torch.full((1, 2), KINDS.index(kind))
    present_BL = torch.ones(1, 2, dtype=torch.bool)
    return embedding(torch.ones(1, 2, 4), kind_BL, torch.full((1, 2), value), ts_BL, present_BL)[0, 1].tolist()


def test_kind_value_and_gap_are_told_apart(embedding: InteractionEmbedding) -> None:
    usual = embed(embedding)
    assert usual != embed(embedding, kind="click")
    assert usual != embed(embedding, value=4.5)
    assert usual != embed(embedding, gap_s=1_000_000)
    assert embed(embedding, value=float("nan")) != embed(embedding, value=0.0)


def test_gaps_count_by_their_binary_logarithm(embedding: InteractionEmbedding) -> None:
    # ⌊log2(gap + 1)⌋: 7 … 14 seconds share a bucket.
    assert embed(embedding, gap_s=7) == embed(embedding, gap_s=14)
    assert embed(embedding, gap_s=6) != embed(embedding, gap_s=7) != embed(embedding, gap_s=15)


@pytest.mark.parametrize(
    ("asked", "like"),
    [({"value": 1e9}, {"value": 50.0}), ({"value": -3.0}, {"value": float("nan")}), ({"gap_s": -5}, {"gap_s": 0})],
)
def test_values_and_gaps_out_of_range_take_the_nearest_bucket(
    embedding: InteractionEmbedding, asked: dict[str, float], like: dict[str, float]
) -> None:
    assert embed(embedding, **asked) == embed(embedding, **like)
