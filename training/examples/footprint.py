"""What streaming an examples folder takes of a worker's memory, known before a row is read.

In:  an opened examples folder, the stream's settings.  Out: ids an example looks up; bytes a worker.
Knows nothing of tables. Estimates: the rows that are open at a time follow from the order of the epoch, exactly; the
bytes of a row from the first part's footer.
"""

from dataclasses import dataclass

import numpy as np

from cluster.examples import Examples, open_part
from embeddings.examples import HISTORY
from embeddings.tables import ITEM, USER
from training.examples.lanes import EpochOrder
from training.examples.stream import StreamConfig

_COLUMNS_BYTES = 13
"""Of a row's columns beside its ids: offset, label, whether it is refused."""
_QUEUED_BYTES = 20
"""Of an example in a batch beside its ids: label and lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFootprint:
    """Bytes of one worker."""

    block_bytes: int
    """The open block of every lane and the next one."""
    decode_bytes: int
    """Row groups being decoded: Arrow's columns and ours."""
    batch_bytes: int
    """Batches laid out ahead, with their rows mapped."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.block_bytes + self.decode_bytes + self.batch_bytes


def ids_an_example(examples: Examples, config: StreamConfig) -> dict[str, float]:
    """Return feature to the ids that an example has on average, as the footer of the first part with rows says."""
    part = next(part for part in examples.parts if sum(part.group_rows))
    with open_part(examples.filesystem, part.path) as file:
        footer = file.metadata
        chunks = [
            footer.row_group(group).column(column)
            for group in range(footer.num_row_groups)
            for column in range(footer.num_columns)
        ]
    # An empty history counts as one value: the mean is at least 1.
    values = sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.split(".")[0] == "history")
    mean = values / sum(part.group_rows)
    return {USER: 1.0, ITEM: 1.0, HISTORY: min(mean, float(config.max_history))}


def stream_footprint(
    examples: Examples, config: StreamConfig, *, seed: int, worker: int, workers: int, id_bytes: int
) -> StreamFootprint:
    """Return what a worker's stream takes in the first epoch."""
    ids = sum(ids_an_example(examples, config).values())
    group_rows = np.array([rows for part in examples.parts for rows in part.group_rows], np.int64)
    order = EpochOrder(group_rows, lanes=config.lanes, shuffle_rows=config.shuffle_rows, seed=seed, epoch=0)
    open_rows = 0
    for lane in range(worker, config.lanes, workers):
        rows = [block.rows for block in order.blocks(lane)]
        open_rows += max((one + after for one, after in zip(rows, [*rows[1:], 0], strict=True)), default=0)
    share = -(-config.batch_examples // workers)
    queued = 2 * (config.prefetch + 1)  # as ids, and as rows
    return StreamFootprint(
        block_bytes=int(open_rows * (id_bytes * (ids + 2) + 4)),  # packed with offset and label; a permutation
        decode_bytes=int(config.decode_threads * group_rows.max() * 2 * (8 * ids + _COLUMNS_BYTES)),
        batch_bytes=int(queued * share * (id_bytes * ids + _QUEUED_BYTES)),
    )
