"""What training reads of a dataset, and what it must not see."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, Dataset, write_dataset
from cluster.errors import DataError
from cluster.events import Event, events_table
from embeddings.tables import TablesConfig
from training.inputs import build_item_vocabulary, build_user_vocabulary, load_inputs, training_events
from training.stream import DataConfig

DATA = DataConfig(train_fraction=0.8, validation_fraction=0.25)
TABLES = TablesConfig(dim=4, spare_rows=3)


def write(path: Path, *told: tuple[str, str, str]) -> Dataset:
    """Write (user, item, kind) events, one a second, over items i0 … i5."""
    events = [
        Event(user_id=user, item_id=item, kind=kind, ts_us=at * 1_000_000, value=4.0 if kind == "rating" else None)
        for at, (user, item, kind) in enumerate(told)
    ]
    board = {"domain": "default", "text": "", "categories": [], "available_from_us": None, "available_until_us": None}
    items = [{"item_id": f"i{row}", **board} for row in range(6)]
    users = [{"user_id": user, "attributes": []} for user in sorted({user for user, _, _ in told})]
    return write_dataset(
        path,
        name="tiny",
        events=events_table(events),
        items=pa.Table.from_pylist(items, schema=ITEM_SCHEMA),
        users=pa.Table.from_pylist(users, schema=USER_SCHEMA),
        label="any",
        sources=[],
        rejected={},
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Ten events: 0 … 5 train, 6 and 7 validate, 8 and 9 are never seen; v only looked, w comes at the very end."""
    told = [("b", "i0", "click"), ("a", "i1", "like"), ("v", "i5", "impression"), ("a", "i2", "rating")]
    told += [("b", "i1", "click"), ("a", "i0", "click"), ("a", "i3", "click"), ("b", "i2", "click")]
    return write(tmp_path / "dataset", *told, ("b", "i4", "click"), ("w", "i5", "click"))


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    np.save(tmp_path / "text.npy", np.arange(12, dtype=np.float32).reshape(6, 2))
    return tmp_path / "text.npy"


def test_training_sees_the_first_share_by_time(dataset: Dataset) -> None:
    assert training_events(dataset, DATA)["ts_us"].to_pylist() == [at * 1_000_000 for at in range(8)]


def test_validation_is_the_newest_of_what_training_may_see(dataset: Dataset, text_path: Path) -> None:
    inputs = load_inputs(dataset, DATA, TABLES, text_path)
    assert inputs.full.order[inputs.validation].tolist() == [7, 6]  # b's, then a's
    assert sorted(inputs.train.order) == [0, 1, 3, 4, 5]
    assert sorted(inputs.full.order) == [0, 1, 3, 4, 5, 6, 7]


def test_leaving_one_out_hides_each_user_s_last_and_validates_on_the_one_before(
    dataset: Dataset, text_path: Path
) -> None:
    # b: 0, 4, 7, 8. a: 1, 3, 5, 6. w has 9 alone, v only looked.
    data = DataConfig(split="leave_one_out")
    seconds = [at // 1_000_000 for at in training_events(dataset, data)["ts_us"].to_pylist()]
    assert seconds == [0, 1, 2, 3, 4, 5, 7]
    inputs = load_inputs(dataset, data, TABLES, text_path)
    assert [seconds[at] for at in inputs.train.order] == [0, 4, 1, 3]
    assert [seconds[at] for at in inputs.full.order[inputs.validation]] == [7, 5]


def test_rows_are_the_catalogue_s_and_those_of_users_who_chose_something(dataset: Dataset, text_path: Path) -> None:
    inputs = load_inputs(dataset, DATA, TABLES, text_path)
    assert (inputs.items.ids, inputs.items.capacity) == ([f"i{row}" for row in range(6)], 9)
    assert (inputs.users.ids, inputs.users.capacity) == (["b", "a"], 5)
    assert build_item_vocabulary(dataset, TABLES).ids == inputs.items.ids
    assert build_user_vocabulary(training_events(dataset, DATA), TABLES).ids == inputs.users.ids


def test_negatives_are_drawn_by_what_training_saw_alone(dataset: Dataset, text_path: Path) -> None:
    # Counts 2, 2, 1, 0, 0, 0 before validation, each + 1: 3 + 3 + 2 + 1 + 1 + 1 = 11.
    data = DataConfig(train_fraction=0.8, validation_fraction=0.25, negatives=5, negative_power=1.0)
    sampler = load_inputs(dataset, data, TABLES, text_path).sampler
    np.testing.assert_allclose(np.exp(sampler.log_q) * 11, [3, 3, 2, 1, 1, 1], rtol=1e-6)


def test_text_vectors_stand_by_item_row(dataset: Dataset, text_path: Path) -> None:
    assert load_inputs(dataset, DATA, TABLES, text_path).text[3].tolist() == [6, 7]


def test_events_that_hold_no_pair_are_an_error(tmp_path: Path, text_path: Path) -> None:
    dataset = write(tmp_path / "alone", *[(f"u{n}", "i0", "click") for n in range(10)])
    with pytest.raises(DataError, match="no user has two interactions among the 6 training events"):
        load_inputs(dataset, DATA, TABLES, text_path)
