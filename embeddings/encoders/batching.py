"""Token ids of many texts become batches of like length, and a model's states one vector a text.

In:  token ids, a budget of tokens.  Out: lists of texts to run together; pooled unit vectors.
Knows nothing of tokenizers, models or caches.

    token counts   3 3 4 │ 9 9 │ 61        budget 20: a batch costs its texts times its longest
    padded to      4     │ 9   │ 61        of like length, so that next to nothing is padding

Shapes: B texts, L positions, E encoder dimension.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional

POOLINGS = ("mean", "cls", "last")


def batches_by_length(lengths: Sequence[int], *, max_tokens: int, max_texts: int) -> Iterator[list[int]]:
    """Yield indices of texts to run together, longest first: at most `max_tokens` padded, one text at least.

    Longest first, so that a batch that does not fit into memory fails at once.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and ((len(batch) + 1) * lengths[batch[0]] > max_tokens or len(batch) == max_texts):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and the mask of those that are none of the padding, int64 [B, L] both."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    mask_BL = np.arange(lengths.max()) < lengths[:, None]
    ids_BL = np.full(mask_BL.shape, pad_id, np.int64)
    ids_BL[mask_BL] = np.concatenate([np.asarray(one, np.int64) for one in ids])
    return torch.from_numpy(ids_BL), torch.from_numpy(mask_BL.astype(np.int64))


def pool(hidden_BLE: torch.Tensor, mask_BL: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return unit vectors, float32 [B, E]: of all tokens, of the first, or of the last that is there."""
    hidden_BLE = hidden_BLE.float()
    if pooling == "cls":
        pooled_BE = hidden_BLE[:, 0]
    elif pooling == "last":
        pooled_BE = hidden_BLE[torch.arange(len(mask_BL), device=mask_BL.device), mask_BL.sum(1) - 1]
    else:
        mask_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLE.dtype)
        pooled_BE = (hidden_BLE * mask_BL1).sum(1) / mask_BL1.sum(1)
    return functional.normalize(pooled_BE, dim=-1)
