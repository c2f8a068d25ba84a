"""Whom and what an interaction is about, as far as it is judged apart: users and items that are known well or hardly.

In:  sequences with targets.  Out: for each segment, which targets are in it.
Knows nothing of models or verdicts. A mean over all events hides what goes wrong for a part of them.
"""

from collections.abc import Mapping

import numpy as np

from embeddings.batch import PAD, Sequences

KNOWN_USERS, NEW_USERS, HEAD_ITEMS, TAIL_ITEMS = "known users", "new users", "head items", "tail items"
HEAD_SHARE = 0.5
"""Share of the past interactions that the most popular items hold, the head."""


class Segments:
    """Segments as they were when a version was taken up."""

    def __init__(self, count_I: np.ndarray, user_rows: int) -> None:
        """Divide items by their past interactions, and users by whether they are among the first `user_rows`."""
        order = np.argsort(-count_I, kind="stable")
        before_I = np.cumsum(count_I[order]) - count_I[order]
        self._head_rows = order[before_I < HEAD_SHARE * count_I.sum()]
        self._user_rows = user_rows

    def of(self, sequences: Sequences, reused_user_rows: set[int]) -> Mapping[str, np.ndarray]:
        """Return for each segment which targets are in it, in row-major order of the sequences."""
        learned_BL = sequences.target_row_BL != PAD
        known_B = (sequences.user_row_B >= 0) & (sequences.user_row_B < self._user_rows)
        known_B &= ~np.isin(sequences.user_row_B, list(reused_user_rows))
        known_P = np.broadcast_to(known_B[:, np.newaxis], learned_BL.shape)[learned_BL]
        head_P = np.isin(sequences.target_row_BL[learned_BL], self._head_rows)
        return {KNOWN_USERS: known_P, NEW_USERS: ~known_P, HEAD_ITEMS: head_P, TAIL_ITEMS: ~head_P}
