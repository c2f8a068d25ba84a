"""What a replay showed: one table, one picture, one JSON object.

In:  a `ReplayRecord` and, for comparison, another system's ranks on the same events.  Out: figures with intervals.
Knows nothing of how the record came about. Intervals are bootstraps over users, whose events are not independent.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.config import Recipe, load_recipe
from cluster.dataset import Dataset, load_dataset
from cluster.errors import DataError
from cluster.events import INTERACTION_KINDS
from cluster.output import render_result
from training.baselines.ease import Replay, replay_ease
from training.evaluation.metrics import difference_interval, hit_at_k, mean_interval, ndcg_at_k, running_mean
from training.evaluation.replay import SLATE, ReplayRecord, arms_for_replay, known_users, replay, split_for_replay
from training.stream import DataConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {"hit_at_10": hit_at_k, "ndcg_at_10": ndcg_at_k}
CONTRASTS = (("live", "frozen"), ("live", "state"), ("state", "frozen"))
SEED = 0
EASE_REFIT_EVERY = 500
EASE_ITEM_LIMIT = 20_000
"""EASE inverts an items × items matrix; larger catalogues are reported without it."""
PICTURE = "replay.png"
UNSTEADY_EVENTS = 100

Json = dict[str, Any]  # Any: whatever JSON holds


def run(args: argparse.Namespace) -> Json:
    """Replay a dataset against a server that is up: the `recloop replay` command."""
    recipe = load_recipe(args.recipe, args.overrides)
    dataset = load_dataset(args.data or args.home.default_dataset)
    return replay_and_report(args.url, recipe, dataset, args.home.ensure().reports, args.events)


def replay_and_report(url: str, recipe: Recipe, dataset: Dataset, folder: Path, limit: int | None = None) -> Json:
    """Replay the dataset's last events on every arm of a server; print the table, draw the picture, return figures.

    Raises `DataError` when there is nothing to replay, or the server knows of it or was trained on something else.
    """
    known, live = split_for_replay(dataset, recipe.section(DataConfig), limit)
    if not set(live["kind"].unique().to_pylist()) & INTERACTION_KINDS:
        raise DataError(f"{dataset.path}: no interactions are left to replay after the first {len(known):,}")
    record = replay(url, live, arms_for_replay(url, len(known)), known_users(known))
    ease = None
    if dataset.info.items <= EASE_ITEM_LIMIT and set(dataset.info.kinds) <= INTERACTION_KINDS:
        events = dataset.events(["user_id", "item_id", "kind"]).slice(0, len(known) + len(live))
        ease = replay_ease(events, train_events=len(known), refit_every=EASE_REFIT_EVERY)
    summary = summarise(record, ease)
    picture = folder / PICTURE
    draw(record, ease, picture)
    print(render_table(summary), f"\npicture: {picture}", sep="\n", file=sys.stderr, flush=True)
    return summary


def summarise(record: ReplayRecord, ease: Replay | None = None) -> Json:
    """Return the figures of a replay: per arm with 95% intervals, warm and cold users apart, freshness."""
    users = np.unique(record.user_ids, return_inverse=True)[1]
    values = {
        metric: {arm: compute(ranks, SLATE) for arm, ranks in record.ranks.items()}
        for metric, compute in METRICS.items()
    }
    summary: Json = {metric: _means(of_arm) for metric, of_arm in values.items()}
    summary["ci95"] = {metric: _intervals(of_arm, users) for metric, of_arm in values.items()}
    for name, chosen in (("warm_users", ~record.cold), ("cold_users", record.cold)):
        summary[name] = {"events": int(chosen.sum())}
        if chosen.any():
            for metric, of_arm in values.items():
                summary[name][metric] = _means({arm: found[chosen] for arm, found in of_arm.items()})
    if ease is not None:
        summary["ease"] = {"hit_at_10": float(ease.hits.mean()), "ndcg_at_10": float(ease.ndcg.mean())}
    summary["freshness_ms"] = {
        f"{name}_p{percent}": float(np.percentile(waited_ms, percent)) if len(waited_ms) else None
        for name, waited_ms in (("state", record.state_ms), ("weights", record.weights_ms))
        for percent in (50, 99)
    }
    return summary | {"events": len(record.acked_seqs), "version": record.version, "replay_s": record.seconds}


def render_table(summary: Mapping[str, Any]) -> str:
    """Return the figures as a person reads them: a row an arm."""
    rows = []
    for arm in summary["hit_at_10"]:
        row = {"arm": arm}
        for metric in METRICS:
            low, high = summary["ci95"][metric][arm]
            row[metric] = f"{summary[metric][arm]:.4f} [{low:.4f}, {high:.4f}]"
        for segment in ("warm_users", "cold_users"):
            found = summary[segment].get("hit_at_10", {}).get(arm)
            row[f"hit_at_10 {segment.replace('_', ' ')}"] = f"{found:.4f}" if found is not None else "-"
        rows.append(row)
    if "ease" in summary:
        rows.append({"arm": "EASE, refitted"} | {metric: f"{summary['ease'][metric]:.4f}" for metric in METRICS})
    return render_result({"arms": rows, "freshness_ms": [summary["freshness_ms"]]})


def draw(record: ReplayRecord, ease: Replay | None, path: Path) -> None:
    """Write the picture: cumulative Hit@10 and NDCG@10 by arm, and Hit@10 of warm and cold users with intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    users = np.unique(record.user_ids, return_inverse=True)[1]
    for axis, (metric, compute) in zip(axes, METRICS.items(), strict=False):
        for arm, ranks in record.ranks.items():
            _draw_curve(axis, arm, compute(ranks, SLATE), users)
        if ease is not None:
            other = ease.hits if metric == "hit_at_10" else ease.ndcg
            label = f"EASE, refitted  {other.mean():.4f}"
            axis.plot(_curve(other), label=label, color="grey", linestyle="--", linewidth=1)
        axis.set(title=f"Cumulative {metric.replace('_at_', '@')}", xlabel="events replayed", ylim=(0, None))
        axis.legend(frameon=False)
    _draw_segments(axes[-1], record, users)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _means(values_by_arm: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {arm: float(values.mean()) for arm, values in values_by_arm.items()}


def _intervals(values_by_arm: Mapping[str, np.ndarray], users: np.ndarray) -> dict[str, list[float]]:
    intervals = {arm: mean_interval(values, seed=SEED, groups_N=users) for arm, values in values_by_arm.items()}
    for better, worse in CONTRASTS:
        if better in values_by_arm and worse in values_by_arm:
            intervals[f"{better}_minus_{worse}"] = difference_interval(
                values_by_arm[better], values_by_arm[worse], seed=SEED, groups_N=users
            )
    return {name: [interval.low, interval.high] for name, interval in intervals.items()}


def _draw_curve(axis: "Axes", arm: str, values: np.ndarray, users: np.ndarray) -> None:
    interval = mean_interval(values, seed=SEED, groups_N=users)
    (line,) = axis.plot(_curve(values), label=f"{arm}  {values.mean():.4f}")
    axis.errorbar(
        len(values),
        interval.mean,
        yerr=[[interval.mean - interval.low], [interval.high - interval.mean]],
        color=line.get_color(),
        capsize=4,
    )


def _curve(values: np.ndarray) -> np.ndarray:
    """Return the running mean, blank while it rests on too few events to be drawn to scale."""
    curve = running_mean(values)
    curve[: min(UNSTEADY_EVENTS, len(curve) - 1)] = np.nan
    return curve


def _draw_segments(axis: "Axes", record: ReplayRecord, users: np.ndarray) -> None:
    from matplotlib.patches import Patch

    segments = {"warm users": ~record.cold, "cold users": record.cold}
    width = 0.8 / len(record.ranks)
    for offset, ranks in enumerate(record.ranks.values()):
        for place, chosen in enumerate(segments.values()):
            if not chosen.any():
                continue
            interval = mean_interval(hit_at_k(ranks[chosen], SLATE), seed=SEED, groups_N=users[chosen])
            axis.bar(
                place + offset * width,
                interval.mean,
                width,
                color=f"C{offset}",
                yerr=[[interval.mean - interval.low], [interval.high - interval.mean]],
                capsize=4,
            )
    middle = width * (len(record.ranks) - 1) / 2
    axis.set(title="Hit@10 by user, 95% intervals", xticks=[middle, 1 + middle], xticklabels=list(segments))
    axis.legend(handles=[Patch(color=f"C{n}", label=arm) for n, arm in enumerate(record.ranks)], frameon=False)
