"""A rate that is too low rises, one that is too high falls, and both learn more than the rate that stays."""

import pytest
import torch

from training.hypergradient import MOST, HypergradientRate


def descend(rate: float, strength: float, steps: int) -> tuple[float, HypergradientRate]:
    """Return the loss of a quadratic bowl of unlike curvatures after so many steps, and the rate followed."""
    curvature = torch.tensor([1.0, 3.0, 10.0])
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 1.0]))
    followed = HypergradientRate(torch.optim.SGD([weight], lr=rate), strength)
    for _ in range(steps):
        weight.grad = curvature * weight.detach()
        followed.step()
    return float((curvature * weight.detach() ** 2).sum()), followed


def test_low_rate_rises_and_learns_more() -> None:
    stays, _ = descend(1e-3, 0.0, 100)
    follows, followed = descend(1e-3, 0.05, 100)
    assert followed.factor > 5
    assert follows < stays / 2


def test_rate_that_overshoots_falls() -> None:
    stays, _ = descend(0.35, 0.0, 100)  # beyond 2 / 10: the steepest direction diverges
    follows, followed = descend(0.35, 0.05, 100)
    assert followed.factor < 1
    assert follows < 1
    assert not stays < 1e6  # not a number, by then


def test_strength_of_zero_is_the_optimizer() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    for _ in range(10):
        weight.grad = torch.tensor([1.0, 3.0, 10.0]) * weight.detach()
        optimizer.step()
    alone = float((torch.tensor([1.0, 3.0, 10.0]) * weight.detach() ** 2).sum())
    assert descend(0.01, 0.0, 10)[0] == alone


@pytest.mark.parametrize(("gradient", "bound"), [(1.0, MOST), (-1.0, 1 / MOST)])
def test_rate_keeps_within_its_bounds(gradient: float, bound: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    followed = HypergradientRate(optimizer, 0.5)
    for step in range(50):
        weight.grad = torch.tensor([gradient**step])
        followed.step()
    assert followed.factor == pytest.approx(bound)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * bound)


def test_gradient_that_is_not_finite_leaves_the_rate() -> None:
    weight, idle = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(2))
    followed = HypergradientRate(torch.optim.SGD([weight, idle], lr=0.01), 0.5)
    for value in (1.0, float("nan"), 1.0, 0.0):
        weight.grad = torch.tensor([value])
        followed.step()
    assert followed.factor == 1.0
