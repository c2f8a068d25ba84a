import numpy as np
import pytest

from training.examples.lanes import EpochOrder


def order_of(group_rows: list[int], *, lanes: int = 3, shuffle_rows: int = 5, epoch: int = 0) -> EpochOrder:
    return EpochOrder(np.array(group_rows), lanes=lanes, shuffle_rows=shuffle_rows, seed=1, epoch=epoch)


def rows_of(order: EpochOrder, lane: int) -> list[tuple[int, int]]:
    """Return (row group, row) of every row of the lane, unpermuted."""
    pieces = [piece for block in order.blocks(lane) for piece in block.pieces]
    return [(piece.group, row) for piece in pieces for row in range(piece.first, piece.last)]


@pytest.mark.parametrize("group_rows", [[7, 7, 7], [1, 0, 20, 3, 0], [2], [50, 1]])
def test_every_row_is_in_exactly_one_lane(group_rows: list[int]) -> None:
    order = order_of(group_rows)
    everything = sorted(row for lane in range(3) for row in rows_of(order, lane))
    assert everything == [(group, row) for group, rows in enumerate(group_rows) for row in range(rows)]


def test_lanes_differ_by_one_row_at_most() -> None:
    order = order_of([7, 7, 6])
    assert sorted(order.lane_rows(lane) for lane in range(3)) == [6, 7, 7]


def test_blocks_hold_at_least_the_rows_to_shuffle_but_for_the_last() -> None:
    order = order_of([2] * 20, lanes=2)
    sizes = [block.rows for block in order.blocks(0)]
    assert sizes == [6, 6, 6, 2]
    assert [block.start for block in order.blocks(0)] == [0, 6, 12, 18]


def test_an_epoch_ends_when_the_longest_lane_does() -> None:
    order = order_of([7, 7, 6])  # lanes of 6, 7 and 7 rows
    assert order.steps(rows_a_lane=3) == 3
    assert [order.step_rows(step, 3) for step in range(4)] == [9, 9, 2, 0]


def test_another_epoch_has_another_order_and_the_same_epoch_the_same() -> None:
    groups = [3] * 30
    first, again, second = order_of(groups), order_of(groups), order_of(groups, epoch=1)
    assert rows_of(first, 0) == rows_of(again, 0) != rows_of(second, 0)
    assert first.permutation(0, 0, 9).tolist() == again.permutation(0, 0, 9).tolist()
    assert first.permutation(0, 0, 9).tolist() != first.permutation(1, 0, 9).tolist()


def test_no_rows_make_no_steps() -> None:
    assert order_of([]).steps(3) == 0
    assert order_of([0, 0]).steps(3) == 0
