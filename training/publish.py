"""A training run becomes a version in the registry.

In:  a run folder.  Out: the published version's name.
Knows nothing of serving. The version is complete or absent: everything is written, then one pointer moves.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from cluster.dataset import load_dataset
from cluster.engine import open_registry
from cluster.errors import DataError
from cluster.manifest import SYSTEM, TWO_STAGE
from cluster.registry import Registry, VersionRef
from embeddings.adapter import SETTINGS_FILE, Adapter
from embeddings.tables import TablesConfig
from training.baselines.config import BASKETS, RATINGS, SystemConfig
from training.checkpoint import read_checkpoint
from training.inputs import build_item_vocabulary, build_user_vocabulary, training_events
from training.models.placing import Placing, place_items
from training.models.tags import COLUMNS, Tags
from training.models.version import (
    COUNT_ROWS,
    ENCODER,
    ITEM_ROWS,
    TEXT_ROWS,
    USER_ROWS,
    VersionState,
    split_checkpoint,
    write_version,
)
from training.online.canary import begin_canary
from training.run import SYSTEM_FILE, TEXT_FILE, TEXT_PRIOR, TEXT_RIDGE, TrainedRun, latest_run, read_recipe
from training.stream import DataConfig, build_history


def run(args: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Publish a training run: the `recloop publish` command."""
    folder = Path(args.run) if args.run else latest_run(args.home)
    trained = TrainedRun.read(folder)
    recipe = read_recipe(folder)
    registry = open_registry(recipe, args.home)
    if args.canary:
        registry.current()  # what the others are served meanwhile; raises where there is nothing yet
    ref = publish_run(trained, registry, promote=not args.canary)
    published = {"version": str(ref), "run": trained.folder, "metrics": trained.metrics}
    if args.canary:
        published["share"] = begin_canary(registry, recipe, args.home, ref, None).share
    return published


def publish_run(trained: TrainedRun, registry: Registry, *, promote: bool = True) -> VersionRef:
    """Write a run's last checkpoint, with everything a request needs, as the next version, and promote it unless told.

    Raises `DataError` when the dataset is not the one the run was trained on any more.
    """
    folder = Path(trained.folder)
    recipe, dataset = read_recipe(folder), load_dataset(trained.dataset)
    config = recipe.section(SystemConfig)
    if config.name == RATINGS:
        raise DataError(f"{folder}: is a run of the rating model, which estimates ratings and is not served")
    if dataset.fingerprint() != trained.dataset_fingerprint:
        raise DataError(f"{trained.dataset}: has changed since the run {folder.name} was trained on it; train again")
    events = training_events(dataset, recipe.section(DataConfig))
    tables = recipe.section(TablesConfig)
    items, users = build_item_vocabulary(dataset, tables), build_user_vocabulary(events, tables)
    history = build_history(events, items, users)
    state = VersionState(
        ref=VersionRef(0),
        recipe=recipe,
        learned_seq=0,
        item_ids=items.ids,
        item_texts=dataset.items()["text"].to_pylist(),
        tags=Tags(dataset.items().select(list(COLUMNS))),
        user_ids=users.ids,
        rows={
            TEXT_ROWS: torch.from_numpy(np.load(folder / TEXT_FILE)),
            COUNT_ROWS: torch.from_numpy(np.bincount(history.item_row, minlength=len(items))),
        },
        dense={},
        optimizer={},
        encoder=trained.encoder_fingerprint,
        adapter=Adapter.load(folder) if (folder / SETTINGS_FILE).exists() else None,
    )
    metrics: dict[str, Any] = {**trained.metrics, ENCODER: trained.encoder_fingerprint}  # Any: JSON
    if config.classical is not None or config.name == BASKETS:
        state = replace(state, system=load_file(folder / SYSTEM_FILE))
    if config.name == TWO_STAGE:
        state = _with_checkpoint(state, Path(trained.checkpoint))
        if (prior := metrics.get(TEXT_PRIOR)) is not None:  # a run from before has none
            state = place_items(state, Placing(prior, metrics[TEXT_RIDGE]))
    else:
        metrics[SYSTEM] = config.name
    if config.blend is not None:  # by the weight that was chosen, where none was given
        system = {**recipe.values["system"], "blend_weight": metrics["blend_weight"]}
        state = replace(state, recipe=replace(recipe, values={**recipe.values, "system": system}))
    registry.prune()
    draft = registry.draft_version()
    write_version(draft, state, events)
    return draft.publish(offset=0, metrics=metrics, promote=promote)


def _with_checkpoint(state: VersionState, checkpoint: Path) -> VersionState:
    """Return the state with what the two-stage model has learned; spare rows stay behind."""
    whole, dense, optimizer = split_checkpoint(read_checkpoint(checkpoint))
    sizes = {"item": len(state.item_ids), "user": len(state.user_ids)}
    tables = {name: whole[table][: sizes[table]].clone() for name, table in ((ITEM_ROWS, "item"), (USER_ROWS, "user"))}
    return replace(
        state,
        rows={**tables, **state.rows},
        dense=dense,
        optimizer={
            name: tensor[: sizes[name.split(".")[0]]].clone() if name.endswith(".momentum") else tensor
            for name, tensor in optimizer.items()
        },
    )
