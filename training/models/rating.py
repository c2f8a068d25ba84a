"""The rating model: would the user like the item, with how many stars, given who rated what how.

In:  a `RatingBatch`.  Out: its losses and predictions.
Knows nothing of where batches come from. Rows come from TorchRec tables, summed a feature, sharded or not.

    user = row + Σ attributes + Σ rated / √n      a row for each item and star level that the user gave it
    item = row + Σ attributes + Σ raters / √n + project(text)                  and the other way round
    heads: ranker.py over user · item, [u, v, u⊙v] or their crosses; and a class a star level

A user is what they rated, an item whom it was rated by, and how (asymmetric SVD, Koren, KDD 2008; from both sides); a
rating that is to be predicted is in neither. Heads: BCE of "liked", squared or absolute error of the stars, cross
entropy of the levels.
Shapes: B examples, D dimension, E encoder dimension, S star levels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from cluster.errors import ConfigError
from embeddings.tables import ITEM, USER, TablesConfig, build_bags, shard
from training.models.ranker import CLICK, INTERACTIONS, RATING, RATING_CENTRE, Ranker

if TYPE_CHECKING:
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

RATED, RATER, ATTRIBUTE = "rated", "rater", "attribute"
USER_ATTRIBUTE, ITEM_ATTRIBUTE = "user_attribute", "item_attribute"
FEATURES = {
    USER: [USER],
    ITEM: [ITEM],
    RATED: [RATED],
    RATER: [RATER],
    ATTRIBUTE: [USER_ATTRIBUTE, ITEM_ATTRIBUTE],
}
"""Table to the features that look rows up in it."""
NAMES = [feature for features in FEATURES.values() for feature in features]
"""Features in the order of a batch's lookup."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RatingConfig:
    """Shape of the rating model, its heads, and which ratings it may see."""

    liked_from: float = 4.0
    """Stars from which on an item is liked."""
    interaction: str = "mlp"
    """Interaction of the heads: mlp, dcn, deepfm or bilinear."""
    hidden: int = 64
    dropout: float = 0.3
    """Of the users' and items' vectors, and within the heads."""
    stars_loss: Literal["mse", "mae"] = "mse"
    liked_weight: float = 1.0
    stars_weight: float = 0.3
    levels_weight: float = 0.0
    """Weights of the heads' losses; 0 leaves a head untrained."""
    bag: int = 512
    """Ratings of a user, or of an item, that are read at most: the newest."""
    batch_ratings: int = 1024
    """Ratings a step, over all workers together."""
    train_fraction: float = 0.8
    """Share of the ratings, drawn at random, that is learned."""
    validation_fraction: float = 0.1
    """Share of all ratings on which the best epoch is chosen; the rest is the test."""
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.interaction not in INTERACTIONS:
            raise ConfigError(f"ratings.interaction={self.interaction!r}: is none of {', '.join(INTERACTIONS)}")
        for name in ("hidden", "bag", "batch_ratings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ratings.{name}={getattr(self, name)}: must be at least 1")
        for name in ("liked_weight", "stars_weight", "levels_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"ratings.{name}={getattr(self, name)}: must be 0 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"ratings.dropout={self.dropout}: must be in [0, 1)")
        if (
            min(self.train_fraction, self.validation_fraction) <= 0
            or self.train_fraction + self.validation_fraction >= 1
        ):
            raise ConfigError(
                f"ratings.train_fraction={self.train_fraction}, validation_fraction={self.validation_fraction}: "
                "must be above 0, and below 1 together"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RatingBatch:
    """What one step consumes, as tensors on one device."""

    lookup: "KeyedJaggedTensor"
    """The features of `NAMES`, B each."""
    text_BE: torch.Tensor
    """float32: the encoder's vector of each item; zeros where there is no text."""
    stars_B: torch.Tensor
    level_B: torch.Tensor
    """int64: which star level that is."""
    global_ratings: int
    """Ratings of the step over all workers: what losses are means over."""

    def to(self, device: torch.device) -> "RatingBatch":
        """Return the batch on `device`, without waiting for the copy."""
        if device.type == "cpu":
            return self
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("text_BE", "stars_B", "level_B")}
        return RatingBatch(
            lookup=self.lookup.to(device, non_blocking=True), global_ratings=self.global_ratings, **moved
        )


class RatingLosses(NamedTuple):
    """Of one batch; each loss is this worker's sum · workers / ratings of the step: DDP's mean is the batch's."""

    total: torch.Tensor
    liked: torch.Tensor
    stars: torch.Tensor
    levels: torch.Tensor


class RatingDense(nn.Module):
    """Everything of the model but its tables."""

    def __init__(self, config: RatingConfig, dim: int, text_dim: int, levels: int, mean_stars: float) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(text_dim, dim, bias=False)
        nn.init.normal_(self.project.weight, std=0.05)
        self.dropout = nn.Dropout(config.dropout)
        self.ranker = Ranker(dim, config.hidden, config.interaction, config.dropout)
        self.levels = nn.Linear(3 * dim, levels)
        self.stars_bias = nn.Parameter(torch.tensor(mean_stars - RATING_CENTRE))
        self.stars_scale = nn.Parameter(torch.ones(()))

    def forward(
        self, sums: Mapping[str, torch.Tensor], counts: Mapping[str, torch.Tensor], text_BE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits of "liked" [B], stars [B] and logits of the levels [B, S]. `counts` are ids a feature."""
        user_BD = sums[USER] + sums[USER_ATTRIBUTE] + _scaled(sums[RATED], counts[RATED])
        item_BD = sums[ITEM] + sums[ITEM_ATTRIBUTE] + _scaled(sums[RATER], counts[RATER]) + self.project(text_BE)
        user_BD, item_BD = self.dropout(user_BD), self.dropout(item_BD)
        score_B = (user_BD * item_BD).sum(-1)
        heads = self.ranker(user_BD, item_BD, score_B)
        level_BS = self.levels(torch.cat([user_BD, item_BD, user_BD * item_BD], dim=-1))
        return heads[CLICK], heads[RATING] + self.stars_bias + self.stars_scale * score_B, level_BS


class RatingModel(nn.Module):
    """Tables and dense part; once sharded, `tables` is distributed and `dense` is replicated."""

    def __init__(self, tables: nn.Module, dense: RatingDense) -> None:
        super().__init__()
        self.tables = tables
        self.dense = dense

    def predict(self, batch: RatingBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Collective. Return logits of "liked" [B], stars [B] and logits of the levels [B, S]."""
        # Collective: ids go to the workers that hold their rows, sums come back.
        sums = self.tables(batch.lookup).to_dict()
        lengths = batch.lookup.lengths().view(len(NAMES), -1)
        return self.dense(sums, dict(zip(NAMES, lengths, strict=True)), batch.text_BE)

    def forward(self, batch: RatingBatch) -> RatingLosses:
        """Collective. Predict and compare."""
        config, (liked_B, stars_B, level_BS) = self.dense.config, self.predict(batch)
        label_B = (batch.stars_B >= config.liked_from).to(liked_B.dtype)
        error = functional.mse_loss if config.stars_loss == "mse" else functional.l1_loss
        share = _workers() / max(batch.global_ratings, 1)
        liked = functional.binary_cross_entropy_with_logits(liked_B, label_B, reduction="sum") * share
        stars = error(stars_B, batch.stars_B, reduction="sum") * share
        levels = functional.cross_entropy(level_BS, batch.level_B, reduction="sum") * share
        total = config.liked_weight * liked + config.stars_weight * stars + config.levels_weight * levels
        return RatingLosses(total, liked, stars, levels)


def build_rating_model(
    tables: TablesConfig,
    model: RatingConfig,
    rows: Mapping[str, int],
    *,
    text_dim: int,
    levels: int,
    mean_stars: float,
    device: torch.device,
    seed: int,
) -> "DistributedModelParallel":
    """Collective. Return the sharded model, initialised alike for any number of workers."""
    torch.manual_seed(seed)
    dense = RatingDense(model, tables.dim, text_dim, levels, mean_stars).to(device)
    bags = build_bags(rows, FEATURES, tables.dim, tables.learning_rate)
    share = -(-model.batch_ratings // _workers())
    pooling = {RATED: model.bag / 4, RATER: model.bag / 4}  # for the planner, about
    sharded = shard(RatingModel(bags, dense), tables, device, batch_examples=share, pooling=pooling)
    torch.manual_seed(seed + 1 + torch.distributed.get_rank())  # dropout differs between workers
    return sharded


def _scaled(sum_BD: torch.Tensor, count_B: torch.Tensor) -> torch.Tensor:
    return sum_BD / count_B.clamp(min=1).sqrt().unsqueeze(1)


def _workers() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
