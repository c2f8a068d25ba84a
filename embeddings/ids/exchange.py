"""Workers that own a range of buckets each answer one another: a worker's ids in, its rows out.

In:  a worker's user and item ids of one step, repeated as they occur.  Out: a row for each, and all reused rows.
Knows nothing of batches and vectors. Communication runs over a group of its own, so a background thread may call it
while the training thread uses another group; one thread at a time.

One step of two workers, both tables in the same messages:

    worker 0: distinct ids, counts ──┐ sizes      ┌─▶ owner 0: merge counts, assign ─┐ sizes of reused ┌─▶ worker 0
                                     ├─ requests ─┤                                  ├─ rows, reused ──┤
    worker 1: distinct ids, counts ──┘            └─▶ owner 1: merge counts, assign ─┘                 └─▶ worker 1

Merged counts and the id table's decisions depend on no order, so any number of workers gets the rows of one.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from embeddings.ids import kernels
from embeddings.ids.config import BUCKETS, IdsConfig, buckets_of
from embeddings.ids.distinct import distinct
from embeddings.ids.table import IdTable, cut_state

USER, ITEM = "user", "item"
NO_IDS = np.empty(0, np.int64)

Answer = Callable[[IdTable, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class MappedIds(NamedTuple):
    """Rows of one worker's ids, and every row of the whole tables that has a new id; all int64 and global."""

    user_rows: np.ndarray
    """One an id asked for, `UNKNOWN_ROW` (-1) where it has none."""
    item_rows: np.ndarray
    """Likewise."""
    user_reused: np.ndarray
    """To be zeroed, with their optimiser state, before the step; the same on all workers, ascending."""
    item_reused: np.ndarray
    """Likewise."""


class ShardedIds:
    """The user and item id tables, shared out over the workers of a group."""

    def __init__(self, config: IdsConfig, group: dist.ProcessGroup | None = None) -> None:
        """Start without ids. `group` is a gloo group that nobody else uses; none is one worker, no communication."""
        self._group = group
        self._worker = 0 if group is None else dist.get_rank(group)
        self._workers = 1 if group is None else dist.get_world_size(group)
        self.buckets = buckets_of(self._worker, self._workers)
        self.tables: Mapping[str, IdTable] = {
            USER: IdTable(config.user_rows, config, self.buckets),
            ITEM: IdTable(config.item_rows, config, self.buckets),
        }
        self._owner_of_bucket = np.empty(BUCKETS, np.int64)
        for worker in range(self._workers):
            owned = buckets_of(worker, self._workers)
            self._owner_of_bucket[owned.start : owned.stop] = worker

    def map(self, user_ids: np.ndarray, item_ids: np.ndarray, step: int) -> MappedIds:
        """Collective, once a global step. Count the ids, give rows to new ones, return this worker's rows.

        Empty arrays are fine: a worker without data takes part. Raises `DataError` for an id not in [0, 2⁶³) before
        anything is sent; the other workers then wait until the group ends.
        """
        return self._ask({USER: user_ids, ITEM: item_ids}, lambda table, ids, counts: table.assign(ids, counts, step))

    def lookup(self, user_ids: np.ndarray, item_ids: np.ndarray) -> MappedIds:
        """Collective. Return the rows that ids have now; changes nothing, reuses nothing. Raises as `map`."""
        return self._ask({USER: user_ids, ITEM: item_ids}, lambda table, ids, _: (table.lookup(ids), NO_IDS))

    def state(self) -> dict[str, np.ndarray]:
        """Return this worker's part, as `TABLE.ARRAY`; the parts concatenate, in order of workers, along axis 0."""
        return {f"{name}.{key}": array for name, table in self.tables.items() for key, array in table.state().items()}

    def load_state(self, whole: Mapping[str, np.ndarray]) -> None:
        """Take this worker's buckets out of the state of all 240. Raises `DataError` as `IdTable.load_state`."""
        for name, table in self.tables.items():
            arrays = {key.removeprefix(f"{name}."): a for key, a in whole.items() if key.startswith(f"{name}.")}
            table.load_state(cut_state(arrays, self.buckets))

    def _ask(self, ids: Mapping[str, np.ndarray], answer: Answer) -> MappedIds:
        """Collective. Let the owners answer for the distinct ids, and spread the rows over the repeated ones."""
        asked = {name: distinct(values) for name, values in ids.items()}
        if self._workers == 1:
            answers = {name: answer(self.tables[name], asked[name][0], asked[name][2]) for name in asked}
        else:
            answers = self._through_owners({name: (one, count) for name, (one, _, count) in asked.items()}, answer)
        rows = {name: answers[name][0][asked[name][1]] for name in asked}
        reused = {name: np.sort(answers[name][1]) for name in asked}
        return MappedIds(rows[USER], rows[ITEM], reused[USER], reused[ITEM])

    def _through_owners(
        self, asked: Mapping[str, tuple[np.ndarray, np.ndarray]], answer: Answer
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Collective, four messages. Return a table's rows for its (ids, counts), and all owners' reused rows."""
        order, sent_T = {}, np.zeros((len(asked), self._workers), np.int64)
        for t, (name, (ids, _)) in enumerate(asked.items()):
            order[name] = kernels.group_by_owner(ids, self._owner_of_bucket, sent_T[t])
        # Collective 1: how many ids of each table come from and go to every worker.
        got_T = self._gather(sent_T.ravel()).reshape(self._workers, len(asked), self._workers)[:, :, self._worker].T

        # Collective 2: the requests, for each owner: user ids, user counts, item ids, item counts.
        columns = [(array[order[name]], sent_T[t]) for t, name in enumerate(asked) for array in asked[name]]
        requests = self._exchange(columns, np.repeat(got_T, 2, axis=0))

        back, reused = [], []
        for t, name in enumerate(asked):
            ids, inverse, counts = distinct(requests[2 * t], requests[2 * t + 1])
            rows, reused_here = answer(self.tables[name], ids, counts)
            back.append((rows[inverse], got_T[t]))
            reused.append(reused_here)

        # Collective 3: how many rows of each table every owner has reused.
        reused_T = self._gather(np.array([rows.size for rows in reused])).reshape(self._workers, len(asked)).T
        # Collective 4: the answers, for each asker: its user rows, its item rows, all reused rows of both.
        back += [(np.tile(rows, self._workers), np.full(self._workers, rows.size)) for rows in reused]
        answers = self._exchange(back, np.concatenate([sent_T, reused_T]))

        found = {}
        for t, name in enumerate(asked):
            rows = np.empty_like(answers[t])
            rows[order[name]] = answers[t]
            found[name] = (rows, answers[len(asked) + t])
        return found

    def _gather(self, numbers: np.ndarray) -> np.ndarray:
        """Collective. Return every worker's numbers, in order of workers."""
        everyone = torch.empty(self._workers * numbers.size, dtype=torch.int64)
        dist.all_gather_single(everyone, torch.from_numpy(numbers), group=self._group)
        return everyone.numpy()

    def _exchange(self, columns: list[tuple[np.ndarray, np.ndarray]], got_sizes: np.ndarray) -> list[np.ndarray]:
        """Collective. Send several columns in one message a worker; return them as the workers sent them, joined.

        A column is its values, grouped by receiver, and how many each receives; `got_sizes` [column, sender] are the
        sizes that arrive.
        """
        ends = [np.cumsum(sizes) for _, sizes in columns]
        message = [
            values[end[to] - sizes[to] : end[to]]
            for to in range(self._workers)
            for (values, sizes), end in zip(columns, ends, strict=True)
        ]
        sent = torch.from_numpy(np.concatenate(message))
        got = torch.empty(int(got_sizes.sum()), dtype=torch.int64)
        sent_splits = np.sum([sizes for _, sizes in columns], axis=0).tolist()
        dist.all_to_all_single(got, sent, got_sizes.sum(axis=0).tolist(), sent_splits, group=self._group)
        # What arrived lies sender by sender, and column by column within a sender.
        pieces = np.split(got.numpy(), np.cumsum(got_sizes.T.ravel())[:-1])
        return [np.concatenate(pieces[column :: len(columns)]) for column in range(len(columns))]
