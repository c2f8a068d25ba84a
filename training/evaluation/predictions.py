"""How good predictions are: AUC over all and by user, log loss, normalised entropy, calibration, RMSE and MAE.

In:  logits and labels (0 or 1), or estimates and values, as arrays.  Out: figures; NaN where one is not defined.
Knows nothing of models. What does not fit into memory is counted batch by batch instead (clicks.py).
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from cluster.errors import DataError
from training.evaluation.metrics import FloatArray

CALIBRATION_BINS = 10
"""Bins of equal width between 0 and 1."""


def auc(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> float:
    """Return the chance that a 1 scores above a 0, equal scores counting half (Hanley and McNeil, Radiology 1982)."""
    auc_G, _count_G = auc_by_group(score_N, label_N, np.zeros(np.shape(score_N), np.int64))
    return float(auc_G[0]) if len(auc_G) else math.nan


def group_auc(score_N: npt.ArrayLike, label_N: npt.ArrayLike, group_N: npt.ArrayLike) -> float:
    """Return GAUC: the mean of each user's AUC, weighted by the user's events (Zhu et al., KDD 2018).

    Users whose events all have the same label say nothing and do not count.
    """
    auc_G, count_G = auc_by_group(score_N, label_N, group_N)
    return float(np.average(auc_G, weights=count_G)) if len(auc_G) else math.nan


def auc_by_group(
    score_N: npt.ArrayLike, label_N: npt.ArrayLike, group_N: npt.ArrayLike
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Return AUC and number of events of each group that has both labels, in order of the groups.

    Raises `DataError` for scores that are not finite and labels other than 0 and 1.
    """
    score, label = np.asarray(score_N, np.float64), np.asarray(label_N, np.float64)
    if not np.isfinite(score).all():
        raise DataError("a score is not finite, so there is no order to be judged")
    if not np.isin(label, (0, 1)).all():
        raise DataError("a label is neither 0 nor 1; AUC is of clicks")
    group = np.unique(np.asarray(group_N), return_inverse=True)[1]
    order = np.lexsort((score, group))
    score, label, group = score[order], label[order], group[order]
    first_T = np.flatnonzero(np.r_[True, (score[1:] != score[:-1]) | (group[1:] != group[:-1])][: len(score)])
    if not len(first_T):
        return np.empty(0), np.empty(0, np.int64)
    group_T = group[first_T]  # T runs of equal scores within a group
    ones_T = np.add.reduceat(label, first_T)
    zeros_T = np.diff(np.append(first_T, len(score))) - ones_T
    ones_G, zeros_G = np.bincount(group_T, ones_T), np.bincount(group_T, zeros_T)
    below_T = np.cumsum(zeros_T) - zeros_T - (np.cumsum(zeros_G) - zeros_G)[group_T]
    won_G = np.bincount(group_T, ones_T * (below_T + zeros_T / 2))
    both_G = (ones_G > 0) & (zeros_G > 0)
    return (won_G / (ones_G * zeros_G).clip(min=1))[both_G], (ones_G + zeros_G)[both_G].astype(np.int64)


def log_loss(logit_N: npt.ArrayLike, label_N: npt.ArrayLike) -> float:
    """Return the mean of −y·log p − (1 − y)·log(1 − p), in nats (Good, JRSS B 1952); labels may be shares."""
    logit, label = np.asarray(logit_N, np.float64), np.asarray(label_N, np.float64)
    return float((np.logaddexp(0, logit) - label * logit).mean()) if logit.size else math.nan


def normalised_entropy(log_loss: float, click_rate: float) -> float:
    """Return log loss over that of always predicting the mean; below 1 is better (He et al., ADKDD 2014, eq. 1)."""
    if not 0 < click_rate < 1:
        return math.nan
    return log_loss / -(click_rate * math.log(click_rate) + (1 - click_rate) * math.log(1 - click_rate))


def calibration_ratio(predicted: float, observed: float) -> float:
    """Return predicted clicks over observed ones; 1 is best (He et al., ADKDD 2014, section 3)."""
    return predicted / observed if observed else math.nan


def calibration_error(count_C: npt.ArrayLike, predicted_C: npt.ArrayLike, observed_C: npt.ArrayLike) -> float:
    """Return the expected calibration error: Σ |predicted − observed clicks| of bins / all events.

    That is the mean gap between mean prediction and click rate of a bin, weighted by events (Naeini et al., AAAI 2015).
    """
    total = np.sum(np.asarray(count_C, np.float64))
    gap = np.abs(np.asarray(predicted_C, np.float64) - np.asarray(observed_C, np.float64)).sum()
    return float(gap / total) if total else math.nan


def by_probability(probability_N: npt.ArrayLike, label_N: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return events, predicted and observed ones of each of `CALIBRATION_BINS` bins, as `calibration_error` takes."""
    probability, label = np.asarray(probability_N, np.float64), np.asarray(label_N, np.float64)
    bin_N = np.minimum((probability * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    count_C, predicted_C, observed_C = (
        np.bincount(bin_N, weights, CALIBRATION_BINS).astype(np.float64) for weights in (None, probability, label)
    )
    return count_C, predicted_C, observed_C


def click_figures(logit_N: npt.ArrayLike, label_N: npt.ArrayLike, user_N: npt.ArrayLike) -> dict[str, float]:
    """Return `auc`, `gauc`, `log_loss`, `ne`, `calibration` and `ece` of click predictions."""
    logit, label = np.asarray(logit_N, np.float64), np.asarray(label_N, np.float64)
    probability = expit(logit)
    loss = log_loss(logit, label)
    return {
        "auc": auc(logit, label),
        "gauc": group_auc(logit, label, user_N),
        "log_loss": loss,
        "ne": normalised_entropy(loss, float(label.mean())) if label.size else math.nan,
        "calibration": calibration_ratio(float(probability.sum()), float(label.sum())),
        "ece": calibration_error(*by_probability(probability, label)),
    }


def rmse(estimate_N: npt.ArrayLike, value_N: npt.ArrayLike) -> float:
    """Return the root of the mean squared error (Herlocker et al., TOIS 2004, section 4.1)."""
    error = np.asarray(estimate_N, np.float64) - np.asarray(value_N, np.float64)
    return float(np.sqrt((error**2).mean())) if error.size else math.nan


def mae(estimate_N: npt.ArrayLike, value_N: npt.ArrayLike) -> float:
    """Return the mean absolute error (Herlocker et al., TOIS 2004, section 4.1)."""
    error = np.asarray(estimate_N, np.float64) - np.asarray(value_N, np.float64)
    return float(np.abs(error).mean()) if error.size else math.nan
