"""What a version holds: written, read in any order of deltas, and told apart when damaged."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import CorruptVersionError
from cluster.events import Event, events_table
from cluster.manifest import VersionRef
from cluster.registry import Registry, VersionDraft
from embeddings.adapter import Adapter
from embeddings.quantized import QuantizedRows
from embeddings.text_encoder import EncoderConfig
from training.models.version import (
    COUNT_ROWS,
    ITEM_ROWS,
    TEXT_ROWS,
    USER_ROWS,
    Change,
    VersionState,
    apply_delta,
    checkpoint_names,
    grow_rows,
    log_popularity,
    read_encoder,
    read_version,
    split_checkpoint,
    write_delta,
    write_version,
)

HISTORY = events_table([Event(user_id="u0", item_id="i0", kind="click", ts_us=1)])


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def published(registry: Registry, version: VersionState) -> VersionRef:
    draft = registry.draft_version()
    write_version(draft, version, HISTORY)
    return draft.publish(offset=5, metrics={"ndcg_at_10": 0.5})


def publish_delta(registry: Registry, version: VersionRef, change: Change, last_seq: int) -> VersionRef:
    draft = registry.draft_delta(version.version)
    write_delta(draft, change)
    return draft.publish(first_seq=last_seq, last_seq=last_seq)


def assert_equal(one: VersionState, other: VersionState) -> None:
    assert list(one.item_ids) == list(other.item_ids)
    assert list(one.item_texts) == list(other.item_texts)
    assert list(one.user_ids) == list(other.user_ids)
    for name in ("rows", "dense", "optimizer"):
        mine, its = getattr(one, name), getattr(other, name)
        assert mine.keys() == its.keys()
        assert [key for key in mine if not torch.equal(mine[key], its[key])] == []


def changed(state: VersionState, seed: int, new_items: int = 0, new_users: int = 0) -> tuple[Change, VersionState]:
    """Return a change of some rows and all dense weights, and the whole state after it, made without a delta."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {ITEM_ROWS: len(state.item_ids) + new_items, USER_ROWS: len(state.user_ids) + new_users}
    sizes |= {TEXT_ROWS: sizes[ITEM_ROWS], COUNT_ROWS: sizes[ITEM_ROWS]}
    rows, pairs = {}, {}
    optimizer, optimizer_pairs = dict(state.optimizer), {}
    for name, before in state.rows.items():
        touched = torch.randperm(before.shape[0], generator=generator)[:3]
        index = torch.cat([touched, torch.arange(before.shape[0], sizes[name])])
        value = torch.randint(1, 100, (len(index), *before.shape[1:]), generator=generator).to(before.dtype)
        rows[name] = grow_rows(before, sizes[name])
        rows[name][index] = value
        pairs[name] = (index, value)
        if name in (ITEM_ROWS, USER_ROWS):
            momentum = f"{name}.momentum"
            optimizer_pairs[momentum] = (index, value[:, 0])
            optimizer[momentum] = grow_rows(optimizer[momentum], sizes[name])
            optimizer[momentum][index] = value[:, 0]
    dense = {name: tensor + 1 for name, tensor in state.dense.items()}
    moments = {name: tensor + 1 for name, tensor in optimizer.items() if not name.endswith(".momentum")}
    items = [(f"new-{seed}-{n}", f"text {n}") for n in range(new_items)]
    users = [f"newcomer-{seed}-{n}" for n in range(new_users)]
    change = Change(
        new_items=items,
        new_users=users,
        rows={name: (index, QuantizedRows(value)) for name, (index, value) in pairs.items()},
        optimizer_rows=optimizer_pairs,
        dense=dense,
        optimizer=moments,
    )
    after = replace(
        state,
        item_ids=[*state.item_ids, *(item_id for item_id, _ in items)],
        item_texts=[*state.item_texts, *(text for _, text in items)],
        user_ids=[*state.user_ids, *users],
        rows=rows,
        dense=dense,
        optimizer=optimizer | moments,
    )
    return change, after


def test_a_version_read_is_the_version_written(
    registry: Registry, published: VersionRef, version: VersionState
) -> None:
    found = read_version(registry, published, with_optimizer=True)
    assert_equal(found, version)
    assert (found.ref, found.learned_seq) == (published, 5)
    assert found.recipe.to_toml() == version.recipe.to_toml()
    assert registry.open_version(published.version).table("history").equals(HISTORY)


def test_the_optimiser_is_read_where_it_is_asked_for(registry: Registry, published: VersionRef) -> None:
    assert read_version(registry, published).optimizer == {}


@pytest.mark.parametrize(("new_items", "new_users"), [(0, 0), (2, 1)])
def test_base_and_deltas_are_the_whole_state(
    registry: Registry, published: VersionRef, version: VersionState, new_items: int, new_users: int
) -> None:
    whole, ref = version, published
    for seed in range(3):
        change, whole = changed(whole, seed, new_items, new_users)
        ref = publish_delta(registry, published, change, last_seq=6 + seed)
    found = read_version(registry, ref, with_optimizer=True)
    assert_equal(found, whole)
    assert (str(found.ref), found.learned_seq) == ("1.3", 8)
    assert len(found.item_ids) == len(version.item_ids) + 3 * new_items


def test_a_delta_touches_its_rows_and_leaves_the_state_before_alone(
    registry: Registry, published: VersionRef, version: VersionState
) -> None:
    before = read_version(registry, published, with_optimizer=True)
    change, whole = changed(version, seed=1, new_items=1)
    publish_delta(registry, published, change, last_seq=6)
    after = apply_delta(before, registry.open_delta(published.version, 1))
    assert_equal(after, whole)
    assert_equal(before, version)
    moved = (after.rows[ITEM_ROWS][: len(version.item_ids)] != version.rows[ITEM_ROWS]).any(1)
    assert moved.sum() <= 3


def test_a_delta_of_nothing_changes_nothing(registry: Registry, published: VersionRef, version: VersionState) -> None:
    none = torch.empty(0, dtype=torch.int64)
    change = Change(
        new_items=[],
        new_users=[],
        rows={name: (none, QuantizedRows(rows[none])) for name, rows in version.rows.items()},
        optimizer_rows={},
        dense=version.dense,
        optimizer={},
    )
    ref = publish_delta(registry, published, change, last_seq=6)
    assert_equal(read_version(registry, ref, with_optimizer=True), version)


@pytest.mark.parametrize("file_name", ["rows.safetensors", "dense.safetensors", "items.parquet", "recipe.toml"])
def test_a_damaged_file_is_named(registry: Registry, published: VersionRef, file_name: str) -> None:
    path = Path(registry.uri.removeprefix("file://"), published.folder, file_name)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptVersionError, match=file_name):
        read_version(registry, published)


def test_a_damaged_delta_is_named(registry: Registry, published: VersionRef, version: VersionState) -> None:
    ref = publish_delta(registry, published, changed(version, seed=1)[0], last_seq=6)
    path = Path(registry.uri.removeprefix("file://"), ref.folder, "rows.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptVersionError, match=r"deltas/000001/rows\.safetensors"):
        read_version(registry, ref)


def publish(registry: Registry, state: VersionState) -> VersionRef:
    draft = registry.draft_version()
    write_version(draft, state, HISTORY)
    return draft.publish(offset=5, metrics={})


def test_what_a_resident_version_has_of_the_same_checksum_is_shared_with_it(
    registry: Registry, published: VersionRef, version: VersionState
) -> None:
    other = replace(
        version,
        user_ids=[*version.user_ids[1:], "newcomer"],
        rows={**version.rows, ITEM_ROWS: version.rows[ITEM_ROWS] + 1},
        dense={name: tensor + 1 for name, tensor in version.dense.items()},
    )
    ref, resident = publish(registry, other), read_version(registry, published)
    found = read_version(registry, ref, resident=resident)
    assert_equal(found, replace(other, optimizer={}))
    assert found.item_ids is resident.item_ids
    assert found.recipe is resident.recipe
    assert found.rows[TEXT_ROWS] is resident.rows[TEXT_ROWS]


def test_what_a_delta_has_changed_is_not_shared_any_more(
    registry: Registry, published: VersionRef, version: VersionState
) -> None:
    change, whole = changed(version, seed=1, new_items=1, new_users=1)
    publish_delta(registry, published, change, last_seq=6)
    after = read_version(registry, VersionRef(published.version, 1))
    assert_equal(after, replace(whole, optimizer={}))
    assert_equal(read_version(registry, published, resident=after), replace(version, optimizer={}))
    assert read_version(registry, publish(registry, whole), resident=after).dense is after.dense


def test_what_is_not_shared_is_checked(registry: Registry, published: VersionRef, version: VersionState) -> None:
    resident = read_version(registry, published)
    ref = publish(registry, replace(version, rows={**version.rows, TEXT_ROWS: version.rows[TEXT_ROWS] + 1}))
    path = Path(registry.uri, ref.folder, "text.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CorruptVersionError, match=r"text\.safetensors"):
        read_version(registry, ref, resident=resident)


class DraftWithTextAmongRows:
    """Writes what versions were before text vectors had a file of their own."""

    def __init__(self, draft: VersionDraft) -> None:
        self.draft = draft
        self.rows: Mapping[str, torch.Tensor] = {}
        self.add_table, self.add_text = draft.add_table, draft.add_text

    def add_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        if name == "rows":
            self.rows = tensors
        elif name == "text":
            self.draft.add_tensors("rows", {**self.rows, **tensors})
        else:
            self.draft.add_tensors(name, tensors)


def test_text_vectors_among_the_rows_are_read_as_well(registry: Registry, version: VersionState) -> None:
    draft = registry.draft_version()
    write_version(DraftWithTextAmongRows(draft), version, HISTORY)
    ref = draft.publish(offset=5, metrics={})
    assert "text.safetensors" not in registry.manifest(ref).files
    assert_equal(read_version(registry, ref, with_optimizer=True), version)


def test_checkpoint_names_and_back(version: VersionState) -> None:
    tables, dense, optimizer = split_checkpoint(checkpoint_names(version))
    assert tables.keys() == {"item", "user"}
    assert dense.keys() == version.dense.keys()
    assert optimizer.keys() == version.optimizer.keys()


def test_popularity_is_smoothed_and_sums_to_1() -> None:
    # Counts 0, 1, 4: 1, 2, 5 of 8.
    np.testing.assert_allclose(np.exp(log_popularity(torch.tensor([0, 1, 4]))), [1 / 8, 2 / 8, 5 / 8], rtol=1e-6)


def test_a_version_holds_its_encoders_adapter_and_says_which_encoder_it_is(
    registry: Registry, version: VersionState
) -> None:
    tensors = {"layer.lora_A": torch.ones(2, 4), "layer.lora_B": torch.ones(4, 2)}
    adapter = Adapter(kind="lora", base="0123456789abcdef", rank=2, alpha=4.0, tensors=tensors)
    draft = registry.draft_version()
    write_version(draft, replace(version, encoder="fedcba9876543210", adapter=adapter), HISTORY)
    ref = draft.publish(offset=5, metrics={})
    found = read_version(registry, ref)
    assert found.encoder == "fedcba9876543210"
    assert found.adapter is not None
    assert found.adapter.digest == adapter.digest
    assert read_version(registry, ref, resident=found).adapter is found.adapter
    stated = read_encoder(registry, ref.version)
    assert (stated.fingerprint, stated.adapter and stated.adapter.digest) == ("fedcba9876543210", adapter.digest)
    assert stated.config == version.recipe.section(EncoderConfig)


def test_a_version_from_before_encoders_were_stated_reads_as_it_did(registry: Registry, published: VersionRef) -> None:
    found = read_version(registry, published)
    assert (found.encoder, found.adapter) == ("", None)
    assert not {"encoder.json", "adapter.json"} & set(registry.manifest(published).files)
