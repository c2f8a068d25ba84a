"""Fit a classical system the way the two-stage model is trained: on the training share, validated, then on all of it.

In:  a dataset and a recipe whose `[system]` names one.  Out: a run folder: what was learned, its figures, run.json.
Knows nothing of versions or serving. One process, without Ray: what takes too much memory is refused beforehand.
"""

import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from scipy import sparse

from cluster.config import Recipe
from cluster.dataset import Dataset
from cluster.errors import ConfigError, DataError
from cluster.home import Home
from cluster.memory import free_memory
from embeddings.tables import TablesConfig
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.baselines.config import HybridConfig, SystemConfig, build_system, fitting_bytes
from training.baselines.hybrid import Hybrid
from training.baselines.interface import Recommender, seen_matrix
from training.evaluation.classical import NextItems, choose_weights, rank_classical
from training.evaluation.metrics import hit_at_k, ndcg_at_k
from training.inputs import TrainingInputs, load_inputs, write_text_vectors
from training.run import SYSTEM_FILE, TEXT_FILE, VALIDATED_SYSTEM_FILE, TrainedRun, new_run
from training.stream import DataConfig, History

GIB = 1 << 30


def fit_system(recipe: Recipe, dataset: Dataset, home: Home) -> TrainedRun:
    """Fit the recipe's system. Raises `ConfigError` where memory does not suffice, `DataError` for too little data."""
    config = recipe.section(SystemConfig)
    check_memory(recipe, dataset)
    folder = new_run(home, recipe)
    encoder = TextEncoder(recipe.section(EncoderConfig), home.cache)
    write_text_vectors(encoder, dataset, folder)
    inputs = load_inputs(dataset, recipe.section(DataConfig), recipe.section(TablesConfig), folder / TEXT_FILE)
    sizes = len(inputs.users), len(inputs.items)

    started_s = time.monotonic()
    seen_UI = _seen(inputs.train, sizes)
    system = build_system(recipe, config.name, np.asarray(inputs.text)).fit(seen_UI)
    asked = NextItems(inputs.full, inputs.validation, items=sizes[1], max_history=config.max_history)
    is_fitted_U = np.diff(seen_UI.indptr) > 0
    metrics: dict[str, float] = {}
    if isinstance(system, Hybrid):
        hybrid = recipe.section(HybridConfig)
        if not hybrid.weights:
            if not len(asked):
                raise DataError(f"{dataset.path}: has nothing to validate on; give hybrid.weights in the recipe")
            choose_weights(system, asked, is_fitted_U)
        metrics |= {f"weight_{part}": weight for part, weight in zip(hybrid.parts, system.weights, strict=True)}
    ranks = rank_classical(system, asked, is_fitted_U)
    _save(system.fit(_seen(inputs.full, sizes)), folder / SYSTEM_FILE)
    return TrainedRun.write(
        folder,
        dataset,
        checkpoint=str(folder / SYSTEM_FILE),
        encoder_fingerprint=encoder.fingerprint,
        metrics=metrics
        | {
            "best_hit_at_10": float(hit_at_k(ranks, 10).sum()) / max(len(ranks), 1),
            "best_ndcg_at_10": float(ndcg_at_k(ranks, 10).sum()) / max(len(ranks), 1),
            "fit_s": time.monotonic() - started_s,
        },
    )


def fit_beside(recipe: Recipe, inputs: TrainingInputs, folder: Path) -> None:
    """Fit the system that a recipe blends with the two-stage model, for validation and for the version."""
    name, sizes = recipe.section(SystemConfig).blend, (len(inputs.users), len(inputs.items))
    if name is not None:
        system = build_system(recipe, name, np.asarray(inputs.text))
        _save(system.fit(_seen(inputs.train, sizes)), folder / VALIDATED_SYSTEM_FILE)
        _save(system.fit(_seen(inputs.full, sizes)), folder / SYSTEM_FILE)


def check_memory(recipe: Recipe, dataset: Dataset) -> None:
    """Raises `ConfigError` where fitting the recipe's classical system takes more memory than is free."""
    config, users, items = recipe.section(SystemConfig), dataset.info.users, dataset.info.items
    if config.classical is None:
        return
    needed, free = fitting_bytes(recipe, config.classical, users, items), free_memory()
    if needed > free:
        key = "name" if config.blend is None else "blend"
        raise ConfigError(
            f"system.{key}={config.classical}: fitting {items:,} items and {users:,} users takes about "
            f"{needed / GIB:.1f} GiB and {free / GIB:.1f} are free; als and popularity take no more than their data, "
            "item_neighbours little"
        )


def _save(system: Recommender, path: Path) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in system.arrays().items()}, path)


def _seen(history: History, sizes: tuple[int, int]) -> sparse.csr_array:
    return seen_matrix(history.user_row, history.item_row, *sizes)
