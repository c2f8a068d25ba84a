"""The two-stage model: retrieval by uᵀAv, then a multi-task ranker, over shared rows.

In:  a `Batch` and the table rows it lists.  Out: losses; and, piece by piece, the vectors and scores that serve.
Knows nothing of tables, sharding or ids: rows arrive as tensors, from TorchRec in training, from memory in serving.

    item_ND  = row + project(text)                   a new item has row 0: its text speaks for it
    user_BLD = A·history(item vectors, kinds, values, gaps) + user row
    retrieval loss: softmax over target and sampled negatives, logits corrected by −log Q
                    (Yi et al., RecSys 2019, eq. 5), or binary cross entropy of each
    ranking loss:   over the target and random negatives, one term a head

Shapes: B sequences, L positions, D dimension, N distinct items, S negatives, E encoder dimension, P positions with a
target, R of them that train the ranker, C candidates a position.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from cluster.errors import ConfigError
from cluster.events import KINDS
from embeddings.batch import PAD, Batch
from embeddings.content import check_kinds, media_widths
from embeddings.fusion import GatedFusion
from training.models.history import (
    HistoryEncoder,
    HSTUEncoder,
    InteractionEmbedding,
    LSTMEncoder,
    PoolEncoder,
    TransformerEncoder,
    encode_by_length,
)
from training.models.ranker import CLICK, INTERACTIONS, RATING, Ranker

HISTORY_ENCODERS = ("pool", "lstm", "transformer", "hstu")
SOFTMAX, BCE = "softmax", "bce"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of the dense part."""

    history: str = "transformer"
    """History encoder: pool, lstm, transformer or hstu."""
    interval_bias: bool = False
    """Let the transformer's attention depend on the time and the interactions that lie between; hstu's always does."""
    max_history: int = 100
    """Interactions the encoder looks back on."""
    layers: int = 2
    heads: int = 2
    """Attention heads."""
    dropout: float = 0.2
    user_row_dropout: float = 0.5
    """Share of users whose row is hidden in a step, so that users without one are served as well."""
    retrieval: str = SOFTMAX
    """Loss of the towers: softmax over target and negatives, or bce, each of them by itself."""
    adversarial_radius: float = 0.0
    """How far the towers' vectors are moved to where the retrieval loss rises most, to be learned there too; 0: not."""
    adversarial_weight: float = 0.5
    """Of that loss."""
    item_row_dropout: float = 0.0
    """Share of items whose row is hidden in a step, so that what is told of an item can stand for itself."""
    members: int = 1
    """Models trained side by side from different starts, each on its share of every row, whose scores are averaged."""
    media: tuple[str, ...] = ()
    """What the dataset has of items beside their text that the model is told: image, audio, or both."""
    interaction: str = "mlp"
    """Interaction of the ranker: mlp, dcn, deepfm or bilinear."""
    ranker_hidden: int = 64
    rating_weight: float = 0.0
    """Stars to add to the click logit when ordering a slate; 0 orders by click alone."""
    candidates: int = 200
    """Items retrieved for the ranker."""

    def __post_init__(self) -> None:
        if self.history not in HISTORY_ENCODERS:
            raise ConfigError(f"model.history={self.history!r}: is none of {', '.join(HISTORY_ENCODERS)}")
        if self.retrieval not in (SOFTMAX, BCE):
            raise ConfigError(f"model.retrieval={self.retrieval!r}: is none of {SOFTMAX}, {BCE}")
        check_kinds(self.media)
        for name in ("adversarial_radius", "adversarial_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name}={getattr(self, name)}: must be 0 or more")
        if self.interaction not in INTERACTIONS:
            raise ConfigError(f"model.interaction={self.interaction!r}: is none of {', '.join(INTERACTIONS)}")
        for name in ("max_history", "layers", "heads", "members", "ranker_hidden", "candidates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)}: must be at least 1")
        for name in ("dropout", "user_row_dropout", "item_row_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)}: must be in [0, 1)")


class Losses(NamedTuple):
    """Of one batch; scalars, differentiable where noted."""

    total: torch.Tensor
    """What the step descends."""
    retrieval: torch.Tensor
    click: torch.Tensor
    rating: torch.Tensor


TEXT_SCALE = 4.0
"""Makes the projection of a unit-length text vector learn four times as fast as the other dense weights."""
RANKED_POSITIONS = 128
"""Targets of a step that train the ranker, drawn at random: most of what a step costs."""
RANKED_DRAWS = 128


class Stages(nn.Module):
    """Both stages over items' vectors, whatever these are made of."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.ranked_positions = RANKED_POSITIONS
        self._build(dim)

    def _build(self, dim: int) -> None:
        config = self.config
        if config.history in ("transformer", "hstu") and dim % config.heads:
            owner = "tables.dim" if config.members == 1 else "tables.dim/model.members"
            raise ConfigError(f"model.heads={config.heads}: must divide {owner}={dim}")
        self.interaction = InteractionEmbedding(dim, config.max_history, len(KINDS), config.dropout)
        self.history = build_history_encoder(config, dim)
        self.bilinear = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.bilinear.weight)
        self.ranker = Ranker(dim, config.ranker_hidden, config.interaction, config.dropout)

    def user_vectors(
        self,
        item_BLD: torch.Tensor,
        kind_BL: torch.Tensor,
        value_BL: torch.Tensor,
        ts_BL: torch.Tensor,
        present_BL: torch.Tensor,
        user_row_BD: torch.Tensor,
    ) -> torch.Tensor:
        """Return the user vector after each interaction, [B, L, D]; padded positions hold anything finite."""
        encoded_BLD = encode_by_length(self.encode, present_BL, item_BLD, kind_BL, value_BL, ts_BL)
        return encoded_BLD + user_row_BD.unsqueeze(1)

    def encode(
        self,
        present_BL: torch.Tensor,
        item_BLD: torch.Tensor,
        kind_BL: torch.Tensor,
        value_BL: torch.Tensor,
        ts_BL: torch.Tensor,
    ) -> torch.Tensor:
        """Return what each interaction and those before it make of their user, without the user's row, [B, L, D]."""
        inputs_BLD = self.interaction(item_BLD, kind_BL, value_BL, ts_BL, present_BL)
        return self.bilinear(self.history(inputs_BLD, present_BL, ts_BL))

    def order(self, user_D: torch.Tensor, item_KD: torch.Tensor) -> torch.Tensor:
        """Return the ranker's ordering score of K candidates for each of the leading user dimensions, […, K]."""
        score_K = (item_KD @ user_D.unsqueeze(-1)).squeeze(-1)
        heads = self.heads(user_D.unsqueeze(-2).expand_as(item_KD), item_KD, score_K)
        return heads[CLICK] + self.config.rating_weight * heads[RATING]

    def heads(self, user_D: torch.Tensor, item_D: torch.Tensor, score: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the ranker's `click` logits and `rating` estimates of pairs, shaped as their retrieval scores."""
        return self.ranker(user_D, item_D, score)

    def losses(self, batch: Batch, item_ND: torch.Tensor, user_row_BD: torch.Tensor) -> Losses:
        """Return the losses of a batch, given the vectors of its items and the rows of its users."""
        user_BLD = self.user_vectors(
            item_ND[batch.history_BL],
            batch.kind_BL,
            batch.value_BL,
            batch.ts_BL,
            batch.present_BL,
            self._visible(user_row_BD, batch.has_user_B),
        )
        learned_BL = batch.target_BL != PAD
        user_PD, target_P, weight_P = user_BLD[learned_BL], batch.target_BL[learned_BL], batch.weight_BL[learned_BL]
        retrieval, score_PS = self._retrieval_loss(user_PD, target_P, weight_P, item_ND, batch)
        some_R = torch.randperm(len(target_P), device=target_P.device)[: self.ranked_positions]
        click, rating = self._ranking_losses(
            user_PD.detach()[some_R],
            target_P[some_R],
            weight_P[some_R],
            batch.target_rating_BL[learned_BL][some_R],
            score_PS.detach()[some_R],
            item_ND.detach(),
            batch,
        )
        total = retrieval + click + rating
        if self.training and self.config.adversarial_radius:
            moved = self._adversarial_loss(user_PD, target_P, weight_P, item_ND, batch)
            total = total + self.config.adversarial_weight * moved
        return Losses(total=total, retrieval=retrieval, click=click, rating=rating)

    def _visible(self, user_row_BD: torch.Tensor, has_user_B: torch.Tensor) -> torch.Tensor:
        shown_B = has_user_B.to(user_row_BD.dtype)
        if self.training:
            shown_B = shown_B * (torch.rand_like(shown_B) >= self.config.user_row_dropout)
        return user_row_BD * shown_B.unsqueeze(-1)

    def _retrieval_loss(
        self,
        user_PD: torch.Tensor,
        target_P: torch.Tensor,
        weight_P: torch.Tensor,
        item_ND: torch.Tensor,
        batch: Batch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, a weighted sum over the number of targets, and the draws' plain scores [P, S].

        A score is −inf where a draw is the target itself.
        """
        score_P = (user_PD * item_ND[target_P]).sum(-1)
        hit_PS = batch.negative_S.unsqueeze(0) == target_P.unsqueeze(1)
        score_PS = (user_PD @ item_ND[batch.negative_S].T).masked_fill(hit_PS, float("-inf"))
        logit_P, logit_PS = score_P - batch.log_q_N[target_P], score_PS - batch.log_q_N[batch.negative_S]
        if self.config.retrieval == BCE:  # noise-contrastive: S draws from Q, so the odds are divided by S·Q
            log_s = math.log(max(len(batch.negative_S), 1))
            loss_P = functional.softplus(log_s - logit_P) + functional.softplus(logit_PS - log_s).sum(1)
        else:  # the positive is candidate 0
            logit_PC = torch.cat([logit_P.unsqueeze(1), logit_PS], dim=1)
            loss_P = functional.cross_entropy(logit_PC, torch.zeros_like(target_P), reduction="none")
        # A batch with nothing to learn has loss 0, not NaN.
        return (weight_P * loss_P).sum() / max(len(target_P), 1), score_PS

    def _adversarial_loss(
        self, user_PD: torch.Tensor, target_P: torch.Tensor, weight_P: torch.Tensor, item_ND: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Return the retrieval loss a radius away, in the direction in which it rises (He et al., SIGIR 2018)."""
        vectors = [vector.detach().requires_grad_() for vector in (user_PD, item_ND)]
        loss, _ = self._retrieval_loss(vectors[0], target_P, weight_P, vectors[1], batch)
        user_PD, item_ND = (
            vector + self.config.adversarial_radius * functional.normalize(gradient, dim=-1)
            for vector, gradient in zip((user_PD, item_ND), torch.autograd.grad(loss, vectors), strict=True)
        )
        return self._retrieval_loss(user_PD, target_P, weight_P, item_ND, batch)[0]

    def _ranking_losses(
        self,
        user_RD: torch.Tensor,
        target_R: torch.Tensor,
        weight_R: torch.Tensor,
        rating_R: torch.Tensor,
        score_RS: torch.Tensor,
        item_ND: torch.Tensor,
        batch: Batch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the click and rating losses. The towers' vectors come detached: this gradient would spoil retrieval.

        Click is noise-contrastive estimation (Gutmann & Hyvärinen, AISTATS 2010): a true pair against C draws from Q
        has logit s − log(C·Q). Here s, the retrieval score less its log-partition as estimated from all draws, tends to
        the log-odds of the item: draws of the target itself are left out of both.
        Keeping only the hardest draws instead would lift everything that is never among them.
        """
        log_z_R1 = (score_RS - batch.log_q_N[batch.negative_S]).logsumexp(1, keepdim=True) - math.log(score_RS.shape[1])
        log_z_R1 = log_z_R1.nan_to_num(neginf=0.0)  # every draw was the target: nothing to estimate it from
        drawn_C = batch.negative_S[:RANKED_DRAWS]
        candidate_RC = torch.cat([target_R.unsqueeze(1), drawn_C.expand(len(target_R), -1)], dim=1)
        user_RCD = user_RD.unsqueeze(1).expand(-1, candidate_RC.shape[1], -1)
        item_RCD = item_ND[candidate_RC]
        heads = self.ranker(user_RCD, item_RCD, (user_RCD * item_RCD).sum(-1) - log_z_R1)

        logit_RC = heads[CLICK] - batch.log_q_N[candidate_RC] - math.log(len(drawn_C))
        chosen_RC = torch.zeros_like(logit_RC)
        chosen_RC[:, 0] = 1.0
        counted_RC = torch.ones_like(logit_RC)
        counted_RC[:, 1:] = (candidate_RC[:, 1:] != candidate_RC[:, :1]).to(logit_RC.dtype)
        click = functional.binary_cross_entropy_with_logits(
            logit_RC, chosen_RC, weight=counted_RC * weight_R.unsqueeze(1), reduction="sum"
        ) / max(len(target_R), 1)

        rated_R = rating_R.isfinite()
        error_R = (heads[RATING][:, 0] - rating_R.nan_to_num())[rated_R]
        return click, (weight_R[rated_R] * error_R.square()).sum() / rated_R.sum().clamp(min=1)


def build_projection(config: ModelConfig, told_dim: int, dim: int) -> nn.Module:
    """Return what makes of all that is told of an item, of this width, a vector of the model's."""
    if config.media:
        widths = media_widths(config.media)
        return GatedFusion([told_dim - sum(widths), *widths], dim)
    project = nn.Linear(told_dim, dim, bias=False)
    nn.init.normal_(project.weight, std=0.01)
    return project


class TwoStage(Stages):
    """Everything of the model but its tables: an item is its row and what is told of it, projected."""

    def __init__(self, config: ModelConfig, dim: int, text_dim: int) -> None:
        """`text_dim` is the width of all that is told of an item, its media included."""
        project = build_projection(config, text_dim, dim)  # drawn first, as it always was: seeds mean the same
        super().__init__(config, dim)
        self.project = project

    def item_vectors(self, row_ND: torch.Tensor, text_NE: torch.Tensor) -> torch.Tensor:
        """Return item vectors, [N, D]."""
        return row_ND + TEXT_SCALE * self.project(text_NE)

    def forward(self, batch: Batch, row_ND: torch.Tensor, user_row_BD: torch.Tensor) -> Losses:
        """Return the losses of a batch, given the table rows that it lists."""
        return self.losses(batch, self.item_vectors(self._kept(row_ND), batch.text_NE), user_row_BD)

    def _kept(self, row_ND: torch.Tensor) -> torch.Tensor:
        """Return the item rows, some of them hidden while training (Volkovs et al., NeurIPS 2017)."""
        if not self.training or not self.config.item_row_dropout:
            return row_ND
        kept_N = torch.rand(len(row_ND), device=row_ND.device) >= self.config.item_row_dropout
        return row_ND * kept_N.to(row_ND.dtype).unsqueeze(1)


def build_history_encoder(config: ModelConfig, dim: int) -> HistoryEncoder:
    """Return the history encoder that the recipe names."""
    if config.history == "pool":
        return PoolEncoder(dim)
    if config.history == "lstm":
        return LSTMEncoder(dim, config.layers, config.dropout)
    attention = (dim, config.layers, config.heads, config.dropout, config.max_history)
    if config.history == "hstu":
        return HSTUEncoder(*attention)
    return TransformerEncoder(*attention, interval_bias=config.interval_bias)
