"""Items put while serving: encoded once by each encoder in use, laid over whatever version is resident.

In:  the log's items.  Out: a model that knows them, and which items may not be shown now.
Knows nothing of HTTP or of versions. Not thread-safe: its one caller holds a lock.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cluster.catalogue import Item
from cluster.log import EventLog
from training.models.resident import Resident
from training.models.tags import PutTags

READ_ITEMS = 256
"""Most items read, or encoded, in one go."""
SPACES = 4
"""Encoders whose vectors are kept: of the promoted version, the one before it, a pinned one and one on trial."""


class Encode(Protocol):
    """Texts to vectors, float32 [n, E], by a version's encoder; raises `EngineError` when it does not answer."""

    def __call__(self, texts: Sequence[str], version: int | None = None) -> np.ndarray:
        """Return one vector a text."""
        ...


class LiveCatalogue:
    """What has been put since training, by item id; vectors by the encoder that made them, which never mix."""

    def __init__(self, log: EventLog, encode: Encode) -> None:
        self._log = log
        self._encode = encode
        self._item_seq = 0
        self._items: dict[str, Item] = {}
        self._vectors: OrderedDict[str, dict[str, tuple[str, np.ndarray]]] = OrderedDict()
        self._windows: dict[str, tuple[int, int]] = {}
        self.tags = PutTags()
        """Of what was put; replaced as a whole, never changed."""

    def poll(self) -> None:
        """Read what was put since the last call."""
        put: list[Item] = []
        while fresh := self._log.read_items(self._item_seq, READ_ITEMS):
            put += (item for _, item in fresh)
            self._item_seq = fresh[-1][0]
        if put:
            self.tags = self.tags.with_items(put, self._items)
            for item in put:
                self._remember(item)

    def lay_over(self, model: Resident) -> Resident:
        """Return a model that also knows what was put, by its own encoder; the same one where it lacks nothing.

        Raises `EngineError`, keeping what was encoded before.
        """
        lacking = [item for item in self._items.values() if self._lacks(model, item)]
        if not lacking:
            return model
        vectors = self._vectors.setdefault(model.state.encoder, {})
        self._vectors.move_to_end(model.state.encoder)
        if len(self._vectors) > SPACES:
            self._vectors.popitem(last=False)
        new = [item for item in lacking if item.item_id not in vectors or vectors[item.item_id][0] != item.text]
        for first in range(0, len(new), READ_ITEMS):
            some = new[first : first + READ_ITEMS]
            encoded = self._encode([item.text for item in some], model.state.ref.version)
            vectors |= {item.item_id: (item.text, vector) for item, vector in zip(some, encoded, strict=True)}
        return model.with_items(
            [(item.item_id, item.text) for item in lacking], np.stack([vectors[item.item_id][1] for item in lacking])
        )

    def unavailable(self, now_us: int) -> frozenset[str]:
        """Return the items whose availability has not begun or is over."""
        return frozenset(item_id for item_id, (start, end) in self._windows.items() if not start <= now_us < end)

    @staticmethod
    def _lacks(model: Resident, item: Item) -> bool:
        return not item.is_deleted and model.text_of(item.item_id) != item.text

    def _remember(self, item: Item) -> None:
        self._items[item.item_id] = item
        self._windows.pop(item.item_id, None)
        if item.available_from_us is not None or item.available_until_us is not None:
            until_us = 2**63 - 1 if item.available_until_us is None else item.available_until_us
            self._windows[item.item_id] = (item.available_from_us or 0, until_us)
