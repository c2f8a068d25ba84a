"""Which rows each step trains on: pure arithmetic over row counts, the same for any number of workers.

In:  rows of every row group, seed, epoch.  Out: for each lane, its blocks of row groups, in order.
Knows nothing of files or batches.

    row groups, permuted    |  g7  | g2 |   g9   |  g0  |  g4 | …        N rows in a line
    lanes                   |── lane 0 ──|── lane 1 ──|── lane 2 ──|     cut at N·l/lanes, within a group if need be
    blocks of a lane        |  g7  | g2a |                               at least `shuffle_rows` each, permuted inside

A global batch takes the same number of rows from every lane, and worker r of W trains on lanes r, r + W, …: whatever
W is, step s is the same set of rows, and to go on at step s a lane only opens the block that holds its row
s · rows_a_step. Lanes differ by one row at most, so no worker runs dry before the others and none waits for another.
"""

from dataclasses import dataclass

import numpy as np

from training.examples.layout import permutation


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first, last) of a row group."""

    group: int
    """Index into the row groups of all parts, in the order of the parts."""
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Block:
    """What is read and permuted together."""

    start: int
    """Rows of the lane before it."""
    rows: int
    pieces: tuple[Piece, ...]


class EpochOrder:
    """The order of one epoch."""

    def __init__(self, group_rows: np.ndarray, *, lanes: int, shuffle_rows: int, seed: int, epoch: int) -> None:
        """`group_rows` [groups] are the rows of each row group."""
        self.lanes = lanes
        self.rows = int(group_rows.sum())
        self._shuffle_rows = shuffle_rows
        self._seed, self._epoch = seed, epoch
        self._order = np.random.default_rng((seed, epoch)).permutation(len(group_rows))
        self._ends = np.cumsum(group_rows[self._order])
        self._starts = self._ends - group_rows[self._order]

    def lane_rows(self, lane: int) -> int:
        """Return how many rows the lane has."""
        first, last = self._bounds(lane)
        return last - first

    def steps(self, rows_a_lane: int) -> int:
        """Return the steps of the epoch when each takes so many rows from every lane."""
        return -(-max(self.lane_rows(lane) for lane in range(self.lanes)) // rows_a_lane)

    def step_rows(self, step: int, rows_a_lane: int) -> int:
        """Return the rows of a step over all lanes; fewer at the end of the epoch."""
        first = step * rows_a_lane
        return sum(min(max(self.lane_rows(lane) - first, 0), rows_a_lane) for lane in range(self.lanes))

    def blocks(self, lane: int) -> list[Block]:
        """Return the lane's blocks, in order."""
        first, last = self._bounds(lane)
        blocks, pieces, start, rows = [], [], 0, 0
        place = int(np.searchsorted(self._ends, first, side="right"))
        while first < last:
            end = min(last, int(self._ends[place]))
            if end > first:
                offset = int(self._starts[place])
                pieces.append(Piece(int(self._order[place]), first - offset, end - offset))
                rows += end - first
            first, place = end, place + 1
            if rows >= self._shuffle_rows or (first >= last and rows):
                blocks.append(Block(start, rows, tuple(pieces)))
                start, rows, pieces = start + rows, 0, []
        return blocks

    def permutation(self, lane: int, block: int, rows: int) -> np.ndarray:
        """Return the order of a block's rows, int32 [rows]."""
        seed = np.random.SeedSequence((self._seed, self._epoch, lane, block)).generate_state(1, np.uint64)[0]
        return permutation(rows, seed)

    def _bounds(self, lane: int) -> tuple[int, int]:
        return self.rows * lane // self.lanes, self.rows * (lane + 1) // self.lanes
