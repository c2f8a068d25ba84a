"""The click model's dense part: what it computes in."""

import torch

from training.models.click import ClickConfig, ClickDense

DIM, FEATURES = 8, 3


def logits_and_gradient(config: ClickConfig) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    dense, pooled_BD = ClickDense(config, DIM), torch.randn(64, DIM * FEATURES)
    logit_B = dense(pooled_BD)
    logit_B.square().sum().backward()
    gradient = dense.layers[0].weight.grad
    assert isinstance(gradient, torch.Tensor)
    return logit_B, gradient


def test_bfloat16_computes_the_same_but_for_rounding_and_hands_out_float32() -> None:
    exact, exact_gradient = logits_and_gradient(ClickConfig())
    rounded, gradient = logits_and_gradient(ClickConfig(dtype="bfloat16"))
    assert rounded.dtype == gradient.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.02)
    assert (gradient - exact_gradient).norm() < 0.1 * exact_gradient.norm()
