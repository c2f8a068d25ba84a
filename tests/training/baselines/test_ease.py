"""EASE in closed form, and the published figures on the MovieLens-100K live replay."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import ConfigError, DataError
from cluster.events import Event, events_table
from training.baselines.ease import Ease, Interactions, replay_ease
from training.prepare.movielens import prepare_movielens


def stream(*pairs: tuple[str, str], kinds: Sequence[str] = ()) -> pa.Table:
    kinds = kinds or ["click"] * len(pairs)
    return events_table(
        Event(user_id=user, item_id=item, kind=kind, ts_us=ts_us)
        for ts_us, ((user, item), kind) in enumerate(zip(pairs, kinds, strict=True))
    )


@pytest.fixture(scope="module")
def movielens(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    out: Path = tmp_path_factory.mktemp("movielens") / "ml-100k"
    return prepare_movielens(out, official=False).events(["user_id", "item_id", "kind"])


def test_two_items_always_taken_together_weigh_as_computed_by_hand() -> None:
    # G = [[2, 2], [2, 2]], λ = 1: P = [[3, -2], [-2, 3]] / 5, so B_01 = -(-2/5) / (3/5) = 2/3
    model = Ease.fit([0, 0, 1, 1], [0, 1, 0, 1], n_items=2, l2=1.0)
    np.testing.assert_allclose(model.weights_II, [[0, 2 / 3], [2 / 3, 0]], atol=1e-12)
    np.testing.assert_allclose(model.scores([0]), [0, 2 / 3], atol=1e-12)


def test_a_withheld_item_of_a_checkerboard_is_recovered() -> None:
    pairs = [
        (user, item) for user in range(8) for item in range(8) if (user + item) % 2 == 0 and (user, item) != (3, 5)
    ]
    model = Ease.fit(*zip(*pairs, strict=True), n_items=8, l2=1.0)
    scores = model.scores([1, 3, 7])
    scores[[1, 3, 7]] = -np.inf
    assert scores.argmax() == 5


def test_a_user_without_history_gets_popularity() -> None:
    model = Ease.fit([0, 1, 2, 0], [2, 2, 2, 1], n_items=3, l2=10.0)
    assert model.scores([]).tolist() == [0, 1, 3]


def test_repeated_interactions_count_once() -> None:
    once = Ease.fit([0, 0, 1], [0, 1, 1], n_items=2, l2=1.0)
    twice = Ease.fit([0, 0, 0, 1], [0, 1, 0, 1], n_items=2, l2=1.0)
    np.testing.assert_array_equal(once.weights_II, twice.weights_II)
    np.testing.assert_array_equal(once.scores([0, 0]), once.scores([0]))


def test_gram_matrix_grown_event_by_event_equals_the_product() -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 9, 200), rng.integers(0, 12, 200)
    interactions = Interactions(12)
    for user_row, item_row in zip(users, items, strict=True):
        interactions.add(int(user_row), int(item_row))
    matrix = np.zeros((9, 12))
    matrix[users, items] = 1
    np.testing.assert_array_equal(interactions.gram_II, matrix.T @ matrix)


def test_regularisation_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"ease\.l2=0"):
        Ease.fit([0], [0], n_items=1, l2=0)


def test_replay_ranks_each_event_before_it_is_known() -> None:
    # Trained: a has x and y. Replayed: newcomer b takes y (popularity: x and y tie, x has the lower row), then x.
    replay = replay_ease(stream(("a", "x"), ("a", "y"), ("b", "y"), ("b", "x")), train_events=2, l2=1.0)
    assert replay.user_ids == ["b", "b"]
    assert replay.ranks.tolist() == [2, 1]
    assert replay.hits.tolist() == [1, 1]
    assert replay.cold.tolist() == [True, True]


def test_the_future_of_the_stream_does_not_change_ranks_before_it() -> None:
    rng = np.random.default_rng(1)
    pairs = [(f"u{user}", f"i{item}") for user, item in rng.integers(0, 12, (150, 2))]
    pairs = list(dict.fromkeys([*((f"u{n}", f"i{n}") for n in range(12)), *pairs]))
    other = [*pairs[:60], *reversed(pairs[60:])]
    ranks = replay_ease(stream(*pairs), train_events=30, l2=1.0, refit_every=5).ranks
    assert (
        ranks[:30].tolist() == replay_ease(stream(*other), train_events=30, l2=1.0, refit_every=5).ranks[:30].tolist()
    )


def test_an_item_the_user_has_is_unranked_and_skips_are_no_interactions() -> None:
    kinds = ["click", "like", "skip", "purchase"]
    replay = replay_ease(stream(("a", "x"), ("a", "y"), ("a", "z"), ("a", "x"), kinds=kinds), train_events=2, l2=1.0)
    assert replay.ranks.tolist() == [0]
    assert replay.cold.tolist() == [False]


def test_nothing_left_to_replay_is_an_error() -> None:
    with pytest.raises(DataError, match="train_events=1"):
        replay_ease(stream(("a", "x")), train_events=1)


@pytest.mark.parametrize(("refit_every", "hit", "ndcg"), [(None, 0.1441, 0.0730), (500, 0.1460, 0.0738)])
def test_published_figures_on_the_movielens_replay(
    movielens: pa.Table, refit_every: int | None, hit: float, ndcg: float
) -> None:
    replay = replay_ease(movielens, train_events=90_000, refit_every=refit_every)
    assert len(replay.ranks) == 10_000
    assert replay.cold.mean() == pytest.approx(0.71, abs=0.005)
    assert replay.hits.mean() == pytest.approx(hit, abs=0.003)
    assert replay.ndcg.mean() == pytest.approx(ndcg, abs=0.003)
