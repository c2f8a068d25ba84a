import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import ConfigError, DataError
from cluster.examples import Examples, load_examples
from training.examples.background import Background
from training.examples.columns import BEYOND, MISSING, NO_ROW, NOT_A_LABEL, REASONS, UNREADABLE, Limits
from training.examples.stream import ExampleRows, ExampleStream, StreamConfig

from .conftest import ITEMS, USERS, bad_table, numbered_table, write_parts

Row = tuple[int, int, tuple[int, ...], float]
LIMITS = Limits(USERS, ITEMS)


def stream_of(
    examples: Examples, *, rank: int = 0, workers: int = 1, epoch: int = 0, limits: Limits = LIMITS, **settings: object
) -> ExampleStream:
    config = StreamConfig(**({"batch_examples": 12, "lanes": 4, "shuffle_rows": 10} | settings))
    return ExampleStream(examples, config, seed=3, epoch=epoch, rank=rank, workers=workers, limits=limits)


def read(stream: ExampleStream, first_step: int = 0) -> list[ExampleRows]:
    with stream.batches(first_step) as shares:
        return list(shares)


def rows_of(share: ExampleRows) -> list[Row]:
    count = len(share.label_B)
    users, items, history = share.ids[:count], share.ids[count : 2 * count], share.ids[2 * count :]
    ends = np.cumsum(share.history_length_B)
    return [
        (int(users[n]), int(items[n]), tuple(history[ends[n] - share.history_length_B[n] : ends[n]].tolist()), label)
        for n, label in enumerate(share.label_B.tolist())
    ]


def steps_of(examples: Examples, workers: int, **settings: object) -> list[Counter[Row]]:
    """Return the rows of each global batch, read by so many workers."""
    shares = [read(stream_of(examples, rank=rank, workers=workers, **settings)) for rank in range(workers)]
    assert len({len(one) for one in shares}) == 1  # every worker has equally many steps
    return [Counter(row for share in step for row in rows_of(share)) for step in zip(*shares, strict=True)]


def whole(first: int, rows: int) -> Counter[Row]:
    table = numbered_table(first, rows).to_pylist()
    return Counter((r["user_id"], r["item_id"], tuple(r["history"]), float(r["label"])) for r in table)


def test_an_epoch_has_every_row_once(write_numbered: Callable[..., Examples]) -> None:
    steps = steps_of(write_numbered(50, 33, 1), workers=1)
    assert sum(steps, Counter()) == whole(0, 84)
    assert [step.total() for step in steps] == [12] * 7


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_any_number_of_workers_sees_the_same_global_batches(
    workers: int, write_numbered: Callable[..., Examples]
) -> None:
    examples = write_numbered(50, 40)
    assert steps_of(examples, workers) == steps_of(examples, 1)


def test_starting_at_a_step_gives_what_was_left(write_numbered: Callable[..., Examples]) -> None:
    stream = stream_of(write_numbered(50, 40), rank=1, workers=2)
    everything = [rows_of(share) for share in read(stream)]
    for first_step in range(len(everything) + 1):
        assert [rows_of(share) for share in read(stream, first_step)] == everything[first_step:]


def test_batches_are_mixed_and_epochs_unlike(write_numbered: Callable[..., Examples]) -> None:
    examples = write_numbered(200)
    first, second = (rows_of(read(stream_of(examples, epoch=epoch))[0]) for epoch in (0, 1))
    assert first != second
    users = [row[0] for row in first]
    assert users != sorted(users)


def test_a_share_knows_how_many_examples_all_workers_have(write_numbered: Callable[..., Examples]) -> None:
    shares = read(stream_of(write_numbered(30), rank=0, workers=2))
    assert [share.global_examples for share in shares] == [12, 12, 6]


def test_longer_histories_keep_the_newest(write_numbered: Callable[..., Examples]) -> None:
    share = read(stream_of(write_numbered(8), max_history=1))[0]
    histories = {row[0]: row[2] for row in rows_of(share)}
    assert histories == {0: (), 1: (1,), 2: (3,), 3: (5,), 4: (), 5: (5,), 6: (7,), 7: (9,)}


def test_empty_parts_change_nothing(write_numbered: Callable[..., Examples]) -> None:
    assert sum(steps_of(write_numbered(20, 0, 5), 2), Counter()) == whole(0, 25)


def test_fewer_rows_than_lanes_are_all_read(write_numbered: Callable[..., Examples]) -> None:
    assert sum(steps_of(write_numbered(2), 3), Counter()) == whole(0, 2)


def test_a_part_that_is_gone_is_an_error_even_where_bad_rows_are_skipped(
    write_numbered: Callable[..., Examples], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.examples.stream.RETRY_DELAYS_S", (0.0,))
    examples = write_numbered(14, 14)
    (tmp_path / "rows" / "part-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00001.parquet: row group \d: cannot be read"):
        read(stream_of(examples, bad_rows="skip"))


def test_a_part_of_other_rows_is_an_error_even_where_bad_rows_are_skipped(
    write_numbered: Callable[..., Examples], tmp_path: Path
) -> None:
    examples = write_numbered(14, 14)
    pq.write_table(numbered_table(0, 10), tmp_path / "rows" / "part-00001.parquet", row_group_size=5)
    with pytest.raises(DataError, match=r"part-00001.parquet: row group \d: has 5 rows, had 7"):
        read(stream_of(examples, bad_rows="skip"))


READS_AT_NICE_15 = """
import os, sys, threading
os.nice(15 - os.nice(0))  # as Ray starts its workers
from training.examples.background import Background
def say():
    yield os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
with Background(say, depth=1) as said:
    print(*said, os.getpriority(os.PRIO_PROCESS, os.getpid()))
"""


def test_readers_have_a_lower_priority_than_the_step_also_within_ray() -> None:
    said = subprocess.run([sys.executable, "-c", READS_AT_NICE_15], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["19", "15"]


def test_ids_without_limit_are_64_bit(write_numbered: Callable[..., Examples]) -> None:
    shares = read(stream_of(write_numbered(10), limits=Limits(None, None)))
    assert {share.ids.dtype for share in shares} == {np.dtype(np.int64)}


BAD = {
    "nan": ("label", float("nan"), pa.float32(), NOT_A_LABEL),
    "label two": ("label", 2, pa.int8(), NOT_A_LABEL),
    "no label": ("label", None, pa.float64(), MISSING),
    "beyond 2^63": ("user_id", 2**63, pa.uint64(), BEYOND),
    "negative": ("item_id", -1, pa.int64(), BEYOND),
    "no user": ("user_id", None, pa.int32(), MISSING),
    "no row": ("user_id", USERS, pa.int64(), NO_ROW),
    "no row in history": ("history", [1, ITEMS, 2], pa.list_(pa.int64()), NO_ROW),
    "no history": ("history", None, pa.list_(pa.int32()), MISSING),
    "missing in history": ("history", [1, None], pa.list_(pa.int32()), MISSING),
    "history beyond 2^63": ("history", [2**64 - 1], pa.large_list(pa.uint64()), BEYOND),
}


@pytest.mark.parametrize(("column", "value", "kind", "reason"), BAD.values(), ids=list(BAD))
def test_a_row_that_cannot_be_used_is_an_error_that_names_it(
    column: str, value: object, kind: pa.DataType, reason: str, tmp_path: Path
) -> None:
    examples = write_parts(tmp_path / "bad", [bad_table(column, value, kind)], group_rows=3)
    with pytest.raises(DataError) as error:
        read(stream_of(examples))
    assert "part-00000.parquet: row group 1: row 1: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(("column", "value", "kind", "reason"), BAD.values(), ids=list(BAD))
def test_a_row_that_cannot_be_used_is_left_out_and_counted_where_the_recipe_says_so(
    column: str, value: object, kind: pa.DataType, reason: str, tmp_path: Path
) -> None:
    examples = write_parts(tmp_path / "bad", [bad_table(column, value, kind)], group_rows=3)
    shares = read(stream_of(examples, bad_rows="skip"))
    skipped = sum(share.skipped for share in shares)
    assert dict(zip(REASONS, skipped.tolist(), strict=True)) == {r: int(r == reason) for r in REASONS}
    assert sum((Counter(rows_of(share)) for share in shares), Counter()) == whole(0, 4) + whole(5, 5)


def damage(path: Path, group: int) -> None:
    """Overwrite the middle of a row group's user ids."""
    chunk = pq.read_metadata(path).row_group(group).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.file_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


def test_a_damaged_row_group_is_an_error_that_names_it(write_numbered: Callable[..., Examples], tmp_path: Path) -> None:
    examples = write_numbered(14, 14)
    damage(tmp_path / "rows" / "part-00001.parquet", 1)
    with pytest.raises(DataError, match=r"part-00001.parquet: row group 1: cannot be read"):
        read(stream_of(examples))


def test_a_damaged_row_group_is_counted_row_by_row_where_the_recipe_says_so(
    write_numbered: Callable[..., Examples], tmp_path: Path
) -> None:
    examples = write_numbered(14, 14)
    damage(tmp_path / "rows" / "part-00001.parquet", 1)
    shares = read(stream_of(examples, bad_rows="skip"))
    assert sum(share.skipped for share in shares).tolist() == [7 * (reason == UNREADABLE) for reason in REASONS]
    assert sum((Counter(rows_of(share)) for share in shares), Counter()) == whole(0, 21)


def test_a_row_group_too_large_to_hold_is_refused(
    write_numbered: Callable[..., Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.examples.stream.MAX_GROUP_ROWS", 6)
    with pytest.raises(DataError, match="row group 0 has 7 rows, more than 6"):
        stream_of(write_numbered(14))


def test_more_workers_than_lanes_are_refused(write_numbered: Callable[..., Examples]) -> None:
    with pytest.raises(ConfigError, match=r"stream.lanes=4: fewer than the 5 workers"):
        stream_of(write_numbered(14), workers=5)


def test_a_batch_that_lanes_cannot_share_names_the_nearest_one_that_they_can() -> None:
    with pytest.raises(ConfigError, match=r"stream.batch_examples=100: must be a multiple of stream.lanes=16; try 96"):
        StreamConfig(batch_examples=100)


def test_leaving_early_ends_the_threads(write_numbered: Callable[..., Examples]) -> None:
    stream = stream_of(write_numbered(84), prefetch=1)
    with stream.batches() as shares:
        next(iter(shares))
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("batches", "decode"))]


def test_memory_holds_no_more_batches_than_asked_for() -> None:
    made = []

    def make() -> object:
        for n in range(100):
            made.append(n)
            yield n

    with Background(make, depth=3) as items:
        assert next(iter(items)) == 0
        threading.Event().wait(0.2)
        assert len(made) <= 1 + 3 + 1  # taken, ready, waiting to be put


def test_an_object_store_uri_is_read_alike(write_numbered: Callable[..., Examples], tmp_path: Path) -> None:
    local = write_numbered(30)
    remote = load_examples(f"file://{tmp_path}/rows")
    assert steps_of(remote, 2) == steps_of(local, 2)
    assert remote.marks == local.marks
