"""Fit a classical system, the way the two-stage model is trained: on the training share, validated, then on all of it.

In:  a dataset and a recipe whose `[system]` names one.  Out: a run folder: what was learned, its figures, run.json.
Knows nothing of versions or serving. One process, without Ray: what takes too much memory is refused beforehand.
"""

import time

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
from training.baselines.interface import seen_matrix
from training.evaluation.classical import NextItems, choose_weights
from training.evaluation.metrics import hit_at_k, ndcg_at_k
from training.inputs import encode_items, load_inputs
from training.run import SYSTEM_FILE, TEXT_FILE, TrainedRun, new_run
from training.stream import DataConfig, History

GIB = 1 << 30


def fit_system(recipe: Recipe, dataset: Dataset, home: Home) -> TrainedRun:
    """Fit the recipe's system. Raises `ConfigError` where memory does not suffice, `DataError` for too little data."""
    config = recipe.section(SystemConfig)
    _check_memory(recipe, config.name, dataset)
    folder = new_run(home, recipe)
    encoder = TextEncoder(recipe.section(EncoderConfig), home.cache)
    np.save(folder / TEXT_FILE, encode_items(encoder, dataset))
    inputs = load_inputs(dataset, recipe.section(DataConfig), recipe.section(TablesConfig), folder / TEXT_FILE)
    sizes = len(inputs.users), len(inputs.items)

    started_s = time.monotonic()
    seen_UI = _seen(inputs.train, sizes)
    system = build_system(recipe, config.name, np.asarray(inputs.text)).fit(seen_UI)
    validation = NextItems(inputs.full, inputs.validation, seen_UI, items=sizes[1], max_history=config.max_history)
    metrics: dict[str, float] = {}
    if isinstance(system, Hybrid):
        hybrid = recipe.section(HybridConfig)
        if not hybrid.weights:
            if not len(validation):
                raise DataError(f"{dataset.path}: has nothing to validate on; give hybrid.weights in the recipe")
            choose_weights(system, validation)
        metrics |= {f"weight_{part}": weight for part, weight in zip(hybrid.parts, system.weights, strict=True)}
    ranks = validation.ranks(system)
    system.fit(_seen(inputs.full, sizes))
    save_file({name: np.ascontiguousarray(array) for name, array in system.arrays().items()}, folder / SYSTEM_FILE)
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


def _seen(history: History, sizes: tuple[int, int]) -> sparse.csr_array:
    return seen_matrix(history.user_row, history.item_row, *sizes)


def _check_memory(recipe: Recipe, name: str, dataset: Dataset) -> None:
    users, items = dataset.info.users, dataset.info.items
    needed, free = fitting_bytes(recipe, name, users, items), free_memory()
    if needed > free:
        raise ConfigError(
            f"system.name={name}: fitting {items:,} items and {users:,} users takes about {needed / GIB:.1f} GiB and "
            f"{free / GIB:.1f} are free; als, bpr and popularity take no more than their data, item_neighbours little"
        )
