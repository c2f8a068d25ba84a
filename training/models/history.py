"""Encode what a user did into one vector a position.

In:  vectors of the items interacted with, oldest first, right-aligned.  Out: user vectors after each interaction.
Knows nothing of ids, tables or losses. Every encoder is causal: position l sees positions 0..l only.

    pool         running mean of the items            average-of-history towers, Covington et al., RecSys 2016
    lstm         recurrent                            GRU4Rec, Hidasi et al., ICLR 2016
    transformer  pre-norm self-attention              SASRec, Kang & McAuley, ICDM 2018
    hstu         gated pointwise attention            HSTU, Zhai et al., ICML 2024

Attention is biased by how many interactions and how much time lie between two of them (`IntervalBias`, as in HSTU).
Shapes: B sequences, L positions, D dimension, H heads.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional

VALUE_BUCKETS = 22
"""0 for no value, then half units up to 10."""
GAP_BUCKETS = 32
"""log2 of the seconds since the interaction before."""
LEAST_SAVED = 128
"""Padded positions that must be saved for a pass more over the weights to pay."""


class HistoryEncoder(Protocol):
    """What the two-stage model asks of an encoder."""

    def __call__(self, inputs_BLD: torch.Tensor, present_BL: torch.Tensor, ts_BL: torch.Tensor) -> torch.Tensor:
        """Return the user vector after each position, [B, L, D]; padded positions hold anything finite.

        `ts_BL` is when each interaction was, in seconds.
        """
        ...


class InteractionEmbedding(nn.Module):
    """An item vector becomes an interaction: what was done, how it was valued, how long after the last."""

    def __init__(self, dim: int, max_history: int, kinds: int, dropout: float) -> None:
        super().__init__()
        self.recency = nn.Embedding(max_history, dim)
        self.kind = nn.Embedding(kinds, dim)
        self.value = nn.Embedding(VALUE_BUCKETS, dim)
        self.gap = nn.Embedding(GAP_BUCKETS, dim)
        self.dropout = nn.Dropout(dropout)
        self.scale = dim**0.5
        for table in (self.recency, self.kind, self.value, self.gap):
            nn.init.normal_(table.weight, std=0.02)

    def forward(
        self,
        item_BLD: torch.Tensor,
        kind_BL: torch.Tensor,
        value_BL: torch.Tensor,
        ts_BL: torch.Tensor,
        present_BL: torch.Tensor,
    ) -> torch.Tensor:
        """Return the encoder's inputs, [B, L, D]."""
        length = item_BLD.shape[1]
        age_L = torch.arange(length - 1, -1, -1, device=item_BLD.device)
        bucket_BL = (value_BL.nan_to_num(-0.5) * 2 + 1).round().clamp(0, VALUE_BUCKETS - 1).long()
        embedded_BLD = item_BLD * self.scale + self.recency(age_L) + self.kind(kind_BL) + self.value(bucket_BL)
        return self.dropout(embedded_BLD + self.gap(_gap_buckets(ts_BL, present_BL)))


class PoolEncoder(nn.Module):
    """Mean of the interactions so far, projected."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, inputs_BLD: torch.Tensor, present_BL: torch.Tensor, ts_BL: torch.Tensor) -> torch.Tensor:
        """Return the projected mean of positions 0..l for each l, [B, L, D]."""
        weight_BL1 = present_BL.unsqueeze(-1).to(inputs_BLD.dtype)
        count_BL1 = weight_BL1.cumsum(1).clamp(min=1)
        return self.norm(self.project((inputs_BLD * weight_BL1).cumsum(1) / count_BL1))


class LSTMEncoder(nn.Module):
    """A recurrent pass from each sequence's first interaction on: padding never reaches the state."""

    def __init__(self, dim: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, dim, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.norm = nn.LayerNorm(dim)

    def forward(self, inputs_BLD: torch.Tensor, present_BL: torch.Tensor, ts_BL: torch.Tensor) -> torch.Tensor:
        """Return the last layer's state after each position, [B, L, D]."""
        # Padding comes first and an LSTM has biases: turn it to the end, where a causal pass does not see it, and back.
        length = present_BL.shape[1]
        place_L = torch.arange(length, device=present_BL.device)
        padding_B1 = length - present_BL.sum(1, keepdim=True)
        output_BLD, _ = self.lstm(_turn(inputs_BLD, (place_L + padding_B1) % length))
        return self.norm(_turn(output_BLD, (place_L - padding_B1) % length))


class IntervalBias(nn.Module):
    """What attention adds for the interactions and the time between two positions; learned, 0 at first."""

    def __init__(self, max_history: int, heads: int) -> None:
        super().__init__()
        self.place_LH = nn.Parameter(torch.zeros(max_history, heads))
        self.gap_GH = nn.Parameter(torch.zeros(GAP_BUCKETS, heads))

    def forward(self, intervals: "Intervals") -> torch.Tensor:
        """Return the bias of attending from each position to each other one, [B, H, L, L]."""
        return (self.place_LH[intervals.back_LL] + self.gap_GH[intervals.bucket_BLL]).permute(0, 3, 1, 2)


class Intervals(NamedTuple):
    """Between two positions: interactions, and buckets of time. The same for every layer."""

    back_LL: torch.Tensor
    bucket_BLL: torch.Tensor

    @classmethod
    def between(cls, ts_BL: torch.Tensor) -> "Intervals":
        """Return those of sequences of these times."""
        place_L = torch.arange(ts_BL.shape[1], device=ts_BL.device)
        back_LL = (place_L.unsqueeze(1) - place_L).clamp(min=0)
        return cls(back_LL, _log2_buckets(ts_BL.unsqueeze(2) - ts_BL.unsqueeze(1)))


class TransformerEncoder(nn.Module):
    """Causal self-attention over the interactions."""

    def __init__(
        self, dim: int, layers: int, heads: int, dropout: float, max_history: int, *, interval_bias: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout) for _ in range(layers))
        biases = (IntervalBias(max_history, heads) for _ in range(layers)) if interval_bias else ()
        self.biases = nn.ModuleList(biases)
        self.norm = nn.LayerNorm(dim)

    def forward(self, inputs_BLD: torch.Tensor, present_BL: torch.Tensor, ts_BL: torch.Tensor) -> torch.Tensor:
        """Return each position's attention over those up to it, [B, L, D]."""
        sees_B1LL = _visible(present_BL)
        unbiased = torch.zeros_like(sees_B1LL, dtype=inputs_BLD.dtype).masked_fill(~sees_B1LL, float("-inf"))
        hidden_BLD, intervals = inputs_BLD, Intervals.between(ts_BL) if len(self.biases) else None
        for layer, block in enumerate(self.blocks):
            mask_BHLL = unbiased + self.biases[layer](intervals) if len(self.biases) else unbiased
            hidden_BLD = block(hidden_BLD, mask_BHLL)
        return self.norm(hidden_BLD)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BLD: torch.Tensor, mask_BHLL: torch.Tensor) -> torch.Tensor:
        B, L, D = hidden_BLD.shape
        q, k, v = self.qkv(self.norm_attention(hidden_BLD)).view(B, L, 3, self.heads, D // self.heads).unbind(2)
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask_BHLL,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        hidden_BLD = hidden_BLD + self.dropout(self.out(attended.transpose(1, 2).reshape(B, L, D)))
        return hidden_BLD + self.dropout(self.mlp(self.norm_mlp(hidden_BLD)))


class HSTUEncoder(nn.Module):
    """Gated attention without a softmax: how much of something there was is kept, not only its share."""

    def __init__(self, dim: int, layers: int, heads: int, dropout: float, max_history: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_HSTUBlock(dim, heads, dropout, max_history) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, inputs_BLD: torch.Tensor, present_BL: torch.Tensor, ts_BL: torch.Tensor) -> torch.Tensor:
        """Return what each position gathers of those up to it, [B, L, D]."""
        sees_B1LL = _visible(present_BL)
        share_B1LL = sees_B1LL / sees_B1LL.sum(-1, keepdim=True)
        hidden_BLD, intervals = inputs_BLD, Intervals.between(ts_BL)
        for block in self.blocks:
            hidden_BLD = block(hidden_BLD, share_B1LL, intervals)
        return self.norm(hidden_BLD)


class _HSTUBlock(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float, max_history: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_gathered = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.uvqk, self.out = nn.Linear(dim, 4 * dim), nn.Linear(dim, dim)
        self.bias = IntervalBias(max_history, heads)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BLD: torch.Tensor, share_B1LL: torch.Tensor, intervals: Intervals) -> torch.Tensor:
        B, L, D = hidden_BLD.shape
        gate_BLD, v, q, k = functional.silu(self.uvqk(self.norm(hidden_BLD))).chunk(4, dim=-1)
        q, k, v = (part.view(B, L, self.heads, D // self.heads).transpose(1, 2) for part in (q, k, v))
        score_BHLL = q @ k.transpose(2, 3) / (D // self.heads) ** 0.5 + self.bias(intervals)
        gathered_BLD = ((functional.silu(score_BHLL) * share_B1LL) @ v).transpose(1, 2).reshape(B, L, D)
        return hidden_BLD + self.out(self.dropout(self.norm_gathered(gathered_BLD) * gate_BLD))


def encode_by_length(
    encode: Callable[..., torch.Tensor], present_BL: torch.Tensor, item_BLD: torch.Tensor, *others: torch.Tensor
) -> torch.Tensor:
    """Return `encode(present_BL, item_BLD, *others)`, [B, L, D], sequences of like length at a time.

    Where few sequences are long, most of what a processor does for the others is padding. An accelerator does all at
    once sooner, and would wait here for their lengths.
    """
    groups = _like_lengths(present_BL) if present_BL.device.type == "cpu" else []
    if len(groups) < 2:
        return encode(present_BL, item_BLD, *others)
    parts = [encode(*(part[b_G, -length:] for part in (present_BL, item_BLD, *others))) for b_G, length in groups]
    encoded_BLD = parts[0].new_zeros(item_BLD.shape)
    for (b_G, length), part_GLD in zip(groups, parts, strict=True):
        encoded_BLD[b_G, -length:] = part_GLD
    return encoded_BLD


def _like_lengths(present_BL: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Return which sequences to encode together, and how long the longest of them is: at most twice the shortest."""
    length_B = torch.where(present_BL.any(1), present_BL.shape[1] - present_BL.int().argmax(1), 1)
    length_B, order_B = length_B.sort(descending=True)
    groups: list[tuple[torch.Tensor, int]] = []
    while len(order_B):
        longest = int(length_B[0])
        alike = int((2 * length_B >= longest).sum())
        if int((longest - length_B[alike:]).sum()) < LEAST_SAVED:
            alike = len(order_B)
        groups.append((order_B[:alike], longest))
        length_B, order_B = length_B[alike:], order_B[alike:]
    return groups


def _visible(present_BL: torch.Tensor) -> torch.Tensor:
    """Return which positions each one sees, bool [B, 1, L, L]."""
    length = present_BL.shape[1]
    square = torch.ones(length, length, dtype=torch.bool, device=present_BL.device)
    # A padded position attends to itself, or its softmax would be over nothing.
    return ((square.tril() & present_BL.unsqueeze(1)) | torch.diag(square.diagonal())).unsqueeze(1)


def _turn(values_BLD: torch.Tensor, from_BL: torch.Tensor) -> torch.Tensor:
    return values_BLD.gather(1, from_BL.unsqueeze(-1).expand_as(values_BLD))


def _gap_buckets(ts_BL: torch.Tensor, present_BL: torch.Tensor) -> torch.Tensor:
    gap_BL = torch.zeros_like(ts_BL)
    gap_BL[:, 1:] = (ts_BL[:, 1:] - ts_BL[:, :-1]) * present_BL[:, :-1]
    return _log2_buckets(gap_BL)


def _log2_buckets(seconds: torch.Tensor) -> torch.Tensor:
    return (seconds.clamp(min=0).float() + 1).log2().long().clamp(max=GAP_BUCKETS - 1)
