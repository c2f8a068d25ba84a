"""Later choices of items that no training has met: what encoders of texts are compared on.

In:  a dataset, a seed.  Out: what a head learns from, and ranks of the later choices of the items held out.

    interactions by time  |──────────── first 80% ────────────|── last 20% ──|
    15% of the items              (left out)                     tested
    all others                    learned                        history
"""

import numpy as np
import torch

from cluster.dataset import Dataset
from embeddings.tables import TablesConfig
from embeddings.vocabulary import Vocabulary
from training.encoder.config import FinetuneConfig
from training.encoder.inputs import lay_out, select, split_cold
from training.encoder.learner import EncoderLearner, choice_ranks
from training.inputs import build_item_vocabulary
from training.stream import build_history

HELD_OUT = 0.15
"""Share of the items that no training meets."""
LATER = 0.2
"""Share of the events, the newest, that are for testing."""


class ColdChoices:
    """One draw of items held out."""

    def __init__(self, dataset: Dataset, seed: int, config: FinetuneConfig) -> None:
        events = dataset.events()
        user_ids = events["user_id"].unique()
        items = build_item_vocabulary(dataset, TablesConfig())
        history = build_history(events, items, Vocabulary(user_ids.to_pylist(), len(user_ids)))
        texts = dataset.items()["text"].to_pylist()
        self.held_out = held_out_items(len(texts), seed)
        is_held_out_N, later_N = np.isin(history.item_row, self.held_out), history.order >= (1 - LATER) * len(events)
        met = select(history, ~is_held_out_N | later_N)  # no history has an item that was held out before it was tested
        tested_N = np.isin(met.item_row, self.held_out) & (met.order >= (1 - LATER) * len(events))
        tested_N[met.starts] = False
        self._test = lay_out(met, np.flatnonzero(tested_N), config.max_history)
        self.user_P = met.user_row[np.flatnonzero(tested_N)]
        self.inputs = split_cold(texts, select(history, ~is_held_out_N & ~later_N), config, where=dataset.path)
        self._is_held_out_I = torch.zeros(len(texts), dtype=torch.bool)
        self._is_held_out_I[torch.from_numpy(self.held_out)] = True

    def ranks(self, learner: EncoderLearner) -> np.ndarray:
        """Return each choice's rank among all items, [P]."""
        return choice_ranks(learner.head, learner.memory_IE, self._test)

    def cold_ranks(self, learner: EncoderLearner) -> np.ndarray:
        """Return each choice's rank among the items held out, [P]."""
        return choice_ranks(learner.head, learner.memory_IE, self._test, self._is_held_out_I)


def held_out_items(count: int, seed: int) -> np.ndarray:
    """Return which of so many items are held out, in order."""
    return np.sort(np.random.default_rng(1_000 + seed).choice(count, int(count * HELD_OUT), replace=False))
