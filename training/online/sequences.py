"""Histories from the event log become sequences to learn from.

In:  per user, the interactions up to the newest one, and which of them are new.  Out: `Sequences`.
Knows nothing of the log or the model. The counterpart for datasets is training/stream.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from cluster.events import KIND_INDEX
from cluster.log import Interaction
from embeddings.batch import PAD, Sequences
from embeddings.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class LiveHistory:
    """One user's interactions, oldest first; those from `first_new_seq` on are to be learned."""

    user_row: int
    interactions: Sequence[Interaction]
    first_new_seq: int


def seen_before(user_row: int, interactions: Sequence[Interaction]) -> LiveHistory:
    """Return the history of a user to whom something was shown: all of it is seen, nothing is to be learned."""
    return LiveHistory(user_row, [*interactions, interactions[-1]], first_new_seq=2**63)


def build_live_sequences(
    histories: Sequence[LiveHistory], items: Vocabulary, weights: Mapping[int, float] | None = None
) -> Sequences:
    """Lay the histories out right-aligned: each interaction but the last is seen, each new one is a target.

    Every interaction's item must have a row. `weights`, by sequence number, are 1 where none is given.
    """
    length = max(1, max(len(history.interactions) for history in histories) - 1)
    shape = (len(histories), length)
    laid_out = Sequences(
        user_row_B=np.array([history.user_row for history in histories], np.int64),
        item_row_BL=np.full(shape, PAD, np.int64),
        kind_BL=np.zeros(shape, np.int64),
        value_BL=np.full(shape, np.nan, np.float32),
        ts_BL=np.zeros(shape, np.int64),
        target_row_BL=np.full(shape, PAD, np.int64),
        target_rating_BL=np.full(shape, np.nan, np.float32),
        weight_BL=np.ones(shape, np.float32),
    )
    for b, history in enumerate(histories):
        for before, (seen, target) in enumerate(
            zip(history.interactions, history.interactions[1:], strict=False), length + 1 - len(history.interactions)
        ):
            laid_out.item_row_BL[b, before] = items.row(seen.item_id)
            laid_out.kind_BL[b, before] = KIND_INDEX[seen.kind]
            laid_out.value_BL[b, before] = _float32(seen.value)
            laid_out.ts_BL[b, before] = seen.ts_us // 1_000_000
            if target.seq >= history.first_new_seq:
                laid_out.target_row_BL[b, before] = items.row(target.item_id)
                laid_out.weight_BL[b, before] = (weights or {}).get(target.seq, 1.0)
                if target.kind == "rating":
                    laid_out.target_rating_BL[b, before] = _float32(target.value)
    return laid_out


def join_sequences(first: Sequences, second: Sequences) -> Sequences:
    """Stack two sets of sequences, the shorter padded in front."""
    length = max(first.item_row_BL.shape[1], second.item_row_BL.shape[1])
    padding = {"item_row_BL": PAD, "target_row_BL": PAD, "value_BL": np.nan, "target_rating_BL": np.nan}

    def widen(name: str, array: np.ndarray) -> np.ndarray:
        missing = length - array.shape[1]
        return np.pad(array, ((0, 0), (missing, 0)), constant_values=padding.get(name, 0))

    joined = {}
    for name in (f.name for f in fields(Sequences)):
        pair = (getattr(first, name), getattr(second, name))
        joined[name] = np.concatenate(pair if pair[0].ndim == 1 else [widen(name, array) for array in pair])
    return Sequences(**joined)


def _float32(value: float | None) -> np.float32:
    """Return the value, NaN for none; what is too large becomes infinite, as Arrow makes it in a dataset."""
    with np.errstate(over="ignore"):
        return np.float32(np.nan if value is None else value)
