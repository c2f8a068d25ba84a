"""What training reads of a dataset: vocabularies, histories, the split by time, the negative sampler.

In:  a dataset, the recipe, item text vectors.  Out: `TrainingInputs`, the same in every worker.
Knows nothing of models or workers.

    events by time   |────────── train ──────────|─ validation ─|── never seen: for replay ──|
                     0                       train_fraction · (1 − validation_fraction)   train_fraction
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.dataset import Dataset
from cluster.errors import DataError
from cluster.events import INTERACTION_KINDS
from embeddings.tables import TablesConfig
from embeddings.vocabulary import Vocabulary
from training.stream import DataConfig, History, NegativeSampler, build_history


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInputs:
    """A dataset as training sees it."""

    items: Vocabulary
    users: Vocabulary
    text: np.ndarray
    """Encoder vectors, float32 [items, E], memory-mapped."""
    train: History
    full: History
    """`train` and the validation interactions."""
    validation_from: int
    """Place in time order at which validation starts."""
    sampler: NegativeSampler


def load_inputs(dataset: Dataset, data: DataConfig, tables: TablesConfig, text_path: Path) -> TrainingInputs:
    """Read the training share of a dataset. Raises `DataError` when it holds nothing to learn from."""
    events = training_events(dataset, data)
    items, users = build_item_vocabulary(dataset, tables), build_user_vocabulary(events, tables)
    validation_from = int(len(events) * (1 - data.validation_fraction))
    train = build_history(events.slice(0, validation_from), items, users)
    if not (train.ends - train.starts > 1).any():
        raise DataError(f"{dataset.path}: no user has two interactions among the {validation_from:,} training events")
    return TrainingInputs(
        items=items,
        users=users,
        text=np.load(text_path, mmap_mode="r"),
        train=train,
        full=build_history(events, items, users),
        validation_from=validation_from,
        sampler=NegativeSampler(np.bincount(train.item_row, minlength=len(items)), data.negative_power),
    )


def training_events(dataset: Dataset, data: DataConfig) -> pa.Table:
    """Return the events that training may see: the first `train_fraction` by time."""
    events = dataset.events()
    return events.slice(0, int(len(events) * data.train_fraction))


def build_item_vocabulary(dataset: Dataset, tables: TablesConfig) -> Vocabulary:
    """Return rows for the whole catalogue, in its order, with spare ones."""
    ids = dataset.items()["item_id"].to_pylist()
    return Vocabulary(ids, len(ids) + tables.spare_rows)


def build_user_vocabulary(events: pa.Table, tables: TablesConfig) -> Vocabulary:
    """Return rows for users who interacted with something, in order of first sight, with spare ones."""
    active = events.filter(pc.is_in(events["kind"], pa.array(sorted(INTERACTION_KINDS))))
    ids = pc.unique(active["user_id"]).to_pylist()
    return Vocabulary(ids, len(ids) + tables.spare_rows)
