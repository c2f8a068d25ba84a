"""What the served version was trained on, and users' past before the log's first event.

In:  the registry, the log, perhaps the dataset.  Out: the log's imported past; the version that batch training made.
Knows nothing of HTTP or of weights.
"""

import functools
from pathlib import Path

import pyarrow as pa

from cluster.dataset import Dataset
from cluster.errors import DataError
from cluster.log import EventLog
from cluster.manifest import VersionRef
from cluster.registry import Registry
from training.models.version import ROOT

HISTORY_TABLE = "history"
TRAINING_SEED = "training-history"
LATER_SEED = "dataset-after-training"
SOURCE_DIGITS = 16


def trained_version(registry: Registry, ref: VersionRef) -> int:
    """Return the version that batch training made and `ref` grew from, by deltas, folding and rollbacks."""
    return int(registry.manifest(VersionRef(ref.version)).metrics.get(ROOT, ref.version))


@functools.lru_cache(maxsize=8)
def count_training_events(registry: Registry, version: int) -> int:
    """Return how many events a version was trained on; remembered, since a version never changes."""
    return registry.open_version(version).count_rows(HISTORY_TABLE)


def seed_history(registry: Registry, log_path: Path, dataset: Dataset | None = None) -> None:
    """Make the log's imported past what the promoted version was trained on and, of a dataset, what came after.

    What is imported already stays; the past of a version that was trained on something else gives way.

    Raises `DataError` when the version was trained on another dataset.
    """
    reader = registry.open_version(registry.current().version)
    source = reader.manifest.files[f"{HISTORY_TABLE}.parquet"].sha256[:SOURCE_DIGITS]
    later = _events_after(reader.table(HISTORY_TABLE), dataset) if dataset is not None else None
    with EventLog(log_path) as log:
        if not log.is_seeded(TRAINING_SEED, source):  # reading it again at each start would take its time
            log.seed_history(TRAINING_SEED, reader.table(HISTORY_TABLE), source)
        if later is not None:
            log.seed_history(LATER_SEED, later)


def _events_after(history: pa.Table, dataset: Dataset) -> pa.Table:
    events = dataset.events()
    if events["event_id"].slice(0, len(history)) != history["event_id"]:
        raise DataError(f"{dataset.path}: is not the dataset that the promoted version was trained on")
    return events.slice(len(history))
