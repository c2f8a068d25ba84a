"""`recloop examples`: exact rows of a dataset small enough to read, on a real Ray, and the command as it is typed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, Dataset, load_dataset, write_dataset
from cluster.errors import ConfigError, DataError
from cluster.events import Event, events_table
from cluster.examples import load_examples
from training.prepare.examples import ExamplesConfig, prepare_examples
from training.prepare.external_ids import digests
from training.prepare.movielens import prepare_movielens

pytestmark = pytest.mark.timeout(300)  # the first test waits for Ray and its workers

# seconds, user, kind, item, request; equal times stay in this order
SHOWN = """
1 ann click a -
2 ann impression b r1
2 bob impression a -
2 ann impression c r1
4 ann click c r1
5 ann skip d -
6 ann impression c r2
7 bob purchase a r9
8 bob click b -
"""
CLICKED = "\n".join(f"{n} u{n % 7} click i{n * n % 11} -" for n in range(100))

# user 0 is ann (6 events), 1 bob (3); item 0 is a (3 events), 1 c (3), 2 b (2), 3 d (1)
SHOWN_ROWS = [
    # user, item, history, label, seconds
    (0, 0, [], 1, 1),
    (0, 2, [0], 0, 2),  # b was shown to ann and not clicked; a was shown to bob, who buys it later; ann clicks c
    (0, 1, [0], 1, 4),
    (0, 3, [0, 1], 0, 5),  # a skip
    (0, 1, [0, 1], 0, 6),  # c again, in another request
    (1, 0, [], 1, 7),
    (1, 2, [0], 1, 8),
]


def build_dataset(path: Path, text: str) -> Dataset:
    events = [
        Event(
            event_id=str(row),
            ts_us=int(seconds) * 1_000_000,
            user_id=user,
            kind=kind,
            item_id=item,
            request_id=None if request == "-" else request,
        )
        for row, line in enumerate(text.split("\n"))
        if line
        for seconds, user, kind, item, request in [line.split()]
    ]
    items = [{"item_id": i, "domain": "d", "text": "", "categories": []} for i in sorted({e.item_id for e in events})]
    users = [{"user_id": user, "attributes": []} for user in sorted({e.user_id for e in events})]
    return write_dataset(
        path,
        name="tiny",
        events=events_table(events),
        items=pa.Table.from_pylist(items, schema=ITEM_SCHEMA),
        users=pa.Table.from_pylist(users, schema=USER_SCHEMA),
        label="a click",
        sources=[],
        rejected={},
    )


def read_parts(folder: Path) -> list[pa.Table]:
    return [pq.read_table(part) for part in sorted(folder.glob("part-*.parquet"))]


def read_rows(folder: Path) -> list[tuple]:
    rows = pa.concat_tables(read_parts(folder)).to_pylist()
    return [(r["user_id"], r["item_id"], r["history"], r["label"], r["ts_us"] // 1_000_000) for r in rows]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_impressions_skips_and_interactions_become_these_rows(ray_cluster, tmp_path: Path):
    dataset = build_dataset(tmp_path / "dataset", SHOWN)
    info = prepare_examples(dataset, tmp_path / "out", ExamplesConfig(negatives=4))
    assert read_rows(tmp_path / "out") == SHOWN_ROWS
    assert load_examples(str(tmp_path / "out")).info == info
    assert (info.name, info.ids, info.rows, info.users, info.items) == ("tiny", "rows", 7, 2, 4)
    assert info.facts == {
        "positives": 4,
        "negatives": 3,
        "mean_history": round(7 / 7, 4),
        "distinct_users": 2,
        "distinct_items": 4,
        "seed": 0,
        "dataset_fingerprint": dataset.fingerprint(),
    }
    schema = read_parts(tmp_path / "out")[0].schema
    assert [str(schema.field(name).type) for name in ("user_id", "item_id", "label", "ts_us")] == [
        "int64",
        "int64",
        "int8",
        "int64",
    ]
    assert schema.field("history").type == pa.list_(pa.int64())


def test_vocabularies_are_numbered_by_count_then_by_id(ray_cluster, tmp_path: Path):
    prepare_examples(build_dataset(tmp_path / "dataset", SHOWN), tmp_path / "out")
    users, items = (pq.read_table(tmp_path / "out" / "ids" / f"{name}.parquet") for name in ("user", "item"))
    assert users.to_pydict() == {"external_id": ["ann", "bob"], "id": [0, 1], "count": [6, 3]}
    assert items.to_pydict() == {"external_id": ["a", "c", "b", "d"], "id": [0, 1, 2, 3], "count": [3, 3, 2, 1]}


def test_any_ids_are_digests_and_the_rows_are_else_the_same(ray_cluster, tmp_path: Path):
    dataset = build_dataset(tmp_path / "dataset", CLICKED)
    numbered = prepare_examples(dataset, tmp_path / "rows", ExamplesConfig(ids="rows"))
    hashed = prepare_examples(dataset, tmp_path / "any", ExamplesConfig(ids="any"))
    assert (hashed.ids, hashed.users, hashed.items, hashed.rows) == ("any", None, None, numbered.rows)
    users, items = (pq.read_table(tmp_path / "any" / "ids" / f"{name}.parquet") for name in ("user", "item"))
    for vocabulary in (users, items):
        assert vocabulary["id"].to_pylist() == digests(vocabulary["external_id"].to_pylist()).tolist()
    user_ids, item_ids = users["id"].to_pylist(), items["id"].to_pylist()
    assert read_rows(tmp_path / "any") == [
        (user_ids[user], item_ids[item], [item_ids[seen] for seen in history], label, seconds)
        for user, item, history, label, seconds in read_rows(tmp_path / "rows")
    ]


def test_without_impressions_each_positive_is_followed_by_other_items(ray_cluster, tmp_path: Path):
    prepare_examples(build_dataset(tmp_path / "dataset", CLICKED), tmp_path / "out", ExamplesConfig(negatives=2))
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 300
    assert [row[4] for row in rows] == [n for n in range(100) for _ in range(3)]
    for positive, *drawn in (rows[at : at + 3] for at in range(0, 300, 3)):
        assert positive[3] == 1
        for negative in drawn:
            assert (negative[0], negative[2], negative[3]) == (positive[0], positive[2], 0)
            assert negative[1] != positive[1]


def test_neither_buckets_nor_the_layout_of_the_events_change_a_byte(ray_cluster, tmp_path: Path):
    dataset = build_dataset(tmp_path / "dataset", CLICKED)
    prepare_examples(dataset, tmp_path / "one", ExamplesConfig(part_rows=125))
    events = dataset.events()
    (dataset.path / "events" / "part-00000.parquet").unlink()
    pq.write_table(events.slice(0, 40), dataset.path / "events" / "part-00000.parquet", row_group_size=9)
    pq.write_table(events.slice(40), dataset.path / "events" / "part-00001.parquet", row_group_size=25)
    prepare_examples(dataset, tmp_path / "other", ExamplesConfig(part_rows=125, bucket_events=15))
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one == other
    assert sorted(one) == [
        "examples.json",
        "ids/item.parquet",
        "ids/user.parquet",
        *(f"part-0000{n}.parquet" for n in range(4)),
    ]
    assert [part.num_rows for part in read_parts(tmp_path / "one")] == [125, 125, 125, 125]


def test_another_seed_draws_other_items_for_the_same_positives(ray_cluster, tmp_path: Path):
    dataset = build_dataset(tmp_path / "dataset", CLICKED)
    rows = []
    for seed in (0, 1):
        prepare_examples(dataset, tmp_path / "out", ExamplesConfig(seed=seed))  # replaces the first
        rows.append(read_rows(tmp_path / "out"))
    positives = [[row for row in of_seed if row[3] == 1] for of_seed in rows]
    assert positives[0] == positives[1]
    assert rows[0] != rows[1]


def spoil_user_ids(dataset: Dataset) -> Path:
    path = dataset.path / "events" / "part-00000.parquet"
    chunk = pq.read_metadata(path).row_group(0).column(3)
    assert chunk.path_in_schema == "user_id"
    with path.open("r+b") as file:
        file.seek(chunk.dictionary_page_offset)
        file.write(b"\xff" * chunk.total_compressed_size)
    return path


def test_a_torn_file_is_named_and_nothing_is_left(ray_cluster, tmp_path: Path):
    dataset = build_dataset(tmp_path / "dataset", CLICKED)
    path = spoil_user_ids(dataset)
    with pytest.raises(DataError, match=f"{path}: cannot be read"):
        prepare_examples(load_dataset(dataset.path), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["dataset"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no events"),
        ("1 ann click a -", "one item only"),
        ("1 ann impression a -\n2 ann click a -\n3 ann teleport b -", "kind 'teleport' is none of impression, click"),
    ],
)
def test_nothing_to_learn_from_is_an_error_and_nothing_is_left(ray_cluster, tmp_path: Path, text: str, message: str):
    dataset = build_dataset(tmp_path / "dataset", text)
    with pytest.raises(DataError, match=message):
        prepare_examples(dataset, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["dataset"]


def test_events_out_of_order_are_an_error_within_and_across_parts(ray_cluster, tmp_path: Path):
    dataset = build_dataset(tmp_path / "dataset", CLICKED)
    events = dataset.events()
    pq.write_table(
        pa.concat_tables([events.slice(50), events.slice(0, 50)]), dataset.path / "events" / "part-00000.parquet"
    )
    for part_rows in (500, 250):
        with pytest.raises(DataError, match="is not in order of ts_us"):
            prepare_examples(dataset, tmp_path / "out", ExamplesConfig(part_rows=part_rows))


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    dataset = build_dataset(tmp_path / "dataset", CLICKED)
    before = contents(dataset.path)
    for out, said in ((dataset.path, "holds files but no examples.json"), (dataset.path / "dataset.json", "is a file")):
        assert main(["examples", "--data", str(dataset.path), "--out", str(out)]) == 3
        assert said in capsys.readouterr().err
    assert contents(dataset.path) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"history": 0}, "history=0"), ({"ids": "text"}, "ids='text': is none of rows, any"), ({"part_rows": 4}, "=4")],
)
def test_settings_out_of_range_are_named(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ExamplesConfig(**settings)


@pytest.fixture(scope="module")
def movielens(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare_movielens(tmp_path_factory.mktemp("movielens") / "dataset", official=False)


def command(dataset: Dataset, out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "cluster", "examples", "--data", str(dataset.path), "--out", str(out), *words]


@pytest.mark.slow
def test_movielens_gives_the_histories_that_a_plain_loop_finds(ray_cluster, movielens: Dataset, tmp_path: Path):
    began = time.monotonic()
    info = prepare_examples(movielens, tmp_path / "out", ExamplesConfig(history=20, negatives=4))
    print(f"\nMovieLens-100K: {info.rows:,} rows in {time.monotonic() - began:.1f} s")
    assert (info.rows, info.users, info.items) == (500_000, 943, 1_682)
    ids = {
        name: dict(zip(*pq.read_table(tmp_path / "out" / "ids" / f"{name}.parquet").columns[:2], strict=True))
        for name in ("user", "item")
    }
    ids = {name: {key.as_py(): row.as_py() for key, row in rows.items()} for name, rows in ids.items()}
    past: dict[int, list[int]] = defaultdict(list)
    expected = []
    events = movielens.events(["user_id", "item_id", "ts_us"]).to_pydict()
    for user_id, item_id, ts_us in zip(*events.values(), strict=True):
        user, item = ids["user"][user_id], ids["item"][item_id]
        expected.append((user, item, past[user][-20:], 1, ts_us // 1_000_000))
        past[user].append(item)
    rows = read_rows(tmp_path / "out")
    assert rows[::5] == expected
    assert {row[3] for place, row in enumerate(rows) if place % 5} == {0}
    part = pq.read_metadata(tmp_path / "out" / "part-00000.parquet")
    assert [part.row_group(group).num_rows for group in range(part.num_row_groups)] == [131_072] * 3 + [106_784]


@pytest.mark.slow
def test_the_command_prints_its_result_alone_and_one_cpu_gives_the_same_bytes(movielens: Dataset, tmp_path: Path):
    for cpus in (1, 3):
        words = ["--json", "--set", f"engine.logical_cpus={cpus}"]
        done = subprocess.run(
            command(movielens, tmp_path / str(cpus), *words), capture_output=True, text=True, timeout=140
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("\n") == 1
        assert json.loads(done.stdout)["positives"] == 100_000
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_made(movielens: Dataset, tmp_path: Path):
    out = tmp_path / "out"
    with subprocess.Popen(command(movielens, out), stderr=subprocess.PIPE, text=True) as program:
        while not list(tmp_path.glob(".out-*/ids")):  # at work on the first shuffle
            assert program.poll() is None
            time.sleep(0.05)
        program.send_signal(signal.SIGINT)
        _, stderr = program.communicate(timeout=60)
    assert (program.returncode, stderr) == (130, "recloop: interrupted\n")
    assert os.listdir(tmp_path) == []
