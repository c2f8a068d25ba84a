"""What can be set about classical systems, how each is built, and what fitting it takes of memory.

In:  a recipe's `[system]` and the sections of the systems.  Out: checked dataclasses; a system to fit or to restore.
Knows nothing of data. `[system]` says which one a recipe is about; each has its settings in the section of its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import numpy as np

from cluster.config import Recipe
from cluster.errors import ConfigError
from cluster.manifest import TWO_STAGE
from training.baselines.autoencoder import Autoencoder
from training.baselines.content import Content
from training.baselines.ease import L2
from training.baselines.factors import AlternatingLeastSquares, BayesianRanking
from training.baselines.hybrid import Hybrid
from training.baselines.interface import Recommender
from training.baselines.neighbours import BLOCK, ItemNeighbours, Similarity, TextNeighbours, UserNeighbours
from training.baselines.popularity import Popularity

HYBRID, CONTENT, TEXT_NEIGHBOURS = "hybrid", "content", "text_neighbours"
RATINGS, BASKETS = "ratings", "baskets"
Part = Literal["popularity", "item_neighbours", "user_neighbours", "text_neighbours", "content", "als", "bpr", "ease"]
"""A system that may be part of a hybrid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemConfig:
    """Which system recommends."""

    name: Literal["two_stage", "ratings", "baskets", "hybrid"] | Part = TWO_STAGE
    """The two-stage model, trained on Ray and learning while it serves; a classical system, fitted once; the ranker of
    next baskets, fitted once too; or the rating model, which estimates and is not served."""
    max_history: int = 100
    """Newest interactions of a user that a classical system scores."""
    blend: Literal["popularity", "item_neighbours", "content", "als", "ease"] | None = None
    """A classical system whose scores are added to the two-stage model's; one that holds nothing of single users, whose
    rows change hands as the model learns."""
    blend_weight: float | None = None
    """By how much; where none is given it is chosen on the validation interactions."""

    def __post_init__(self) -> None:
        if self.max_history < 1:
            raise ConfigError(f"system.max_history={self.max_history}: must be at least 1")
        if self.blend is not None and self.name != TWO_STAGE:
            raise ConfigError(f"system.blend={self.blend}: goes with system.name={TWO_STAGE}; see [hybrid] for others")
        if self.blend_weight is not None and (self.blend is None or self.blend_weight < 0):
            raise ConfigError(f"system.blend_weight={self.blend_weight}: must be 0 or more, and system.blend be given")

    @property
    def classical(self) -> str | None:
        """The classical system that recommends, alone or beside the two-stage model; none where there is none."""
        return self.blend if self.name in (TWO_STAGE, RATINGS, BASKETS) else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class EaseConfig:
    """EASE."""

    l2: float = L2
    """Regularisation: the larger, the less items say that few have."""

    def __post_init__(self) -> None:
        if self.l2 <= 0:
            raise ConfigError(f"ease.l2={self.l2}: must be above 0; try {L2:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _NeighboursConfig:
    section: ClassVar[str]
    neighbours: int = 100
    """Nearest ones that count."""
    similarity: Similarity = "cosine"
    shrink: float = 0.0
    """The larger, the less it says to have little in common."""

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ConfigError(f"{self.section}.neighbours={self.neighbours}: must be at least 1")
        if self.shrink < 0:
            raise ConfigError(f"{self.section}.shrink={self.shrink}: must be 0 or more")


class ItemNeighboursConfig(_NeighboursConfig):
    """Item-based collaborative filtering."""

    section = "item_neighbours"


class UserNeighboursConfig(_NeighboursConfig):
    """User-based collaborative filtering."""

    section = "user_neighbours"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextNeighboursConfig:
    """User-based collaborative filtering by what a language model makes of users' items."""

    neighbours: int = 100
    """Nearest ones that count."""

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ConfigError(f"{TEXT_NEIGHBOURS}.neighbours={self.neighbours}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlsConfig:
    """Weighted matrix factorisation by alternating least squares."""

    factors: int = 64
    regularization: float = 0.05
    alpha: float = 10.0
    """How much more an interaction counts than its absence."""
    iterations: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("factors", "regularization", "alpha", "iterations"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"als.{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class BprConfig:
    """Bayesian personalised ranking by stochastic gradient descent."""

    factors: int = 64
    learning_rate: float = 0.03
    regularization: float = 0.01
    iterations: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("factors", "learning_rate", "regularization", "iterations"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"bpr.{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridConfig:
    """A weighted sum of classical systems, each with the settings of its own section."""

    parts: tuple[Part, ...] = ("ease", "content")
    weights: tuple[float, ...] = ()
    """Of the parts; where none are given they are chosen on the validation interactions."""

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or len(set(self.parts)) < len(self.parts):
            raise ConfigError(f"hybrid.parts={list(self.parts)}: must be two systems or more, each once")
        if self.weights and len(self.weights) != len(self.parts):
            raise ConfigError(f"hybrid.weights={list(self.weights)}: {len(self.parts)} parts need as many, or none")


SYSTEMS: Mapping[str, tuple[Callable[..., Recommender], type]] = {
    "item_neighbours": (ItemNeighbours, ItemNeighboursConfig),
    "user_neighbours": (UserNeighbours, UserNeighboursConfig),
    "als": (AlternatingLeastSquares, AlsConfig),
    "bpr": (BayesianRanking, BprConfig),
    "ease": (Autoencoder, EaseConfig),
}
"""Systems that have settings: how each is made of them."""

EASE_ENTRY_BYTES = 41
"""Of a pair of items while EASE is fitted: the Gram matrix, its regularised copy, the solver's two, the weights.
Measured, as is the next."""
BLOCK_ENTRY_BYTES = 18
"""Of a similarity while the nearest are found: itself, its terms and where it ranks."""


def build_system(recipe: Recipe, name: str, text_IE: np.ndarray) -> Recommender:
    """Return the classical system of this name with the recipe's settings; `text_IE` is what is told of the items."""
    if name == HYBRID:
        config = recipe.section(HybridConfig)
        parts = [build_system(recipe, part, text_IE) for part in config.parts]
        return Hybrid(parts, config.weights or [1.0] * len(parts))
    if name == CONTENT:
        return Content(text_IE)
    if name == TEXT_NEIGHBOURS:
        return TextNeighbours(text_IE, recipe.section(TextNeighboursConfig).neighbours)
    if name == "popularity":
        return Popularity()
    build, owner = SYSTEMS[name]
    return build(**asdict(recipe.section(owner)))


def fitting_bytes(recipe: Recipe, name: str, users: int, items: int) -> int:
    """Return about what fitting takes of memory, where that grows faster than what is fitted on; 0 for the others."""
    if name == HYBRID:
        return max(fitting_bytes(recipe, part, users, items) for part in recipe.section(HybridConfig).parts)
    per = {
        "ease": EASE_ENTRY_BYTES * items * items,
        "item_neighbours": BLOCK_ENTRY_BYTES * BLOCK * items,
        "user_neighbours": BLOCK_ENTRY_BYTES * BLOCK * users,
        TEXT_NEIGHBOURS: BLOCK_ENTRY_BYTES * BLOCK * users,
    }
    return per.get(name, 0)
