"""How well the model names the next item: every catalogue item ranked, items the user already has left out.

In:  the dense part, whole tables, a history and which of its interactions to predict.
Out: of each its rank, the list that would be shown in its place, how likely it was held, the rating it would be given.
Knows nothing of training. The prediction of an interaction sees only the user's interactions before it.

Shapes: B interactions to predict, I items, K candidates, D dimension.
"""

from dataclasses import dataclass

import numpy as np
import torch

from embeddings.batch import PAD
from training.baselines.hybrid import known_scores
from training.baselines.interface import UNKNOWN, Recommender
from training.evaluation.classical import NextItems
from training.models.blend import blended
from training.models.ranker import RATING
from training.models.served import ServedModel
from training.models.two_stage import TwoStage
from training.online.predictions import Predictions, Towers
from training.stream import History, Windows, build_sequences, windows_before

UNRANKED = 0
"""The rank of an item that is not among the candidates."""
NOT_SHOWN = -1
"""In place of an item row where a list is short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """What is ranked: whole tables, by row."""

    item_ID: torch.Tensor
    """Item vectors."""
    user_UD: torch.Tensor
    """User rows."""
    beside: "Beside | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A classical system whose scores are added."""

    system: Recommender
    max_history: int
    weight: float

    @classmethod
    def of(cls, model: ServedModel) -> "Beside | None":
        """Return what a version has beside its model; none where there is nothing."""
        if model.classical is None:
            return None
        return cls(system=model.classical.system, max_history=model.classical.max_history, weight=model.blend_weight)

    def scores(self, history: History, targets: np.ndarray, items: int) -> torch.Tensor:
        """Return its standardised scores [B, I] for each target; 0 of items that it does not know."""
        asked = NextItems(history, targets, items=items, max_history=self.max_history)
        seen_BI = asked.seen(np.arange(len(asked)))
        return torch.from_numpy(known_scores(self.system, seen_BI, np.full(len(asked), UNKNOWN), items))


@torch.inference_mode()
def rank_next_items(
    dense: TwoStage, catalogue: Catalogue, history: History, targets: np.ndarray, batch_size: int = 128
) -> np.ndarray:
    """Return the rank (1 is best, `UNRANKED` beyond the candidates) of each target, an index into the history.

    Targets must not be a user's first interaction. The model is in evaluation mode on return.
    """
    ranks = []
    for start in range(0, len(targets), batch_size):
        batch = targets[start : start + batch_size]
        found_BK = list_next_items(dense, catalogue, history, batch) == history.item_row[batch, None]
        ranks.append(np.where(found_BK.any(axis=1), found_BK.argmax(axis=1) + 1, UNRANKED))
    return np.concatenate(ranks) if ranks else np.empty(0, np.int64)


@torch.inference_mode()
def list_next_items(dense: TwoStage, catalogue: Catalogue, history: History, targets: np.ndarray) -> np.ndarray:
    """Return the item rows of the candidates [B, K] as they would be shown in place of each target, best first.

    `NOT_SHOWN` where fewer are left. All targets make one batch, and must not be a user's first interaction. The model
    is in evaluation mode on return.
    """
    dense.eval()
    windows = windows_before(history, targets, dense.config.max_history)
    user_BD = _user_vectors(dense, catalogue, history, windows)
    score_BI = user_BD @ catalogue.item_ID.T
    classical_BI, weight = None, 0.0
    if catalogue.beside is not None:
        weight = catalogue.beside.weight
        classical_BI = catalogue.beside.scores(history, windows.last, score_BI.shape[1]).to(score_BI.device)
        score_BI = blended(score_BI, classical_BI, weight)
    for row, (start, end) in enumerate(zip(history.first_of(targets), targets, strict=True)):
        score_BI[row, history.item_row[start:end]] = float("-inf")
    score_BK, candidate_BK = score_BI.topk(min(dense.config.candidates, score_BI.shape[1]), dim=1)
    # The order that is served, ties included; what is excluded or not a number has no rank.
    order_BK = dense.order(user_BD, catalogue.item_ID[candidate_BK])
    if classical_BI is not None:
        order_BK = blended(order_BK, classical_BI.gather(1, candidate_BK), weight, score_BK.isfinite())
    order_BK = order_BK.masked_fill(~score_BK.isfinite(), float("-inf"))
    best_BK = order_BK.argsort(dim=1, descending=True, stable=True)
    shown_BK = torch.where(order_BK.isfinite(), candidate_BK, NOT_SHOWN).gather(1, best_BK)
    return shown_BK.cpu().numpy()


@torch.inference_mode()
def rate_next_items(dense: TwoStage, catalogue: Catalogue, history: History, targets: np.ndarray) -> np.ndarray:
    """Return the rating [B] that each target's item would be given, as `list_next_items` takes them."""
    dense.eval()
    windows = windows_before(history, targets, dense.config.max_history)
    user_BD = _user_vectors(dense, catalogue, history, windows)
    item_BD = catalogue.item_ID[torch.from_numpy(history.item_row[targets]).to(user_BD.device)]
    return dense.heads(user_BD, item_BD, (user_BD * item_BD).sum(dim=-1))[RATING].cpu().numpy()


@torch.inference_mode()
def predict_next_items(dense: TwoStage, catalogue: Catalogue, history: History, targets: np.ndarray) -> Predictions:
    """Return how likely retrieval held each target among all items, as `list_next_items` takes them.

    As progressive validation has it: those that the user has are not left out, and what is beside has no part in it.
    """
    dense.eval()
    user_BD = _user_vectors(dense, catalogue, history, windows_before(history, targets, dense.config.max_history))
    found = Towers(dense, catalogue.item_ID, catalogue.user_UD).choices(user_BD, history.item_row[targets])
    log_p_B, rank_B, confidence_B = (part.cpu().numpy() for part in found)
    return Predictions(loss_P=-log_p_B, rank_P=rank_B, confidence_P=confidence_B)


def _user_vectors(dense: TwoStage, catalogue: Catalogue, history: History, windows: Windows) -> torch.Tensor:
    """Return the user vectors [B, D] at the end of each window."""
    sequences = build_sequences(history, windows)
    device = catalogue.item_ID.device
    user_row_B = torch.from_numpy(sequences.user_row_B).to(device)
    history_BL = torch.from_numpy(np.maximum(sequences.item_row_BL, 0)).to(device)
    return dense.user_vectors(
        catalogue.item_ID[history_BL],
        torch.from_numpy(sequences.kind_BL).to(device),
        torch.from_numpy(sequences.value_BL.astype(np.float32)).to(device),
        torch.from_numpy(sequences.ts_BL).to(device),
        torch.from_numpy(sequences.item_row_BL != PAD).to(device),
        catalogue.user_UD[user_row_B],
    )[:, -1]
