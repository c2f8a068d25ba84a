"""The rating model: what its batches hold, its losses by hand, and taste planted and found."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.config import Recipe
from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, Dataset, write_dataset
from cluster.errors import ConfigError, DataError
from cluster.events import Event, events_table
from cluster.home import Home
from cluster.ray_session import RaySession
from cluster.registry import Registry
from training.models.rating import (
    ATTRIBUTE,
    ITEM_ATTRIBUTE,
    NAMES,
    RATED,
    RATER,
    USER_ATTRIBUTE,
    RatingBatch,
    RatingConfig,
    RatingDense,
    RatingModel,
)
from training.publish import publish_run
from training.ratings.inputs import RatingInputs, build_rating_batch, grouped, load_rating_inputs
from training.trainer import train_ratings_on_ray

TEXT_DIM = 2
RECIPE = """
[system]
name = "ratings"
[tables]
dim = 8
learning_rate = 0.1
[ratings]
hidden = 8
dropout = 0.0
batch_ratings = 64
levels_weight = 0.1
[train]
workers = 2
epochs = 4
learning_rate = 0.01
warmup_steps = 2
"""


def write(path: Path, stars: dict[tuple[int, int], float | None], users: int, items: int) -> Dataset:
    """Write who (user, item) gave how many stars, one a second; users have a side, items a category."""
    events = [
        Event(
            user_id=f"u{user}", item_id=f"i{item}", kind="rating" if value else "click", value=value, ts_us=at * 10**6
        )
        for at, ((user, item), value) in enumerate(stars.items())
    ]
    item_rows = [
        {"item_id": f"i{item}", "domain": "default", "text": "", "categories": [f"c{item % 2}"]}
        for item in range(items)
    ]
    user_rows = [
        {"user_id": f"u{user}", "attributes": [("side", str(user % 2)), ("town", f"t{user}")]} for user in range(users)
    ]
    return write_dataset(
        path,
        name="stars",
        events=events_table(events),
        items=pa.Table.from_pylist(item_rows, schema=ITEM_SCHEMA),
        users=pa.Table.from_pylist(user_rows, schema=USER_SCHEMA),
        label="stars",
        sources=[],
        rejected={},
    )


def inputs_of(dataset: Dataset, folder: Path, **settings: float) -> RatingInputs:
    np.save(folder / "text.npy", np.zeros((dataset.info.items, TEXT_DIM), np.float32))
    return load_rating_inputs(dataset, RatingConfig(**settings), folder / "text.npy")


@pytest.fixture
def three_by_two(tmp_path: Path) -> RatingInputs:
    """Three users rate two items, 5 stars or 2, all to be learned from."""
    stars = {(0, 0): 5.0, (0, 1): 2.0, (1, 0): 2.0, (1, 1): 5.0, (2, 0): 5.0}
    inputs = inputs_of(write(tmp_path / "data", stars, users=3, items=2), tmp_path)
    train = np.arange(5)
    return replace(
        inputs,
        train=train,
        of_user=grouped(inputs.user_N[train], train, 3),
        of_item=grouped(inputs.item_N[train], train, 2),
    )


def looked_up(batch: RatingBatch, feature: str) -> list[list[int]]:
    found = batch.lookup[feature]
    return [part.tolist() for part in torch.split(found.values(), found.lengths().tolist())]


def test_a_rating_is_in_neither_of_its_own_bags(three_by_two: RatingInputs) -> None:
    batch = build_rating_batch(three_by_two, np.array([0, 4]), bag=9, global_ratings=2)
    # Levels are 2 and 5 stars. u0 also gave i1 two stars: row 1 · 2 + 0. u2 rated nothing else.
    assert looked_up(batch, RATED) == [[2], []]
    # i0 was also given 2 stars by u1 (row 2) and 5 by u2 (row 5); and, for u2, 5 by u0 (row 1) and 2 by u1.
    assert looked_up(batch, RATER) == [[2, 5], [1, 2]]
    assert batch.stars_B.tolist() == [5.0, 5.0]
    assert batch.level_B.tolist() == [1, 1]


def test_attributes_of_users_and_items_share_a_table(three_by_two: RatingInputs) -> None:
    batch = build_rating_batch(three_by_two, np.array([1, 2]), bag=9, global_ratings=2)
    users, items = looked_up(batch, USER_ATTRIBUTE), looked_up(batch, ITEM_ATTRIBUTE)
    assert [len(rows) for rows in users] == [2, 2]
    assert users[0][0] != users[1][0]
    assert {row for rows in (*users, *items) for row in rows} <= set(range(three_by_two.rows[ATTRIBUTE]))
    assert not {row for rows in users for row in rows} & {row for rows in items for row in rows}


def test_a_bag_holds_the_newest(three_by_two: RatingInputs) -> None:
    batch = build_rating_batch(three_by_two, np.array([0]), bag=2, global_ratings=1)
    assert looked_up(batch, RATER) == [[2, 5]]
    batch = build_rating_batch(three_by_two, np.array([0]), bag=1, global_ratings=1)
    assert looked_up(batch, RATER) == [[5]]


def test_the_split_is_the_seed_s_and_gives_each_rating_once(tmp_path: Path) -> None:
    stars = {(user, item): 1.0 + (user + item) % 5 for user in range(10) for item in range(10)}
    dataset = write(tmp_path / "data", stars, users=10, items=10)
    one, same, other = (inputs_of(dataset, tmp_path, split_seed=seed) for seed in (1, 1, 2))
    assert [len(part) for part in (one.train, one.validation, one.test)] == [80, 10, 10]
    assert sorted([*one.train, *one.validation, *one.test]) == list(range(100))
    assert one.test.tolist() == same.test.tolist() != other.test.tolist()
    assert sorted(one.of_user.values) == sorted(one.of_item.values) == one.train.tolist()


def test_what_has_no_ratings_or_values_of_any_kind_is_refused(tmp_path: Path) -> None:
    clicks = write(tmp_path / "clicks", {(0, item): None for item in range(5)}, users=1, items=5)
    with pytest.raises(DataError, match="holds 0 ratings"):
        inputs_of(clicks, tmp_path)
    prices = write(tmp_path / "prices", {(0, item): 1 + item / 7 for item in range(30)}, users=1, items=30)
    with pytest.raises(DataError, match="30 distinct values"):
        inputs_of(prices, tmp_path)


@pytest.mark.parametrize("setting", [{"hidden": 0}, {"dropout": 1.0}, {"train_fraction": 0.95}, {"interaction": "sum"}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=rf"ratings\.{name}='?{value}"):
        RatingConfig(**setting)


class Silent(torch.nn.Module):
    """Tables whose rows are all zero."""

    def forward(self, lookup: object) -> "Silent":
        return self

    def to_dict(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(2, 4) for name in NAMES}


@pytest.mark.parametrize(("stars_loss", "error"), [("mse", 9 / 4), ("mae", 3 / 2)])
def test_untrained_losses_are_those_of_knowing_nothing(
    three_by_two: RatingInputs, stars_loss: str, error: float
) -> None:
    # Mean 3.5 stars: 1.5 off for 5 as for 2. Half are liked; and levels are told apart by chance.
    config = RatingConfig(stars_loss=stars_loss, liked_weight=1.0, stars_weight=2.0, levels_weight=0.0)
    model = RatingModel(Silent(), RatingDense(config, 4, TEXT_DIM, levels=2, mean_stars=3.5)).eval()
    torch.nn.init.zeros_(model.dense.levels.weight)
    torch.nn.init.zeros_(model.dense.levels.bias)
    found = model(build_rating_batch(three_by_two, np.array([0, 1]), bag=9, global_ratings=2))
    assert found.liked.item() == pytest.approx(math.log(2))
    assert found.stars.item() == pytest.approx(error)
    assert found.levels.item() == pytest.approx(math.log(2))
    assert found.total.item() == pytest.approx(math.log(2) + 2 * error)


@pytest.mark.slow
def test_planted_taste_is_found_by_two_workers(ray_cluster: RaySession, tmp_path: Path) -> None:
    """Who is of an item's side gives it 5 stars, others 2 or 1; nothing says so but ratings and attributes."""
    rng = np.random.default_rng(0)
    pairs = [divmod(int(cell), 40) for cell in rng.permutation(40 * 40)[:800]]
    stars = {(user, item): 5.0 if (user + item) % 2 == 0 else float(rng.integers(1, 3)) for user, item in pairs}
    dataset = write(tmp_path / "data", stars, users=40, items=40)
    run = train_ratings_on_ray(Recipe.from_toml(RECIPE), dataset, Home(tmp_path / "home").ensure())
    assert run.metrics["test_auc"] > 0.99
    assert run.metrics["test_rmse"] < 1.0
    assert run.metrics["test_ne"] < 0.5
    with pytest.raises(DataError, match="estimates ratings and is not served"):
        publish_run(run, Registry(tmp_path / "registry"))
