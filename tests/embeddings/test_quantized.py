"""Rounded rows: how far from the rows they stand for, and the same rows every time."""

import pytest
import torch

from cluster.errors import ConfigError
from embeddings.quantized import FORMATS, quantize


def sent(rows: torch.Tensor, row_format: str, held: torch.Tensor | None = None) -> torch.Tensor:
    """Return what a receiver that had `held` has after it was sent these rows."""
    held = torch.zeros_like(rows) if held is None else held
    return quantize(rows, held, row_format).applied_to(held)


def test_float32_is_what_it_was():
    rows = torch.randn(5, 8)
    assert torch.equal(sent(rows, "float32", torch.randn(5, 8)), rows)


def test_int8_is_a_127th_of_the_largest_change_or_nearer_and_keeps_that_one():
    held = torch.tensor([[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    rows = held + torch.tensor([[127.0, 1.0, -0.4, 0.6], [-2.54, 0.01, 0.0, 1.27]])
    steps = quantize(rows, held, "int8")
    assert steps.value.tolist() == [[127, 1, 0, 1], [-127, 0, 0, 64]]
    assert (steps.applied_to(held) - rows).abs().amax(1).tolist() == pytest.approx([0.4, 0.01], abs=1e-5)


def test_float16_is_a_thousandth_off_at_most():
    rows = torch.randn(100, 16)
    assert ((sent(rows, "float16") - rows).abs() <= rows.abs() / 1_000 + 1e-7).all()


@pytest.mark.parametrize("row_format", FORMATS)
def test_a_row_of_zeros_and_no_rows_at_all_stay_so(row_format):
    assert sent(torch.zeros(1, 4), row_format).tolist() == [[0.0] * 4]
    assert sent(torch.empty(0, 4), row_format).shape == (0, 4)


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_not_made_so(row_format, bad):
    rows = torch.tensor([[1.0, bad], [1.0, 2.0]])
    assert sent(rows, row_format).isfinite().all(1).tolist() == [False, True]


@pytest.mark.parametrize("row_format", FORMATS)
def test_a_row_that_did_not_change_is_not_changed(row_format):
    held = sent(torch.randn(20, 8), row_format)
    assert torch.equal(sent(held, row_format, held), held)


def test_an_unknown_format_is_named():
    with pytest.raises(ConfigError, match="'int4': is none of float32, float16, int8"):
        quantize(torch.zeros(1, 4), torch.zeros(1, 4), "int4")
