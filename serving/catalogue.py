"""Items put while serving: encoded once, laid over whatever version is resident.

In:  the log's items.  Out: a model that knows them, and which items may not be shown now.
Knows nothing of HTTP or of versions. Not thread-safe: its one caller holds a lock.
"""

from collections.abc import Callable, Sequence

import numpy as np

from cluster.catalogue import Item
from cluster.log import EventLog
from training.models.resident import Resident

Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors, float32 [n, E]; raises `EngineError` when the encoder does not answer."""

READ_ITEMS = 256
"""Most items read and encoded in one go."""


class LiveCatalogue:
    """What has been put since training, by item id."""

    def __init__(self, log: EventLog, encode: Encode) -> None:
        self._log = log
        self._encode = encode
        self._item_seq = 0
        self._items: dict[str, tuple[Item, np.ndarray]] = {}
        self._windows: dict[str, tuple[int, int]] = {}

    def poll(self) -> None:
        """Read and encode what was put since the last call; raises `EngineError`, keeping what it came to before."""
        while fresh := self._log.read_items(self._item_seq, READ_ITEMS):
            items = [item for _, item in fresh]
            for item, vector in zip(items, self._encode([item.text for item in items]), strict=True):
                self._remember(item, vector)
            self._item_seq = fresh[-1][0]

    def lay_over(self, model: Resident) -> Resident:
        """Return a model that also knows what was put; the same one where it lacks nothing."""
        lacking = [(item, vector) for item, vector in self._items.values() if model.text_of(item.item_id) != item.text]
        if not lacking:
            return model
        return model.with_items(
            [(item.item_id, item.text) for item, _ in lacking], np.stack([vector for _, vector in lacking])
        )

    def unavailable(self, now_us: int) -> frozenset[str]:
        """Return the items whose availability has not begun or is over."""
        return frozenset(item_id for item_id, (start, end) in self._windows.items() if not start <= now_us < end)

    def _remember(self, item: Item, vector: np.ndarray) -> None:
        self._items[item.item_id] = (item, vector)
        self._windows.pop(item.item_id, None)
        if item.available_from_us is not None or item.available_until_us is not None:
            until_us = 2**63 - 1 if item.available_until_us is None else item.available_until_us
            self._windows[item.item_id] = (item.available_from_us or 0, until_us)
