"""A version taken up for further training: sharded model, growing vocabularies, what changed since the last delta.

In:  a `VersionState`.  Out: a `Change` for the next delta; a `VersionState` for the next version.
Knows nothing of events, of the log or of when to publish. Needs a process group of one worker.
"""

import numpy as np
import torch

from embeddings.batch import Batch, Sequences
from embeddings.quantized import QuantizedRows
from embeddings.tables import ITEM, USER, TablesConfig, local_shards
from embeddings.vocabulary import UNKNOWN_ROW, Vocabulary
from training.checkpoint import dense_state, load_state
from training.models.recommender import build_recommender, dense_part
from training.models.two_stage import Losses, ModelConfig, TwoStage
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
from training.online.predictions import Predictions, ShownPairs, Towers, predict, predict_shown
from training.online.sent import SentRows
from training.online.user_rows import learn_user_rows
from training.step import Optimizers, StepConfig, train_step


class LiveModel:
    """The version's model in training, with the frozen weights it started from beside it."""

    def __init__(
        self,
        state: VersionState,
        step: StepConfig,
        table_rate: float,
        device: torch.device,
        seed: int,
        sent: SentRows | None = None,
    ) -> None:
        """Load weights and optimiser; the tables learn at `table_rate` of their batch rate."""
        tables = state.recipe.section(TablesConfig)
        self.device = device
        self.items = Vocabulary(state.item_ids, len(state.item_ids) + tables.spare_rows)
        self.users = Vocabulary(state.user_ids, len(state.user_ids) + tables.spare_rows)
        self.item_texts = list(state.item_texts)
        self.text = grow_rows(state.rows[TEXT_ROWS], self.items.capacity).numpy()
        self.counts = grow_rows(state.rows[COUNT_ROWS], self.items.capacity).numpy()
        self.model = build_recommender(
            tables,
            state.recipe.section(ModelConfig),
            self.items,
            self.users,
            text_dim=self.text.shape[1],
            device=device,
            seed=seed,
        )
        self.optimizers = Optimizers(self.model, step)
        load_state(self.model, self.optimizers, checkpoint_names(state))
        self.optimizers.scale_table_rate(table_rate)
        self.dense = dense_part(self.model)
        self._rows = {name: parts[0][1] for name, parts in local_shards(self.model).items()}
        self._base = _build_dense(state, device)
        self._base_rows = {
            ITEM: grow_rows(state.trained_rows[ITEM_ROWS], self.items.capacity).to(device),
            USER: grow_rows(state.trained_rows[USER_ROWS], self.users.capacity).to(device),
        }
        self._sent = sent or SentRows("float32", 0.0)
        self._sent.start({name: (state.rows[name], self._rows[name].cpu()) for name in (ITEM_ROWS, USER_ROWS)})
        self._known: Towers | None = None
        self._base_known: Towers | None = None
        self.reused_rows: set[int] = set()
        """User rows that have changed hands since the version was taken up."""
        self._start_counting()

    def mark_published(self, change: Change | None = None) -> None:
        """Count changes from here on: replicas have the change, or without one everything as it is."""
        if change is None:
            self._sent.start({name: (self._rows[name].cpu(), self._rows[name].cpu()) for name in (ITEM, USER)})
        else:
            self._sent.note({name: change.rows[name] for name in (ITEM_ROWS, USER_ROWS)})
        self._start_counting()

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
        self.text[row] = vector
        self._known = self._base_known = None
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

    @torch.no_grad()
    def _reuse_row(self, user_id: str) -> int:
        """Start the row that has learned least afresh for a new user, if any was left unused since the last delta.

        How much a row has learned is its accumulator, the sum of its squared gradients: a frequency that is saved with
        every version.
        """
        momentum = self._rows[f"{USER}.momentum"]
        learned = momentum.clone()
        learned[list(self._touched_users)] = float("inf")
        row = int(learned.argmin())
        if learned[row] == float("inf"):
            return UNKNOWN_ROW
        for tensor in (self._rows[USER], momentum, self._base_rows[USER]):
            tensor[row] = 0.0
        self.users.reuse(row, user_id)
        self._reused_users[row] = user_id
        self.reused_rows.add(row)
        return row

    def learn(self, batch: Batch, loss_scale: float) -> Losses:
        """Take one train step."""
        self._known = None
        self.model.train()
        losses = train_step(self.model, batch.to(self.device), self.optimizers, loss_scale)
        self._touched_items.update(batch.item_rows_N.tolist())
        self._touched_users.update(batch.user_row_B[batch.has_user_B].tolist())
        return losses

    def learn_users(self, sequences: Sequences, rate: float) -> None:
        """Let the users' own rows follow their interactions; call `learn` with the same ones after it."""
        learn_user_rows(self._towers(), sequences, rate)

    def predict(self, sequences: Sequences) -> Predictions:
        """Predict each target with the present weights."""
        return predict(self._towers(), sequences)

    def predict_shown(self, sequences: Sequences, sequence_K: np.ndarray, item_row_K: np.ndarray) -> ShownPairs:
        """Return what the present weights make of items, each shown after all of a sequence."""
        return predict_shown(self._towers(), sequences, sequence_K, item_row_K)

    def item_scale(self) -> float:
        """Return the root mean square of what item vectors consist of."""
        return max(float(self._towers().item_ID.square().mean().sqrt()), torch.finfo(torch.float32).tiny)

    def predict_base(self, sequences: Sequences) -> Predictions:
        """Predict each target with the weights it started from."""
        if self._base_known is None:
            self._base_known = Towers.build(self._base, self._base_rows, self._known_text())
        return predict(self._base_known, sequences)

    @torch.no_grad()
    def change(self) -> Change:
        """Return everything that changed since the last delta."""
        new_items, new_users = (
            range(self._published_items, len(self.items)),
            range(self._published_users, len(self.users)),
        )
        rows = {name: tensor.cpu() for name, tensor in self._rows.items()}
        touched = {ITEM: self._touched_items.union(new_items), USER: self._touched_users.union(new_users)}
        anyway = {ITEM: set(new_items), USER: set(new_users).union(self._reused_users)}
        sent = {name: self._sent.choose(name, rows[name], touched[name], anyway[name]) for name in (ITEM, USER)}
        described, counted = _index(self._described.union(new_items)), _index(self._counted.union(new_items))
        own = {name: _index(touched[name]) for name in (ITEM, USER)}
        optimizer_rows = {f"{name}.momentum": (index, rows[f"{name}.momentum"][index]) for name, index in own.items()}
        if self._sent.is_lossy:
            optimizer_rows |= {f"{EXACT}{name}": (index, rows[name][index]) for name, index in own.items()}
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
        whole = {name: self._rows[name][: sizes[name.split(".")[0]]].cpu().clone() for name in self._rows}
        dense, moments = self._dense_and_moments()
        rows = {
            ITEM_ROWS: whole[ITEM],
            USER_ROWS: whole[USER],
            TEXT_ROWS: torch.from_numpy(self.text[: len(self.items)].copy()),
            COUNT_ROWS: torch.from_numpy(self.counts[: len(self.items)].copy()),
        }
        momentum = {name: tensor for name, tensor in whole.items() if name.endswith(".momentum")}
        return rows, dense, momentum | moments

    def _towers(self) -> Towers:
        """Return the present weights for prediction; the catalogue's vectors are worked out once a step."""
        self.dense.eval()
        if self._known is None:
            self._known = Towers.build(self.dense, self._rows, self._known_text())
        return self._known

    def _known_text(self) -> torch.Tensor:
        return torch.from_numpy(self.text[: len(self.items)]).to(self.device)

    def _dense_and_moments(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return split_checkpoint({name: t.detach().cpu().clone() for name, t in dense_state(self.optimizers).items()})[
            1:
        ]


def _build_dense(state: VersionState, device: torch.device) -> TwoStage:
    dense = TwoStage(
        state.recipe.section(ModelConfig), state.recipe.section(TablesConfig).dim, state.rows[TEXT_ROWS].shape[1]
    )
    dense.load_state_dict(dict(state.dense))
    return dense.to(device).eval()


def _index(rows: set[int]) -> torch.Tensor:
    return torch.tensor(sorted(rows), dtype=torch.int64)
