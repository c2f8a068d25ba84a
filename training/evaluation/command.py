"""`recloop evaluate`: how well published versions name the next item on a dataset's last part.

In:  versions and a dataset.  Out: every metric with intervals, the first version against the others, EASE beside.
Knows nothing of serving. The same events that `recloop replay` sends, ranked offline with user state live.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.config import Recipe, load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.engine import open_registry
from cluster.errors import DataError
from cluster.events import INTERACTION_KINDS
from cluster.registry import Registry, VersionRef
from training.baselines.ease import replay_ease
from training.evaluation.leakage import check_not_fitted
from training.evaluation.page import write_page
from training.evaluation.report import EASE_ITEM_LIMIT, EASE_REFIT_EVERY
from training.evaluation.scoreboard import Row, Scoreboard, evaluate
from training.evaluation.segments import ALL
from training.evaluation.system import ClassicalSystem, System, VersionSystem
from training.inputs import is_training_event
from training.models.classical import ServedClassical, load_resident
from training.models.served import ServedModel
from training.models.version import RECIPE_FILE, ROOT
from training.stream import DataConfig

PAGE = "evaluation.html"
HEADLINES = ("hit_at_10", "ndcg_at_10")
"""Metrics that are told of every segment in the terminal; the others are on the page."""


def run(args: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Score versions: the `recloop evaluate` command."""
    registry = open_registry(load_recipe(args.recipe, args.overrides), args.home)
    refs = list(dict.fromkeys(map(VersionRef.parse, args.versions))) or [_trained_version(registry)]
    dataset = load_dataset(args.data or args.home.default_dataset)
    known_N = np.any([_check_trained_on(registry, ref, dataset) for ref in refs], axis=0)
    systems = {str(ref): load_system(registry, ref) for ref in refs}
    for ref in refs:
        fitted = registry.open_version(ref.version).table("history")["event_id"]
        check_not_fitted(fitted, dataset.events(["event_id"])["event_id"].filter(pa.array(~known_N)))
    scoreboard = evaluate(systems, dataset, known_N, args.segments)
    metrics, segments = describe(scoreboard)
    page = Path(args.page) if args.page else args.home.ensure().reports / PAGE
    facts = {
        "dataset": dataset.info.name,
        "events to be named": f"{len(scoreboard.user_N):,}; {known_N.sum():,} are known",
        "items ranked": f"{scoreboard.items:,}, less those that the user has",
    }
    write_page(page, f"Evaluation of {', '.join(systems)}", facts, metrics, segments)
    first, *others = systems
    result = {"version": first, "others": others, "page": str(page), "scores": headlines(segments), "metrics": metrics}
    return (result | {"segments": segments} if args.json else result) | ease_beside(dataset, known_N)


def load_system(registry: Registry, ref: VersionRef) -> System:
    """Return what a version is evaluated as."""
    model = load_resident(registry, ref)
    if isinstance(model, ServedModel):
        return VersionSystem(model)
    if isinstance(model, ServedClassical):
        return ClassicalSystem(model)
    raise DataError(f"version {ref}: offers what users have, and is not ranked by what they have not; see [baskets]")


def describe(scoreboard: Scoreboard) -> tuple[list[Row], list[Row]]:
    """Return the rows of all events, with tests against the first version, and those of every segment."""
    tests = scoreboard.tests()
    segments = [
        {"segment": name, "events": int(chosen_N.sum())} | row
        for name, chosen_N in scoreboard.segments.items()
        for row in scoreboard.rows(name)
    ]
    metrics = [
        {name: value for name, value in row.items() if name not in ("segment", "events")}
        | tests.get((row["metric"], row["version"]), {})
        for row in segments
        if row["segment"] == ALL
    ]
    return metrics + scoreboard.rating_rows() + scoreboard.choice_rows(), segments


def headlines(segments: list[Row]) -> list[Row]:
    """Return a row a segment and version, with the headline metrics and their intervals."""
    rows: dict[tuple[str, str], Row] = {}
    for row in segments:
        head = {name: row[name] for name in ("version", "segment", "events")}
        found = rows.setdefault((row["segment"], row["version"]), head)
        if (name := row["metric"]) in HEADLINES:
            found |= {name: row["value"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
    return list(rows.values())


def _check_trained_on(registry: Registry, ref: VersionRef, dataset: Dataset) -> npt.NDArray[np.bool_]:
    """Return which of the dataset's events the version was allowed to see.

    Raises `DataError` where it has learned others, or was trained on another dataset.
    """
    if learned_seq := registry.manifest(ref).last_seq:
        raise DataError(
            f"version {ref}: has learned {learned_seq:,} live events, which may be those it would be scored on; "
            f"evaluate a trained version, such as {_trained_version(registry)}"
        )
    reader = registry.open_version(ref.version)
    events = dataset.events(["event_id", "user_id", "kind"])
    fitted_ids = reader.table("history")["event_id"]
    if events["event_id"].filter(pc.is_in(events["event_id"], fitted_ids.combine_chunks())) != fitted_ids:
        raise DataError(f"{dataset.path}: is not the dataset that version {ref} was trained on")
    return is_training_event(events, Recipe.from_resolved(reader.text(RECIPE_FILE)).section(DataConfig))


def _trained_version(registry: Registry) -> VersionRef:
    """Return the promoted version, or the trained one that it grew from."""
    current = registry.current()
    return VersionRef(int(registry.manifest(VersionRef(current.version)).metrics.get(ROOT, current.version)))


def ease_beside(dataset: Dataset, known_N: npt.NDArray[np.bool_]) -> dict[str, Any]:  # Any: JSON
    """Return EASE's headline figures on the same events, refitted as they come; nothing where it cannot be fitted."""
    known_events = int(known_N.sum())
    if not known_N[:known_events].all():  # not a split in time
        return {}
    if dataset.info.items > EASE_ITEM_LIMIT or not set(dataset.info.kinds) <= INTERACTION_KINDS:
        return {}
    ease = replay_ease(
        dataset.events(["user_id", "item_id", "kind"]), train_events=known_events, refit_every=EASE_REFIT_EVERY
    )
    return {"ease_refitted": {"hit_at_10": float(ease.hits.mean()), "ndcg_at_10": float(ease.ndcg.mean())}}
