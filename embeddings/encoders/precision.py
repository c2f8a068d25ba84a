"""A model in fewer bits, and which number format is fastest on this processor.

In:  a float32 model.  Out: the same model in bfloat16, or with 8-bit matrix products.
Knows nothing of texts.

bfloat16 pays where the processor multiplies it (AMX, AVX-512 BF16) and costs several times float32 where it does not;
8 bits pay nearly everywhere. Measure with `fastest_dtype`, do not assume.

Shapes: T tokens, I inputs, O outputs of a layer.
"""

import time
import warnings
from collections.abc import Mapping

import torch
from torch import nn

DTYPES = ("float32", "bfloat16", "int8")
_SMALLEST = 1e-6
"""Keeps the scale of a row of zeros away from 0."""


class Int8Linear(nn.Module):
    """A linear layer whose product is of 8-bit integers: weights scaled by output, inputs by token.

    FBGEMM scales its input as a whole; one outlier among the tokens then leaves the others a handful of steps (cosine
    .97 on all-MiniLM-L6-v2). Dividing each token by its largest value first gives each its own scale (.995), and leaves
    a text's vector next to independent of what else is in the batch.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        scale_O = (weight_OI.abs().amax(1) / 127).clamp(min=_SMALLEST).double()
        zero_O = torch.zeros(len(scale_O), dtype=torch.long)
        with warnings.catch_warnings():
            # To be replaced with the tensors' removal: https://github.com/pytorch/pytorch/issues/184982
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            quantized_OI = torch.quantize_per_channel(weight_OI, scale_O, zero_O, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantized_OI, None)
        self._bias_O = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, input_TI: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, float32 […, O]."""
        largest_T1 = input_TI.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)
        # 7 of 8 bits for the input: pairs of products then fit into the 16 that AVX2 adds them in.
        product_TO = torch.ops.quantized.linear_dynamic(input_TI / largest_T1, self._packed, True)
        if self._bias_O is None:
            return product_TO * largest_T1
        return torch.addcmul(self._bias_O, product_TO, largest_T1)


def convert_model(model: nn.Module, dtype: str) -> nn.Module:
    """Return the model in a number format of `DTYPES`; it may be changed in place."""
    if dtype == "bfloat16":
        return model.bfloat16()
    if dtype == "int8":
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
    return model


def measure_dtypes(*, tokens: int = 512, width: int = 384, repeats: int = 10) -> dict[str, float]:
    """Return the best milliseconds, by number format, of one feed-forward layer on this processor's present threads."""
    generator = torch.Generator().manual_seed(0)
    input_TI = torch.randn(tokens, width, generator=generator)
    best_ms: dict[str, float] = {}
    layers = {dtype: convert_model(nn.Sequential(nn.Linear(width, 4 * width)), dtype) for dtype in DTYPES}
    with torch.inference_mode():
        for turn in range(-1, repeats):  # the first compiles kernels; turns, so that what else runs slows all of them
            for dtype, layer in layers.items():
                given_TI = input_TI.bfloat16() if dtype == "bfloat16" else input_TI
                start_s = time.perf_counter()
                layer(given_TI)
                if turn >= 0:
                    best_ms[dtype] = min(best_ms.get(dtype, float("inf")), 1000 * (time.perf_counter() - start_s))
    return best_ms


def fastest_dtype(best_ms: Mapping[str, float] | None = None, *, exact: bool = False) -> str:
    """Return the number format that is fastest here, by what `measure_dtypes` found or finds.

    With `exact`, of those that keep a cosine of .999 to float32.
    """
    best_ms = best_ms or measure_dtypes()
    return min((dtype for dtype in DTYPES if not (exact and dtype == "int8")), key=best_ms.__getitem__)
