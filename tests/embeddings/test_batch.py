"""A batch lists each row once; its positions lead back to every row it was made of."""

from dataclasses import fields

import numpy as np
import torch

from embeddings.batch import PAD, Batch, Sequences, build_batch, share_of_batch
from embeddings.tables import build_lookup

TEXT = np.arange(20, dtype=np.float32).reshape(10, 2)
LOG_Q = np.log(np.full(10, 1 / 10))


def sequences(history: list[list[int]], target: list[list[int]], users: list[int]) -> Sequences:
    shape = (len(history), len(history[0]))
    return Sequences(
        user_row_B=np.array(users),
        item_row_BL=np.array(history),
        kind_BL=np.zeros(shape, np.int64),
        value_BL=np.full(shape, np.nan, np.float32),
        ts_BL=np.zeros(shape, np.int64),
        target_row_BL=np.array(target),
        target_rating_BL=np.full(shape, np.nan, np.float32),
        weight_BL=np.ones(shape, np.float32),
    )


def drawn_batch() -> Batch:
    """The one that embeddings/batch.py draws, with a padded second sequence."""
    return build_batch(
        sequences([[7, 3, 7, 9], [PAD, PAD, PAD, 7]], [[3, 7, 9, 4], [PAD, PAD, PAD, PAD]], [20, PAD]),
        np.array([4, 8, 7]),
        TEXT,
        LOG_Q,
    )


def test_the_batch_is_the_one_its_module_draws() -> None:
    # The padding of the second sequence stands in for row 0, which is looked up and masked.
    batch = drawn_batch()
    assert batch.item_rows_N.tolist() == [0, 3, 4, 7, 8, 9]
    assert batch.history_BL[0].tolist() == [3, 1, 3, 5]
    assert batch.target_BL[0].tolist() == [1, 3, 5, 2]
    assert batch.negative_S.tolist() == [2, 4, 3]


def test_positions_lead_back_to_the_rows() -> None:
    batch = drawn_batch()
    assert batch.item_rows_N[batch.history_BL[0]].tolist() == [7, 3, 7, 9]
    assert batch.item_rows_N[batch.negative_S].tolist() == [4, 8, 7]
    assert torch.equal(batch.text_NE, torch.from_numpy(TEXT)[batch.item_rows_N])
    torch.testing.assert_close(batch.log_q_N.exp(), torch.full((6,), 1 / 10))


def test_padding_is_neither_present_nor_learned() -> None:
    batch = drawn_batch()
    assert batch.present_BL.tolist() == [[True] * 4, [False, False, False, True]]
    assert batch.target_BL[1].tolist() == [PAD] * 4
    assert batch.has_user_B.tolist() == [True, False]
    assert batch.user_row_B.tolist() == [20, 0]


def test_moved_to_a_device_it_is_the_same_batch() -> None:
    batch = drawn_batch()
    moved = batch.to(torch.device("meta"))
    assert moved.history_BL.device.type == "meta"
    assert moved.history_BL.shape == batch.history_BL.shape


def test_the_lookup_lists_each_table_s_rows_once() -> None:
    lookup = build_lookup({"item": torch.tensor([3, 4, 7, 8, 9]), "user": torch.tensor([20, 41])})
    assert lookup.keys() == ["item", "user"]
    assert lookup.lengths().tolist() == [5, 2]
    assert lookup.values().tolist() == [3, 4, 7, 8, 9, 20, 41]
    assert lookup.stride() == 1


def test_a_share_is_the_batch_of_its_sequences_alone_without_the_padding_they_have_in_common() -> None:
    found = share_of_batch(drawn_batch(), torch.tensor([False, True]), TEXT)
    alone = build_batch(sequences([[7]], [[PAD]], [PAD]), np.array([4, 8, 7]), TEXT, LOG_Q)
    for name in (f.name for f in fields(Batch)):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name), equal_nan=True)


def test_a_share_of_no_sequences_has_the_negatives_and_nothing_to_learn() -> None:
    found = share_of_batch(drawn_batch(), torch.tensor([False, False]), TEXT)
    assert found.item_rows_N[found.negative_S].tolist() == [4, 8, 7]
    assert (found.target_BL.tolist(), found.present_BL.tolist(), found.has_user_B.tolist()) == (
        [[PAD]],
        [[False]],
        [False],
    )
