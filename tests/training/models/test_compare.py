"""What `recloop versions diff` tells of two versions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.config import Recipe
from cluster.events import Event, events_table
from cluster.registry import Registry
from training.models.compare import compare_versions
from training.models.version import ITEM_ROWS, USER_ROWS, VersionState, write_version

HISTORY = events_table([Event(user_id="u0", item_id="i0", kind="click", ts_us=1)])


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def publish(registry: Registry, state: VersionState):
    draft = registry.draft_version()
    write_version(draft, state, HISTORY)
    return draft.publish(offset=state.learned_seq, metrics={})


def test_rows_are_matched_by_id_and_measured(registry: Registry, version: VersionState) -> None:
    order = torch.arange(len(version.item_ids)).flip(0)
    moved = {name: rows if name == USER_ROWS else rows[order] for name, rows in version.rows.items()}
    moved[ITEM_ROWS] = moved[ITEM_ROWS].clone()
    moved[ITEM_ROWS][0] *= 3
    after = replace(version, item_ids=version.item_ids[::-1], item_texts=version.item_texts[::-1], rows=moved)
    found = compare_versions(registry, publish(registry, version), publish(registry, after))
    last = version.rows[ITEM_ROWS][-1].double().norm() * 2 / version.rows[ITEM_ROWS].double().norm()
    assert found["rows"][ITEM_ROWS]["changed"] == 1
    assert found["rows"][ITEM_ROWS]["relative_change"] == pytest.approx(last.item())
    assert found["rows"][USER_ROWS] == {"common": len(version.user_ids), "changed": 0, "relative_change": 0.0}


def test_new_and_gone_ids_dense_weights_and_settings_are_told(registry: Registry, version: VersionState) -> None:
    name = next(iter(version.dense))
    dense = dict(version.dense) | {name: version.dense[name] + 1}
    values = {section: dict(entries) for section, entries in version.recipe.values.items()}
    values.setdefault("tables", {})["learning_rate"] = 0.5
    recipe = Recipe(version.recipe.name, values, version.recipe.sections)
    after = replace(version, user_ids=["newcomer", *version.user_ids[1:]], dense=dense, recipe=recipe)
    found = compare_versions(registry, publish(registry, version), publish(registry, after))
    assert found["users"]["new_ids"] == ["newcomer"]
    assert found["users"]["gone_ids"] == [version.user_ids[0]]
    assert list(found["dense"]["tensors"]) == [name]
    assert found["recipe"]["tables.learning_rate"][1] == 0.5
