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
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cluster.errors import RegistryError
from cluster.events import KIND_INDEX
from cluster.log import Interaction
from cluster.registry import Registry, VersionReader, VersionRef
from embeddings.index import IndexConfig, ItemIndex
from embeddings.tables import TablesConfig
from training.baselines.config import SystemConfig
from training.models.blend import blended
from training.models.ensemble import build_two_stage
from training.models.interests import Interests, combine, weigh
from training.models.resident import (
    Candidates,
    Catalogue,
    Put,
    Resident,
    index_items,
    index_users,
    lay_over,
    restore_classical,
)
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

TUNING_USERS = 100
"""Made-up users by whom an index is tuned, each with items drawn by how popular they are."""
TUNING_HISTORY = 8


@dataclass(frozen=True, kw_only=True)  # without slots, which leave no room for what is computed when it is asked for
class ServedModel(Catalogue):
    """One version's answers. Build it with `load`, `with_delta` and `with_items`."""

    dense: TwoStage
    item_ID: torch.Tensor
    index: ItemIndex | None = None
    """Of a large catalogue: where candidates are found."""

    @classmethod
    def load(cls, registry: Registry, ref: VersionRef, resident: Resident | None = None) -> "ServedModel":
        """Read and verify a version with its deltas. Raises `CorruptVersionError` or `RegistryError`.

        What the `resident` model has of the same content is shared with it, and neither read nor built again.
        """
        state = read_version(registry, ref, resident=resident.state if resident else None)
        if not state.dense:
            raise RegistryError(f"version {ref}: holds no two-stage model; it is of {registry.manifest(ref).system}")
        return cls.build(state, {}, resident)

    @classmethod
    def build(cls, state: VersionState, put: Put, resident: Resident | None = None) -> "ServedModel":
        """Compute what answering needs from a version's tensors and the items put since, as far as nobody has yet."""
        item_row = index_items(state, resident)
        put, item_ids, index_of = lay_over(state, item_row, put)
        row_ID, text_IE, count_I = (state.rows[name] for name in (ITEM_ROWS, TEXT_ROWS, COUNT_ROWS))
        if put:
            row_ID, text_IE, count_I = (grow_rows(rows, len(item_ids)) for rows in (row_ID, text_IE, count_I))
        for item_id, (_, vector) in put.items():
            text_IE[index_of[item_id], : len(vector)] = torch.tensor(vector)  # what is told beside its text stays
        dense = _build_dense(state, resident)
        with torch.inference_mode():
            item_ID = dense.item_vectors(row_ID, text_IE)
        model = cls(
            state=state,
            dense=dense,
            put=put,
            item_ids=item_ids,
            index_of=index_of,
            item_row=item_row,
            classical=restore_classical(state, text_IE, resident),
            item_ID=item_ID,
            text_IE=text_IE,
            popularity_I=log_popularity(count_I),
            user_row=index_users(state, resident),
        )
        return replace(model, index=model._build_index(resident))

    def with_delta(self, reader: VersionReader) -> "ServedModel":
        """Return the model after a delta of this version; items put since stay."""
        return self.with_state(apply_delta(self.state, reader))

    @property
    def max_history(self) -> int:
        """Interactions it looks back on."""
        return max(self.dense.config.max_history, self.classical.max_history if self.classical else 0)

    @cached_property
    def blend_weight(self) -> float:
        """By how much the classical system's scores are added."""
        return self.state.recipe.section(SystemConfig).blend_weight or 0.0

    @cached_property
    def unit_vectors(self) -> torch.Tensor:
        """Item vectors [I, D] of length 1, computed when neighbours are first asked for."""
        return torch.nn.functional.normalize(self.item_ID, dim=1)

    def recommend(
        self,
        user_id: str,
        history: Sequence[Interaction],
        k: int,
        exclude: frozenset[str] = frozenset(),
        interests: Interests | None = None,
        within_I: npt.NDArray[np.bool_] | None = None,
    ) -> Candidates:
        """Return up to `k` items, best first, without those excluded; of those within alone, where that is given."""
        known = [entry for entry in history if entry.item_id in self.index_of]
        excluded = self.barred(exclude, within_I)
        interest_I = None if interests is None else self.interest_scores(interests)
        if not known:
            return self.popular(k, excluded, interest_I)
        with torch.inference_mode():
            user_D = self.user_vector(user_id, known[-self.dense.config.max_history :])
            classical_I = self.classical_scores(known)
            wanted = max(min(max(k, self.dense.config.candidates), len(self.item_ids) - len(excluded)), 0)
            candidate_K = None
            if self.index is not None and within_I is None and classical_I is None and interest_I is None:
                candidate_K = self.index.search(user_D, self.item_ID, wanted, np.asarray(excluded, np.int64))
            if candidate_K is None:
                score_I = self.item_ID @ user_D
                if classical_I is not None:
                    score_I = blended(score_I, classical_I, self.blend_weight)
                if interest_I is not None:
                    score_I = blended(score_I, interest_I, weigh(len(known)))
                score_I[excluded] = float("-inf")
                candidate_K = score_I.topk(wanted).indices
            order_K = self.order(user_D, self.item_ID[candidate_K])
            if classical_I is not None:
                order_K = blended(order_K, classical_I[candidate_K], self.blend_weight)
            if interest_I is not None:
                order_K = blended(order_K, interest_I[candidate_K], weigh(len(known)))
            best_K = order_K.argsort(descending=True, stable=True)[:k]
        item_ids = [self.item_ids[index] for index in candidate_K[best_K].tolist()]
        return Candidates(item_ids=item_ids, scores=order_K[best_K].numpy(), cold_start=False)

    def _build_index(self, resident: Resident | None) -> ItemIndex | None:
        """Return the resident's index where it still holds, or one made anew; none for a catalogue that needs none."""
        config = self.state.recipe.section(IndexConfig)
        if len(self.item_ids) <= config.exact_up_to:
            return None
        held = resident.index if isinstance(resident, ServedModel) else None
        if held is not None and (index := held.over(self.item_ID)) is not None:
            return index
        rng = np.random.default_rng(0)
        share_I = np.exp(self.popularity_I.astype(np.float64))
        rows_QL = rng.choice(len(share_I), (TUNING_USERS, TUNING_HISTORY), p=share_I / share_I.sum())
        with torch.inference_mode():
            histories = [[Interaction(self.item_ids[row], "click", None, 0, 0) for row in rows_L] for rows_L in rows_QL]
            user_QD = torch.stack([self.user_vector("", history) for history in histories])
        return ItemIndex.build(self.item_ID, user_QD, config)

    def rank(
        self,
        user_id: str,
        history: Sequence[Interaction],
        item_ids: Sequence[str],
        interests: Interests | None = None,
    ) -> Candidates:
        """Return these items, each of which it can rank, best first."""
        rows = [self.index_of[item_id] for item_id in item_ids]
        known = [entry for entry in history if entry.item_id in self.index_of]
        interest_I = None if interests is None else self.interest_scores(interests)
        if not known or not rows:
            scores_I = self.popularity_I if interest_I is None else self.told(interest_I)
            return self.sorted_by(item_ids, scores_I[rows], cold_start=not known and interest_I is None)
        with torch.inference_mode():
            user_D = self.user_vector(user_id, known[-self.dense.config.max_history :])
            order_K, classical_I = self.order(user_D, self.item_ID[rows]), self.classical_scores(known)
            if classical_I is not None:
                order_K = blended(order_K, classical_I[rows], self.blend_weight)
            if interest_I is not None:
                order_K = blended(order_K, interest_I[rows], weigh(len(known)))
        return self.sorted_by(item_ids, order_K.numpy(), cold_start=False)

    def interest_scores(self, interests: Interests) -> torch.Tensor:
        """Return what interests say of each item [I]: what is said is the text of an item, the only one a user had."""
        said = [*([interests.liked_E] if interests.liked_E is not None else []), *interests.disliked_NE]
        with torch.inference_mode():
            text_NE = self.text_IE.new_zeros(len(said), self.text_IE.shape[1])
            text_NE[:, : len(said[0])] = torch.from_numpy(np.stack(said))
            item_ND = self.dense.item_vectors(text_NE.new_zeros(len(said), self.item_ID.shape[1]), text_NE)
            one_N1 = torch.ones((len(said), 1), dtype=torch.bool)
            user_ND = self.dense.user_vectors(
                item_ND.unsqueeze(1),
                torch.full_like(one_N1, KIND_INDEX["like"], dtype=torch.long),
                torch.full_like(one_N1, torch.nan, dtype=item_ND.dtype),
                torch.zeros_like(one_N1, dtype=torch.long),
                one_N1,
                torch.zeros_like(item_ND),
            )[:, -1]
            scores = list((user_ND @ self.item_ID.T).numpy())
        liked_I = scores.pop(0) if interests.liked_E is not None else None
        return torch.from_numpy(combine(liked_I, scores))

    def classical_scores(self, known: Sequence[Interaction]) -> torch.Tensor | None:
        """Return what the classical system beside it makes of each item [I], after a history of known items."""
        if self.classical is None:
            return None
        rows = [self.index_of[entry.item_id] for entry in known]
        return torch.from_numpy(self.classical.standardised(rows, None, len(self.item_ids)))

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


def _build_dense(state: VersionState, resident: Resident | None) -> TwoStage:
    config = state.recipe.section(ModelConfig)
    if isinstance(resident, ServedModel) and config == resident.dense.config:
        if state.dense is resident.state.dense:
            return resident.dense
        shapes = {name: parameter.shape for name, parameter in resident.dense.named_parameters()}
        if shapes == {name: tensor.shape for name, tensor in state.dense.items()}:
            return _with_weights(resident.dense, state.dense)
    dense = build_two_stage(config, state.recipe.section(TablesConfig).dim, text_dim=state.rows[TEXT_ROWS].shape[1])
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
