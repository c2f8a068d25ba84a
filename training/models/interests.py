"""Stated interests: how much they weigh beside what a user did, and what they are to a system without a text tower.

In:  vectors of what is said, a catalogue's text vectors and popularity.  Out: weights, matching items, what is buried.
Knows nothing of models or of language: the vectors of what is liked and of what is not come apart
(serving/interests.py).

A language model knows what a text is about, not what those who like it watch: items nearest to the text are worse than
what is popular. So the two-stage model takes what is said as the text of one item that the user had (served.py), and a
classical system takes the popular ones among the items that match as the user's history (classical.py). Their scores
are added to those of popularity, or of the history: of which one interaction says more than three words, so that the
weight falls with each (benchmarks/interests.py has the figures).

Shapes: I items, K candidates, N things disliked, E encoder dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WEIGHT = 0.5
"""Of interests against popularity, both over the catalogue's spread; with n interactions it is divided by 1 + n."""
MATCHES = 10
"""Items that stand for the interests."""
MATCH_WEIGHT = 0.5
"""Of how well an item matches, against how popular it is, both over the catalogue's spread."""
BURIED_SHARE = 0.1
"""Share of the catalogue, most like something disliked, that stands behind all others."""

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interests:
    """What was said, as the version's encoder reads it."""

    liked_E: Vectors | None
    """None where only dislikes were stated."""
    disliked_NE: Vectors
    """One a thing disliked."""


def weigh(interactions: int) -> float:
    """Return the weight of interests beside so many interactions."""
    return WEIGHT / (1 + interactions)


def match_items(interests: Interests, text_IE: Vectors, popularity_I: Vectors) -> npt.NDArray[np.int64]:
    """Return the items that stand for the interests, the best last, as in a history."""
    liked_I = text_IE @ interests.liked_E if interests.liked_E is not None else None
    score_I = _standardised(popularity_I)
    if liked_I is not None or len(interests.disliked_NE):
        score_I = score_I + MATCH_WEIGHT * combine(liked_I, list(interests.disliked_NE @ text_IE.T))
    return np.argsort(-score_I, kind="stable")[:MATCHES][::-1]


def combine(liked_I: Vectors | None, disliked: Sequence[Vectors]) -> Vectors:
    """Return what is scored for what is liked less what is scored for what is not, each over its spread."""
    parts = [*([_standardised(liked_I)] if liked_I is not None else []), *(-_standardised(one_I) for one_I in disliked)]
    return np.stack(parts).sum(0)


def is_buried(interests: Interests, text_KE: Vectors, text_IE: Vectors) -> npt.NDArray[np.bool_]:
    """Return which candidates [K] are among the items most like something disliked."""
    if not len(interests.disliked_NE):
        return np.zeros(len(text_KE), np.bool_)
    bound_N1 = np.quantile(interests.disliked_NE @ text_IE.T, 1 - BURIED_SHARE, axis=1, keepdims=True)
    return np.any(interests.disliked_NE @ text_KE.T > bound_N1, axis=0)


def _standardised(score_I: Vectors) -> Vectors:
    spread = score_I.std()
    return (score_I - score_I.mean()) / spread if spread > 0 else np.zeros_like(score_I)
