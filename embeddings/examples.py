"""One batch of pointwise examples: a user, an item, the user's history and a label, many times over.

In:  table rows laid out feature by feature.  Out: an `ExampleBatch`, whose lookup TorchRec shards.
Knows nothing of files, ids or losses.

    example          0            1         2
    user             u20          u41       u20
    item             i7           i3        i9
    history          i3 i7        —         i4

    KeyedJaggedTensor   keys      user          item        history
                        lengths   1  1  1       1 1 1       2   0 1        three a feature: stride 3
                        values    20 41 20      7 3 9       3 7   4

An id without a row (not admitted yet) has length 0: its vector is zero and nothing is learned for it.
Shapes: B examples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from embeddings.tables import ITEM, USER

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

HISTORY = "history"
FEATURES = {USER: [USER], ITEM: [ITEM, HISTORY]}
"""Table to the features that look rows up in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleBatch:
    """What one train step consumes, as tensors on one device."""

    lookup: "KeyedJaggedTensor"
    label_B: torch.Tensor
    """float32."""
    global_examples: int
    """Examples of the step over all workers: what the loss is a mean over."""
    reused: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Table to the rows, int64, that belong to another id from this step on and must start fresh; of all workers."""

    def to(self, device: torch.device) -> "ExampleBatch":
        """Return the batch on `device`, without waiting for the copy."""
        if device.type == "cpu":
            return self
        return ExampleBatch(
            lookup=self.lookup.pin_memory().to(device, non_blocking=True),
            label_B=self.label_B.pin_memory().to(device, non_blocking=True),
            global_examples=self.global_examples,
            reused={table: rows.to(device) for table, rows in self.reused.items()},
        )


def build_lookup_of_examples(values: torch.Tensor, lengths: torch.Tensor) -> "KeyedJaggedTensor":
    """Return the lookup of B examples: `lengths` int32 [3B] of user, item and history; `values` the rows in order."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    return KeyedJaggedTensor(keys=[USER, ITEM, HISTORY], values=values, lengths=lengths)
