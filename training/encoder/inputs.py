"""What fine-tuning reads of a dataset: histories to learn from, and choices of items that training never saw.

In:  a dataset, the recipe.  Out: `FinetuneInputs`, the same in every worker; each step's draw of items and targets.
Knows nothing of the encoder.

    interactions by time  |──────── train ────────|──── later ────|
    items held out              validation            validation      no training has met them: cold
    all other items          targets, history           history
"""

from dataclasses import dataclass

import numpy as np

from cluster.dataset import Dataset
from cluster.errors import DataError
from cluster.events import KINDS
from embeddings.tables import TablesConfig
from training.encoder.config import FinetuneConfig
from training.inputs import build_item_vocabulary, build_user_vocabulary, training_events
from training.stream import DataConfig, History, build_history, build_sequences, windows_before

MOST_VALIDATED = 20_000
"""Choices before the later ones that are validated on, drawn at random where there are more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Choices with what came before each; all [P]."""

    history_PL: np.ndarray
    """Items chosen before, oldest first, −1 where there is none."""
    item_P: np.ndarray
    stars_P: np.ndarray
    """NaN where it was no rating."""

    def part(self, first: int, end: int) -> "Targets":
        """Return those from one place to another."""
        return Targets(
            history_PL=self.history_PL[first:end], item_P=self.item_P[first:end], stars_P=self.stars_P[first:end]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDraw:
    """What one step learns."""

    rows_N: np.ndarray
    """Items to encode, each once."""
    log_q_N: np.ndarray
    """Log of the odds of each to be among them."""
    targets: Targets
    """With `item_P` as places in `rows_N`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneInputs:
    """A dataset as fine-tuning sees it."""

    texts: list[str]
    train: History
    full: History
    """With the later interactions and the items held out."""
    validation: np.ndarray
    """Indices into `full` of the choices to validate on: of items held out."""
    is_later: np.ndarray
    """Which of these come after all that is learned from, bool."""
    cold: np.ndarray
    """Rows of the items held out."""

    def train_targets(self) -> np.ndarray:
        """Return the indices into `train` of what can be learned: all but each user's first."""
        return np.setdiff1d(np.arange(len(self.train)), self.train.starts)


def load_finetune_inputs(dataset: Dataset, recipe_data: DataConfig, config: FinetuneConfig) -> FinetuneInputs:
    """Read the training share of a dataset. Raises `DataError` when it holds nothing to learn from."""
    events = training_events(dataset, recipe_data)
    tables = TablesConfig()
    items = build_item_vocabulary(dataset, tables)
    return split_cold(
        dataset.items()["text"].to_pylist(),
        build_history(events, items, build_user_vocabulary(events, tables)),
        config,
        where=dataset.path,
    )


def split_cold(texts: list[str], full: History, config: FinetuneConfig, where: object) -> FinetuneInputs:
    """Hold out some items and the newest interactions. Raises `DataError` when too little is left."""
    counts = np.bincount(full.item_row, minlength=len(texts))
    met = np.flatnonzero(counts)
    rng = np.random.default_rng(config.seed)
    cold = np.sort(rng.choice(met, int(len(met) * config.cold_items), replace=False))
    ordered = np.sort(full.order)
    late_N = full.order >= ordered[int(len(ordered) * (1 - config.validation_fraction))] if len(ordered) else []
    is_cold_N = np.isin(full.item_row, cold)
    train = select(full, ~(is_cold_N | late_N))
    validates_N = is_cold_N.copy()
    validates_N[full.starts] = False
    validation = np.flatnonzero(validates_N)
    is_later = np.asarray(late_N, np.bool_)[validation]
    if (~is_later).sum() > MOST_VALIDATED:
        kept = is_later.copy()
        kept[rng.choice(np.flatnonzero(~is_later), MOST_VALIDATED, replace=False)] = True
        validation, is_later = validation[kept], is_later[kept]
    if not (train.ends - train.starts > 1).any():
        raise DataError(f"{where}: no user has two interactions left to fine-tune the encoder on")
    return FinetuneInputs(texts=texts, train=train, full=full, validation=validation, is_later=is_later, cold=cold)


def select(history: History, kept_N: np.ndarray) -> History:
    """Return the history without the other interactions."""
    user_row = history.user_row[kept_N]
    starts = np.flatnonzero(np.r_[True, user_row[1:] != user_row[:-1]]) if len(user_row) else np.empty(0, np.int64)
    return History(
        user_row=user_row,
        item_row=history.item_row[kept_N],
        kind=history.kind[kept_N],
        value=history.value[kept_N],
        ts_s=history.ts_s[kept_N],
        order=history.order[kept_N],
        starts=starts,
        ends=np.r_[starts, len(user_row)][1:].astype(np.int64),
    )


def lay_out(history: History, targets_P: np.ndarray, length: int) -> Targets:
    """Return choices, indices into the history that are no user's first, with what came before each."""
    if not len(targets_P):
        return Targets(history_PL=np.empty((0, 1), np.int64), item_P=targets_P, stars_P=np.empty(0, np.float32))
    before = build_sequences(history, windows_before(history, targets_P, length))
    rated_P = history.kind[targets_P] == KINDS.index("rating")
    return Targets(
        history_PL=np.where(before.item_row_BL < 0, -1, before.item_row_BL),
        item_P=history.item_row[targets_P],
        stars_P=np.where(rated_P, history.value[targets_P], np.nan).astype(np.float32),
    )


class TargetSampler:
    """Draws each step's items first and then interactions with them: a step encodes few texts and learns much."""

    def __init__(self, history: History, targets: np.ndarray, config: FinetuneConfig) -> None:
        self._history, self._config = history, config
        by_item = targets[np.argsort(history.item_row[targets], kind="stable")]
        self._by_item = by_item
        self.items, self._first, self._count = np.unique(
            history.item_row[by_item], return_index=True, return_counts=True
        )
        weights = self._count.astype(float) ** config.item_power
        self._probability = weights / weights.sum()
        self._log_q = np.full(int(history.item_row.max()) + 1, np.log(self._probability.min()), np.float32)
        self._log_q[self.items] = np.log(self._probability)

    def steps_per_epoch(self, workers: int) -> int:
        """Return how many steps encode about as many items as there are."""
        return max(1, round(len(self.items) / (self._config.batch_items * workers)))

    def draw(self, rng: np.random.Generator) -> StepDraw:
        """Return a step's items, and some of the interactions with them."""
        wanted = min(self._config.batch_items, len(self.items))
        chosen = rng.choice(len(self.items), wanted, replace=False, p=self._probability)
        counts = self._count[chosen]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found = self._by_item[np.repeat(self._first[chosen], counts) + within]
        if len(found) > self._config.batch_targets:
            found = rng.choice(found, self._config.batch_targets, replace=False)
        rows = np.sort(self.items[chosen])
        laid_out = lay_out(self._history, found, self._config.max_history)
        targets = Targets(
            history_PL=laid_out.history_PL,
            item_P=np.searchsorted(rows, laid_out.item_P),
            stars_P=laid_out.stars_P,
        )
        log_q_N = np.minimum(np.log(wanted) + self._log_q[rows], 0.0).astype(np.float32)
        return StepDraw(rows_N=rows, log_q_N=log_q_N, targets=targets)

    def draw_targets(self, rng: np.random.Generator, count: int) -> Targets:
        """Return so many interactions, or all where there are fewer, whatever their items."""
        found = rng.choice(self._by_item, min(count, len(self._by_item)), replace=False)
        return lay_out(self._history, found, self._config.max_history)
