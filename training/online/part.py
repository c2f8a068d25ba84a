"""What one worker holds of a version in training: its part of the tables, and all of the dense weights and the text.

In:  what the leader asks, the same on every worker.  Out: answers, whole on the leader.
Knows nothing of ids, events, deltas or of what has changed: the leader does (training/online/model.py).

Alone, a worker holds everything and nothing travels. Of several, tables are split by rows, whatever the recipe says:
a row has one owner. Each learns and encodes the sequences of its own users, and scores its own part of the catalogue;
a step is the one that a single worker would take, but for what is drawn at random (dropout, which targets train the
ranker) and for the order of sums.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Concatenate, ParamSpec, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from embeddings.batch import PAD, Batch, Sequences, share_of_batch
from embeddings.tables import ITEM, MOMENTUM, USER, Piece, TablesConfig, local_shards
from embeddings.vocabulary import UNKNOWN_ROW, Vocabulary
from training.checkpoint import load_state
from training.models.ensemble import build_two_stage
from training.models.recommender import build_recommender, dense_part
from training.models.two_stage import RANKED_POSITIONS, Losses, ModelConfig, TwoStage
from training.models.version import grow_rows
from training.online.predictions import Predictions, ShownPairs, Towers, predict, predict_shown
from training.online.shared_rows import collect_rows, gather_whole, hand_out, owns
from training.online.shared_towers import SharedTowers
from training.online.user_rows import learn_user_rows
from training.online.workers import Workers
from training.step import Optimizers, StepConfig, train_step

ROW_TENSORS = (ITEM, USER, f"{ITEM}{MOMENTUM}", f"{USER}{MOMENTUM}")
TAKE_UP = "take up"
"""The command to hold part of another version, with its `Blueprint`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """What every worker is told of a version."""

    tables: TablesConfig
    model: ModelConfig
    step: StepConfig
    table_rate: float
    """Learning rate of the tables as a share of their batch rate."""
    seed: int
    items: int
    """Known by now."""
    item_capacity: int
    user_capacity: int
    text_dim: int
    ranked_positions: int = RANKED_POSITIONS
    """Targets of a step, over all workers together, that train the ranker."""


P = ParamSpec("P")
R = TypeVar("R")


def on_every_worker(method: Callable[Concatenate["ModelPart", P], R]) -> Callable[Concatenate["ModelPart", P], R]:
    """Collective. Have what is asked of the leader's part done by every worker's."""

    @functools.wraps(method)
    def done_by_all(part: "ModelPart", *args: P.args, **kwargs: P.kwargs) -> R:
        assert not kwargs  # none travel
        part.workers.tell(method.__name__, *args)
        return method(part, *args, **kwargs)

    return done_by_all


class ModelPart:
    """One worker's part of a version's model, with the frozen weights it started from beside it."""

    def __init__(
        self,
        workers: Workers,
        device: torch.device,
        blueprint: Blueprint,
        whole: Mapping[str, torch.Tensor] | None = None,
        text_IE: torch.Tensor | None = None,
    ) -> None:
        """Collective. Build the model and load it: from the leader's `whole` tensors, by checkpoint name."""
        self.workers, self.device, self._blueprint = workers, device, blueprint
        together, tables = workers.count > 1, blueprint.tables
        self.model = build_recommender(
            replace(tables, sharding=("row_wise",)) if together else tables,
            blueprint.model,
            Vocabulary((), blueprint.item_capacity),
            Vocabulary((), blueprint.user_capacity),
            text_dim=blueprint.text_dim,
            device=device,
            seed=blueprint.seed,
        )
        self.optimizers = Optimizers(self.model, blueprint.step)
        self.pieces = {name: parts[0] for name, parts in local_shards(self.model).items()}
        """This worker's block of each table and of its accumulators."""
        whole = self._load_together(whole) if together else whole
        assert whole is not None  # alone, everything is there
        load_state(self.model, self.optimizers, dict(whole))
        self.optimizers.scale_table_rate(blueprint.table_rate)
        self.dense = dense_part(self.model)
        self.text = self._load_text(text_IE)
        """The encoder's vectors by item row."""
        self._known_items = blueprint.items
        self._base = _build_dense(blueprint, whole, device)
        self._base_pieces = {n: self.pieces[n]._replace(values=self.pieces[n].values.clone()) for n in (ITEM, USER)}
        self._towers: Towers | None = None
        self._base_towers: Towers | None = None

    def _load_together(self, whole: Mapping[str, torch.Tensor] | None) -> Mapping[str, torch.Tensor]:
        """Collective. Take this worker's block of each table; return what every worker holds all of."""
        tables = {name: whole[f"tables.{name}"] for name in ROW_TENSORS} if whole else {}
        replicated = {n: tensor for n, tensor in whole.items() if not n.startswith("tables.")} if whole else {}
        told = [replicated, {name: len(table) for name, table in tables.items()}]
        dist.broadcast_object_list(told, 0, self.workers.control)  # collective
        replicated, rows = told
        for name in ROW_TENSORS:
            hand_out(self.pieces[name], tables.get(name), rows[name], self.workers.control)
        return replicated

    def _load_text(self, text_IE: torch.Tensor | None) -> np.ndarray:
        """Collective. Return the item text vectors, with zeros for the rows that are free."""
        if text_IE is None:
            text_IE = torch.empty(self._blueprint.items, self._blueprint.text_dim)
        if self.workers.count > 1:
            dist.broadcast(text_IE, 0, self.workers.control)  # collective
        return grow_rows(text_IE, self._blueprint.item_capacity).numpy()

    @on_every_worker
    def describe(self, row: int, vector: np.ndarray) -> None:
        """Set an item's text vector; what is told beside its text stays. A row beyond those known is the next one."""
        self.text[row, : len(vector)] = vector
        self._known_items = max(self._known_items, row + 1)
        self._towers = self._base_towers = None

    @on_every_worker
    @torch.no_grad()
    def clear_least_learned(self, busy: list[int]) -> int:
        """Start the user row that has learned least afresh, but for the busy ones; return it, `UNKNOWN_ROW` for none.

        How much a row has learned is its accumulator, the sum of its squared gradients: a frequency that is saved with
        every version.
        """
        momentum = self.pieces[f"{USER}{MOMENTUM}"]
        learned = momentum.values.clone()
        busy_row = torch.tensor(busy, dtype=torch.int64, device=self.device)
        learned[busy_row[owns(momentum, busy_row)] - momentum.first_row] = float("inf")
        own = (float("inf"), UNKNOWN_ROW)
        if len(learned) and not learned.min().isinf():
            own = (float(learned.min()), momentum.first_row + int(learned.argmin()))
        everyones = [own] * self.workers.count
        if self.workers.count > 1:
            dist.all_gather_object(everyones, own, self.workers.control)  # collective
        row = min(everyones)[1]
        for piece in (self.pieces[USER], momentum, self._base_pieces[USER]):
            if row != UNKNOWN_ROW and owns(piece, torch.tensor(row)):
                piece.values[row - piece.first_row] = 0.0
        return row

    def learn(self, batch: Batch, worker_B: np.ndarray, loss_scale: float) -> None:
        """Collective. Take one train step, each worker on its own sequences."""
        if self.workers.count > 1:
            self._learn_together(replace(batch, text_NE=batch.text_NE[:0]), worker_B, loss_scale)
            return
        self._towers = None
        self.dense.ranked_positions = self._blueprint.ranked_positions
        self.model.train()
        train_step(self.model, batch.to(self.device), self.optimizers, loss_scale)

    @on_every_worker
    def _learn_together(self, batch: Batch, worker_B: np.ndarray, loss_scale: float) -> None:
        """Collective. Take one train step; each target counts as it would on a single worker.

        There a loss is a mean over the step's targets, here over a worker's, and gradients are averaged over workers.
        """
        mine_B = torch.from_numpy(worker_B == self.workers.rank)
        learned_BL, rated_BL = batch.target_BL != PAD, batch.target_rating_BL.isfinite()
        share = self.workers.count * float(learned_BL[mine_B].sum()) / max(float(learned_BL.sum()), 1)
        rated_share = self.workers.count * float(rated_BL[mine_B].sum()) / max(float(rated_BL.sum()), 1)

        def weigh(batch: Batch) -> Losses:
            losses: Losses = self.model(batch)
            total = share * (losses.retrieval + losses.click) + rated_share * losses.rating
            return losses._replace(total=total)

        self._towers = None
        self.dense.ranked_positions = math.ceil(self._blueprint.ranked_positions * share / self.workers.count)
        self.model.train()
        train_step(weigh, share_of_batch(batch, mine_B, self.text).to(self.device), self.optimizers, loss_scale)

    @on_every_worker
    def learn_users(self, sequences: Sequences, worker_B: np.ndarray, rate: float) -> None:
        """Let the users' own rows follow their interactions."""
        learn_user_rows(self._present(worker_B), sequences, rate)

    @on_every_worker
    def predict(self, sequences: Sequences, worker_B: np.ndarray) -> Predictions:
        """Predict each target with the present weights."""
        return predict(self._present(worker_B), sequences)

    @on_every_worker
    def predict_shown(
        self, sequences: Sequences, worker_B: np.ndarray, sequence_K: np.ndarray, item_row_K: np.ndarray
    ) -> ShownPairs:
        """Return what the present weights make of items, each shown after all of a sequence."""
        return predict_shown(self._present(worker_B), sequences, sequence_K, item_row_K)

    @on_every_worker
    def predict_base(self, sequences: Sequences, worker_B: np.ndarray) -> Predictions:
        """Predict each target with the weights it started from."""
        if self._base_towers is None:
            self._base_towers = self._build_towers(self._base, self._base_pieces)
        return predict(_encoded_by(worker_B, self._base_towers), sequences)

    @on_every_worker
    def item_scale(self) -> float:
        """Return the root mean square of what item vectors consist of."""
        towers = self._present(np.empty(0, np.int64))
        return max(float(towers.mean_square().sqrt()), torch.finfo(torch.float32).tiny)

    @on_every_worker
    @torch.no_grad()
    def rows_at(self, name: str, row_N: torch.Tensor) -> torch.Tensor:
        """Return rows of one of `ROW_TENSORS`, on the CPU."""
        piece, row_N = self.pieces[name], row_N.to(self.device)
        return (collect_rows(piece, row_N) if self.workers.count > 1 else piece.values[row_N]).cpu()

    @on_every_worker
    @torch.no_grad()
    def first_rows(self, name: str, rows: int) -> torch.Tensor | None:
        """Return a copy of the first rows of one of `ROW_TENSORS`, on the leader's CPU; none to the others."""
        piece = self.pieces[name]
        if self.workers.count > 1:
            return gather_whole(piece, rows, self.workers.control)
        return piece.values[:rows].cpu().clone()

    def _present(self, worker_B: np.ndarray) -> Towers:
        """Return the present weights for prediction; the catalogue's vectors are worked out once a step."""
        self.dense.eval()
        if self._towers is None:
            self._towers = self._build_towers(self.dense, self.pieces)
        return _encoded_by(worker_B, self._towers)

    def _build_towers(self, dense: TwoStage, pieces: Mapping[str, Piece]) -> Towers:
        text_IE = torch.from_numpy(self.text[: self._known_items])
        if self.workers.count > 1:
            return SharedTowers.build_part(dense, pieces, text_IE)
        return Towers.build(dense, {n: pieces[n].values for n in (ITEM, USER)}, text_IE.to(self.device))


def follow(workers: Workers, device: torch.device) -> None:
    """Collective. Do what the leader says until it says that this is all."""
    part = None
    while (heard := workers.hear()) is not None:
        command, args = heard
        if command == TAKE_UP:
            part = ModelPart(workers, device, *cast("tuple[Blueprint]", args))
        else:
            getattr(part, command)(*args)


def _encoded_by(worker_B: np.ndarray, towers: Towers) -> Towers:
    return replace(towers, worker_B=worker_B) if isinstance(towers, SharedTowers) else towers


def _build_dense(blueprint: Blueprint, named: Mapping[str, torch.Tensor], device: torch.device) -> TwoStage:
    dense = build_two_stage(blueprint.model, blueprint.tables.dim, blueprint.text_dim)
    dense.load_state_dict({n.removeprefix("dense."): tensor for n, tensor in named.items() if n.startswith("dense.")})
    return dense.to(device).eval()
