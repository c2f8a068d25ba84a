"""Rows in fewer bits: float16, or their change in int8 with one scale a row.

In:  float32 rows, and what the receiver has of them.  Out: `QuantizedRows`; from these, what the receiver has then.
Knows nothing of tables, files or of who is sent them. A change is much smaller than its row, so that a 127th of its
largest entry is little. Rounding is to the nearest; what it takes away is not lost as long as the sender compares with
what the receiver has (error feedback: Seide et al., Interspeech 2014), and not with what it sent last.

Shapes: N rows, D dimension.
"""

from dataclasses import dataclass

import torch

from cluster.errors import ConfigError

FORMATS = ("float32", "float16", "int8")
_INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows as they are sent."""

    value: torch.Tensor
    """[N, …]; int8 are steps of change, all else the rows themselves."""
    scale_N: torch.Tensor | None = None
    """Of int8: how much a step is in each row, float32."""

    def applied_to(self, held: torch.Tensor) -> torch.Tensor:
        """Return the rows that a receiver has after them, which had `held` before."""
        if self.scale_N is not None:
            return held + self.value.float() * self.scale_N.unsqueeze(1)
        return self.value.float() if self.value.dtype == torch.float16 else self.value

    def take(self, index: torch.Tensor) -> "QuantizedRows":
        """Return some of the rows."""
        return QuantizedRows(self.value[index], None if self.scale_N is None else self.scale_N[index])


def quantize(value_ND: torch.Tensor, held_ND: torch.Tensor, row_format: str) -> QuantizedRows:
    """Round float32 rows to a format. Rows that are not finite are not so afterwards either.

    Raises `ConfigError` for an unknown format.
    """
    if row_format == "float32":
        return QuantizedRows(value_ND)
    if row_format == "float16":
        return QuantizedRows(value_ND.half())
    if row_format == "int8":
        change_ND = value_ND - held_ND
        scale_N = change_ND.abs().amax(1) / _INT8_MAX if len(change_ND) else change_ND.new_empty(0)
        step_N1 = torch.where(scale_N > 0, scale_N, 1.0).unsqueeze(1)
        return QuantizedRows((change_ND / step_N1).nan_to_num().round().to(torch.int8), scale_N)
    raise ConfigError(f"row format {row_format!r}: is none of {', '.join(FORMATS)}")
