"""Rounded rows: how far from the rows they stand for, and the same rows every time."""

import pytest
import torch

from cluster.errors import ConfigError
from embeddings.quantized import FORMATS, quantize


def test_float32_is_what_it_was():
    rows = torch.randn(5, 8)
    assert torch.equal(quantize(rows, "float32").dequantized(), rows)


def test_int8_is_a_127th_of_the_largest_entry_or_nearer_and_keeps_that_entry():
    rows = torch.tensor([[127.0, 1.0, -0.4, 0.6], [-2.54, 0.01, 0.0, 1.27]])
    sent = quantize(rows, "int8")
    assert sent.value.tolist() == [[127, 1, 0, 1], [-127, 0, 0, 64]]
    assert (sent.dequantized() - rows).abs().amax(1).tolist() == pytest.approx([0.4, 0.01], abs=1e-6)


def test_float16_is_a_thousandth_off_at_most():
    rows = torch.randn(100, 16)
    assert ((quantize(rows, "float16").dequantized() - rows).abs() <= rows.abs() / 1_000 + 1e-7).all()


@pytest.mark.parametrize("row_format", FORMATS)
def test_a_row_of_zeros_and_no_rows_at_all_stay_so(row_format):
    assert quantize(torch.zeros(1, 4), row_format).dequantized().tolist() == [[0.0] * 4]
    assert quantize(torch.empty(0, 4), row_format).dequantized().shape == (0, 4)


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_not_made_so(row_format, bad):
    rows = torch.tensor([[1.0, bad], [1.0, 2.0]])
    finite = quantize(rows, row_format).dequantized().isfinite().all(1)
    assert finite.tolist() == [False, True]


@pytest.mark.parametrize("row_format", FORMATS)
def test_rounding_twice_is_rounding_once(row_format):
    once = quantize(torch.randn(20, 8), row_format).dequantized()
    assert torch.allclose(quantize(once, row_format).dequantized(), once, rtol=1e-6)


def test_an_unknown_format_is_named():
    with pytest.raises(ConfigError, match="'int4': is none of float32, float16, int8"):
        quantize(torch.zeros(1, 4), "int4")
