"""A version taken up for further training: growing vocabularies, what changed since the last delta, and the model.

In:  a `VersionState`.  Out: a `Change` for the next delta; a `VersionState` for the next version.
Knows nothing of events, of the log or of when to publish, and not who holds the model: one worker, or several of which
this one leads (training/online/part.py).
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from embeddings.batch import PAD, Batch, Sequences
from embeddings.quantized import QuantizedRows
from embeddings.tables import ITEM, MOMENTUM, USER, TablesConfig
from embeddings.vocabulary import UNKNOWN_ROW, Vocabulary
from training.checkpoint import dense_state
from training.models.two_stage import RANKED_POSITIONS, ModelConfig
from training.models.version import (
    COUNT_ROWS,
    EXACT,
    ITEM_ROWS,
    TEXT_ROWS,
    USER_ROWS,
    Change,
    VersionState,
    checkpoint_names,
    grow_rows,
    split_checkpoint,
)
from training.online.part import ROW_TENSORS, TAKE_UP, Blueprint, ModelPart
from training.online.predictions import Predictions, ShownPairs
from training.online.sent import SentRows
from training.online.workers import Workers, worker_of
from training.step import StepConfig


class LiveModel:
    """What the leader knows of the version in training, and its part of the model; what it does, every worker does."""

    def __init__(
        self,
        state: VersionState,
        step: StepConfig,
        table_rate: float,
        device: torch.device,
        seed: int,
        sent: SentRows | None = None,
        ranked_positions: int = RANKED_POSITIONS,
        workers: Workers | None = None,
    ) -> None:
        """Load weights and optimiser; the tables learn at `table_rate` of their batch rate."""
        tables = state.recipe.section(TablesConfig)
        self.workers = workers or Workers()
        self.items = Vocabulary(state.item_ids, len(state.item_ids) + tables.spare_rows)
        self.users = Vocabulary(state.user_ids, len(state.user_ids) + tables.spare_rows)
        self.item_texts = list(state.item_texts)
        self.counts = grow_rows(state.rows[COUNT_ROWS], self.items.capacity).numpy()
        blueprint = Blueprint(
            tables=tables,
            model=state.recipe.section(ModelConfig),
            step=step,
            table_rate=table_rate,
            seed=seed,
            items=len(self.items),
            item_capacity=self.items.capacity,
            user_capacity=self.users.capacity,
            text_dim=state.rows[TEXT_ROWS].shape[1],
            ranked_positions=ranked_positions,
        )
        self.workers.tell(TAKE_UP, blueprint)
        self.part = ModelPart(self.workers, device, blueprint, checkpoint_names(state), state.rows[TEXT_ROWS])
        self.dense, self.text = self.part.dense, self.part.text
        self._sent = sent or SentRows("float32", 0.0)
        self._start_sending({name: state.rows[name] for name in (ITEM_ROWS, USER_ROWS)})
        self.reused_rows: set[int] = set()
        """User rows that have changed hands since the version was taken up."""
        self._start_counting()

    def mark_published(self, change: Change | None = None) -> None:
        """Count changes from here on: replicas have the change, or without one everything as it is."""
        if change is None:
            self._start_sending()
        else:
            self._sent.note({name: change.rows[name] for name in (ITEM_ROWS, USER_ROWS)})
        self._start_counting()

    def _start_sending(self, held: Mapping[str, torch.Tensor] | None = None) -> None:
        """Replicas hold these rows, or without any what is trained."""
        if not self._sent.is_lossy:
            return
        capacity = {ITEM: self.items.capacity, USER: self.users.capacity}
        trained = {name: self._first_rows(name, rows) for name, rows in capacity.items()}
        self._sent.start({name: ((held or trained)[name], rows) for name, rows in trained.items()})

    def _start_counting(self) -> None:
        self._reused_users: dict[int, str] = {}
        self._published_items, self._published_users = len(self.items), len(self.users)
        self._touched_items: set[int] = set()
        self._touched_users: set[int] = set()
        self._counted: set[int] = set()
        self._described: set[int] = set()

    def describe(self, item_id: str, text: str, vector: np.ndarray) -> None:
        """Set an item's text and vector, giving it a row on first sight; ignored when the table is full."""
        row = self.items.assign(item_id)
        if row == UNKNOWN_ROW:
            return
        self.item_texts[row : row + 1] = [text]
        self.part.describe(row, vector)
        self._touched_items.add(row)
        self._described.add(row)

    def count(self, item_id: str, user_id: str) -> None:
        """Note one interaction, giving the user a row on first sight: a free one, or the one that has learned least.

        An item gets its row when it is described: an id that only feedback names is in no catalogue.
        """
        item_row, user_row = self.items.row(item_id), self.users.assign(user_id)
        if user_row == UNKNOWN_ROW:
            user_row = self._reuse_row(user_id)
        if item_row != UNKNOWN_ROW:
            self.counts[item_row] += 1
            self._counted.add(item_row)
        if user_row != UNKNOWN_ROW:
            self._touched_users.add(user_row)

    def _reuse_row(self, user_id: str) -> int:
        """Start the row that has learned least afresh for a new user, if any was left unused since the last delta."""
        row = self.part.clear_least_learned(sorted(self._touched_users))
        if row != UNKNOWN_ROW:
            self.users.reuse(row, user_id)
            self._reused_users[row] = user_id
            self.reused_rows.add(row)
        return row

    def learn(self, batch: Batch, loss_scale: float) -> None:
        """Take one train step."""
        user_row_B = torch.where(batch.has_user_B, batch.user_row_B, PAD).numpy()
        self.part.learn(batch, self._worker_of(user_row_B), loss_scale)
        self._touched_items.update(batch.item_rows_N.tolist())
        self._touched_users.update(batch.user_row_B[batch.has_user_B].tolist())

    def learn_users(self, sequences: Sequences, rate: float) -> None:
        """Let the users' own rows follow their interactions; call `learn` with the same ones after it."""
        self.part.learn_users(sequences, self._worker_of(sequences.user_row_B), rate)

    def predict(self, sequences: Sequences) -> Predictions:
        """Predict each target with the present weights."""
        return self.part.predict(sequences, self._worker_of(sequences.user_row_B))

    def predict_shown(self, sequences: Sequences, sequence_K: np.ndarray, item_row_K: np.ndarray) -> ShownPairs:
        """Return what the present weights make of items, each shown after all of a sequence."""
        return self.part.predict_shown(sequences, self._worker_of(sequences.user_row_B), sequence_K, item_row_K)

    @property
    def rate_factor(self) -> float | None:
        """How many times the rate it started from the dense rate is by now; none where it stays."""
        followed = self.part.optimizers.followed
        return None if followed is None else followed.factor

    def item_scale(self) -> float:
        """Return the root mean square of what item vectors consist of."""
        return self.part.item_scale()

    def predict_base(self, sequences: Sequences) -> Predictions:
        """Predict each target with the weights it started from."""
        return self.part.predict_base(sequences, self._worker_of(sequences.user_row_B))

    @torch.no_grad()
    def change(self) -> Change:
        """Return everything that changed since the last delta."""
        new_items, new_users = (
            range(self._published_items, len(self.items)),
            range(self._published_users, len(self.users)),
        )
        touched = {ITEM: self._touched_items.union(new_items), USER: self._touched_users.union(new_users)}
        anyway = {ITEM: set(new_items), USER: set(new_users).union(self._reused_users)}
        sent = {n: self._sent.choose(n, partial(self.part.rows_at, n), touched[n], anyway[n]) for n in (ITEM, USER)}
        described, counted = _index(self._described.union(new_items)), _index(self._counted.union(new_items))
        own = {name: _index(touched[name]) for name in (ITEM, USER)}
        optimizer_rows = {
            f"{n}{MOMENTUM}": (index, self.part.rows_at(f"{n}{MOMENTUM}", index)) for n, index in own.items()
        }
        if self._sent.is_lossy:
            optimizer_rows |= {f"{EXACT}{n}": (index, self.part.rows_at(n, index)) for n, index in own.items()}
        dense, moments = self._dense_and_moments()
        return Change(
            new_items=[(self.items.ids[row], self.item_texts[row]) for row in new_items],
            new_users=self.users.ids[self._published_users :],
            reused_users=dict(self._reused_users),
            rows={
                ITEM_ROWS: sent[ITEM],
                USER_ROWS: sent[USER],
                TEXT_ROWS: (described, QuantizedRows(torch.from_numpy(self.text)[described])),
                COUNT_ROWS: (counted, QuantizedRows(torch.from_numpy(self.counts)[counted])),
            },
            optimizer_rows=optimizer_rows,
            dense=dense,
            optimizer=moments,
        )

    @torch.no_grad()
    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the rows, dense and optimiser tensors of a version whole, as `VersionState` names them."""
        sizes = {ITEM: len(self.items), USER: len(self.users)}
        whole = {name: self._first_rows(name, sizes[name.removesuffix(MOMENTUM)]) for name in ROW_TENSORS}
        dense, moments = self._dense_and_moments()
        rows = {
            ITEM_ROWS: whole[ITEM],
            USER_ROWS: whole[USER],
            TEXT_ROWS: torch.from_numpy(self.text[: len(self.items)].copy()),
            COUNT_ROWS: torch.from_numpy(self.counts[: len(self.items)].copy()),
        }
        momentum = {name: tensor for name, tensor in whole.items() if name.endswith(MOMENTUM)}
        return rows, dense, momentum | moments

    def _first_rows(self, name: str, rows: int) -> torch.Tensor:
        whole = self.part.first_rows(name, rows)
        assert whole is not None  # this worker leads
        return whole

    def _worker_of(self, user_row_B: np.ndarray) -> np.ndarray:
        """Return whose each sequence is; those of users without a row are dealt out."""
        count = self.workers.count
        return np.array(
            [b % count if row == PAD else worker_of(self.users.ids[row], count) for b, row in enumerate(user_row_B)],
            np.int64,
        )

    def _dense_and_moments(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return split_checkpoint(
            {name: t.detach().cpu().clone() for name, t in dense_state(self.part.optimizers).items()}
        )[1:]


def _index(rows: set[int]) -> torch.Tensor:
    return torch.tensor(sorted(rows), dtype=torch.int64)
