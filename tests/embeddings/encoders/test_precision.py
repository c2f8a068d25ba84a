"""A model in fewer bits answers nearly the same."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from embeddings.encoders.precision import DTYPES, Int8Linear, convert_model, fastest_dtype, measure_dtypes


def _cosine(dtype: str, input_TI: torch.Tensor) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    with torch.inference_mode():
        exact = model(input_TI)
        converted = convert_model(model, dtype)
        given = input_TI.bfloat16() if dtype == "bfloat16" else input_TI
        return float(functional.cosine_similarity(converted(given).float(), exact).min())


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1 - 1e-6), ("bfloat16", 0.999), ("int8", 0.99)])
def test_each_number_format_keeps_the_direction(dtype: str, least: float) -> None:
    assert _cosine(dtype, torch.randn(32, 64, generator=torch.Generator().manual_seed(1))) >= least


def test_one_large_token_does_not_blur_the_others_in_int8() -> None:
    linear = nn.Linear(64, 64)
    input_TI = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    input_TI[0] *= 1_000
    with torch.inference_mode():
        int8, exact = Int8Linear(linear)(input_TI), linear(input_TI)
    assert functional.cosine_similarity(int8, exact).min() > 0.999


def test_a_row_of_zeros_is_the_bias_in_int8() -> None:
    linear = nn.Linear(8, 4)
    with torch.inference_mode():
        torch.testing.assert_close(Int8Linear(linear)(torch.zeros(2, 8)), linear.bias.expand(2, 4))
        torch.testing.assert_close(Int8Linear(nn.Linear(8, 4, bias=False))(torch.zeros(2, 8)), torch.zeros(2, 4))


def test_the_fastest_number_format_is_one_that_was_measured_and_exact_ones_leave_int8_out() -> None:
    assert set(measure_dtypes(tokens=32, width=32, repeats=1)) == set(DTYPES)
    assert fastest_dtype(exact=True) in ("float32", "bfloat16")
