"""What changed from one version to another: ids, rows, dense weights, recipe.

In:  a registry and two `VersionRef`s.  Out: plain numbers, for `recloop versions diff`.
Knows nothing of what led from the one to the other: they need not be of one chain. Rows are matched by id.
"""

from collections.abc import Mapping
from typing import Any

import torch

from cluster.config import Recipe
from cluster.registry import Registry, VersionRef
from training.models.version import ROW_TENSORS, SEEN, USER_ROWS, VersionState, read_version

Json = dict[str, Any]  # Any: whatever JSON holds
SHOWN_IDS = 20


def compare_versions(registry: Registry, one: VersionRef, other: VersionRef) -> Json:
    """Return the changes from `one` to `other`. Raises `CorruptVersionError` or `RegistryError`."""
    before, after = read_version(registry, one), read_version(registry, other)
    return {
        "from": str(one),
        "to": str(other),
        "system": [registry.manifest(VersionRef(ref.version)).system for ref in (one, other)],
        "learned_seq": [before.learned_seq, after.learned_seq],
        "items": _compare_ids(before.item_ids, after.item_ids),
        "users": _compare_ids(before.user_ids, after.user_ids),
        "rows": {
            name: _compare_rows(name, before, after)
            for name in ROW_TENSORS
            if name in before.rows and name in after.rows
        },
        "dense": _compare_dense(_dense(before, after.seen), _dense(after, before.seen)),
        "recipe": _compare_recipes(before.recipe, after.recipe),
        "metrics": [dict(registry.manifest(ref).metrics) for ref in (one, other)],
    }


def _compare_ids(before: list[str], after: list[str]) -> Json:
    new, gone = sorted(set(after) - set(before)), sorted(set(before) - set(after))
    return {"before": len(before), "after": len(after), "new": len(new), "gone": len(gone)} | {
        f"{kind}_ids": ids[:SHOWN_IDS] for kind, ids in (("new", new), ("gone", gone)) if ids
    }


def _compare_rows(name: str, before: VersionState, after: VersionState) -> Json:
    """Compare the rows of ids that both have: how many differ, and by what share of their length."""
    ids_before, ids_after = (state.user_ids if name == USER_ROWS else state.item_ids for state in (before, after))
    place = {external_id: row for row, external_id in enumerate(ids_before)}
    pairs = [(place[external_id], row) for row, external_id in enumerate(ids_after) if external_id in place]
    index_P2 = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    one, other = before.rows[name][index_P2[:, 0]], after.rows[name][index_P2[:, 1]]
    if one.shape[1:] != other.shape[1:]:
        return {"common": len(pairs), "shapes": [list(one.shape[1:]), list(other.shape[1:])]}
    return {"common": len(pairs), "changed": int((one != other).view(len(pairs), -1).any(1).sum())} | _distance(
        one, other
    )


def _dense(state: VersionState, seen_elsewhere: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
    """Return all that has no rows: a classical system's arrays, dense weights and the correction by what is seen.

    The last is zero where only the other version has one.
    """
    seen = state.seen if state.seen is not None or seen_elsewhere is None else torch.zeros_like(seen_elsewhere)
    whole = {**{f"system.{name}": tensor for name, tensor in state.system.items()}, **state.dense}
    return whole if seen is None else {**whole, SEEN: seen}


def _compare_dense(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Json:
    alike = [name for name in before if name in after and before[name].shape == after[name].shape]
    by_name = {name: _distance(before[name], after[name]) for name in alike}
    reshaped = sorted((before.keys() | after.keys()) - set(alike))
    return {"tensors": {name: change for name, change in by_name.items() if change["relative_change"]}} | (
        {"reshaped": reshaped} if reshaped else {}
    )


def _distance(one: torch.Tensor, other: torch.Tensor) -> Json:
    """Return ‖other − one‖ / ‖one‖ over all entries; of a tensor that was zero, ‖other‖."""
    length = one.double().norm().item() or 1.0
    return {"relative_change": (other.double() - one.double()).norm().item() / length}


def _compare_recipes(before: Recipe, after: Recipe) -> Json:
    """Return `section.key` to its two values, where they differ."""
    flat = [
        {f"{section}.{key}": value for section, entries in recipe.values.items() for key, value in entries.items()}
        for recipe in (before, after)
    ]
    pairs = {key: [side.get(key) for side in flat] for key in sorted({*flat[0], *flat[1]})}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
