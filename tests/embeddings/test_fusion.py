"""Text, picture and sound become one vector."""

import pytest
import torch
from torch import nn

from cluster.errors import ConfigError
from embeddings.fusion import GatedFusion


def _content(items: int, widths: list[int]) -> torch.Tensor:
    return torch.randn(items, sum(widths), generator=torch.Generator().manual_seed(0))


def test_with_text_alone_it_is_a_linear_layer_of_the_same_names_and_values() -> None:
    linear = nn.Linear(6, 4, bias=False)
    fusion = GatedFusion([6], 4)
    fusion.load_state_dict(linear.state_dict())
    text_NE = _content(5, [6])
    assert torch.equal(fusion(text_NE), linear(text_NE))
    assert list(fusion.state_dict()) == ["weight"]


def test_at_first_every_modality_is_let_through_as_it_is() -> None:
    fusion, content_NW = GatedFusion([3, 2, 2], 4), _content(5, [3, 2, 2])
    torch.testing.assert_close(fusion(content_NW), content_NW @ fusion.weight.T)
    assert torch.equal(fusion.gates(content_NW), torch.ones(5, 3))


def test_a_missing_modality_s_gate_is_exactly_closed_and_nothing_is_learned_of_it() -> None:
    fusion, content_NW = GatedFusion([3, 2, 2], 4), _content(5, [3, 2, 2])
    assert fusion.gate is not None
    nn.init.normal_(fusion.gate.weight)
    nn.init.normal_(fusion.gate.bias)
    content_NW[:, 3:5] = 0
    assert torch.equal(fusion.gates(content_NW)[:, 1], torch.zeros(5))
    assert (fusion.gates(content_NW)[:, ::2] > 0).all()
    before = fusion(content_NW)
    before.sum().backward()
    assert fusion.weight.grad is not None
    assert not fusion.weight.grad[:, 3:5].any()
    with torch.no_grad():
        fusion.weight[:, 3:5] += 1
    assert torch.equal(fusion(content_NW), before)


def test_an_item_without_any_modality_is_the_zero_vector() -> None:
    assert not GatedFusion([3, 2], 4)(torch.zeros(2, 5)).any()


def test_gates_learn_to_close_on_what_is_noise() -> None:
    torch.manual_seed(0)
    fusion = GatedFusion([4, 4], 2)
    text_NE, noise_NE, heads = torch.randn(256, 4), torch.randn(256, 4), torch.randn(2, 4)
    optimizer = torch.optim.Adam(fusion.parameters(), lr=0.05)
    for _ in range(150):
        loss = (fusion(torch.cat([text_NE, noise_NE], 1)) - text_NE @ heads.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    assert fusion.weight[:, :4].abs().mean() > 10 * fusion.weight[:, 4:].abs().mean()


@pytest.mark.parametrize("widths", [[], [3, 0]])
def test_widths_out_of_range_are_refused(widths: list[int]) -> None:
    with pytest.raises(ConfigError, match="modalities of widths"):
        GatedFusion(widths, 4)
