"""Figures of predictions, by hand and against torchmetrics and SciPy; counted batch by batch they are the same."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from torchmetrics.functional import mean_absolute_error, mean_squared_error
from torchmetrics.functional.classification import binary_calibration_error

from cluster.errors import DataError
from training.evaluation.clicks import ClickTally
from training.evaluation.predictions import (
    auc,
    auc_by_group,
    click_figures,
    group_auc,
    log_loss,
    mae,
    normalised_entropy,
    rmse,
)


def random_clicks(seed, events=5_000):
    """Return logits with many ties, labels that follow them but are overestimated, and users."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(size=events).round(1)
    label = (rng.random(events) < 1 / (1 + np.exp(1 - logit))).astype(float)
    return logit, label, rng.integers(0, 300, events)


def test_auc_counts_pairs_and_halves_ties():
    assert auc([1.0, 2.0, 3.0, 4.0], [0, 1, 0, 1]) == 3 / 4
    assert auc([1.0, 1.0], [0, 1]) == 1 / 2
    assert auc([2.0, 1.0], [0, 1]) == 0
    assert math.isnan(auc([1.0], [1]))
    assert math.isnan(auc([], []))


def test_gauc_weighs_users_by_their_events_and_leaves_out_those_of_one_label():
    # a: 1 of 1 pairs right, two events; b: 1 of 2 pairs, three events; c clicked on everything.
    score, label, user = [0, 1, 5, 4, 6, 9, 8], [0, 1, 1, 0, 0, 1, 1], list("aabbbcc")
    auc_G, count_G = auc_by_group(score, label, user)
    assert (auc_G.tolist(), count_G.tolist()) == ([1, 1 / 2], [2, 3])
    assert group_auc(score, label, user) == pytest.approx((2 * 1 + 3 / 2) / 5, abs=1e-15)
    assert math.isnan(group_auc([1, 2], [1, 1], [0, 0]))


def test_gauc_is_the_weighted_mean_of_each_users_auc():
    logit, label, user = random_clicks(seed=0)
    parts = [
        (auc(logit[user == u], label[user == u]), (user == u).sum())
        for u in np.unique(user)
        if 0 < label[user == u].mean() < 1
    ]
    values, weights = zip(*parts, strict=True)
    assert group_auc(logit, label, user) == pytest.approx(np.average(values, weights=weights), abs=1e-12)


def test_figures_are_those_of_torchmetrics_and_of_scipys_u_test():
    logit, label, user = random_clicks(seed=1)
    figures = click_figures(logit, label, user)
    probability, target = torch.from_numpy(1 / (1 + np.exp(-logit))), torch.from_numpy(label)
    pairs_won = mannwhitneyu(logit[label == 1], logit[label == 0]).statistic
    assert figures["auc"] == pytest.approx(pairs_won / (label.sum() * (1 - label).sum()), abs=1e-9)
    assert figures["ece"] == pytest.approx(
        binary_calibration_error(probability, target.long(), n_bins=10).item(), abs=1e-9
    )
    loss = torch.nn.functional.binary_cross_entropy(probability, target).item()
    assert figures["log_loss"] == pytest.approx(loss, abs=1e-9)
    assert rmse(logit, label) == pytest.approx(
        mean_squared_error(torch.from_numpy(logit), target, squared=False).item(), abs=1e-9
    )
    assert mae(logit, label) == pytest.approx(mean_absolute_error(torch.from_numpy(logit), target).item(), abs=1e-9)


def test_calibration_by_hand():
    # Two events at 1/4 and two at 3/4, with one click in each pair: as many clicks as predicted, each bin 1/4 off.
    logit = np.log([1 / 3, 1 / 3, 3, 3])
    figures = click_figures(logit, [0, 1, 1, 0], [0, 0, 0, 0])
    assert figures["calibration"] == pytest.approx(1, abs=1e-12)
    assert figures["ece"] == pytest.approx(1 / 4, abs=1e-12)
    assert click_figures(logit[:2], [0, 1], [0, 0])["calibration"] == pytest.approx(1 / 2, abs=1e-12)


def test_the_mean_predicted_for_all_has_normalised_entropy_1():
    label = [1, 0, 0, 0]
    assert normalised_entropy(log_loss(np.log([1 / 3] * 4), label), 1 / 4) == pytest.approx(1, abs=1e-12)
    assert log_loss([0.0], [1]) == pytest.approx(math.log(2), abs=1e-15)
    assert math.isnan(normalised_entropy(1.0, 0.0))


def test_large_logits_do_not_overflow():
    assert log_loss([1_000.0, -1_000.0], [1, 0]) == 0
    assert log_loss([1_000.0], [0]) == 1_000


def test_errors_by_hand():
    assert rmse([1, 2, 3], [1, 4, 1]) == pytest.approx((8 / 3) ** 0.5, abs=1e-15)
    assert mae([1, 2, 3], [1, 4, 1]) == pytest.approx(4 / 3, abs=1e-15)
    assert math.isnan(rmse([], []))


def test_counted_batch_by_batch_the_figures_are_the_same():
    logit, label, user = random_clicks(seed=2, events=20_000)
    tally = ClickTally()
    for start in range(0, len(logit), 4_096):
        batch = slice(start, start + 4_096)
        tally.add(torch.from_numpy(logit[batch]), torch.from_numpy(label[batch]))
    counted, exact = tally.figures(), click_figures(logit, label, user)
    for name, figure in counted.items():
        assert figure == pytest.approx(exact[name], abs=1e-3 if name in ("calibration", "ece") else 1e-4), name


def test_nothing_counted_is_not_a_number():
    assert all(math.isnan(figure) for figure in ClickTally().figures().values())
    assert all(math.isnan(figure) for figure in click_figures([], [], []).values())


def test_order_does_not_matter():
    logit, label, user = random_clicks(seed=3)
    order = np.random.default_rng(4).permutation(len(logit))
    assert click_figures(logit[order], label[order], user[order]) == pytest.approx(
        click_figures(logit, label, user), abs=1e-12
    )


def test_scores_without_order_and_labels_between_0_and_1_are_errors():
    with pytest.raises(DataError, match="not finite"):
        auc([math.nan, 1.0], [0, 1])
    with pytest.raises(DataError, match="neither 0 nor 1"):
        auc([0.0, 1.0], [0, 0.5])
