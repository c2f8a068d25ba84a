"""An examples folder becomes batches, read and laid out on background threads with bounded memory.

In:  an opened examples folder, the epoch, the step to start at, this worker's rank.  Out: `ExampleRows`, one a step.
Knows nothing of tables, devices or how ids become rows.

    decode threads    Parquet row groups ──▶ columns, every row judged       (one block ahead of every lane)
    layout thread     a slice of each lane's permuted block ──▶ one batch    (`prefetch` batches ahead of the step)

A lane holds its open block and the next one: a worker needs about lanes / workers · 2 · block bytes, however many rows
there are. What is yielded depends on the data, seed, epoch and step only (lanes.py).
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster.errors import ConfigError, DataError
from cluster.examples import COLUMNS, Examples, open_part
from training.examples.background import Background, yield_to_steps
from training.examples.columns import (
    REASONS,
    Columns,
    Limits,
    assert_all_accepted,
    concatenate,
    cut,
    no_columns,
    read_columns,
)
from training.examples.lanes import Block, EpochOrder
from training.examples.layout import STRIDE, count_rows, lay_out, pack

RETRY_DELAYS_S = (0.1, 1.0)
MAX_GROUP_ROWS = 1 << 22
"""Row groups are read whole; larger ones would break the bound on memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """How an examples folder is read."""

    batch_examples: int = 32_768
    """Examples a step, over all workers together."""
    lanes: int = 16
    """Independent streams that the rows are cut into; every batch takes from each, every worker reads some of them."""
    shuffle_rows: int = 131_072
    """Rows of a lane that are permuted together, at least; whole row groups."""
    prefetch: int = 4
    """Batches laid out ahead of the step."""
    decode_threads: int = 1
    """Threads a worker decodes Parquet on."""
    max_history: int = 50
    """Newest history items that an example keeps."""
    bad_rows: str = "fail"
    """`fail` ends the run at the first row that cannot be used; `skip` leaves such rows out, counted by reason."""

    def __post_init__(self) -> None:
        for name in ("batch_examples", "lanes", "shuffle_rows", "prefetch", "decode_threads", "max_history"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stream.{name}={getattr(self, name)}: must be at least 1")
        if self.batch_examples % self.lanes:
            nearest = max(1, round(self.batch_examples / self.lanes)) * self.lanes
            raise ConfigError(
                f"stream.batch_examples={self.batch_examples}: must be a multiple of stream.lanes={self.lanes}; "
                f"try {nearest}"
            )
        if self.bad_rows not in ("fail", "skip"):
            raise ConfigError(f'stream.bad_rows={self.bad_rows!r}: is none of "fail", "skip"')

    @property
    def rows_a_lane(self) -> int:
        """Rows of a step that come from one lane."""
        return self.batch_examples // self.lanes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleRows:
    """One worker's share of one step, in host memory."""

    step: int
    """Within the epoch."""
    ids: np.ndarray
    """int32 or int64 [2B + N]: user ids [B], item ids [B], then the histories' item ids [N], one after the other."""
    history_length_B: np.ndarray
    """int32."""
    label_B: np.ndarray
    """float32."""
    global_examples: int
    """Rows of the step over all workers, skipped ones included."""
    skipped: np.ndarray
    """int64 [reasons]: rows of this share left out, by `REASONS`."""


class ExampleStream:
    """Collective in spirit: every worker iterates its own, and all yield equally many steps."""

    def __init__(
        self,
        examples: Examples,
        config: StreamConfig,
        *,
        seed: int,
        epoch: int,
        rank: int,
        workers: int,
        limits: Limits | None = None,
    ) -> None:
        """`limits` are the ids that have a table row; without them any id from 0 is one.

        Raises `ConfigError` for more workers than lanes, `DataError` for a row group too large to read whole.
        """
        if workers > config.lanes:
            raise ConfigError(f"stream.lanes={config.lanes}: fewer than the {workers} workers; try {workers * 4}")
        self._examples, self._config = examples, config
        self._lanes = range(rank, config.lanes, workers)
        self._limits = limits or Limits(None, None)
        highest = max((bound for bound in (self._limits.users, self._limits.items) if bound is not None), default=2**63)
        self._id_type = np.int32 if highest <= 2**31 else np.int64
        groups = [(part, i) for part in examples.parts for i in range(len(part.group_rows))]
        rows = np.array([part.group_rows[i] for part, i in groups], np.int64)
        if len(rows) and rows.max() > MAX_GROUP_ROWS:
            part, index = groups[int(rows.argmax())]
            raise DataError(
                f"{part.path}: row group {index} has {rows.max():,} rows, more than {MAX_GROUP_ROWS:,}; write the file "
                "with smaller row groups"
            )
        self._groups = groups
        self._order = EpochOrder(rows, lanes=config.lanes, shuffle_rows=config.shuffle_rows, seed=seed, epoch=epoch)

    @property
    def steps(self) -> int:
        """Steps of the epoch, known to every worker without asking."""
        return self._order.steps(self._config.rows_a_lane)

    def batches(self, first_step: int = 0) -> "Background[ExampleRows]":
        """Start to read ahead from a step on; leave the returned `with` block to stop."""
        return Background(lambda: self._lay_out(first_step), depth=self._config.prefetch)

    def _lay_out(self, first_step: int) -> Iterator[ExampleRows]:
        rows_a_lane = self._config.rows_a_lane
        threads = self._config.decode_threads
        with ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=yield_to_steps) as pool:
            readers = [
                _LaneReader(self._order, lane, self._read_block, pool, first_row=first_step * rows_a_lane)
                for lane in self._lanes
            ]
            try:
                for step in range(first_step, self.steps):
                    slices = [one for reader in readers for one in reader.take(rows_a_lane)]
                    yield self._lay_out_step(step, slices)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _lay_out_step(self, step: int, slices: "list[_Slice]") -> ExampleRows:
        skipped = np.zeros(len(REASONS), np.int64)
        counts = [count_rows(one.block.packed, one.rows, skipped) for one in slices]
        examples, history = sum(count[0] for count in counts), sum(count[1] for count in counts)
        ids = np.empty(2 * examples + history + STRIDE, self._id_type)
        length_B, label_B = np.empty(examples, np.int32), np.empty(examples, np.float32)
        place = np.zeros(2, np.int64)
        for one in slices:
            lay_out(one.block.packed, one.block.history, one.rows, ids, length_B, label_B.view(np.int32), place)
        return ExampleRows(
            step=step,
            ids=ids[: 2 * examples + history],
            history_length_B=length_B,
            label_B=label_B,
            global_examples=self._order.step_rows(step, self._config.rows_a_lane),
            skipped=skipped,
        )

    def _read_block(self, block: Block) -> "_ReadBlock":
        c = concatenate([self._read_group(p.group, p.first, p.last) for p in block.pieces])
        if len(c.history) > np.iinfo(np.int32).max:
            raise DataError(
                f"a block of {block.rows:,} rows has {len(c.history):,} history ids, more than 2^31; "
                "lower stream.shuffle_rows or stream.max_history, or write smaller row groups"
            )
        packed = pack(c.user_id, c.item_id, c.offset, c.label, c.refused, self._id_type)
        history = np.zeros(len(c.history) + STRIDE, self._id_type)
        history[: len(c.history)] = c.history
        return _ReadBlock(packed, history)

    def _read_table(self, path: str, group: int) -> pa.Table:
        """Read a row group, again if it fails: a store that is busy for a moment must not cost rows."""
        for delay_s in (*RETRY_DELAYS_S, None):
            try:
                with open_part(self._examples.filesystem, path) as file:
                    return file.read_row_group(group, columns=list(COLUMNS), use_threads=False)
            except (OSError, DataError):
                if delay_s is None:
                    raise
                time.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    def _read_group(self, group: int, first: int, last: int) -> Columns:
        part, index = self._groups[group]
        where = f"{part.path}: row group {index}"
        try:
            table = self._read_table(part.path, index)
            columns = read_columns(table, self._limits, self._config.max_history)
        except (OSError, ValueError, IndexError, pa.ArrowException, DataError) as error:
            # What the system says (gone, not permitted, out of handles) is no fault of the rows: never skipped.
            causes = (error, error.__cause__)
            is_of_system = any(isinstance(one, OSError) and one.errno is not None for one in causes)
            if self._config.bad_rows == "fail" or is_of_system:
                raise DataError(f"{where}: cannot be read ({error})") from error
            columns = no_columns(part.group_rows[index])
        if len(columns) != part.group_rows[index]:
            raise DataError(f"{where}: has {len(columns):,} rows, had {part.group_rows[index]:,}: the file has changed")
        if self._config.bad_rows == "fail":
            assert_all_accepted(columns, where)
        return cut(columns, first, last)


@dataclass(frozen=True, slots=True)
class _ReadBlock:
    packed: np.ndarray
    """As `layout.pack` lays rows out."""
    history: np.ndarray


@dataclass(frozen=True, slots=True)
class _Slice:
    block: _ReadBlock
    rows: np.ndarray
    """int32: which rows of the block, in order."""


class _LaneReader:
    """One lane's rows in order; the next block is being decoded while the open one is used."""

    def __init__(
        self,
        order: EpochOrder,
        lane: int,
        read: Callable[[Block], _ReadBlock],
        pool: ThreadPoolExecutor,
        first_row: int,
    ) -> None:
        self._order, self._lane, self._read, self._pool = order, lane, read, pool
        self._blocks = order.blocks(lane)
        starts = [block.start for block in self._blocks]
        self._number = max(0, int(np.searchsorted(starts, first_row, side="right")) - 1)
        self._place = first_row - starts[self._number] if starts else 0
        self._ahead = self._submit(self._number)
        self._open_block: _ReadBlock | None = None
        self._permutation = np.zeros(0, np.int32)

    def take(self, rows: int) -> list[_Slice]:
        """Return the lane's next rows; fewer at its end."""
        slices = []
        while rows and self._number < len(self._blocks):
            if self._open_block is None:
                self._open()
            assert self._open_block is not None
            count = min(rows, len(self._permutation) - self._place)
            if count:
                slices.append(_Slice(self._open_block, self._permutation[self._place : self._place + count]))
            self._place += count
            rows -= count
            if self._place == len(self._permutation):
                self._open_block, self._place, self._number = None, 0, self._number + 1
        return slices

    def _open(self) -> None:
        assert self._ahead is not None
        block = self._blocks[self._number]
        self._open_block = self._ahead.result()
        self._permutation = self._order.permutation(self._lane, self._number, block.rows)
        self._ahead = self._submit(self._number + 1)

    def _submit(self, number: int) -> "Future[_ReadBlock] | None":
        return self._pool.submit(self._read, self._blocks[number]) if number < len(self._blocks) else None
