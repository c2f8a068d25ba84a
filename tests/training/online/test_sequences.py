"""Sequences from the live log, by hand and against those that batch training cuts from the same history."""

from dataclasses import fields

import numpy as np
import pytest

from cluster.events import KINDS, Event, events_table
from cluster.log import EventLog, Interaction
from embeddings.batch import PAD, Sequences
from embeddings.vocabulary import Vocabulary
from training.online.sequences import LiveHistory, build_live_sequences, join_sequences
from training.stream import Windows, build_history, build_sequences, windows_before

ITEMS = Vocabulary(["a", "b", "c", "d", "e"], 10)
CLICK, RATING = KINDS.index("click"), KINDS.index("rating")
NAN = float("nan")
LONG = [
    ("a", "click", None),
    ("b", "rating", 4.0),
    ("c", "purchase", 19.9),
    ("d", "rating", 1.5),
    ("a", "share", None),
    ("e", "dwell", 30.0),
]


def interaction(item_id, seq, kind="click", value=None):
    return Interaction(item_id=item_id, kind=kind, value=value, ts_us=seq * 1_000_000 + 999_999, seq=seq)


def columns_of(sequences: Sequences) -> dict:
    return {f.name: getattr(sequences, f.name) for f in fields(Sequences)}


def assert_equal(found: Sequences, expected: dict) -> None:
    for name, column in columns_of(found).items():
        np.testing.assert_array_equal(column, expected[name], err_msg=name, strict=True)


def test_one_new_click_after_two_old_ones_is_the_only_target():
    history = LiveHistory(3, [interaction("a", -7), interaction("b", 4, "rating", 4.5), interaction("c", 9)], 9)
    expected = {
        "user_row_B": np.array([3]),
        "item_row_BL": np.array([[0, 1]]),
        "kind_BL": np.array([[CLICK, RATING]]),
        "value_BL": np.array([[NAN, 4.5]], np.float32),
        "ts_BL": np.array([[-7 + 0, 4]]),
        "target_row_BL": np.array([[PAD, 2]]),
        "target_rating_BL": np.array([[NAN, NAN]], np.float32),
        "weight_BL": np.ones((1, 2), np.float32),
    }
    assert_equal(build_live_sequences([history], ITEMS), expected)


def test_users_of_unlike_length_are_aligned_at_their_newest_interaction():
    long = LiveHistory(0, [interaction(item, seq) for seq, item in enumerate("abcd", 1)], 3)
    short = LiveHistory(PAD, [interaction("e", 5), interaction("a", 6, "rating", 2.0)], 5)
    found = build_live_sequences([long, short], ITEMS)
    np.testing.assert_array_equal(found.user_row_B, [0, PAD])
    np.testing.assert_array_equal(found.item_row_BL, [[0, 1, 2], [PAD, PAD, 4]])
    np.testing.assert_array_equal(found.target_row_BL, [[PAD, 2, 3], [PAD, PAD, 0]])
    np.testing.assert_array_equal(found.target_rating_BL, [[NAN] * 3, [NAN, NAN, 2.0]])


def test_a_first_interaction_of_all_has_nothing_before_it_and_no_target():
    found = build_live_sequences([LiveHistory(0, [interaction("a", 1)], 1)], ITEMS)
    np.testing.assert_array_equal(found.item_row_BL, [[PAD]])
    np.testing.assert_array_equal(found.target_row_BL, [[PAD]])


def stream(user_id: str, entries: list, start_us: int) -> list[Event]:
    return [
        Event(user_id=user_id, item_id=item, kind=kind, value=value, ts_us=start_us + n * 60_000_001)
        for n, (item, kind, value) in enumerate(entries)
    ]


@pytest.mark.parametrize("length", [3, 10])
def test_the_log_and_a_dataset_give_the_same_sequences_of_the_same_history(tmp_path, length):
    users = Vocabulary(["v", "u"], 10)
    events = sorted(stream("u", LONG, 0) + stream("v", LONG[::-1][:3], 30_000_000), key=lambda event: event.ts_us)
    history = build_history(events_table(events), ITEMS, users)
    from_batch = build_sequences(history, windows_before(history, history.ends - 1, length))

    with EventLog(tmp_path / "events.db") as log:
        log.seed_history("past", events_table(events[:3]))
        log.append(events[3:])
        live = [
            LiveHistory(users.row(user_id), log.user_state(user_id, length + 1).history, first_new_seq=-(2**62))
            for user_id in ("v", "u")
        ]
    assert_equal(build_live_sequences(live, ITEMS), columns_of(from_batch))


def test_impressions_and_dislikes_are_in_neither(tmp_path):
    users = Vocabulary(["u"], 10)
    entries = [("a", "click", None), ("b", "impression", None), ("c", "dislike", None), ("d", "like", None)]
    events = stream("u", entries, 0)
    history = build_history(events_table(events), ITEMS, users)
    from_batch = build_sequences(history, Windows(history.starts, history.ends - 1))
    np.testing.assert_array_equal(from_batch.item_row_BL, [[0]])
    with EventLog(tmp_path / "events.db") as log:
        log.append(events)
        live = LiveHistory(0, log.user_state("u", 10).history, first_new_seq=1)
    assert_equal(build_live_sequences([live], ITEMS), columns_of(from_batch))


@pytest.mark.parametrize("swap", [False, True])
def test_joined_sequences_are_padded_in_front(swap):
    long = build_live_sequences([LiveHistory(0, [interaction(i, s) for s, i in enumerate("abcd", 1)], 1)], ITEMS)
    short = build_live_sequences([LiveHistory(1, [interaction("e", 5), interaction("a", 6, "rating", 2.0)], 5)], ITEMS)
    joined = join_sequences(short, long) if swap else join_sequences(long, short)
    at = 0 if swap else 1
    np.testing.assert_array_equal(joined.user_row_B, [1, 0] if swap else [0, 1])
    np.testing.assert_array_equal(joined.item_row_BL[at], [PAD, PAD, 4])
    np.testing.assert_array_equal(joined.target_row_BL[at], [PAD, PAD, 0])
    np.testing.assert_array_equal(joined.target_rating_BL[at], [NAN, NAN, 2.0])
    np.testing.assert_array_equal(joined.value_BL[at], [NAN, NAN, NAN])
    np.testing.assert_array_equal(joined.ts_BL[at], [0, 0, 5])
    np.testing.assert_array_equal(joined.item_row_BL[1 - at], long.item_row_BL[0])
