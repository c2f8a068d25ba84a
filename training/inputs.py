"""What training reads of a dataset: vocabularies, histories, the split by time, the negative sampler.

In:  a dataset, the recipe, item text vectors.  Out: `TrainingInputs`, the same in every worker.
Knows nothing of models or workers.

    data.split = "time"            |────────── train ──────────|─ validation ─|── never seen: for replay ──|
                                   0    train_fraction · (1 − validation_fraction)   train_fraction
    data.split = "leave_one_out"   each user's interactions: all but two train, the next validates, the last is not seen
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.dataset import Dataset
from cluster.errors import DataError
from cluster.events import INTERACTION_KINDS
from cluster.progress import progress
from embeddings.content import encode_media
from embeddings.tables import TablesConfig
from embeddings.text_encoder import TextEncoder
from embeddings.vocabulary import Vocabulary
from training.run import TEXT_FILE
from training.stream import DataConfig, History, NegativeSampler, build_history


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInputs:
    """A dataset as training sees it."""

    items: Vocabulary
    users: Vocabulary
    text: np.ndarray
    """Encoder vectors of texts, and of media where the model is told of them, float32 [items, E], memory-mapped."""
    train: History
    full: History
    """`train` and the validation interactions."""
    validation: np.ndarray
    """Indices into `full` of the interactions to validate on: none is its user's first."""
    sampler: NegativeSampler


def load_inputs(dataset: Dataset, data: DataConfig, tables: TablesConfig, text_path: Path) -> TrainingInputs:
    """Read the training share of a dataset. Raises `DataError` when it holds nothing to learn from."""
    events, validates = _split(dataset.events(), data)
    items, users = build_item_vocabulary(dataset, tables), build_user_vocabulary(events, tables)
    train = build_history(events.filter(pa.array(~validates)), items, users)
    if not (train.ends - train.starts > 1).any():
        raise DataError(
            f"{dataset.path}: no user has two interactions among the {(~validates).sum():,} training events"
        )
    full = build_history(events, items, users)
    later = validates[full.order]
    later[full.starts] = False
    return TrainingInputs(
        items=items,
        users=users,
        text=np.load(text_path, mmap_mode="r"),
        train=train,
        full=full,
        validation=np.flatnonzero(later),
        sampler=NegativeSampler(np.bincount(train.item_row, minlength=len(items)), data),
    )


def encode_items(encoder: TextEncoder, dataset: Dataset, media: Sequence[str] = ()) -> np.ndarray:
    """Return the encoder's vector of each item of the dataset, float32 [items, E], in the order of `items()`.

    After it stand those of the item's media, kind by kind. Raises `DataError` naming a file that cannot be read, and
    where no item has one of a kind.
    """
    texts = dataset.items()["text"].to_pylist()
    with progress(len(texts), "encoding item text", unit="text") as bar:
        told = [encoder.encode(texts, on_progress=bar.update)]
    for kind in media:
        files = dataset.media(kind)
        if not any(files):
            raise DataError(f"{dataset.path}: no item has a file of model.media {kind!r}; prepare it with some")
        told.append(encode_media(kind, files, encoder.cache_folder))
    return np.concatenate(told, axis=1) if media else told[0]


def write_text_vectors(encoder: TextEncoder, dataset: Dataset, folder: Path, media: Sequence[str] = ()) -> None:
    """Write the items' vectors into a run folder and, of a fine-tuned encoder, what fine-tuning has changed."""
    np.save(folder / TEXT_FILE, encode_items(encoder, dataset, media))
    if encoder.adapter is not None:
        encoder.adapter.save(folder)


def training_events(dataset: Dataset, data: DataConfig, columns: list[str] | None = None) -> pa.Table:
    """Return the events that training may see, in order of time, those it validates on included.

    Of `columns`, where not all are wanted, `kind` and `user_id` must be two.
    """
    return _split(dataset.events(columns), data)[0]


def is_training_event(events: pa.Table, data: DataConfig) -> np.ndarray:
    """Return which of a dataset's events are those that training may see, bool [events]."""
    if data.split == "time":
        return np.arange(len(events)) < int(len(events) * data.train_fraction)
    return _left_of_user(events) != 0


def _split(events: pa.Table, data: DataConfig) -> tuple[pa.Table, np.ndarray]:
    """Return the events that training may see, and which of them it validates on."""
    if data.split == "time":
        known = events.filter(pa.array(is_training_event(events, data)))
        return known, np.arange(len(known)) >= int(len(known) * (1 - data.validation_fraction))
    left_N = _left_of_user(events)
    return events.filter(pa.array(left_N != 0)), left_N[left_N != 0] == 1


def _left_of_user(events: pa.Table) -> np.ndarray:
    """Return how many interactions each one's user has after it; −1 for what is none."""
    left_N = np.full(len(events), -1)
    chosen = np.flatnonzero(pc.is_in(events["kind"], pa.array(sorted(INTERACTION_KINDS))).to_numpy())
    user_N = pc.dictionary_encode(events["user_id"].combine_chunks()).indices.to_numpy()[chosen]
    by_user = np.argsort(user_N, kind="stable")
    ends = np.cumsum(np.bincount(user_N))
    left_N[chosen[by_user]] = ends[user_N[by_user]] - 1 - np.arange(len(chosen))
    return left_N


def build_item_vocabulary(dataset: Dataset, tables: TablesConfig) -> Vocabulary:
    """Return rows for the whole catalogue, in its order, with spare ones."""
    ids = dataset.items()["item_id"].to_pylist()
    return Vocabulary(ids, len(ids) + tables.spare_rows)


def build_user_vocabulary(events: pa.Table, tables: TablesConfig) -> Vocabulary:
    """Return rows for users who interacted with something, in order of first sight, with spare ones."""
    active = events.filter(pc.is_in(events["kind"], pa.array(sorted(INTERACTION_KINDS))))
    ids = pc.unique(active["user_id"]).to_pylist()
    return Vocabulary(ids, len(ids) + tables.spare_rows)
