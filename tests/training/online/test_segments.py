"""Segments on sequences that can be read by eye."""

import numpy as np

from embeddings.batch import PAD, Sequences
from training.online.segments import Segments


def sequences(user_row_B, target_row_BL) -> Sequences:
    shape = np.shape(target_row_BL)
    return Sequences(
        user_row_B=np.array(user_row_B),
        item_row_BL=np.zeros(shape, np.int64),
        kind_BL=np.zeros(shape, np.int64),
        value_BL=np.zeros(shape, np.float32),
        ts_BL=np.zeros(shape, np.int64),
        target_row_BL=np.array(target_row_BL),
        target_rating_BL=np.zeros(shape, np.float32),
        weight_BL=np.ones(shape, np.float32),
    )


def test_users_are_known_that_the_version_had_and_items_popular_that_make_half_of_the_past():
    segments = Segments(np.array([1, 6, 2, 3]), user_rows=2)  # item 1 has 6 of 12, so it alone is the head
    found = segments.of(sequences([0, 5, PAD, 1], [[PAD, 1], [1, 2], [PAD, 3], [PAD, 1]]), reused_user_rows={1})
    assert {name: in_P.astype(int).tolist() for name, in_P in found.items()} == {
        "known users": [1, 0, 0, 0, 0],  # user 1's row is somebody else's by now
        "new users": [0, 1, 1, 1, 1],
        "head items": [1, 1, 0, 0, 1],
        "tail items": [0, 0, 1, 1, 0],
    }


def test_with_no_past_there_is_no_head():
    found = Segments(np.zeros(3), user_rows=0).of(sequences([0], [[2]]), set())
    assert (found["head items"].tolist(), found["tail items"].tolist()) == ([False], [True])
