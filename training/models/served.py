"""A version resident in memory, ready to answer.

In:  a user's history and a number.  Out: candidates, retrieved and ranked; neighbours of an item.
Knows nothing of HTTP, logs or policies. Immutable: a delta or a new item makes another one, and whoever serves swaps
one reference. Tables are plain tensors here: TorchRec is not needed to answer. Answers are the same to the bit in every
process that runs torch on as many threads, whatever was shared with the model before.

A user without history in the catalogue is shown what is popular. An item put after training has no row yet and is
placed by its text alone.

Shapes: I items, D dimension, E encoder dimension, L history length, K candidates.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from cluster.events import KIND_INDEX
from cluster.log import Interaction
from cluster.registry import Registry, VersionReader, VersionRef
from embeddings.tables import TablesConfig
from training.models.seen import seen_correction
from training.models.two_stage import ModelConfig, TwoStage
from training.models.version import (
    COUNT_ROWS,
    ITEM_ROWS,
    TEXT_ROWS,
    USER_ROWS,
    VersionState,
    apply_delta,
    grow_rows,
    log_popularity,
    read_version,
)

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Items for a user, best first."""

    item_ids: list[str]
    scores: np.ndarray
    """Click logits, or log popularity for a cold start."""
    cold_start: bool
    """Whether nothing the user did could be used."""


@dataclass(frozen=True, kw_only=True)  # without slots, which leave no room for what is computed when it is asked for
class ServedModel:
    """One version's answers. Build it with `load`, `with_delta` and `with_items`."""

    state: VersionState
    dense: TwoStage
    put: Mapping[str, tuple[str, np.ndarray]]
    """Items put that the version does not hold so: id to text and encoder vector; those without a row come last, in
    this order."""
    item_ids: list[str]
    index_of: dict[str, int]
    item_row: dict[str, int]
    """`index_of` less what was put."""
    item_ID: torch.Tensor
    popularity_I: np.ndarray
    user_row: dict[str, int]

    @classmethod
    def load(cls, registry: Registry, ref: VersionRef, resident: "ServedModel | None" = None) -> "ServedModel":
        """Read and verify a version with its deltas. Raises `CorruptVersionError` or `RegistryError`.

        What the `resident` model has of the same content is shared with it, and neither read nor built again.
        """
        return cls.build(read_version(registry, ref, resident=resident.state if resident else None), {}, resident)

    @classmethod
    def build(
        cls,
        state: VersionState,
        put: Mapping[str, tuple[str, np.ndarray]],
        resident: "ServedModel | None" = None,
    ) -> "ServedModel":
        """Compute what answering needs from a version's tensors and the items put since, as far as nobody has yet."""
        item_row = _index(state.item_ids, resident and (resident.state.item_ids, resident.item_row))
        put = {item_id: item for item_id, item in put.items() if not _is_held(state, item_row.get(item_id), *item)}
        new_ids = [item_id for item_id in put if item_id not in item_row]
        item_ids, index_of = state.item_ids, item_row
        if new_ids:
            item_ids = [*item_ids, *new_ids]
            index_of = item_row | {item_id: len(item_row) + position for position, item_id in enumerate(new_ids)}
        row_ID, text_IE, count_I = (state.rows[name] for name in (ITEM_ROWS, TEXT_ROWS, COUNT_ROWS))
        if put:
            row_ID, text_IE, count_I = (grow_rows(rows, len(item_ids)) for rows in (row_ID, text_IE, count_I))
        for item_id, (_, vector) in put.items():
            text_IE[index_of[item_id]] = torch.tensor(vector)
        dense = _build_dense(state, resident)
        with torch.inference_mode():
            item_ID = dense.item_vectors(row_ID, text_IE)
        return cls(
            state=state,
            dense=dense,
            put=put,
            item_ids=item_ids,
            index_of=index_of,
            item_row=item_row,
            item_ID=item_ID,
            popularity_I=log_popularity(count_I),
            user_row=_index(state.user_ids, resident and (resident.state.user_ids, resident.user_row)),
        )

    def with_delta(self, reader: VersionReader) -> "ServedModel":
        """Return the model after a delta of this version; items put since stay."""
        return self.with_state(apply_delta(self.state, reader))

    def with_state(self, state: VersionState) -> "ServedModel":
        """Return the model of this version in another state, such as after many deltas; items put since stay."""
        return ServedModel.build(state, self.put, self)

    def with_items(self, items: Sequence[tuple[str, str]], vectors_NE: np.ndarray) -> "ServedModel":
        """Return the model with these (id, text) items recommendable, or read anew where it knows them."""
        new = {item_id: (text, vector) for (item_id, text), vector in zip(items, vectors_NE, strict=True)}
        return ServedModel.build(self.state, {**self.put, **new}, self)

    @property
    def name(self) -> str:
        """The version with its delta, such as 1.37."""
        return str(self.state.ref)

    @property
    def learned_seq(self) -> int:
        """Newest event of the log that the weights have learned."""
        return self.state.learned_seq

    @property
    def max_history(self) -> int:
        """Interactions it looks back on."""
        return self.dense.config.max_history

    @property
    def item_count(self) -> int:
        """Items it can recommend."""
        return len(self.item_ids)

    @cached_property
    def unit_vectors(self) -> torch.Tensor:
        """Item vectors [I, D] of length 1, computed when neighbours are first asked for."""
        return torch.nn.functional.normalize(self.item_ID, dim=1)

    def knows(self, item_id: str) -> bool:
        """Whether the item can be recommended."""
        return item_id in self.index_of

    def text_of(self, item_id: str) -> str | None:
        """Return the item's text, or none for an unknown item."""
        if item_id in self.put:
            return self.put[item_id][0]
        index = self.index_of.get(item_id)
        return self.state.item_texts[index] if index is not None else None

    def recommend(
        self, user_id: str, history: Sequence[Interaction], k: int, exclude: frozenset[str] = frozenset()
    ) -> Candidates:
        """Return up to `k` items, best first, without those excluded."""
        known = [entry for entry in history if entry.item_id in self.index_of][-self.max_history :]
        excluded = [self.index_of[item_id] for item_id in exclude if item_id in self.index_of]
        if not known:
            scores_I = self.popularity_I.copy()
            scores_I[excluded] = -np.inf
            best = np.argsort(-scores_I, kind="stable")[:k]
            return self._candidates(best[np.isfinite(scores_I[best])], scores_I, cold_start=True)
        with torch.inference_mode():
            user_D = self.user_vector(user_id, known)
            score_I = self.item_ID @ user_D
            score_I[excluded] = float("-inf")
            wanted = min(max(k, self.dense.config.candidates), len(self.item_ids) - len(excluded))
            candidate_K = score_I.topk(max(wanted, 0)).indices
            order_K = self.order(user_D, self.item_ID[candidate_K])
            best_K = order_K.argsort(descending=True, stable=True)[:k]
            scores = np.full(len(self.item_ids), -np.inf, np.float32)
            scores[candidate_K.numpy()] = order_K.numpy()
        return self._candidates(candidate_K[best_K].numpy(), scores, cold_start=False)

    def order(self, user_D: torch.Tensor, item_KD: torch.Tensor) -> torch.Tensor:
        """Return the score [K] by which a user's candidates are shown: the ranker's, corrected by what is chosen."""
        order_K = self.dense.order(user_D, item_KD)
        return order_K if self.state.seen is None else order_K + seen_correction(self.state.seen, user_D, item_KD)

    def user_vector(self, user_id: str, history: Sequence[Interaction]) -> torch.Tensor:
        """Return the user vector [D] after a history of known items, oldest first."""
        index_1L = torch.tensor([[self.index_of[entry.item_id] for entry in history]])
        row = self.user_row.get(user_id)
        user_D = self.state.rows[USER_ROWS][row] if row is not None else torch.zeros(self.item_ID.shape[1])
        return self.dense.user_vectors(
            self.item_ID[index_1L],
            torch.tensor([[KIND_INDEX[entry.kind] for entry in history]]),
            torch.tensor([[float("nan") if entry.value is None else entry.value for entry in history]]),
            torch.tensor([[entry.ts_us // 1_000_000 for entry in history]]),
            torch.ones_like(index_1L, dtype=torch.bool),
            user_D.unsqueeze(0),
        )[0, -1]

    def similar(self, item_id: str, k: int) -> list[tuple[str, float]]:
        """Return the `k` nearest items by cosine, best first. Raises `KeyError` for an unknown item."""
        index = self.index_of[item_id]
        cosine_I = (self.unit_vectors @ self.unit_vectors[index]).numpy().copy()
        cosine_I[index] = -np.inf
        best = np.argsort(-cosine_I, kind="stable")[: min(k, len(self.item_ids) - 1)]
        return [(self.item_ids[i], float(cosine_I[i])) for i in best]

    def _candidates(self, indices: np.ndarray, scores_I: np.ndarray, *, cold_start: bool) -> Candidates:
        return Candidates(item_ids=[self.item_ids[i] for i in indices], scores=scores_I[indices], cold_start=cold_start)


def _index(ids: list[str], resident: tuple[list[str], dict[str, int]] | None) -> dict[str, int]:
    """Return each id's place in the list; of a resident list and its index, that index with what differs made good."""
    if resident is None or len(ids) < len(resident[0]):
        return {item_id: place for place, item_id in enumerate(ids)}
    before, index = resident
    if ids == before:
        return index
    changed = [place for place, (one, other) in enumerate(zip(before, ids, strict=False)) if one != other]
    index = index.copy()
    for place in changed:
        del index[before[place]]
    for place in (*changed, *range(len(before), len(ids))):
        index[ids[place]] = place
    return index


def _is_held(state: VersionState, row: int | None, text: str, vector: np.ndarray) -> bool:
    """Whether the version has learned of an item all that was put."""
    if row is None or state.item_texts[row] != text:
        return False
    return np.array_equal(state.rows[TEXT_ROWS][row].numpy(), vector)


def _build_dense(state: VersionState, resident: ServedModel | None) -> TwoStage:
    config = state.recipe.section(ModelConfig)
    if resident is not None and config == resident.dense.config:
        if state.dense is resident.state.dense:
            return resident.dense
        shapes = {name: parameter.shape for name, parameter in resident.dense.named_parameters()}
        if shapes == {name: tensor.shape for name, tensor in state.dense.items()}:
            return _with_weights(resident.dense, state.dense)
    dense = TwoStage(config, state.recipe.section(TablesConfig).dim, text_dim=state.rows[TEXT_ROWS].shape[1])
    dense.load_state_dict(dict(state.dense))
    return dense.eval().requires_grad_(requires_grad=False)


def _with_weights(module: Module, weights: Mapping[str, torch.Tensor], prefix: str = "") -> Module:
    """Return the module with other weights; building one anew takes seven times as long, most of it random numbers."""
    other = copy.copy(module)
    other._parameters = {
        name: parameter if parameter is None else nn.Parameter(weights[prefix + name], requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    other._modules = {
        name: child if child is None else _with_weights(child, weights, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    return other
