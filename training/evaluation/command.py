"""`recloop evaluate`: how well a published version names the next item on a dataset's last part.

In:  a version and a dataset.  Out: Hit@10 and NDCG@10 with intervals, warm and cold users apart, EASE beside.
Knows nothing of serving. The same events that `recloop replay` sends, ranked offline with user state live.
"""

import argparse
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.config import load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.engine import open_registry
from cluster.errors import DataError
from cluster.events import INTERACTION_KINDS
from cluster.registry import Registry, VersionRef
from embeddings.vocabulary import Vocabulary
from training.baselines.ease import replay_ease
from training.evaluation.metrics import Interval, hit_at_k, mean_interval, ndcg_at_k
from training.evaluation.next_item import Catalogue, rank_next_items
from training.evaluation.report import EASE_ITEM_LIMIT, EASE_REFIT_EVERY
from training.inputs import training_events
from training.models.served import ServedModel
from training.models.version import ROOT, USER_ROWS, grow_rows
from training.stream import DataConfig, build_history

SEED = 0


def run(args: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Score one version: the `recloop evaluate` command."""
    registry = open_registry(load_recipe(args.recipe, args.overrides), args.home)
    ref = VersionRef.parse(args.version) if args.version else _trained_version(registry)
    dataset = load_dataset(args.data or args.home.default_dataset)
    model = ServedModel.load(registry, ref)
    if model.learned_seq:
        raise DataError(
            f"version {ref}: has learned {model.learned_seq:,} live events, which may be those it would be scored on; "
            f"evaluate a trained version, such as {_trained_version(registry)}"
        )
    history = registry.open_version(ref.version).table("history")
    if dataset.events(["event_id"])["event_id"].slice(0, len(history)) != history["event_id"]:
        raise DataError(f"{dataset.path}: is not the dataset that version {ref} was trained on")
    return {"version": str(ref)} | evaluate(model, dataset)


def _trained_version(registry: Registry) -> VersionRef:
    """Return the promoted version, or the trained one that it grew from."""
    current = registry.current()
    return VersionRef(int(registry.manifest(VersionRef(current.version)).metrics.get(ROOT, current.version)))


def evaluate(model: ServedModel, dataset: Dataset) -> dict[str, Any]:  # Any: JSON
    """Return the version's figures on the events after the share it was allowed to train on.

    Raises `DataError` when the dataset has items that the version does not know, or nothing after that share.
    """
    data = model.state.recipe.section(DataConfig)
    events, known = dataset.events(), training_events(dataset, data)
    items = Vocabulary(model.item_ids, model.item_count)
    users = _all_users(model, events)
    history = build_history(events, items, users)
    targets = np.flatnonzero(history.order >= len(known))
    if not len(targets):
        raise DataError(f"{dataset.path}: holds no interactions after the first {len(known):,} events")
    catalogue = Catalogue(item_ID=model.item_ID, user_UD=grow_rows(model.state.rows[USER_ROWS], len(users)))
    first = np.isin(targets, history.starts)
    ranks = np.zeros(len(targets), np.int64)
    ranks[~first] = rank_next_items(model.dense, catalogue, history, targets[~first])
    ranks[first] = _popularity_ranks(model.popularity_I)[history.item_row[targets[first]]]
    return _describe(ranks, history.user_row[targets], set(users.rows(known["user_id"]).tolist())) | _ease(
        dataset, len(known)
    )


def _popularity_ranks(popularity_I: np.ndarray) -> np.ndarray:
    """Return each item's rank by popularity, ties in row order, as a stranger is served."""
    ranks = np.empty(len(popularity_I), np.int64)
    ranks[np.argsort(-popularity_I, kind="stable")] = np.arange(1, len(popularity_I) + 1)
    return ranks


def _all_users(model: ServedModel, events: pa.Table) -> Vocabulary:
    known = list(model.state.user_ids)
    met = set(known)
    return Vocabulary([*known, *(user for user in events["user_id"].unique().to_pylist() if user not in met)], 2**31)


def _describe(ranks: np.ndarray, users: np.ndarray, known_users: set[int]) -> dict[str, Any]:  # Any: JSON
    warm = np.isin(users, list(known_users))
    rows = []
    for name, chosen in (("all", np.ones(len(ranks), bool)), ("warm users", warm), ("cold users", ~warm)):
        if chosen.any():
            hit = mean_interval(hit_at_k(ranks[chosen], 10), seed=SEED, groups_N=users[chosen])
            ndcg = mean_interval(ndcg_at_k(ranks[chosen], 10), seed=SEED, groups_N=users[chosen])
            rows.append(
                {"segment": name, "events": int(chosen.sum())} | _row("hit_at_10", hit) | _row("ndcg_at_10", ndcg)
            )
    return {"scores": rows}


def _row(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _ease(dataset: Dataset, train_events: int) -> dict[str, Any]:  # Any: JSON
    if dataset.info.items > EASE_ITEM_LIMIT or not set(dataset.info.kinds) <= INTERACTION_KINDS:
        return {}
    ease = replay_ease(
        dataset.events(["user_id", "item_id", "kind"]), train_events=train_events, refit_every=EASE_REFIT_EVERY
    )
    return {"ease_refitted": {"hit_at_10": float(ease.hits.mean()), "ndcg_at_10": float(ease.ndcg.mean())}}
