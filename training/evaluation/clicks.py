"""AUC, log loss, normalised entropy and calibration of click predictions, in fixed memory however many there are.

In:  logits and labels, batch by batch, on any number of workers.  Out: figures over all of them.
Knows nothing of models, nor of formulas, which are those of predictions.py. Labels between 0 and 1 count as that share
of a click.

AUC and calibration are of logits in bins of 1/256: pairs within a bin count half, and all of it is predicted what its
middle is, which moves either by less than 10⁻⁴.
"""

import math

import torch
import torch.distributed as dist
from torch.nn import functional

from training.evaluation.predictions import CALIBRATION_BINS, calibration_error, calibration_ratio, normalised_entropy

BINS_PER_UNIT = 256
LOGIT_RANGE = 16
"""Logits beyond ± this share the outermost bins."""
_BINS = 2 * LOGIT_RANGE * BINS_PER_UNIT


class ClickTally:
    """Counts of predictions by logit, clicked and not."""

    def __init__(self) -> None:
        self._count = torch.zeros(2, _BINS, dtype=torch.float64)
        self._log_loss = 0.0
        self.examples = 0

    @torch.no_grad()
    def add(self, logit_B: torch.Tensor, label_B: torch.Tensor) -> None:
        """Take predictions. They come to the host: one host–device sync where they are on a GPU."""
        logit_B, label_B = logit_B.detach().float().cpu(), label_B.float().cpu()
        bin_B = ((logit_B + LOGIT_RANGE) * BINS_PER_UNIT).long().clamp_(0, _BINS - 1)
        clicks = torch.bincount(bin_B, label_B, _BINS)
        self._count[1] += clicks
        self._count[0] += torch.bincount(bin_B, minlength=_BINS) - clicks
        self._log_loss += functional.binary_cross_entropy_with_logits(logit_B, label_B, reduction="sum").item()
        self.examples += len(label_B)

    def over_all_workers(self) -> "ClickTally":
        """Collective. Return the counts of all workers together."""
        sums = torch.cat([self._count.ravel(), torch.tensor([self._log_loss, self.examples], dtype=torch.float64)])
        sums = sums.to(collective_device())
        dist.all_reduce(sums)  # collective
        whole = ClickTally()
        whole._count = sums[:-2].reshape(2, _BINS).cpu()
        whole._log_loss, whole.examples = sums[-2].item(), round(sums[-1].item())
        return whole

    def figures(self) -> dict[str, float]:
        """Return `auc`, `log_loss`, `ne`, `calibration` and `ece`; NaN where they are not defined.

        That is without examples, or with those of one label only.
        """
        unclicked, clicked = self._count
        clicks, others = clicked.sum().item(), unclicked.sum().item()
        below = unclicked.cumsum(0) - unclicked / 2
        log_loss = self._log_loss / self.examples if self.examples else math.nan
        probability = ((torch.arange(_BINS, dtype=torch.float64) + 0.5) / BINS_PER_UNIT - LOGIT_RANGE).sigmoid()
        predicted = (unclicked + clicked) * probability
        bins = torch.stack([unclicked + clicked, predicted, clicked])
        bins = bins.new_zeros(3, CALIBRATION_BINS).index_add_(1, (probability * CALIBRATION_BINS).long(), bins)
        return {
            "auc": (clicked * below).sum().item() / (clicks * others) if clicks and others else math.nan,
            "log_loss": log_loss,
            "ne": normalised_entropy(log_loss, clicks / max(self.examples, 1)),
            "calibration": calibration_ratio(predicted.sum().item(), clicks),
            "ece": calibration_error(*bins.numpy()),
        }


def collective_device() -> torch.device:
    """Return where tensors of a collective of the default group must be."""
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
