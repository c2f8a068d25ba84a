"""Events of some users become examples: histories, impressions that were followed, and what is drawn against them."""

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import DataError
from training.prepare.external_ids import COUNT_SCHEMA, count_ids, digests, merge_counts
from training.prepare.sessions import (
    CHOSEN,
    IMPRESSION,
    LISTED,
    LISTED_POSITION,
    NO_REQUEST,
    ROW_SCHEMA,
    UNWANTED,
    ItemTable,
    build_examples,
    expand,
)

Row = tuple[int, int, int, int, int]  # user, position, item, role, request


def examples_of(rows: list[Row], *, history: int = 20, listed: dict[int, int] | None = None) -> pa.Table:
    """Sessionise rows, each at a time of 10 times its position; `listed` are numbers of users."""
    values = [(*row, 10 * row[1]) for row in rows]
    values += [(user, LISTED_POSITION, 0, LISTED, NO_REQUEST, number) for user, number in (listed or {}).items()]
    columns = [[0] * len(values), *map(list, zip(*values, strict=True))]
    table = pa.Table.from_arrays([pa.array(column) for column in columns], ROW_SCHEMA.names).cast(ROW_SCHEMA)
    return build_examples(table, history=history, part_events=100, seed=0)


def seen(examples: pa.Table) -> list[tuple[int, int, int, list[int]]]:
    """Return position, item, label and history of each example, by position."""
    rows = sorted(examples.to_pylist(), key=lambda row: row["position"])
    return [(row["position"], row["item"], row["label"], row["history"]) for row in rows]


def plainly(rows: list[Row], history: int) -> list[tuple[int, int, int, list[int]]]:
    """Return the same by a plain loop."""
    found, past = [], {}
    for user, position, item, role, request in rows:
        later = [r[4] for r in rows[position + 1 :] if (r[0], r[2], r[3]) == (user, item, CHOSEN)]
        followed = any(-1 in (request, other) or request == other for other in later)
        if role != IMPRESSION or not followed:
            found.append((position, item, int(role == CHOSEN), past.get(user, [])[-history:]))
        if role == CHOSEN:
            past.setdefault(user, []).append(item)
    return found


def test_a_history_is_what_the_user_chose_before_and_no_one_else():
    rows = [(7, 0, 1, CHOSEN, -1), (9, 1, 5, CHOSEN, -1), (7, 2, 2, CHOSEN, -1), (9, 3, 6, CHOSEN, -1)]
    assert seen(examples_of(rows)) == [(0, 1, 1, []), (1, 5, 1, []), (2, 2, 1, [1]), (3, 6, 1, [5])]


def test_a_history_is_cut_to_the_newest_items():
    rows = [(7, position, position, CHOSEN, -1) for position in range(5)]
    histories = [history for *_, history in seen(examples_of(rows, history=2))]
    assert histories == [[], [0], [0, 1], [1, 2], [2, 3]]


def test_skips_are_examples_of_label_0_and_enter_no_history():
    rows = [(7, 0, 1, CHOSEN, -1), (7, 1, 2, UNWANTED, -1), (7, 2, 3, CHOSEN, -1)]
    assert seen(examples_of(rows)) == [(0, 1, 1, []), (1, 2, 0, [1]), (2, 3, 1, [1])]


@pytest.mark.parametrize(
    ("shown", "chosen", "is_example"),
    [
        ((7, 0, 1, IMPRESSION, -1), (7, 1, 1, CHOSEN, -1), False),  # later, of the same user and item
        ((7, 1, 1, IMPRESSION, -1), (7, 0, 1, CHOSEN, -1), True),  # earlier
        ((7, 0, 1, IMPRESSION, -1), (7, 1, 2, CHOSEN, -1), True),  # another item
        ((7, 0, 1, IMPRESSION, -1), (8, 1, 1, CHOSEN, -1), True),  # another user
        ((7, 0, 1, IMPRESSION, 3), (7, 1, 1, CHOSEN, 3), False),  # the same request
        ((7, 0, 1, IMPRESSION, 3), (7, 1, 1, CHOSEN, 4), True),  # another request
        ((7, 0, 1, IMPRESSION, 3), (7, 1, 1, CHOSEN, -1), False),  # the interaction names none
        ((7, 0, 1, IMPRESSION, -1), (7, 1, 1, CHOSEN, 4), False),  # the impression names none
    ],
)
def test_an_impression_is_an_example_where_nothing_followed(shown: Row, chosen: Row, is_example: bool):
    labels = {position: label for position, _, label, _ in seen(examples_of([shown, chosen]))}
    assert labels == ({shown[1]: 0} if is_example else {}) | {chosen[1]: 1}


def test_rows_in_any_order_give_what_a_plain_loop_gives():
    rng = np.random.default_rng(0)
    rows = [
        (int(user), position, int(item), int(role), int(request))
        for position, (user, item, role, request) in enumerate(rng.integers((0, 0, 1, -1), (5, 9, 4, 2), (200, 4)))
    ]
    shuffled = [rows[at] for at in rng.permutation(200)]
    one, other = (examples_of(order, history=3).sort_by("position") for order in (rows, shuffled))
    assert one.equals(other)
    assert seen(one) == plainly(rows, history=3)
    assert 0 < one.num_rows < 200  # some impressions were followed


def test_a_listed_user_is_called_by_number_and_draws_the_same():
    rows = [(7, 0, 1, CHOSEN, -1), (9, 1, 5, CHOSEN, -1), (7, 2, 2, CHOSEN, -1)]
    plain, numbered = (examples_of(rows, listed=listed).sort_by("position") for listed in (None, {7: 0, 9: 1}))
    assert plain["user_id"].to_pylist() == [7, 9, 7]
    assert numbered["user_id"].to_pylist() == [0, 1, 0]
    assert plain["draw"].equals(numbered["draw"])
    assert len(set(plain["draw"].to_pylist())) == 3


def item_table(counts: list[int]) -> ItemTable:
    ids = np.arange(len(counts))
    return ItemTable.build(digest=ids * 100, id=ids + 1000, count=np.array(counts), power=0.75)


@pytest.mark.parametrize(("excluded", "expected"), [(0, [0, 1, 27]), (1, [8, 0, 27]), (2, [8, 1, 0])])
def test_items_are_drawn_by_smoothed_count_among_all_others(excluded: int, expected: list[int]):
    items = item_table([15, 0, 80])  # (count + 1)^¾ is 8, 1 and 27
    pieces = sum(expected)
    uniform = (np.arange(pieces) + 0.5) / pieces
    drawn = items.draw(uniform, np.full(pieces, excluded, dtype=np.int32))
    assert np.bincount(drawn, minlength=3).tolist() == expected


def test_a_positive_is_followed_by_other_items_with_its_history_and_time():
    rows = [(7, 0, 1, CHOSEN, -1), (7, 1, 2, UNWANTED, -1), (7, 2, 0, CHOSEN, -1)]
    examples, items = examples_of(rows), item_table([1, 1, 1])
    written = expand(examples, 0, 7, items, negatives=2)
    assert written["label"].to_pylist() == [1, 0, 0, 0, 1, 0, 0]
    assert written["history"].to_pylist() == [[]] * 3 + [[1001]] * 4
    assert written["ts_us"].to_pylist() == [0, 0, 0, 10, 20, 20, 20]
    item = written["item_id"].to_pylist()
    assert (item[0], item[3], item[4]) == (1001, 1002, 1000)
    assert set(item[1:3]) <= {1000, 1002}
    assert set(item[5:7]) <= {1001, 1002}
    pieces = [expand(examples, first, last, items, negatives=2) for first, last in ((0, 2), (2, 5), (5, 7))]
    assert pa.concat_tables(pieces).equals(written)


def test_counts_of_the_same_id_add_up_over_batches():
    batches = [
        pa.table({"user_id": ["a", "b", "a"], "item_id": ["x"] * 3, "kind": ["click"] * 3}),
        pa.table({"user_id": ["b", "b"], "item_id": ["x", "a"], "kind": ["click", "skip"]}),
    ]
    merged = merge_counts(pa.concat_tables([count_ids(batch, buckets=1) for batch in batches])).to_pylist()
    counts = {(row["column"], row["external_id"]): row["count"] for row in merged}
    assert counts == {(0, "a"): 2, (0, "b"): 3, (1, "x"): 4, (1, "a"): 1, (2, "click"): 4, (2, "skip"): 1}


def test_a_digest_is_63_bits_of_blake2b():
    # echo -n user-1 | b2sum -l 64 gives 9aac5a8621eae188: little-endian, halved
    assert digests(["user-1", ""]).tolist() == [4931711044313503309, 6510301506637419378]


def test_two_ids_of_one_digest_are_an_error_that_names_both():
    columns = {"bucket": [0, 0], "column": [1, 1], "external_id": ["ball", "doll"], "digest": [5, 5], "count": [1, 1]}
    with pytest.raises(DataError, match=r"item_id: 'ball' and 'doll' have one digest"):
        merge_counts(pa.table(columns, schema=COUNT_SCHEMA))
    apart = pa.table({**columns, "column": [0, 1]}, schema=COUNT_SCHEMA)  # a user and an item may share one
    assert merge_counts(apart).num_rows == 2
