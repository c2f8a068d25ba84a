"""What is promoted where and when: on display, in a mailer.

In:  which item, at which place, from when until when.  Out: whether it is at a time, and at how many places.
Knows nothing of users or purchases.

Shapes: N promotions, Q questions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from training.baselines.interface import IntArray
from training.baskets.purchases import FloatArray

SIZES, ARRAYS = "sizes", ("_starts_s", "_begin_N", "_until_s_N", "_change_M", "_times_s", "_places_M")
"""What a version keeps: how many items and places there are; the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotions:
    """Promotions of one kind, ready to be asked."""

    items: int
    places: int
    _starts_s: IntArray
    """Every time at which some begin, ascending."""
    _begin_N: IntArray
    """Of each: its place, its item and the number of its start, as one number; ascending."""
    _until_s_N: IntArray
    _change_M: IntArray
    """Item and number of a time, as one, at which it begins or ends somewhere; ascending."""
    _times_s: IntArray
    _places_M: IntArray
    """At how many places it is promoted from then on."""

    @classmethod
    def of(
        cls, place_N: IntArray, item_N: IntArray, from_s_N: IntArray, until_s_N: IntArray, *, places: int, items: int
    ) -> "Promotions":
        """Sort; promotions of one item at one place do not overlap."""
        starts_s, start_N = np.unique(from_s_N, return_inverse=True)
        begin_N = (place_N * items + item_N) * len(starts_s) + start_N
        order = np.argsort(begin_N, kind="stable")
        times_s = np.unique(np.concatenate([starts_s, until_s_N]))
        changes = [item_N * len(times_s) + np.searchsorted(times_s, at_s) for at_s in (from_s_N, until_s_N)]
        change_M, which = np.unique(np.concatenate(changes), return_inverse=True)
        step_M = np.bincount(which, np.repeat([1, -1], len(item_N)), len(change_M)).astype(np.int64)
        return cls(
            items=items,
            places=places,
            _starts_s=starts_s,
            _begin_N=begin_N[order],
            _until_s_N=until_s_N[order],
            _change_M=change_M,
            _times_s=times_s,
            _places_M=np.cumsum(step_M),  # all of an item's end, so the next one's begin at nought
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all of it, for `restore`."""
        return {SIZES: np.array([self.items, self.places])} | {name: getattr(self, name) for name in ARRAYS}

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Return what `arrays` were taken of."""
        items, places = arrays[SIZES].tolist()
        return cls(items=items, places=places, **{name: arrays[name] for name in ARRAYS})

    def at(self, place_Q: IntArray, item_Q: IntArray, at_s_Q: IntArray) -> npt.NDArray[np.bool_]:
        """Return whether items are promoted at places at times, [Q]; at a place below 0 none is."""
        if not len(self._begin_N):
            return np.zeros(len(item_Q), np.bool_)
        wanted_Q = (place_Q * self.items + item_Q) * len(self._starts_s)
        started_Q = np.searchsorted(self._starts_s, at_s_Q, "right") - 1
        found_Q = np.searchsorted(self._begin_N, wanted_Q + started_Q, "right") - 1
        is_one_Q = (found_Q >= 0) & (started_Q >= 0) & (place_Q >= 0)
        found_Q = np.maximum(found_Q, 0)
        return is_one_Q & (self._begin_N[found_Q] >= wanted_Q) & (self._until_s_N[found_Q] > at_s_Q)

    def share_of_places(self, item_Q: IntArray, at_s_Q: IntArray) -> FloatArray:
        """Return at what share of the places items are promoted at times, [Q]."""
        if not len(self._change_M):
            return np.zeros(len(item_Q))
        wanted_Q = item_Q * len(self._times_s)
        passed_Q = np.searchsorted(self._times_s, at_s_Q, "right") - 1
        found_Q = np.searchsorted(self._change_M, wanted_Q + passed_Q, "right") - 1
        is_one_Q = (found_Q >= 0) & (passed_Q >= 0)
        found_Q = np.maximum(found_Q, 0)
        is_one_Q &= self._change_M[found_Q] >= wanted_Q
        return np.where(is_one_Q, self._places_M[found_Q], 0) / max(self.places, 1)
