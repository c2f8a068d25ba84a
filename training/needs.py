"""What every worker of a training job will take of memory, from the recipe, the data's footers and a plan.

In:  a recipe, an examples folder or a dataset.  Out: a `Job`; with a `TablePlan`, bytes of each worker.
Knows nothing of how much there is (plan.py) or of Ray.

Bytes of a worker, all at once in the worst case:

    weight, optimizer  its parts of the tables and their accumulators       exact
    lookup             ids and vectors of a step                            the planner's estimate
    dense              parameters, gradients, DDP's buckets, AdamW          exact
    stream             blocks, decoding and batches ahead (footprint.py)    estimate
    ids                its id tables and two copies of their state          exact; ids that nobody listed
    copy               what the checkpoint being written holds              exact; of a run over interactions: the
                       whole tables that validation gathers                 estimate
    process            Python, torch, TorchRec, Ray, compiled kernels       measured once
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from cluster.config import Recipe
from cluster.dataset import Dataset
from cluster.errors import ConfigError
from cluster.examples import Examples
from cluster.home import Home
from embeddings.content import media_widths
from embeddings.examples import FEATURES
from embeddings.ids.config import IdsConfig, buckets_of, rows_per_bucket, table_rows
from embeddings.plan import TablePlan
from embeddings.tables import ITEM, USER, TablesConfig, build_bags, build_tables
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.examples.footprint import ids_an_example, stream_footprint
from training.examples.stream import StreamConfig
from training.inputs import build_item_vocabulary, build_user_vocabulary, training_events
from training.models.click import ClickConfig, ClickDense, ClickModel
from training.models.ensemble import build_two_stage
from training.models.recommender import Recommender
from training.models.two_stage import ModelConfig
from training.run import TrainConfig
from training.stream import DataConfig

PROCESS_BYTES = 760 << 20
"""Resident memory of a Ray Train worker on CPU beside all else here: 680 MiB of code and what libraries set up, and
what the allocator keeps of a step's and a checkpoint's temporaries (measured: 30 to 110 MiB)."""
RAY_BYTES = 1330 << 20
"""Of a machine beside the workers: a private Ray's own processes and Ray Train's, shared pages counted once."""
_ADAMW_COPIES, _CHECKPOINT_COPIES = 5, 3
"""Of a dense parameter: itself, gradient, bucket and two moments; itself and the moments."""
_EVENT_BYTES = 240
"""Of an interaction in every worker of the two-stage recommender: its columns, and histories with and without the
validation's share."""
_ID_ENTRY_BYTES = 48
"""Of a row or a pending id in its id table: two slots of key and place, id and use."""
_ID_STATE_BYTES = {"row": 16, "pending": 12}
"""Of either in a copy of the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerNeed:
    """What one worker takes (module docstring)."""

    worker: int
    weight_bytes: int
    optimizer_bytes: int
    lookup_bytes: int
    dense_bytes: int
    stream_bytes: int
    ids_bytes: int
    copy_bytes: int
    process_bytes: int
    gpu_bytes: int
    """Of all these, what its GPU holds."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        parts = (getattr(self, part.name) for part in fields(self) if part.name not in ("worker", "gpu_bytes"))
        return sum(parts)

    @property
    def host_bytes(self) -> int:
        """What its machine holds."""
        return self.total_bytes - self.gpu_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be trained, as far as memory goes; of every worker but for the tables."""

    module: nn.Module
    """On the meta device."""
    batch_examples: int
    """A worker's, as the model's builder tells the planner."""
    pooling: Mapping[str, float]
    stream_bytes: tuple[int, ...]
    ids_bytes: tuple[int, ...]
    gathers: bool
    """Whether validation gathers whole tables; else checkpoints are written from a copy."""


def click_job(recipe: Recipe, examples: Examples, workers: int) -> Job:
    """Return the click model's job. Raises `ConfigError` for more workers than lanes or buckets."""
    stream, tables, ids = recipe.section(StreamConfig), recipe.section(TablesConfig), recipe.section(IdsConfig)
    if workers > stream.lanes:
        raise ConfigError(f"stream.lanes={stream.lanes}: fewer than the {workers} workers; try {workers * 4}")
    if examples.info.ids == "rows":
        rows = {USER: examples.info.users or 0, ITEM: examples.info.items or 0}
        ids_bytes, id_bytes = [0] * workers, 4 if max(rows.values()) <= 2**31 else 8
    else:
        rows = {USER: table_rows(ids.user_rows), ITEM: table_rows(ids.item_rows)}
        ids_bytes, id_bytes = [id_tables_bytes(ids, worker, workers) for worker in range(workers)], 8
    with torch.device("meta"):
        dense = ClickDense(recipe.section(ClickConfig), tables.dim)
    seed = recipe.section(TrainConfig).seed
    footprints = [
        stream_footprint(examples, stream, seed=seed, worker=worker, workers=workers, id_bytes=id_bytes)
        for worker in range(workers)
    ]
    return Job(
        module=ClickModel(build_bags(rows, FEATURES, tables.dim, tables.learning_rate), dense),
        batch_examples=-(-stream.batch_examples // workers),
        pooling=ids_an_example(examples, stream),
        stream_bytes=tuple(footprint.total_bytes for footprint in footprints),
        ids_bytes=tuple(ids_bytes),
        gathers=False,
    )


def two_stage_job(recipe: Recipe, dataset: Dataset, workers: int, home: Home) -> Job:
    """Return the two-stage recommender's job: every worker holds the interactions and the items' text vectors."""
    tables = recipe.section(TablesConfig)
    events = training_events(dataset, recipe.section(DataConfig), ["kind", "user_id"])
    items, users = build_item_vocabulary(dataset, tables), build_user_vocabulary(events, tables)
    model = recipe.section(ModelConfig)
    text_dim = _text_dim(TextEncoder(recipe.section(EncoderConfig), home.cache)) + sum(media_widths(model.media))
    with torch.device("meta"):
        dense = build_two_stage(model, tables.dim, text_dim)
    rows = {ITEM: items.capacity, USER: users.capacity}
    held_bytes = _EVENT_BYTES * len(events) + 4 * text_dim * len(items)
    return Job(
        module=Recommender(build_tables(rows, tables.dim, tables.learning_rate), dense),
        batch_examples=1,
        pooling={},
        stream_bytes=(held_bytes,) * workers,
        ids_bytes=(0,) * workers,
        gathers=True,
    )


def _text_dim(encoder: TextEncoder) -> int:
    """Return the length of a text's vector; of a model at hand without importing its library, which takes a second."""
    described = Path(encoder.location) / "config.json"
    return int(json.loads(described.read_text())["hidden_size"]) if described.exists() else encoder.dim


def id_tables_bytes(config: IdsConfig, worker: int, workers: int) -> int:
    """Return what a worker's buckets of both id tables take, with two copies of their state: saved and being saved."""
    buckets = len(buckets_of(worker, workers))
    total = 0
    for capacity in (config.user_rows, config.item_rows):
        rows = rows_per_bucket(capacity)
        pending = max(1, int(rows * config.pending_share))
        copies = 2 * (_ID_STATE_BYTES["row"] * rows + _ID_STATE_BYTES["pending"] * pending)
        total += buckets * (_ID_ENTRY_BYTES * (rows + pending) + copies)
    return total


def worker_need(job: Job, planned: TablePlan, worker: int) -> WorkerNeed:
    """Return what a worker takes under the plan."""
    shards = planned.shards_of(worker)
    dense = getattr(job.module, "dense")  # noqa: B009  (a module's attribute has no type)
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in dense.parameters())
    states = sum(shard.weight_bytes + shard.optimizer_bytes for shard in shards)
    whole = sum(table.rows * table.dim * 4 for table in planned.tables)
    # Gathering: the pieces as bytes, as tensors, and the whole.
    copy = 3 * whole if job.gathers else states + _CHECKPOINT_COPIES * parameters
    on_gpu = sum(s.weight_bytes + s.optimizer_bytes for s in shards if not s.on_host)
    lookup = sum(shard.lookup_bytes for shard in shards)
    is_gpu = any(not shard.on_host for table in planned.tables for shard in table.shards)
    return WorkerNeed(
        worker=worker,
        weight_bytes=sum(shard.weight_bytes for shard in shards),
        optimizer_bytes=sum(shard.optimizer_bytes for shard in shards),
        lookup_bytes=lookup,
        dense_bytes=_ADAMW_COPIES * parameters,
        stream_bytes=job.stream_bytes[worker],
        ids_bytes=job.ids_bytes[worker],
        copy_bytes=copy,
        process_bytes=PROCESS_BYTES,
        gpu_bytes=on_gpu + lookup + _ADAMW_COPIES * parameters if is_gpu else 0,
    )
