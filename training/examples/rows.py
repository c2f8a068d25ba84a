"""Ids become table rows, and a share of a step becomes an `ExampleBatch`.

In:  `ExampleRows` of host arrays.  Out: `ExampleBatch`.
Knows nothing of files or of the order of steps.

Static: the ids are rows already. Dynamic: the id tables give rows out; an id that has none (yet) is left out of its
bag, so its vector is zero and nothing is learned for it.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from cluster.examples import Examples
from embeddings.examples import ExampleBatch, build_lookup_of_examples
from embeddings.ids.config import IdsConfig, table_rows
from embeddings.ids.exchange import MappedIds, ShardedIds
from embeddings.tables import ITEM, USER
from training.examples.columns import Limits
from training.examples.layout import drop_unknown
from training.examples.stream import ExampleRows

MAX_INT32_ROWS = 2**31 - 1


class RowsOfIds(Protocol):
    """How ids become rows."""

    table_rows: Mapping[str, int]
    """Table to the rows it must have."""
    limits: Limits
    """What ids must stay below."""

    def learn(self, share: ExampleRows, step: int) -> ExampleBatch:
        """Collective, in the order of steps. Return the batch to learn, giving rows to new ids."""
        ...

    def look_up(self, share: ExampleRows) -> ExampleBatch:
        """Collective. Return the batch to score; changes nothing."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """Return what this worker must save; arrays of all workers concatenate along axis 0."""
        ...

    def load_state(self, whole: Mapping[str, np.ndarray]) -> None:
        """Take this worker's part of the state of all."""
        ...


class StaticRows:
    """Ids that are rows already."""

    def __init__(self, users: int, items: int) -> None:
        self.table_rows: Mapping[str, int] = {USER: users, ITEM: items}
        self.limits = Limits(users, items)

    def learn(self, share: ExampleRows, step: int) -> ExampleBatch:
        """Return the batch; there is nothing to look up."""
        return self.look_up(share)

    def look_up(self, share: ExampleRows) -> ExampleBatch:
        """Return the batch; there is nothing to look up."""
        examples = len(share.label_B)
        lengths = np.ones(3 * examples, np.int32)
        lengths[2 * examples :] = share.history_length_B
        return _batch(share, share.ids, lengths)

    def state(self) -> dict[str, np.ndarray]:
        """Return nothing: ids stay what they are."""
        return {}

    def load_state(self, whole: Mapping[str, np.ndarray]) -> None:
        """Take nothing."""


class DynamicRows:
    """Ids that get rows when they are seen, as `embeddings.ids` decides."""

    def __init__(self, ids: ShardedIds, config: IdsConfig) -> None:
        self._ids = ids
        self.table_rows: Mapping[str, int] = {USER: table_rows(config.user_rows), ITEM: table_rows(config.item_rows)}
        self.limits = Limits(None, None)
        self._type = np.int32 if max(self.table_rows.values()) <= MAX_INT32_ROWS else np.int64

    def learn(self, share: ExampleRows, step: int) -> ExampleBatch:
        """Collective. Give rows to new ids and return the batch, with the rows that change hands."""
        examples = len(share.label_B)
        mapped = self._ids.map(share.ids[:examples], share.ids[examples:], step)
        return self._lay_out(share, mapped)

    def look_up(self, share: ExampleRows) -> ExampleBatch:
        """Collective. Return the batch of the rows that ids have now."""
        examples = len(share.label_B)
        return self._lay_out(share, self._ids.lookup(share.ids[:examples], share.ids[examples:]))

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of this worker's buckets."""
        return self._ids.state()

    def load_state(self, whole: Mapping[str, np.ndarray]) -> None:
        """Take this worker's buckets out of all. Raises `DataError` for tables of other capacities."""
        self._ids.load_state(whole)

    def _lay_out(self, share: ExampleRows, mapped: MappedIds) -> ExampleBatch:
        examples = len(share.label_B)
        values = np.empty(len(share.ids), self._type)
        lengths = np.empty(3 * examples, np.int32)
        count = drop_unknown(mapped.user_rows, mapped.item_rows, share.history_length_B, values, lengths)
        reused = {USER: torch.from_numpy(mapped.user_reused), ITEM: torch.from_numpy(mapped.item_reused)}
        return _batch(share, values[:count], lengths, reused)


def build_rows(examples: Examples, config: IdsConfig, group: torch.distributed.ProcessGroup | None) -> RowsOfIds:
    """Return how the folder's ids become rows; `group` is for nothing else, none with one worker."""
    if examples.info.ids == "rows":
        assert examples.info.users is not None  # `ExamplesInfo` checks it
        assert examples.info.items is not None
        return StaticRows(examples.info.users, examples.info.items)
    return DynamicRows(ShardedIds(config, group), config)


def _batch(
    share: ExampleRows, values: np.ndarray, lengths: np.ndarray, reused: Mapping[str, torch.Tensor] | None = None
) -> ExampleBatch:
    return ExampleBatch(
        lookup=build_lookup_of_examples(torch.from_numpy(values), torch.from_numpy(lengths)),
        label_B=torch.from_numpy(share.label_B),
        global_examples=share.global_examples,
        reused={table: rows for table, rows in (reused or {}).items() if len(rows)},
    )
