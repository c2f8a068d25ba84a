"""Systems side by side: the same interactions named by each, every metric of their lists, and what of it is luck.

In:  systems and a dataset, some events of which are known.  Out: values an interaction; rows of figures.
Knows nothing of versions, or of how figures are shown.

Each interaction that is not known is to be named from its user's history before it: one relevant item, all items
ranked but those that the user has. Intervals draw whole users, tests swap whole users.

Shapes: N interactions to be named, K places, M metrics, I items, U users.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from scipy import sparse

from cluster.dataset import Dataset
from cluster.errors import DataError
from cluster.events import KINDS
from embeddings.vocabulary import Vocabulary
from training.evaluation import beyond_accuracy
from training.evaluation.leakage import check_excluded, check_time_order
from training.evaluation.lists import IntArray, find_hits, list_values
from training.evaluation.metrics import FloatArray, mean_interval, mean_intervals
from training.evaluation.predictions import auc, by_probability, calibration_error, calibration_ratio, group_auc
from training.evaluation.segments import ALL, Segments, read_attribute, segments_by_attribute, segments_by_history
from training.evaluation.significance import holm, randomisation_tests
from training.evaluation.system import Cases, ChoiceSystem, RatingSystem, System
from training.evaluation.topk import popular_items, top_of_scores
from training.models.version import log_popularity
from training.online.predictions import Predictions
from training.stream import build_history

K = 10
SEED = 0
LIKED_FROM = 4.0
"""Stars from which on an item is liked."""

Row = dict[str, Any]  # Any: whatever JSON holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoreboard:
    """What systems did on the same interactions."""

    values: Mapping[str, Mapping[str, FloatArray]]
    """System to metric to values [N]."""
    lists: Mapping[str, IntArray]
    """System to lists [N, K]."""
    user_N: IntArray
    segments: Segments
    items: int
    ratings: Mapping[str, FloatArray]
    """System to estimated ratings [N], for those that estimate them."""
    rating_N: FloatArray
    """What the rating was; NaN for an interaction that is none."""
    choices: Mapping[str, Predictions]
    """System to predictions [N], for those that say how likely a choice is."""
    popularity_loss_N: FloatArray
    """The log loss, in nats, of guessing by popularity."""

    def choice_rows(self) -> list[Row]:
        """Return a row a system and metric of how likely the choices were held that all who say so say something of.

        `choice_ne` is the log loss over that of guessing by popularity; `choice_calibration` how often the item held
        most likely was expected to be chosen over how often it was, `choice_ece` the mean gap between the two.
        """
        losses = {name: found.loss_P for name, found in self.choices.items()}
        told_N = np.isfinite(np.sum(list(losses.values()), axis=0)) if losses else np.zeros(len(self.user_N), bool)
        rows = []
        for name, found in self.choices.items() if told_N.any() else ():
            loss_N, confidence_N, hit_N = found.loss_P[told_N], found.confidence_P[told_N], found.hits[told_N]
            interval = mean_interval(loss_N, seed=SEED, groups_N=self.user_N[told_N])
            figures = {
                "choice_ne": interval.mean / (float(self.popularity_loss_N[told_N].mean()) or math.nan),
                "choice_calibration": calibration_ratio(float(confidence_N.sum()), float(hit_N.sum())),
                "choice_ece": calibration_error(*by_probability(confidence_N, hit_N)),
            }
            rows += [
                {"metric": "choice_log_loss", "version": name}
                | {"value": interval.mean, "low": interval.low, "high": interval.high},
                *(
                    {"metric": metric, "version": name, "value": value}
                    for metric, value in figures.items()
                    if np.isfinite(value)  # without any hit there is no calibration
                ),
            ]
        return sorted(rows, key=lambda row: row["metric"], reverse=True)

    def rating_rows(self) -> list[Row]:
        """Return a row a system and metric of rated interactions that all who estimate ratings say something of."""
        errors = {name: estimate_N - self.rating_N for name, estimate_N in self.ratings.items()}
        told_N = np.isfinite(np.sum(list(errors.values()), axis=0)) if errors else np.zeros(len(self.user_N), bool)
        rows = []
        for name, error_N in errors.items() if told_N.any() else ():
            both_N2 = np.stack([error_N[told_N] ** 2, np.abs(error_N[told_N])], axis=1)
            squared, absolute = mean_intervals(both_N2, seed=SEED, groups_N=self.user_N[told_N])
            rows += [
                {"metric": "rating_rmse", "version": name}
                | {"value": squared.mean**0.5, "low": squared.low**0.5, "high": squared.high**0.5},
                {"metric": "rating_mae", "version": name}
                | {"value": absolute.mean, "low": absolute.low, "high": absolute.high},
            ]
            estimate_N, liked_N = self.ratings[name][told_N], self.rating_N[told_N] >= LIKED_FROM
            orders = {"rating_auc": auc(estimate_N, liked_N)}
            orders["rating_gauc"] = group_auc(estimate_N, liked_N, self.user_N[told_N])
            rows += [
                {"metric": metric, "version": name, "value": value}
                for metric, value in orders.items()
                if np.isfinite(value)  # where nothing, or nothing but, was liked, there is no order
            ]
        return sorted(rows, key=lambda row: row["metric"], reverse=True)

    def rows(self, segment: str = ALL) -> list[Row]:
        """Return a row a metric and system: value and interval over a segment, and the difference to the first system.

        Figures of all lists together have no interval.
        """
        chosen_N = self.segments[segment]
        first, *others = self.values
        names = list(self.values[first])
        columns = [np.stack([self.values[system][name][chosen_N] for name in names], axis=1) for system in self.values]
        differences = [column_NM - columns[0] for column_NM in columns[1:]]
        both_NM = np.concatenate([*columns, *differences], axis=1)
        found = iter(mean_intervals(both_NM, seed=SEED, groups_N=self.user_N[chosen_N]))
        rows = {
            (name, system): {"metric": name, "version": system, "value": i.mean, "low": i.low, "high": i.high}
            for system in self.values
            for name, i in zip(names, found, strict=False)
        }
        for system in others:
            for name, i in zip(names, found, strict=False):
                rows[name, system] |= {"difference": i.mean, "difference_low": i.low, "difference_high": i.high}
        for system, lists_NK in self.lists.items():
            exposure_I = beyond_accuracy.exposure(lists_NK[chosen_N], self.items)
            for name, figure in (("coverage", beyond_accuracy.coverage), ("gini", beyond_accuracy.gini)):
                rows[name, system] = {"metric": name, "version": system, "value": figure(exposure_I)}
        order = [*names, "coverage", "gini"]
        return [rows[name, system] for name in order for system in self.values]

    def tests(self) -> dict[tuple[str, str], Row]:
        """Return the p-value of each metric's difference to the first system, and Holm's over all other systems."""
        first, *others = self.values
        names = list(self.values[first])
        p_SM = np.empty((len(others), len(names)))
        for place, system in enumerate(others):
            difference_NM = np.stack([self.values[system][name] - self.values[first][name] for name in names], axis=1)
            p_SM[place] = randomisation_tests(difference_NM, seed=SEED, groups_N=self.user_N)
        return {
            (name, system): {"p": p, "p_holm": adjusted}
            for column, name in enumerate(names)
            for system, p, adjusted in zip(
                others, p_SM[:, column].tolist(), holm(p_SM[:, column]).tolist(), strict=True
            )
        }


def evaluate(
    systems: Mapping[str, System], dataset: Dataset, known_N: npt.NDArray[np.bool_], attributes: Sequence[str] = ()
) -> Scoreboard:
    """Have systems name the interactions of those events that are not known; segments also by `attributes`.

    Raises `DataError` where systems recommend different items, the dataset has items they do not know or nothing but
    known events, and where anything of it could not be fair (training/evaluation/leakage.py).
    """
    item_ids = _common_items(systems)
    events = dataset.events()
    known = events.filter(pa.array(known_N))
    if known_N[: len(known)].all():  # a split in time, not one by user
        check_time_order(known["ts_us"].to_numpy(), events["ts_us"].slice(len(known)).to_numpy())
    user_ids = events["user_id"].unique()
    items, users = Vocabulary(item_ids, len(item_ids)), Vocabulary(user_ids.to_pylist(), len(user_ids))
    history = build_history(events, items, users)
    known_N = known_N[history.order]
    targets = np.flatnonzero(~known_N)
    if not len(targets):
        raise DataError(f"{dataset.path}: holds no interactions but the {len(known):,} known events")
    cases = Cases(history=history, targets=targets, user_ids=user_ids, item_ids=item_ids)
    user_N, item_N = history.user_row[targets], history.item_row[targets]
    owned_P = np.unique(history.user_row[known_N] * len(items) + history.item_row[known_N])  # pairs of user and item
    owners_I = np.bincount(owned_P % len(items), minlength=len(items))
    chosen_I = np.bincount(history.item_row[known_N], minlength=len(items))
    active_U = np.bincount(users.rows(known["user_id"]), minlength=len(users))
    segments = segments_by_history(user_N, item_N, active_U, owners_I)
    catalogue = dataset.items()
    for name in _with_domain(attributes, catalogue):
        values = read_attribute(dataset, name, users.ids, item_ids)
        segments |= segments_by_attribute(name, user_N if name.startswith("user.") else item_N, values)
    lists, popular_NK = _name(systems, cases, owners_I)
    text_IE = next((system.text_IE for system in systems.values() if system.text_IE is not None), None)
    vectors = _item_vectors(catalogue, items, text_IE)
    owners = len(np.unique(owned_P // len(items)))
    return Scoreboard(
        values={
            name: _values(lists_NK, popular_NK, item_N, owners_I, owners, vectors) for name, lists_NK in lists.items()
        },
        lists=lists,
        user_N=user_N,
        segments=segments,
        items=len(items),
        ratings={name: system.ratings(cases) for name, system in systems.items() if isinstance(system, RatingSystem)},
        rating_N=np.where(history.kind[targets] == KINDS.index("rating"), history.value[targets], np.nan),
        choices={name: system.choices(cases) for name, system in systems.items() if isinstance(system, ChoiceSystem)},
        popularity_loss_N=-log_popularity(torch.from_numpy(chosen_I))[item_N].astype(np.float64),
    )


def _common_items(systems: Mapping[str, System]) -> Sequence[str]:
    (first, system), *others = systems.items()
    for name, other in others:
        if list(other.item_ids) != list(system.item_ids):
            raise DataError(f"versions {first} and {name} recommend different items; compare those of one catalogue")
    return system.item_ids


def _name(systems: Mapping[str, System], cases: Cases, owners_I: IntArray) -> tuple[dict[str, IntArray], IntArray]:
    """Return every system's lists, and those of what is popular."""
    lists: dict[str, list[IntArray]] = {name: [] for name in systems}
    popular = []
    for batch, *scores in zip(cases.batches(), *(system.scores(cases) for system in systems.values()), strict=True):
        popular.append(popular_items(owners_I, batch.seen, K))
        for (name, found), score_BI in zip(lists.items(), scores, strict=True):
            if score_BI.shape != batch.seen.shape:
                raise DataError(f"version {name}: scores of shape {score_BI.shape}, not {batch.seen.shape}")
            top_BK = top_of_scores(score_BI, batch.seen, K)
            check_excluded(top_BK, batch.seen)
            found.append(top_BK)
    return {name: np.concatenate(found) for name, found in lists.items()}, np.concatenate(popular)


def _values(
    lists_NK: IntArray,
    popular_NK: IntArray,
    item_N: IntArray,
    owners_I: IntArray,
    owners: int,
    vectors: Mapping[str, npt.NDArray[np.floating] | sparse.csr_array],
) -> dict[str, FloatArray]:
    shape, count = (len(item_N), len(owners_I)), len(item_N)
    hits = find_hits(lists_NK, sparse.csr_array((np.ones(count), item_N, np.arange(count + 1)), shape))
    values = list_values(hits, K)
    values["novelty_bits"] = beyond_accuracy.novelty(lists_NK, owners_I, owners)
    values["popularity"] = beyond_accuracy.popularity(lists_NK, owners_I)
    values |= {name: beyond_accuracy.diversity(lists_NK, unit_ID) for name, unit_ID in vectors.items()}
    values["serendipity"] = beyond_accuracy.serendipity(hits, lists_NK, popular_NK, K)
    return values


def _item_vectors(
    catalogue: pa.Table, items: Vocabulary, text_IE: npt.NDArray[np.floating] | None
) -> dict[str, npt.NDArray[np.floating] | sparse.csr_array]:
    """Return what lists can be diverse in."""
    vectors: dict[str, npt.NDArray[np.floating] | sparse.csr_array] = {}
    if text_IE is not None:
        vectors["diversity_text"] = beyond_accuracy.unit_vectors(text_IE[: len(items)])
    categories: list[Sequence[str]] = [()] * len(items)
    for row, listed in zip(items.rows(catalogue["item_id"]).tolist(), catalogue["categories"].to_pylist(), strict=True):
        if row >= 0:
            categories[row] = listed
    if any(categories):
        vectors["diversity_categories"] = beyond_accuracy.category_vectors(categories)
    return vectors


def _with_domain(attributes: Sequence[str], catalogue: pa.Table) -> list[str]:
    """Return the attributes, with the domain where there are several."""
    domain = ["item.domain"] if len(catalogue["domain"].unique()) > 1 else []
    return list(dict.fromkeys([*domain, *attributes]))
