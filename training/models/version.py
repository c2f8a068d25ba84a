"""What a version holds, and how it is laid out in the registry: written by training, read by training and serving.

In:  a registry and a `VersionRef`.  Out: a `VersionState`: whole tensors, vocabularies, recipe, learned offset.
Knows nothing of how it was learned or how it is served.

    rows.safetensors       item [I, D] · user [U, D] · count [I]   one row an id, in vocabulary order
    text.safetensors       text [I, E], apart: it is large, and the next version's is mostly the same
    dense.safetensors      the two-stage model's parameters
    system.safetensors     what a classical system has learned: alone, without item, user and dense, or beside them
    seen.safetensors       the correction by what of the seen was chosen, where there is one
    optimizer.safetensors  what training needs besides to go on: row accumulators, AdamW's moments, seen's posterior
    items.parquet          item_id, text         users.parquet   user_id
    tags.parquet           categories, domain of the items it was trained on, by row, where they were told
    history.parquet        the interactions it was trained on, EVENT_SCHEMA, for user state and rehearsal
    recipe.toml            the resolved recipe
    encoder.json           fingerprint of the encoder, adapter included, that made `text`
    adapter.*              what fine-tuning changed in that encoder (embeddings/adapter.py), where anything did

A delta has the same files less text, tags, history, recipe, encoder and adapter: another encoder is another version.
Its row tensors, text too, come in pairs, NAME.index and NAME.value, its items and users are those that are new and
follow the ones before. A user with a `row` takes over that row instead. Rows may be rounded (`online.delta_rows`) or
sent only once they have changed enough (`online.delta_threshold`): then optimizer.safetensors, which replicas do not
read, has the trainer's own as exact.NAME. With NAME.scale, int8 values are steps of change to the row before.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch

from cluster.config import Recipe
from cluster.manifest import Manifest, VersionRef
from cluster.registry import Registry, VersionReader
from embeddings.adapter import ADAPTER, ADAPTER_FILE, SETTINGS_FILE, Adapter
from embeddings.content import media_widths
from embeddings.quantized import QuantizedRows
from embeddings.text_encoder import EncoderConfig
from training.baselines.config import TWO_STAGE, SystemConfig
from training.models.tags import Tags
from training.models.two_stage import ModelConfig

ITEM_ROWS, USER_ROWS, TEXT_ROWS, COUNT_ROWS = "item", "user", "text", "count"
EXACT = "exact."
"""Begins the names of rows in a delta that only whoever trains on from it reads."""
ROOT = "trained_version"
"""Metric of a version that the online trainer made: the trained version it grew from."""
EVENTS, SET_ASIDE = "events_total", "set_aside_total"
"""Metrics of all that the online trainer publishes: events applied so far, and how many of these the guard or a
rollback has undone."""
TUNED_SEQ = "tuned_seq"
"""Among the metrics `adapter` of a version whose encoder was tuned while it served: the newest event it has read."""
ITEMS_FILE, USERS_FILE, RECIPE_FILE = "items.parquet", "users.parquet", "recipe.toml"
TAGS_FILE = "tags.parquet"
TEXT_FILE, DENSE_FILE, SYSTEM_FILE = "text.safetensors", "dense.safetensors", "system.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
ENCODER_FILE = "encoder.json"
ENCODER = "encoder"
"""Metric of a version: the fingerprint of its encoder."""
SHARED_FILES = frozenset(
    (ITEMS_FILE, TAGS_FILE, USERS_FILE, RECIPE_FILE, TEXT_FILE, DENSE_FILE, SYSTEM_FILE, ADAPTER_FILE)
)
"""What a version may share with the one before it in memory."""
TEXTS_AT_ONCE = 4_096
"""Texts made with the interpreter's lock held; requests go on in between."""
SEEN = "seen"
"""File of a version, and of a delta that changes it: `VersionState.seen`."""
ROW_TENSORS = (ITEM_ROWS, USER_ROWS, TEXT_ROWS, COUNT_ROWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionState:
    """A version with its deltas applied. Tensors are not written to after construction."""

    ref: VersionRef
    recipe: Recipe
    learned_seq: int
    """Newest event of the log that it has learned."""
    item_ids: list[str]
    item_texts: list[str]
    user_ids: list[str]
    rows: Mapping[str, torch.Tensor]
    """By `ROW_TENSORS`."""
    dense: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    """Empty where it was not asked for."""
    exact: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Item and user rows as the trainer has them, where `rows` are rounded; empty without the optimiser."""
    seen: torch.Tensor | None = None
    """Weights [2D] of `training.models.seen`; none before anything was learned of what was shown."""
    system: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What a classical system has learned, its `arrays`; empty where there is none."""
    tags: Tags | None = None
    """What the first items were told to be, by row; none of versions from before that was kept."""
    encoder: str = ""
    """Fingerprint of the encoder that made the text vectors; empty of versions from before it was stated."""
    adapter: Adapter | None = None
    """What fine-tuning changed in that encoder; none where it is as it was pre-trained."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """File name to checksum, of the files whose content is here as it was read: no delta has changed it since."""

    @property
    def text_dim(self) -> int:
        """Length of the vectors by which the text encoder tells of items; those of media stand after them."""
        told = self.rows[TEXT_ROWS].shape[1]
        is_told_more = self.recipe.section(SystemConfig).name == TWO_STAGE
        return told - sum(media_widths(self.recipe.section(ModelConfig).media)) if is_told_more else told

    @property
    def trained_rows(self) -> Mapping[str, torch.Tensor]:
        """Return the rows to train on from, and to publish as a version of its own."""
        return {**self.rows, **self.exact}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a delta changes."""

    new_items: Sequence[tuple[str, str]]
    """Ids and texts."""
    new_users: Sequence[str]
    rows: Mapping[str, tuple[torch.Tensor, QuantizedRows]]
    """Row tensor to (index [n], n rows as replicas get them)."""
    optimizer_rows: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """The trainer's own: accumulators, and under `exact.` the rows that replicas get rounded, or not at all yet."""
    dense: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    reused_users: Mapping[int, str] = field(default_factory=dict)
    """Rows that belong to another user from here on."""
    seen: torch.Tensor | None = None
    """`VersionState.seen` where it has changed."""


class Draft(Protocol):
    """A version or delta being written."""

    def add_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write NAME.safetensors."""
        ...

    def add_table(self, name: str, table: pa.Table) -> None:
        """Write NAME.parquet."""
        ...

    def add_text(self, file_name: str, text: str) -> None:
        """Write a text file."""
        ...


def write_version(draft: Draft, state: VersionState, history: pa.Table) -> None:
    """Write all files of a version into a draft."""
    draft.add_tensors("rows", {name: rows for name, rows in state.trained_rows.items() if name != TEXT_ROWS})
    draft.add_tensors("text", {TEXT_ROWS: state.rows[TEXT_ROWS]})
    if state.dense:
        draft.add_tensors("dense", state.dense)
        draft.add_tensors("optimizer", state.optimizer)
    if state.seen is not None:
        draft.add_tensors(SEEN, {"weight": state.seen})
    if state.system:
        draft.add_tensors("system", state.system)
    draft.add_table("items", _items_table(list(zip(state.item_ids, state.item_texts, strict=True))))
    if state.tags is not None:
        draft.add_table("tags", state.tags.table)
    draft.add_table("users", pa.table({"user_id": pa.array(state.user_ids, pa.string())}))
    draft.add_table("history", history)
    draft.add_text("recipe.toml", state.recipe.to_toml())
    if state.encoder:
        draft.add_text(ENCODER_FILE, json.dumps({"fingerprint": state.encoder}))
    if state.adapter is not None:
        draft.add_tensors(ADAPTER, state.adapter.tensors)
        draft.add_text(SETTINGS_FILE, state.adapter.settings())


def write_delta(draft: Draft, change: Change) -> None:
    """Write all files of a delta into a draft."""
    rounded = {name: (index, rows.value) for name, (index, rows) in change.rows.items()}
    scales = {f"{name}.scale": rows.scale_N for name, (_, rows) in change.rows.items() if rows.scale_N is not None}
    draft.add_tensors("rows", _pairs(rounded) | scales)
    draft.add_tensors("dense", change.dense)
    if change.seen is not None:
        draft.add_tensors(SEEN, {"weight": change.seen})
    draft.add_tensors("optimizer", {**change.optimizer, **_pairs(change.optimizer_rows)})
    draft.add_table("items", _items_table(change.new_items))
    draft.add_table("users", _users_table(change))


def read_version(
    registry: Registry, ref: VersionRef, *, with_optimizer: bool = False, resident: VersionState | None = None
) -> VersionState:
    """Return the version with its deltas up to `ref`; what `resident` has read of the same checksum is shared with it.

    Raises `CorruptVersionError` or `RegistryError`.
    """
    reader = registry.open_version(ref.version)
    if (held := _holder(resident, reader, ITEMS_FILE)) is not None:
        item_ids, item_texts = held.item_ids, held.item_texts
    else:
        item_ids, item_texts = _read_items(reader)
    held = _holder(resident, reader, USERS_FILE)
    user_ids = held.user_ids if held else _texts(reader.table("users")["user_id"])
    held = _holder(resident, reader, RECIPE_FILE)
    recipe = held.recipe if held else Recipe.from_resolved(reader.text(RECIPE_FILE))
    rows = reader.tensors("rows")
    if TEXT_FILE in reader.manifest.files:  # else it is among the rows: a version from before text had its own file
        held = _holder(resident, reader, TEXT_FILE)
        rows[TEXT_ROWS] = held.rows[TEXT_ROWS] if held else reader.tensors("text")[TEXT_ROWS]
    held = _holder(resident, reader, DENSE_FILE)
    dense = held.dense if held else _tensors(reader, DENSE_FILE)
    held = _holder(resident, reader, SYSTEM_FILE)
    system = held.system if held else _tensors(reader, SYSTEM_FILE)
    state = VersionState(
        ref=VersionRef(ref.version),
        recipe=recipe,
        learned_seq=reader.manifest.last_seq,
        item_ids=item_ids,
        item_texts=item_texts,
        user_ids=user_ids,
        rows=rows,
        dense=dense,
        optimizer=_tensors(reader, OPTIMIZER_FILE) if with_optimizer else {},
        seen=_read_seen(reader),
        system=system,
        tags=_read_tags(reader, _holder(resident, reader, TAGS_FILE)),
        encoder=_read_encoder(reader),
        adapter=_read_adapter(reader, _holder(resident, reader, ADAPTER_FILE)),
        sources={name: entry.sha256 for name, entry in reader.manifest.files.items() if name in SHARED_FILES},
    )
    for number in range(1, ref.delta + 1):
        state = apply_delta(state, registry.open_delta(ref.version, number))
    return state


class StatedEncoder(NamedTuple):
    """Which encoder a version's text vectors are of."""

    fingerprint: str
    """Empty of a version from before it was stated."""
    config: EncoderConfig
    """Without the folder of an adapter: what the version holds counts, not a folder where it was trained."""
    adapter: Adapter | None


def read_encoder(registry: Registry, version: int) -> StatedEncoder:
    """Return what a version states of its encoder, without reading anything else.

    Raises `CorruptVersionError` or `RegistryError`.
    """
    reader = registry.open_version(version)
    config = Recipe.from_resolved(reader.text(RECIPE_FILE)).section(EncoderConfig)
    return StatedEncoder(_read_encoder(reader), replace(config, adapter=None), _read_adapter(reader, None))


def apply_delta(state: VersionState, reader: VersionReader) -> VersionState:
    """Return the state after a delta; the state before stays as it is, and what the delta leaves alone is shared."""
    sources = dict(state.sources)
    item_ids, item_texts = _read_items(reader)
    if item_ids:
        item_ids, item_texts = [*state.item_ids, *item_ids], [*state.item_texts, *item_texts]
        sources.pop(ITEMS_FILE, None)
    else:
        item_ids, item_texts = state.item_ids, state.item_texts
    user_ids, users = state.user_ids, reader.table("users").to_pylist()
    if users:
        user_ids = list(user_ids)
        sources.pop(USERS_FILE, None)
    for user in users:
        if user.get("row") is None:
            user_ids.append(user["user_id"])
        else:
            user_ids[user["row"]] = user["user_id"]
    held, sent = _holder(state, reader, DENSE_FILE), reader.tensors("rows")
    dense = held.dense if held else reader.tensors("dense")
    sources[DENSE_FILE] = reader.manifest.files[DENSE_FILE].sha256
    rows = _apply_pairs(state.rows, sent)
    if rows[TEXT_ROWS] is not state.rows[TEXT_ROWS]:
        sources.pop(TEXT_FILE, None)
    optimizer: Mapping[str, torch.Tensor] = {}
    exact = state.exact
    if state.optimizer:
        own = reader.tensors("optimizer")
        own_rows = {name.removeprefix(EXACT): own.pop(name) for name in list(own) if name.startswith(EXACT)}
        optimizer = _apply_pairs(state.optimizer, own)
        if exact or own_rows:
            exact = {name: state.trained_rows[name] for name in (ITEM_ROWS, USER_ROWS)}
            for pairs in (sent, own_rows):
                exact = _apply_pairs(exact, {n: t for n, t in pairs.items() if n.split(".")[0] in exact})
    return replace(
        state,
        ref=reader.manifest.ref,
        learned_seq=reader.manifest.last_seq,
        item_ids=item_ids,
        item_texts=item_texts,
        user_ids=user_ids,
        rows=rows,
        dense=dense,
        optimizer=optimizer,
        exact=exact,
        seen=state.seen if (seen := _read_seen(reader)) is None else seen,
        sources=sources,
    )


def find_set_aside(manifest: Manifest) -> range | None:
    """Return the events that the guard, or who rolled back, had set aside when this was published; none as a rule."""
    if "set_aside_from_seq" in manifest.metrics:
        return range(int(manifest.metrics["set_aside_from_seq"]), manifest.last_seq + 1)
    if "set_aside" in manifest.metrics and manifest.first_seq is not None:
        return range(manifest.first_seq, manifest.last_seq + 1)
    return None


def checkpoint_names(state: VersionState) -> dict[str, torch.Tensor]:
    """Return a version's tensors under the names that training/checkpoint.py uses."""
    named = {"tables.item": state.trained_rows[ITEM_ROWS], "tables.user": state.trained_rows[USER_ROWS]}
    named |= {f"dense.{name}": tensor for name, tensor in state.dense.items()}
    for name, tensor in state.optimizer.items():
        named[f"tables.{name}" if name.endswith(".momentum") else f"dense_optimizer.{name}"] = tensor
    return named


def split_checkpoint(
    named: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split tensors named as in a checkpoint into tables, dense and optimiser, as `VersionState` names them."""
    tables: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    optimizer: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        kind, rest = name.split(".", 1)
        if kind == "tables" and not rest.endswith(".momentum"):
            tables[rest] = tensor
        elif kind == "dense":
            dense[rest] = tensor
        else:
            optimizer[rest] = tensor
    return tables, dense, optimizer


def log_popularity(count_I: torch.Tensor) -> np.ndarray:
    """Return log((count + 1) / total) of each item: what a user nobody knows is shown first."""
    smoothed = count_I.double() + 1
    return (smoothed / smoothed.sum()).log().float().numpy()


def grow_rows(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return a copy with zero rows up to `size`."""
    grown = rows.new_zeros((size, *rows.shape[1:]))
    grown[: rows.shape[0]] = rows
    return grown


def _texts(column: pa.ChunkedArray) -> list[str]:
    """Return a column's texts, a few thousand at a time: the interpreter's lock is not held for a whole catalogue."""
    texts: list[str] = []
    for start in range(0, len(column), TEXTS_AT_ONCE):
        texts += column.slice(start, TEXTS_AT_ONCE).to_pylist()
    return texts


def _holder(resident: VersionState | None, reader: VersionReader, file_name: str) -> VersionState | None:
    """Return the resident state if it has the content of this file."""
    entry = reader.manifest.files.get(file_name)
    same = resident is not None and entry is not None and resident.sources.get(file_name) == entry.sha256
    return resident if same else None


def _tensors(reader: VersionReader, file_name: str) -> dict[str, torch.Tensor]:
    """Return a file's tensors; none where the version, or the delta, has no such file."""
    return reader.tensors(file_name.removesuffix(".safetensors")) if file_name in reader.manifest.files else {}


def _read_encoder(reader: VersionReader) -> str:
    if ENCODER_FILE not in reader.manifest.files:
        return ""
    return str(json.loads(reader.text(ENCODER_FILE))["fingerprint"])


def _read_adapter(reader: VersionReader, held: VersionState | None) -> Adapter | None:
    """Return the version's adapter, or the resident one of the same tensors and settings."""
    if SETTINGS_FILE not in reader.manifest.files:
        return None
    settings = reader.text(SETTINGS_FILE)
    if held is not None and held.adapter is not None and held.adapter.settings() == settings:
        return held.adapter
    return Adapter.from_files(settings, reader.tensors(ADAPTER), str(reader.manifest.ref))


def _read_seen(reader: VersionReader) -> torch.Tensor | None:
    return _tensors(reader, f"{SEEN}.safetensors").get("weight")


def _read_items(reader: VersionReader) -> tuple[list[str], list[str]]:
    items = reader.table("items")
    return _texts(items["item_id"]), _texts(items["text"])


def _read_tags(reader: VersionReader, held: VersionState | None) -> Tags | None:
    if TAGS_FILE not in reader.manifest.files:
        return None
    return held.tags if held else Tags(reader.table("tags"))


def _users_table(change: Change) -> pa.Table:
    user_ids = [*change.new_users, *change.reused_users.values()]
    rows = [*(None for _ in change.new_users), *change.reused_users]
    return pa.table({"user_id": pa.array(user_ids, pa.string()), "row": pa.array(rows, pa.int64())})


def _items_table(items: Sequence[tuple[str, str]]) -> pa.Table:
    return pa.table(
        {
            "item_id": pa.array([item_id for item_id, _ in items], pa.string()),
            "text": pa.array([text for _, text in items], pa.string()),
        }
    )


def _pairs(rows: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    flat = {}
    for name, (index, value) in rows.items():
        # Row tensors may share an index; a file's tensors may not share memory.
        flat[f"{name}.index"], flat[f"{name}.value"] = index.to(torch.int32, copy=True), value
    return flat


def _apply_pairs(before: Mapping[str, torch.Tensor], changed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `before` with whole tensors replaced and NAME.index / NAME.value pairs written over a grown copy."""
    after = dict(before)
    for name, index in changed.items():
        if not name.endswith(".index"):
            if not name.endswith((".value", ".scale")):
                after[name] = index
            continue
        if len(index):
            row_tensor = name.removesuffix(".index")
            old = before[row_tensor]
            sent = QuantizedRows(changed[f"{row_tensor}.value"], changed.get(f"{row_tensor}.scale"))
            after[row_tensor] = grow_rows(old, max(old.shape[0], int(index.max()) + 1))
            rows = index.long()
            after[row_tensor][rows] = sent.applied_to(after[row_tensor][rows])
    return after
