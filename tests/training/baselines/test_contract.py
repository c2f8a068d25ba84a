"""Every classical system passes one suite: what it must recover, forget, and do alike one by one and all at once."""

import numpy as np
import pytest

from cluster.errors import ConfigError
from training.baselines.autoencoder import Autoencoder
from training.baselines.content import Content
from training.baselines.factors import AlternatingLeastSquares, BayesianRanking
from training.baselines.hybrid import Hybrid, standardised
from training.baselines.interface import UNKNOWN, Recommender, seen_matrix
from training.baselines.neighbours import ItemNeighbours, TextNeighbours, UserNeighbours
from training.baselines.popularity import Popularity

USERS, ITEMS = 40, 20
VECTORS = np.eye(2)[np.arange(ITEMS) % 2] + 0.01 * np.random.default_rng(0).normal(size=(ITEMS, 2))
"""Of the items' texts: even and odd ones are told alike."""

SYSTEMS = {
    "popularity": Popularity,
    "item cosine": lambda: ItemNeighbours(10),
    "item pearson": lambda: ItemNeighbours(10, "pearson", shrink=0.5),
    "user cosine": lambda: UserNeighbours(10),
    "user pearson": lambda: UserNeighbours(10, "pearson"),
    "text neighbours": lambda: TextNeighbours(VECTORS, 10),
    "content": lambda: Content(VECTORS),
    "ease": lambda: Autoencoder(l2=1.0),
    "als": lambda: AlternatingLeastSquares(factors=2, iterations=10),
    "bpr": lambda: BayesianRanking(factors=2, iterations=200, learning_rate=0.1),
    "hybrid": lambda: Hybrid([ItemNeighbours(10), Popularity()], [1.0, 0.1]),
}
PERSONAL = [name for name in SYSTEMS if name != "popularity"]


def checkerboard(seed: int = 0):
    """Even users have most of the even items, odd ones of the odd; each lacks three."""
    rng = np.random.default_rng(seed)
    pairs = []
    for user in range(USERS):
        own = np.arange(user % 2, ITEMS, 2)
        pairs += [(user, item) for item in rng.choice(own, len(own) - 3, replace=False)]
    user_N, item_N = np.array(pairs).T
    return seen_matrix(user_N, item_N, USERS, ITEMS)


@pytest.fixture(params=SYSTEMS)
def system(request) -> Recommender:
    return SYSTEMS[request.param]()


@pytest.mark.parametrize("name", PERSONAL)
def test_what_is_missing_of_ones_own_colour_comes_first(name):
    seen = checkerboard()
    scores = SYSTEMS[name]().fit(seen).scores(seen, np.arange(USERS))
    scores[seen.toarray() > 0] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :3]
    assert ((best % 2) == (np.arange(USERS) % 2)[:, None]).mean() > 0.98


@pytest.mark.parametrize("name", PERSONAL)
def test_strangers_are_served_by_what_they_have(name):
    seen = checkerboard()
    stranger = seen_matrix(np.array([0, 0, 0]), np.array([1, 3, 5]), 1, ITEMS)
    scores = SYSTEMS[name]().fit(seen).scores(stranger, np.array([UNKNOWN]))[0]
    scores[[1, 3, 5]] = -np.inf
    assert set((np.argsort(-scores)[:3] % 2).tolist()) == {1}


def test_saved_and_restored_it_scores_the_same(system, request):
    seen = checkerboard()
    expected = system.fit(seen).scores(seen, np.arange(USERS))
    restored = SYSTEMS[request.node.callspec.params["system"]]().restore(system.arrays())
    assert np.array_equal(restored.scores(seen, np.arange(USERS)), expected)


def test_fitted_again_it_forgets(system, request):
    first, second = checkerboard(), checkerboard(seed=1)
    anew = SYSTEMS[request.node.callspec.params["system"]]().fit(second).scores(second, np.arange(USERS))
    assert np.array_equal(system.fit(first).fit(second).scores(second, np.arange(USERS)), anew)


def test_who_has_nothing_gets_what_is_popular(system):
    seen = checkerboard()
    nobody = seen_matrix(np.array([], np.int64), np.array([], np.int64), 2, ITEMS)
    scores = system.fit(seen).scores(nobody, np.full(2, UNKNOWN))
    count_I = seen.sum(axis=0)
    assert scores.shape == (2, ITEMS)
    assert np.isfinite(scores).all()
    for row in scores:
        assert (np.diff(count_I[np.argsort(-row, kind="stable")]) <= 0).all()


def test_a_batch_equals_one_by_one(system):
    seen = checkerboard()
    together = system.fit(seen).scores(seen, np.arange(USERS))
    for user in range(USERS):
        alone = system.scores(seen[[user]], np.array([user]))
        assert alone[0] == pytest.approx(together[user], rel=1e-4, abs=1e-5)


def test_the_same_seed_gives_the_same(request, system):
    seen = checkerboard()
    other = SYSTEMS[request.node.callspec.params["system"]]()
    assert np.array_equal(
        system.fit(seen).scores(seen, np.arange(USERS)), other.fit(seen).scores(seen, np.arange(USERS))
    )


def test_repeats_say_nothing_new():
    once = seen_matrix(np.array([0, 1]), np.array([2, 3]), 2, 4)
    again = seen_matrix(np.array([0, 1, 0, 0]), np.array([2, 3, 2, 2]), 2, 4)
    assert np.array_equal(once.toarray(), again.toarray())


class TestByHand:
    SEEN = seen_matrix(np.array([0, 0, 1, 1, 2, 2, 2]), np.array([0, 1, 0, 2, 0, 1, 2]), 3, 4)
    """Users {0 1}, {0 2}, {0 1 2}; nobody has item 3."""

    def test_cosine_of_items(self):
        model = ItemNeighbours(4).fit(self.SEEN)
        nearest = model.nearest_II.toarray()
        assert nearest[0, 1] == pytest.approx(2 / np.sqrt(3 * 2))
        assert nearest[1, 2] == pytest.approx(1 / 2)
        assert nearest[3].tolist() == [0.0] * 4
        assert np.diag(nearest).tolist() == [0.0] * 4

    def test_pearson_of_users_is_the_correlation_of_their_rows(self):
        model = UserNeighbours(2, "pearson").fit(self.SEEN)
        rows = self.SEEN.toarray()
        expected = np.corrcoef(rows[0], rows[2])[0, 1]
        # Users 0 and 1 are not correlated, so of item 2 only user 2 speaks.
        scores = model.scores(self.SEEN[[0]], np.array([0]))
        assert scores[0, 2] == pytest.approx(expected, rel=1e-5)

    def test_only_the_nearest_count(self):
        nearest = ItemNeighbours(1).fit(self.SEEN).nearest_II
        assert np.diff(nearest.indptr).tolist() == [1, 1, 1, 0]

    def test_users_are_alike_by_text_who_have_nothing_in_common(self):
        told = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
        seen = seen_matrix(
            np.array([0, 1, 2]), np.array([0, 1, 2]), 3, 4
        )  # users {0}, {1}, {2}; 0 and 2 are told alike
        scores = TextNeighbours(told, 1).fit(seen).scores(seen, np.arange(3))
        assert scores[0].tolist() == [0.0, 0.0, 1.0, 0.0]
        stranger = seen_matrix(np.array([0]), np.array([3]), 1, 4)
        scores = TextNeighbours(told, 3).fit(seen).scores(stranger, np.array([UNKNOWN]))
        assert scores[0] == pytest.approx([0.6, 0.8, 0.6, 0.0])

    def test_als_solves_for_the_user(self):
        model = AlternatingLeastSquares(factors=2, regularization=0.1, alpha=5.0).fit(self.SEEN)
        scores = model.scores(self.SEEN, np.arange(3))
        for user, had in enumerate(self.SEEN.toarray()):
            weight, prefers = np.diag(np.where(had > 0, 5.0, 1.0)), had
            left = model.item_IF.T @ weight @ model.item_IF + 0.1 * np.eye(2)
            factors = np.linalg.solve(left, model.item_IF.T @ weight @ prefers)
            assert scores[user] == pytest.approx(model.item_IF @ factors, rel=1e-4, abs=1e-5)

    def test_a_hybrid_is_the_weighted_sum(self):
        parts = [Popularity().fit(self.SEEN), ItemNeighbours(4).fit(self.SEEN)]
        rows = np.arange(3)
        expected = sum(w * standardised(p.scores(self.SEEN, rows)) for p, w in zip(parts, (2.0, 0.5), strict=True))
        assert Hybrid(parts, [2.0, 0.5]).scores(self.SEEN, rows) == pytest.approx(expected)


def test_settings_out_of_range_are_refused():
    for build in (lambda: ItemNeighbours(0), lambda: UserNeighbours(5, "nearness"), lambda: Hybrid([Popularity()], [])):
        with pytest.raises(ConfigError):
            build()
