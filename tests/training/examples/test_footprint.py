"""What streaming takes: counted by hand on rows that are told apart by their number."""

from collections.abc import Callable

import pytest

from cluster.examples import Examples
from training.examples.footprint import ids_an_example, stream_footprint
from training.examples.stream import StreamConfig

STREAM = StreamConfig(batch_examples=8, lanes=2, shuffle_rows=10, prefetch=3)


def test_ids_an_example_are_those_of_the_footer(write_numbered: Callable[..., Examples]) -> None:
    # Histories of 0, 1, 2, 3 items in turn; an empty one counts as one: 7 values in 4 rows.
    assert ids_an_example(write_numbered(40), STREAM) == {"user": 1.0, "item": 1.0, "history": 1.75}


def test_no_more_ids_than_the_stream_keeps(write_numbered: Callable[..., Examples]) -> None:
    config = StreamConfig(batch_examples=8, lanes=2, max_history=1)
    assert ids_an_example(write_numbered(40), config)["history"] == 1.0


def test_a_worker_holds_two_blocks_of_each_of_its_lanes(write_numbered: Callable[..., Examples]) -> None:
    examples = write_numbered(80, group_rows=10)  # two lanes of 40 rows, blocks of 10
    one = stream_footprint(examples, STREAM, seed=0, worker=0, workers=1, id_bytes=4)
    two = stream_footprint(examples, STREAM, seed=0, worker=1, workers=2, id_bytes=4)
    # A row is user, item, offset and label of 4 bytes each, 1.75 history ids, and its place in the permutation.
    assert one.block_bytes == 2 * 2 * 10 * (4 * 5.75 + 4)
    assert two.block_bytes == one.block_bytes / 2
    assert one.batch_bytes == 2 * (3 + 1) * 8 * (4 * 3.75 + 20)
    assert one.total_bytes == one.block_bytes + one.decode_bytes + one.batch_bytes


def test_larger_row_groups_take_more_to_decode(write_numbered: Callable[..., Examples]) -> None:
    small, large = (
        stream_footprint(
            write_numbered(80, group_rows=rows, name=str(rows)), STREAM, seed=0, worker=0, workers=1, id_bytes=4
        )
        for rows in (10, 40)
    )
    assert large.decode_bytes == pytest.approx(4 * small.decode_bytes, abs=4)
