import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.planted import gather, optimum_auc, planted_logit, scatter, write_examples
from benchmarks.world import HELDOUT, build_world
from cluster.errors import ConfigError
from cluster.examples import load_examples

USERS, ITEMS = 100_000, 10_000


def write_small(folder: Path, rows: int = 5000, *, seed: int = 7, ids: str = "rows", part_rows: int = 2000) -> Path:
    return write_examples(folder, rows, USERS, ITEMS, seed=seed, ids=ids, part_rows=part_rows, heldout_rows=1000)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first = digests(write_small(tmp_path / "first"))
    assert first == digests(write_small(tmp_path / "second"))
    other = digests(write_small(tmp_path / "other", seed=8))
    assert [name for name in first if first[name] == other[name]] == []


def test_no_two_parts_are_alike(tmp_path: Path) -> None:
    write_small(tmp_path)
    users = [pq.read_table(path)["user_id"].to_pylist()[:1000] for path in sorted(tmp_path.glob("*.parquet"))]
    assert len(users) == 4
    assert all(one != other for one, other in pairwise(users))


def test_an_interrupted_folder_is_finished_to_what_an_uninterrupted_one_holds(tmp_path: Path) -> None:
    whole = digests(write_small(tmp_path / "whole"))
    torn = write_small(tmp_path / "torn")
    kept = (torn / "part-00000.parquet").stat().st_mtime_ns
    (torn / "examples.json").rename(torn / "examples.json.unfinished")
    (torn / "part-00001.parquet").rename(torn / "part-00001.parquet.unfinished")
    (torn / "part-00001.parquet.unfinished").write_bytes(b"PAR1 and then the power went")
    write_small(torn)
    assert digests(torn) == whole
    assert (torn / "part-00000.parquet").stat().st_mtime_ns == kept


def test_a_folder_of_other_arguments_is_refused_and_left_alone(tmp_path: Path) -> None:
    before = digests(write_small(tmp_path))
    with pytest.raises(ConfigError, match="other arguments"):
        write_small(tmp_path, seed=8)
    assert digests(tmp_path) == before


def test_the_folder_opens_as_examples_and_holds_the_rows_it_states(tmp_path: Path) -> None:
    examples = load_examples(str(write_small(tmp_path)))
    assert [sum(part.group_rows) for part in examples.parts] == [2000, 2000, 1000]
    assert (examples.info.rows, examples.info.users, examples.info.items) == (5000, USERS, ITEMS)
    assert examples.heldout is not None
    assert sum(examples.heldout.group_rows) == 1000


def test_scattered_ids_carry_the_same_interactions(tmp_path: Path) -> None:
    rows = pq.read_table(write_small(tmp_path / "rows") / "part-00000.parquet")
    ids = pq.read_table(write_small(tmp_path / "any", ids="any") / "part-00000.parquet")
    assert str(ids.schema.field("user_id").type) == "int64"
    assert gather(ids["user_id"].to_numpy()).tolist() == rows["user_id"].to_pylist()
    assert gather(ids["history"].combine_chunks().flatten().to_numpy()).tolist() == (
        rows["history"].combine_chunks().flatten().to_pylist()
    )
    assert ids["label"].to_pylist() == rows["label"].to_pylist()
    info = json.loads((tmp_path / "any" / "examples.json").read_text("utf-8"))
    assert (info["ids"], info["users"], info["items"]) == ("any", None, None)
    assert optimum_auc(tmp_path / "any") == optimum_auc(tmp_path / "rows")


def test_scattering_is_one_to_one_over_the_non_negative_int64() -> None:
    row_N = np.arange(100_000, dtype=np.int32)
    id_N = scatter(row_N)
    assert len(np.unique(id_N)) == 100_000
    assert gather(id_N).tolist() == row_N.tolist()
    # 100,000 ids fall into 8 equal ranges of [0, 2^63): 12,500 each, give or take 5 standard deviations of 105.
    assert id_N.min() >= 0
    assert np.abs(np.bincount(id_N >> 60, minlength=8) - 12_500).max() < 525


def test_the_true_probability_has_an_auc_of_four_fifths(tmp_path: Path) -> None:
    write_examples(tmp_path, 1000, USERS, ITEMS, seed=0, heldout_rows=200_000)
    assert 0.79 < optimum_auc(tmp_path) < 0.85


def test_labels_come_up_as_often_as_their_probability_says(tmp_path: Path) -> None:
    write_examples(tmp_path, 200_000, USERS, ITEMS, seed=0, heldout_rows=10)
    table = pq.read_table(tmp_path / "part-00000.parquet")
    logit_B = planted_logit(tmp_path, table["user_id"].to_numpy(), table["item_id"].to_numpy())
    label_B, probability_B = table["label"].to_numpy(), 1 / (1 + np.exp(-logit_B))
    assert abs(label_B.mean() - 3 / 10) < 0.01
    for decile in range(10):
        chosen_B = (probability_B * 10).astype(int) == decile
        spread = math.sqrt(float(np.sum(probability_B[chosen_B] * (1 - probability_B[chosen_B]))))
        assert abs(float(np.sum(label_B[chosen_B] - probability_B[chosen_B]))) < 5 * spread


def test_histories_show_the_taste_and_have_the_stated_length() -> None:
    world = build_world(seed=0, users=USERS, items=ITEMS, history=4)
    user_B, item_B, _, end_B, history_N = world.draw(HELDOUT, 0, 100_000)
    length_B = np.diff(end_B)
    assert (length_B.min(), length_B.max()) == (0, 8)
    assert abs(length_B.mean() - 4) < 0.05
    # The better of two normal draws lies 1/√π ≈ 0.56 standard deviations of 1.5 above one draw: 0.85.
    gain = world.logit(np.repeat(user_B, length_B), history_N).mean() - world.logit(user_B, item_B).mean()
    assert 0.7 < gain < 1.0


def test_popularity_is_zipf_and_lies_all_over_the_table() -> None:
    world = build_world(seed=0, users=USERS, items=ITEMS)
    user_B, item_B, *_ = world.draw(0, 0, 200_000)
    for row_B, count in ((user_B, USERS), (item_B, ITEMS)):
        times = np.bincount(row_B, minlength=count)
        popular = np.argsort(-times)
        # Of rank k: log((k + 2) / (k + 1)) / log(count + 1); within 5 standard deviations.
        for rank in (0, 1, 2):
            chance = math.log((rank + 2) / (rank + 1)) / math.log(count + 1)
            expected = 200_000 * chance
            assert abs(times[popular[rank]] - expected) < 5 * math.sqrt(expected)
        in_first_half = int(np.sum(popular[:100] < count // 2))
        assert 40 <= in_first_half <= 60
