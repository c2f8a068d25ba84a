from itertools import islice, pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.plain_torch import Columns, Rows, build_plain, read_batches
from benchmarks.planted import write_examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of 140,000 rows: of each, a full row group and one of 8,928."""
    folder = tmp_path_factory.mktemp("planted")
    return write_examples(folder, 280_000, 2000, 1000, seed=3, part_rows=140_000, heldout_rows=1)


def rows_of(batch: Columns) -> list[tuple[int, int, list[int], float]]:
    starts = [*batch.start_B.tolist(), len(batch.history_N)]
    history = batch.history_N.tolist()
    histories = [history[a:b] for a, b in pairwise(starts)]
    return list(zip(batch.user_B.tolist(), batch.item_B.tolist(), histories, batch.label_B.tolist(), strict=True))


def test_batches_hold_the_files_rows_in_their_order(folder: Path) -> None:
    path = folder / "part-00000.parquet"
    batches = list(read_batches([path], 1000))
    # 131 batches of the first row group and 8 of the second; 72 and 928 rows are left at their ends.
    assert [len(batch.label_B) for batch in batches] == [1000] * 139
    table = pq.read_table(path)
    for first, batch in ((0, batches[0]), (130_000, batches[130]), (131_072, batches[131])):
        columns = table.slice(first, 1000).to_pydict()
        assert rows_of(batch) == list(zip(*columns.values(), strict=True))


def test_shares_read_each_row_group_once(folder: Path) -> None:
    paths = sorted(folder.glob("part-*.parquet"))
    counts = [sum(1 for _ in read_batches(paths, 8928, share=share, shares=2)) for share in (0, 1)]
    # The full groups, 14 batches each, go to one share; the short ones, one batch each, to the other.
    assert counts == [28, 2]


def test_rows_start_over_at_their_end(folder: Path) -> None:
    rows = Rows(sorted(folder.glob("part-*.parquet")), 65_536)
    first, *_, fifth = islice(rows, 5)
    assert rows_of(first) == rows_of(fifth)


def test_the_baseline_learns(folder: Path) -> None:
    run = build_plain(0, folder=str(folder), batch=4096, threads=1)
    start, end = run(1), run(40)
    assert start.examples == 4096
    assert end.examples == 40 * 4096
    # From about log 2 with rows of zeros to below 0.61, the entropy of 3 in 10.
    assert start.loss > 0.65
    assert end.loss < 0.6
