"""Encode what a user did into one vector a position.

In:  vectors of the items interacted with, oldest first, right-aligned.  Out: user vectors after each interaction.
Knows nothing of ids, tables or losses. Every encoder is causal: position l sees positions 0..l only.

    pool         running mean of the items            average-of-history towers, Covington et al., RecSys 2016
    lstm         recurrent                            GRU4Rec, Hidasi et al., ICLR 2016
    transformer  pre-norm self-attention              SASRec, Kang & McAuley, ICDM 2018

Shapes: B sequences, L positions, D dimension.
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

VALUE_BUCKETS = 22
"""0 for no value, then half units up to 10."""
GAP_BUCKETS = 32
"""log2 of the seconds since the interaction before."""


class HistoryEncoder(Protocol):
    """What the two-stage model asks of an encoder."""

    def __call__(self, inputs_BLD: torch.Tensor, present_BL: torch.Tensor) -> torch.Tensor:
        """Return the user vector after each position, [B, L, D]; padded positions hold anything finite."""
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

    def forward(self, inputs_BLD: torch.Tensor, present_BL: torch.Tensor) -> torch.Tensor:
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

    def forward(self, inputs_BLD: torch.Tensor, present_BL: torch.Tensor) -> torch.Tensor:
        """Return the last layer's state after each position, [B, L, D]."""
        # Padding comes first and an LSTM has biases: turn it to the end, where a causal pass does not see it, and back.
        length = present_BL.shape[1]
        place_L = torch.arange(length, device=present_BL.device)
        padding_B1 = length - present_BL.sum(1, keepdim=True)
        output_BLD, _ = self.lstm(_turn(inputs_BLD, (place_L + padding_B1) % length))
        return self.norm(_turn(output_BLD, (place_L - padding_B1) % length))


class TransformerEncoder(nn.Module):
    """Causal self-attention over the interactions."""

    def __init__(self, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, inputs_BLD: torch.Tensor, present_BL: torch.Tensor) -> torch.Tensor:
        """Return each position's attention over those up to it, [B, L, D]."""
        length = inputs_BLD.shape[1]
        square = torch.ones(length, length, dtype=torch.bool, device=inputs_BLD.device)
        # A padded position attends to itself, or its softmax would be over nothing.
        sees_BLL = (square.tril() & present_BL.unsqueeze(1)) | torch.diag(square.diagonal())
        hidden_BLD = inputs_BLD
        for block in self.blocks:
            hidden_BLD = block(hidden_BLD, sees_BLL.unsqueeze(1))
        return self.norm(hidden_BLD)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BLD: torch.Tensor, sees_B1LL: torch.Tensor) -> torch.Tensor:
        B, L, D = hidden_BLD.shape
        q, k, v = self.qkv(self.norm_attention(hidden_BLD)).view(B, L, 3, self.heads, D // self.heads).unbind(2)
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=sees_B1LL,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        hidden_BLD = hidden_BLD + self.dropout(self.out(attended.transpose(1, 2).reshape(B, L, D)))
        return hidden_BLD + self.dropout(self.mlp(self.norm_mlp(hidden_BLD)))


def _turn(values_BLD: torch.Tensor, from_BL: torch.Tensor) -> torch.Tensor:
    return values_BLD.gather(1, from_BL.unsqueeze(-1).expand_as(values_BLD))


def _gap_buckets(ts_BL: torch.Tensor, present_BL: torch.Tensor) -> torch.Tensor:
    gap_BL = torch.zeros_like(ts_BL)
    gap_BL[:, 1:] = (ts_BL[:, 1:] - ts_BL[:, :-1]).clamp(min=0) * present_BL[:, :-1]
    return (gap_BL.float() + 1).log2().long().clamp(max=GAP_BUCKETS - 1)
