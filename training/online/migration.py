"""From one encoder's vectors to another's, while a version lives on: bridged until encoded again, projected as before.

In:  vectors of the same texts by both encoders, a two-stage model's weights.  Out: vectors and weights to switch to.
Knows nothing of registries or when to switch, and asks no encoder.

    bridge    new ≈ old · W, by ridge regression over texts that both have read; what it costs is told as the recall of
              neighbours, on texts that were not fitted
    project   P' so that P' · new ≈ P · old for every item, by ridge regression weighted by popularity: items, and with
              them users, the ranker and all that was learned online, stay where they were

Shapes: N texts, E encoder dimension, D dimension, K neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from embeddings.text_encoder import TextEncoder
from training.models.placing import PROJECT, Regression, restart_moments
from training.models.version import COUNT_ROWS, TEXT_ROWS, VersionState

RIDGE = 1e-3
"""Of the regressions, as a share of the mean square of what is regressed on."""
NEIGHBOURS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridged:
    """Vectors of a catalogue by the new encoder, as far as it has read it."""

    vector_NE: np.ndarray
    is_encoded_N: np.ndarray
    """False where the vector is the bridge's."""
    recall: float | None
    """Recall at 10 of neighbours by bridged vectors, against those by encoded ones; none where all is encoded."""

    @property
    def coverage(self) -> float:
        """Return the share of texts that the new encoder has read."""
        return float(self.is_encoded_N.mean()) if len(self.is_encoded_N) else 1.0


def bridge(old_NE: np.ndarray, new_NE: np.ndarray, is_encoded_N: np.ndarray) -> Bridged:
    """Return vectors for all texts, given those (rows of `new_NE`) that the new encoder has read, in their places.

    A tenth of these is left out of a first fit, to tell what the bridge costs.
    """
    if is_encoded_N.all():
        return Bridged(vector_NE=new_NE, is_encoded_N=is_encoded_N, recall=None)
    encoded = np.flatnonzero(is_encoded_N)
    told = encoded[::10]
    fitted = np.setdiff1d(encoded, told)
    recall = None
    if len(fitted) and len(told):
        guessed_NE = _unit(old_NE[told] @ Regression.of(old_NE[fitted], new_NE[fitted], None).solve(RIDGE))
        recall = neighbour_recall(guessed_NE, new_NE[told], new_NE[encoded])
    bridged_NE = _unit(old_NE @ Regression.of(old_NE[encoded], new_NE[encoded], None).solve(RIDGE))
    is_told_N1 = np.any(old_NE, axis=1, keepdims=True)
    vector_NE = np.where(is_encoded_N[:, None], new_NE, bridged_NE * is_told_N1).astype(np.float32)
    return Bridged(vector_NE=vector_NE, is_encoded_N=is_encoded_N, recall=recall)


def neighbour_recall(guessed_NE: np.ndarray, true_NE: np.ndarray, among_ME: np.ndarray) -> float:
    """Return the mean share of the true vectors' ten nearest that are nearest to the guessed ones too."""
    most = min(NEIGHBOURS, len(among_ME))
    true_NK = np.argsort(-(true_NE @ among_ME.T), axis=1, kind="stable")[:, :most]
    guessed_NK = np.argsort(-(guessed_NE @ among_ME.T), axis=1, kind="stable")[:, :most]
    return float(np.mean([len(set(a) & set(b)) / most for a, b in zip(true_NK, guessed_NK, strict=True)]))


def move_to(state: VersionState, text_IE: np.ndarray, encoder: TextEncoder) -> tuple[VersionState, float]:
    """Return the state as another encoder tells its items, given its vectors, and how far items move by it."""
    text = torch.from_numpy(text_IE)
    dense, moved = refit_projection(state.dense, state.rows[TEXT_ROWS], text, state.rows[COUNT_ROWS])
    return replace(
        state,
        rows={**state.rows, TEXT_ROWS: text},
        dense=dense,
        optimizer=restart_moments(state.optimizer),
        encoder=encoder.fingerprint,
        adapter=encoder.adapter,
    ), moved


def refit_projection(
    dense: Mapping[str, torch.Tensor], old_NE: torch.Tensor, new_NE: torch.Tensor, count_N: torch.Tensor
) -> tuple[dict[str, torch.Tensor], float]:
    """Return the weights with a projection of the new vectors, and how far items move: a share of the old length."""
    before_ND = (old_NE @ dense[PROJECT].T).numpy()
    weight_N = 1 + np.log1p(count_N.numpy().astype(np.float64))
    project_DE = torch.from_numpy(Regression.of(new_NE.numpy(), before_ND, weight_N).solve(RIDGE).T).contiguous()
    after_ND = (new_NE @ project_DE.T).numpy()
    moved = np.linalg.norm(after_ND - before_ND) / max(np.linalg.norm(before_ND), 1e-12)
    return {**dense, PROJECT: project_DE}, float(moved)


def _unit(vector_NE: np.ndarray) -> np.ndarray:
    return vector_NE / np.maximum(np.linalg.norm(vector_NE, axis=1, keepdims=True), 1e-12)
