"""Systems side by side: a classical one has only to give scores; figures against counts by hand."""

import numpy as np
import pyarrow as pa
import pytest

from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, Dataset, write_dataset
from cluster.errors import DataError
from cluster.events import Event, events_table
from training.baselines.interface import Recommender, seen_matrix
from training.baselines.neighbours import ItemNeighbours
from training.baselines.popularity import Popularity
from training.evaluation import system as system_module
from training.evaluation.scoreboard import Scoreboard, evaluate
from training.evaluation.segments import ALL
from training.online.predictions import Predictions

ITEMS = [f"i{n}" for n in range(24)]


class Fitted:
    """A classical recommender as a system: the adapter is all that a new kind needs."""

    text_IE = None

    def __init__(self, recommender: Recommender, item_ids=ITEMS) -> None:
        self.item_ids = item_ids
        self._recommender = recommender

    def scores(self, cases):
        for batch in cases.batches():
            yield self._recommender.scores(batch.seen, cases.history.user_row[batch.targets])


def checkerboard(path, *, late=()):
    """Write twenty users of even or odd items, in an order of their own, sixteen events each; time goes round."""
    rng = np.random.default_rng(0)
    order = [rng.permutation(np.arange(user % 2, len(ITEMS), 2)) for user in range(20)]
    order = [np.concatenate([items, items[:4]]) for items in order]
    events = [
        Event(user_id=f"u{user}", item_id=ITEMS[order[user][turn]], kind="click", ts_us=20 * turn + user)
        for turn in range(10)
        for user in range(20)
    ]
    categories = [["even"] if n % 2 == 0 else ["odd"] for n in range(len(ITEMS))]
    return write_dataset(
        path,
        name="board",
        events=events_table([*events, *late]),
        items=pa.Table.from_pylist(
            [
                {"item_id": item, "domain": "a" if n < 12 else "b", "text": "", "categories": listed}
                for n, (item, listed) in enumerate(zip(ITEMS, categories, strict=True))
            ],
            schema=ITEM_SCHEMA,
        ),
        users=pa.Table.from_pylist(
            [
                {"user_id": f"u{user}", "attributes": [("side", "even" if user % 2 == 0 else "odd")]}
                for user in range(20)
            ],
            schema=USER_SCHEMA,
        ),
        label="clicks",
        sources=[],
        rejected={},
    )


def fitted_on(dataset, known, recommender):
    events = dataset.events().slice(0, known)
    users = dataset.events()["user_id"].unique().to_pylist()
    user_N = np.array([users.index(user) for user in events["user_id"].to_pylist()])
    item_N = np.array([ITEMS.index(item) for item in events["item_id"].to_pylist()])
    return Fitted(recommender.fit(seen_matrix(user_N, item_N, len(users), len(ITEMS))))


def first(dataset: Dataset, known: int) -> np.ndarray:
    """Return which events are known where the first ones are."""
    return np.arange(dataset.info.events) < known


def board(tmp_path, known=160, attributes=()) -> Scoreboard:
    dataset = checkerboard(tmp_path / "data")
    systems = {
        "popular": fitted_on(dataset, known, Popularity()),
        "neighbours": fitted_on(dataset, known, ItemNeighbours()),
    }
    return evaluate(systems, dataset, first(dataset, known), attributes)


def test_a_system_that_sees_the_pattern_names_every_item_and_is_significantly_better(tmp_path):
    found = board(tmp_path)
    row = {(row["metric"], row["version"]): row for row in found.rows()}
    # Of twelve items of a kind a user has eight or nine: all that are left fit into ten places.
    assert len(found.user_N) == 40
    assert row["hit_at_10", "neighbours"]["value"] == 1
    assert row["recall_at_10", "neighbours"]["value"] == row["hit_at_10", "neighbours"]["value"]
    assert row["precision_at_10", "neighbours"]["value"] == pytest.approx(1 / 10)
    assert row["f1_at_10", "neighbours"]["value"] == pytest.approx(2 / 11)
    assert row["hit_at_10", "popular"]["value"] < 1
    better = row["ndcg_at_10", "neighbours"]
    assert better["difference"] == pytest.approx(better["value"] - row["ndcg_at_10", "popular"]["value"])
    assert better["difference_low"] > 0
    assert found.tests()["ndcg_at_10", "neighbours"]["p_holm"] < 0.01
    # What popularity names itself is never a surprise.
    assert row["serendipity", "popular"]["value"] == 0
    assert row["serendipity", "neighbours"]["value"] > 0
    assert row["coverage", "neighbours"]["value"] == 1
    assert "low" not in row["coverage", "neighbours"]


def test_a_system_against_itself_does_not_differ(tmp_path):
    dataset = checkerboard(tmp_path / "data")
    systems = {name: fitted_on(dataset, 160, Popularity()) for name in ("first", "again", "once more")}
    found = evaluate(systems, dataset, first(dataset, 160))
    assert {test["p_holm"] for test in found.tests().values()} == {1.0}
    for row in found.rows():
        if "difference" in row:
            assert (row["difference"], row["difference_low"], row["difference_high"]) == (0, 0, 0)


def test_having_an_item_twice_does_not_make_it_more_popular(tmp_path):
    once, twice = checkerboard(tmp_path / "once"), tmp_path / "twice"
    again = [
        Event(user_id="u0", item_id=once.events()["item_id"][0].as_py(), kind="click", ts_us=-1 - n) for n in range(50)
    ]
    popular = fitted_on(once, 160, Popularity())
    found = [
        {(row["metric"]): row["value"] for row in evaluate({"popular": popular}, dataset, first(dataset, known)).rows()}
        for dataset, known in ((once, 160), (checkerboard(twice, late=again), 210))
    ]
    assert found[0] == found[1]


def test_segments_are_parts_of_the_whole(tmp_path):
    found = board(tmp_path, attributes=["user.side", "item.categories"])
    whole = {(row["metric"], row["version"]): row["value"] for row in found.rows(ALL)}
    assert [name for name in found.segments if name.startswith("item.domain")] == ["item.domain=a", "item.domain=b"]
    for parts in (("user.side=even", "user.side=odd"), ("item.domain=a", "item.domain=b")):
        sizes = [found.segments[name].sum() for name in parts]
        assert sum(sizes) == 40
        values = [
            next(r["value"] for r in found.rows(name) if (r["metric"], r["version"]) == ("ndcg_at_10", "popular"))
            for name in parts
        ]
        assert np.average(values, weights=sizes) == pytest.approx(whole["ndcg_at_10", "popular"])
    assert (found.segments["user.side=even"] == found.segments["item.categories=even"]).all()


def test_batches_do_not_show(tmp_path, monkeypatch):
    whole = board(tmp_path)
    monkeypatch.setattr(system_module, "SCORES_AT_ONCE", 7 * len(ITEMS))
    parts = board(tmp_path)
    for name, lists in whole.lists.items():
        assert lists.tolist() == parts.lists[name].tolist()


def test_lists_leave_out_what_the_user_had_before_and_nothing_after(tmp_path):
    dataset = checkerboard(tmp_path / "data")
    found = evaluate({"popular": fitted_on(dataset, 160, Popularity())}, dataset, first(dataset, 160))
    events = dataset.events().to_pylist()
    users = dataset.events()["user_id"].unique().to_pylist()
    turns = {}
    for place in range(len(found.user_N)):
        user = found.user_N[place]
        turn = turns[user] = turns.get(user, 8) + 1  # eight are known; then the ninth, then the tenth is named
        had = [ITEMS.index(event["item_id"]) for event in events if event["user_id"] == users[user]][: turn - 1]
        assert not set(found.lists["popular"][place].tolist()) & set(had)


class Critic(Fitted):
    """Says of every rating but a user's newest that it will be 3."""

    def ratings(self, cases):
        rating_N = np.full(len(cases.targets), 3.0)
        rating_N[np.isin(cases.targets + 1, cases.history.ends)] = np.nan
        return rating_N


def test_ratings_are_judged_where_there_are_any_and_where_something_is_said_of_them(tmp_path):
    stars = [
        Event(user_id=f"u{user}", item_id=ITEMS[user], kind="rating", value=value, ts_us=1_000 + place)
        for place, (user, value) in enumerate(((0, 1.0), (1, 4.0), (1, 5.0), (0, 3.0), (2, 2.0)))
    ]
    dataset = checkerboard(tmp_path / "data", late=stars)
    popular = fitted_on(dataset, 160, Popularity())
    critic = Critic(Popularity().fit(seen_matrix(np.array([0]), np.array([0]), 20, len(ITEMS))))
    found = evaluate({"popular": popular, "critic": critic}, dataset, first(dataset, 160))
    rows = {row["metric"]: row for row in found.rating_rows()}
    # Of u0's 1 and 3 and u1's 4 and 5 the first ones count: 2 and 1 off. u2 has one alone, which is the newest.
    assert rows["rating_mae"]["value"] == pytest.approx(3 / 2)
    assert rows["rating_rmse"]["value"] == pytest.approx((5 / 2) ** 0.5)
    assert rows["rating_auc"]["value"] == 1 / 2  # the 4 was liked, the 1 was not, both get a 3
    assert "rating_gauc" not in rows  # nobody has both
    assert {row["version"] for row in rows.values()} == {"critic"}
    assert rows["rating_rmse"]["low"] <= rows["rating_rmse"]["value"] <= rows["rating_rmse"]["high"]
    assert evaluate({"popular": popular}, dataset, first(dataset, 160)).rating_rows() == []


class Guesser(Fitted):
    """Holds each choice but a user's newest likely by a quarter; is half sure of one item, which is right for i0."""

    def choices(self, cases):
        item_N = cases.history.item_row[cases.targets]
        loss_N = np.full(len(item_N), np.log(4.0))
        loss_N[np.isin(cases.targets + 1, cases.history.ends)] = np.nan
        return Predictions(loss_P=loss_N, rank_P=np.where(item_N == 0, 1, 2), confidence_P=np.full(len(item_N), 0.5))


def test_probabilities_are_judged_where_something_is_said_of_them(tmp_path):
    late = [
        Event(user_id=f"u{user}", item_id=ITEMS[item], kind="click", ts_us=1_000 + place)
        for place, (user, item) in enumerate(((0, 0), (0, 1), (0, 2), (2, 0), (2, 4), (2, 1)))
    ]
    dataset = checkerboard(tmp_path / "data", late=late)
    guesser = Guesser(Popularity().fit(seen_matrix(np.array([0]), np.array([0]), 20, len(ITEMS))))
    popular = fitted_on(dataset, 200, Popularity())
    found = evaluate({"popular": popular, "guesser": guesser}, dataset, first(dataset, 200))
    rows = {row["metric"]: row for row in found.choice_rows()}
    assert {row["version"] for row in rows.values()} == {"guesser"}
    assert rows["choice_log_loss"]["value"] == pytest.approx(np.log(4.0))
    # Of four choices, the newest of both users being left out, two are i0: half, as it was held likely.
    assert rows["choice_calibration"]["value"] == pytest.approx(1.0)
    assert rows["choice_ece"]["value"] == pytest.approx(0.0)
    chosen = dataset.events().slice(0, 200)["item_id"].to_pylist()
    guessed = [(chosen.count(ITEMS[item]) + 1) / (200 + len(ITEMS)) for item in (0, 1, 0, 4)]
    assert rows["choice_ne"]["value"] == pytest.approx(np.log(4.0) / -np.log(guessed).mean(), rel=1e-6)
    assert evaluate({"popular": popular}, dataset, first(dataset, 200)).choice_rows() == []


def test_systems_that_do_not_fit_together_are_errors(tmp_path):
    dataset = checkerboard(tmp_path / "data")
    popular = fitted_on(dataset, 160, Popularity())
    with pytest.raises(DataError, match="versions a and b recommend different items"):
        evaluate({"a": popular, "b": Fitted(Popularity(), ITEMS[::-1])}, dataset, first(dataset, 160))
    with pytest.raises(DataError, match="holds no interactions but"):
        evaluate({"a": popular}, dataset, first(dataset, 200))

    class Broken:
        item_ids, text_IE = ITEMS, None

        def __init__(self, make):
            self._make = make

        def scores(self, cases):
            for batch in cases.batches():
                yield self._make(batch.seen.shape)

    for make, said in (
        (lambda shape: np.full(shape, np.nan, np.float32), "not finite"),
        (lambda shape: np.zeros((shape[0], 3), np.float32), "scores of shape"),
    ):
        with pytest.raises(DataError, match=said):
            evaluate({"a": Broken(make)}, dataset, first(dataset, 160))
