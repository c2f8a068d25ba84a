"""Stated interests: what a person says they like stands at the head of their history, as items they might have had.

In:  vectors of what is said, a catalogue's text vectors and popularity.  Out: items that match; candidates, with what
is like the disliked behind the others.
Knows nothing of models: whatever recommends after a history recommends after this one. Nor of language: the vectors of
what is liked and of what is not come apart (serving/interests.py).

A language model knows what a text is about, not what those who like it watch: items nearest to "crime, no gore" in the
text's own space are worse than what is popular. The popular ones among them are what the history of somebody with that
interest looks like, and the model takes it from there (benchmarks/interests.py has the figures).

Shapes: I items, K candidates, N things disliked, E encoder dimension.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


def match_items(interests: Interests, text_IE: Vectors, popularity_I: Vectors) -> npt.NDArray[np.int64]:
    """Return the items that stand for the interests, the best last, as in a history."""
    fit_I = np.zeros(len(text_IE), np.float32)
    if interests.liked_E is not None:
        fit_I += _standardised(text_IE @ interests.liked_E)
    for disliked_E in interests.disliked_NE:
        fit_I -= _standardised(text_IE @ disliked_E)
    score_I = _standardised(popularity_I) + MATCH_WEIGHT * fit_I
    return np.argsort(-score_I, kind="stable")[:MATCHES][::-1]


def is_buried(interests: Interests, text_KE: Vectors, text_IE: Vectors) -> npt.NDArray[np.bool_]:
    """Return which candidates [K] are among the items most like something disliked."""
    buried_K = np.zeros(len(text_KE), np.bool_)
    for disliked_E in interests.disliked_NE:
        bound = np.quantile(text_IE @ disliked_E, 1 - BURIED_SHARE)
        buried_K |= text_KE @ disliked_E > bound
    return buried_K


def _standardised(score_I: Vectors) -> Vectors:
    spread = score_I.std()
    return (score_I - score_I.mean()) / spread if spread > 0 else np.zeros_like(score_I)
