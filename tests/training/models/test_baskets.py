"""The ranker of baskets as a version: it answers from histories as it would from the purchases it was fitted on."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.config import Recipe, load_recipe
from cluster.dataset import ITEM_SCHEMA, PROMOTION_SCHEMA, USER_SCHEMA, Dataset, write_dataset
from cluster.errors import ConfigError, DataError
from cluster.events import Event, events_table
from cluster.home import Home
from cluster.log import Interaction
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.vocabulary import Vocabulary
from training.baskets.features import DAY_S
from training.baskets.inputs import COLUMNS, read_kinds, read_purchases
from training.baskets.ranker import BasketConfig, BasketRanker
from training.evaluation.command import load_system
from training.inputs import training_events
from training.models.baskets import ServedBaskets
from training.models.classical import load_resident
from training.models.interests import Interests
from training.publish import publish_run
from training.stream import DataConfig
from training.trainer import fit_baskets, run

USERS, ITEMS, VISITS, EVERY_DAYS = 30, 12, 24, 5
NEWEST = 40
START_S = 1_700_000_000
VISIT_S = START_S + VISITS * EVERY_DAYS * DAY_S
"""When everybody comes next: items 0 and 1 take turns, so that it is the turn of (VISITS + user) % 2."""
SETTINGS = (
    "data.train_fraction=0.96",
    "data.validation_fraction=0.2",
    f"system.max_history={NEWEST}",
    "baskets.cuts=6",
    "baskets.days_between_cuts=5",
    "baskets.rounds=40",
    "baskets.least_in_leaf=5",
)


def bought(user: int, visits: int = VISITS) -> list[Interaction]:
    """Return a user's purchases, oldest first: item 0 or 1 in turns, and another one at random."""
    rng = np.random.default_rng(user)
    return [
        Interaction(f"i{item}", "purchase", 1.0 + item, (START_S + visit * EVERY_DAYS * DAY_S) * 1_000_000, -1)
        for visit in range(visits)
        for item in ((visit + user) % 2, int(rng.integers(2, ITEMS - 1)))  # nobody buys the last item
    ]


def recipe(*overrides: str) -> Recipe:
    return load_recipe("baskets", [*SETTINGS, *overrides])


def shop(folder: Path, visits: int) -> Dataset:
    """Write what everybody bought on so many visits, and what was on display in one of two shops."""
    events = [
        Event(
            user_id=f"u{user}",
            item_id=entry.item_id,
            kind=entry.kind,
            value=entry.value,
            ts_us=entry.ts_us,
            context={"place": f"shop {user % 2}", "saved": "0.1"},
        )
        for user in range(USERS)
        for entry in bought(user, visits)
    ]
    items = [
        {"item_id": f"i{n}", "domain": "default", "text": f"thing {n}", "categories": [f"kind {n % 3}"]}
        for n in range(ITEMS)
    ]
    day_us = DAY_S * 1_000_000
    promotions = [
        {
            "item_id": f"i{n}",
            "kind": "display",
            "place": "shop 1",
            "from_us": START_S * 1_000_000 + n * 10 * day_us,
            "until_us": START_S * 1_000_000 + (n * 10 + 10) * day_us,
        }
        for n in range(ITEMS)
    ]
    return write_dataset(
        folder / "dataset",
        name="shop",
        events=events_table(sorted(events, key=lambda event: event.ts_us)),
        items=pa.Table.from_pylist(items, schema=ITEM_SCHEMA),
        users=pa.Table.from_pylist([{"user_id": f"u{u}", "attributes": []} for u in range(USERS)], schema=USER_SCHEMA),
        label="what was bought",
        sources=[],
        rejected={},
        promotions=pa.Table.from_pylist(promotions, schema=PROMOTION_SCHEMA),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """The last visit is beyond the training share."""
    return shop(tmp_path_factory.mktemp("shop"), VISITS + 1)


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Registry:
    return Registry(Home(tmp_path_factory.mktemp("home")).ensure().registry)


@pytest.fixture(scope="module")
def version(dataset, registry, tmp_path_factory) -> VersionRef:
    trained = fit_baskets(recipe(), dataset, Home(tmp_path_factory.mktemp("fitting")).ensure())
    assert trained.metrics["validated_visits"] == USERS
    assert trained.metrics["best_ndcg_at_10"] > 0.6
    return publish_run(trained, registry)


@pytest.fixture
def model(registry, version) -> ServedBaskets:
    """The version as it answers at the time of everybody's next visit."""
    model = load_resident(registry, version)
    assert isinstance(model, ServedBaskets)
    return replace(model, now_s=lambda: float(VISIT_S))


def test_it_is_the_turn_of_what_was_not_bought_last_and_what_users_have_is_offered(model):
    assert model.repeats
    named = [model.recommend(f"u{user}", bought(user), 1).item_ids for user in range(USERS)]
    assert np.mean([found == [f"i{(VISITS + user) % 2}"] for user, found in enumerate(named)]) > 0.9


def test_one_more_purchase_makes_it_the_others_turn(model):
    another = Interaction(f"i{VISITS % 2}", "purchase", 1.0, (VISIT_S - 60) * 1_000_000, 1)
    before, after = (model.recommend("u0", [*bought(0), *more], ITEMS) for more in ([], [another]))
    assert before.item_ids.index("i0") < after.item_ids.index("i0")


def test_served_from_a_history_the_scores_are_those_of_the_purchases_it_was_fitted_on(model, dataset):
    events = training_events(dataset, recipe().section(DataConfig), list(COLUMNS))
    users, items = (Vocabulary(ids, len(ids)) for ids in (model.state.user_ids, model.state.item_ids))
    purchases, promotions = read_purchases(events, users, items, dataset, besides=True)
    assert set(purchases.besides) == {"saved", "display"}  # are told in contexts, which histories leave out
    fitted = BasketRanker(read_kinds(dataset.items()), recipe().section(BasketConfig), promotions, newest=NEWEST).fit(
        replace(purchases, besides={})
    )
    whole_UI = fitted.scores(np.arange(USERS), np.full(USERS, VISIT_S))
    for row, user_id in enumerate(model.state.user_ids):
        found = model.recommend(user_id, bought(int(user_id[1:]))[-NEWEST:], ITEMS)
        of_item = dict(zip(found.item_ids, found.scores.tolist(), strict=True))
        is_candidate = np.isfinite(whole_UI[row])
        for item_row in np.flatnonzero(is_candidate):
            assert of_item[f"i{item_row}"] == pytest.approx(whole_UI[row, item_row], rel=1e-6)
        least = whole_UI[row, is_candidate].min()
        assert all(of_item[f"i{item_row}"] < least for item_row in np.flatnonzero(~is_candidate))


def test_without_a_purchase_it_is_what_is_popular(model):
    for told in (
        [],
        [Interaction("unheard of", "purchase", None, 0, 1)],
        [Interaction("i3", "impression", None, 0, 1)],
    ):
        found = model.recommend("a stranger", told, ITEMS)
        assert found.cold_start
        counts = dict(zip(model.state.item_ids, model.state.rows["count"].tolist(), strict=True))
        assert (np.diff([counts[item_id] for item_id in found.item_ids]) <= 0).all()


def test_what_is_excluded_is_left_out_and_the_callers_items_are_ranked_alike(model):
    found = model.recommend("u3", bought(3), 1_000, frozenset({"i0", "unheard of"}))
    assert sorted(found.item_ids) == sorted(set(model.item_ids) - {"i0"})
    assert (np.diff(found.scores) <= 0).all()
    assert np.isfinite(found.scores).all()
    ranked = model.rank("u3", bought(3), found.item_ids[::-1])
    assert (ranked.item_ids, ranked.scores.tolist()) == (found.item_ids, found.scores.tolist())
    liked_E = model.text_IE[5].numpy()
    interests = Interests(liked_E=liked_E, disliked_NE=np.empty((0, len(liked_E)), np.float32))
    assert not model.recommend("a stranger", [], 3, interests=interests).cold_start


def test_an_item_put_is_known_and_not_recommended(model):
    put = replace(model.with_items([("new", "thing 5")], model.text_IE[5:6].numpy()), now_s=model.now_s)
    assert put.knows("new")
    assert not put.can_rank("new")
    assert put.similar("new", 1)[0][0] == "i5"
    told = [*bought(1), Interaction("new", "purchase", 1.0, VISIT_S * 1_000_000, 1)]
    assert put.recommend("u1", told, ITEMS).item_ids == model.recommend("u1", bought(1), ITEMS).item_ids
    assert put.ranker is model.ranker


def test_the_time_of_a_visit_is_the_newest_events_where_the_data_are_of_the_past(model):
    past = replace(
        model, ranker=BasketRanker.restore(model.ranker.arrays(), BasketConfig(clock="events"), newest=NEWEST)
    )
    last_s = bought(0)[-1].ts_us // 1_000_000
    at_last = replace(model, now_s=lambda: float(last_s + 1))
    assert model.ranker.fitted_until_s == last_s + 1
    one, other = (m.recommend("u0", bought(0), ITEMS) for m in (past, at_last))
    assert one.scores.tolist() == other.scores.tolist()
    assert one.scores.tolist() != model.recommend("u0", bought(0), ITEMS).scores.tolist()


def test_a_version_of_it_is_refused_where_what_users_have_is_left_out(registry, version):
    with pytest.raises(DataError, match="offers what users have"):
        load_system(registry, version)


def test_nothing_to_validate_on_is_named(tmp_path):
    with pytest.raises(DataError, match="nobody comes again in the validation share"):
        fit_baskets(recipe(), shop(tmp_path, 1), Home(tmp_path).ensure())


def test_nothing_done_in_the_training_share_is_named(tmp_path):
    with pytest.raises(DataError, match="nobody did anything"):
        fit_baskets(recipe("data.train_fraction=0.0001"), shop(tmp_path, 2), Home(tmp_path).ensure())


def test_another_recipe_has_a_ranker_of_its_own(model):
    values = {**model.state.recipe.values, "baskets": {"clock": "events"}}
    state = replace(model.state, recipe=replace(model.state.recipe, values=values))
    assert model.with_state(state).ranker.config.clock == "events"
    assert model.with_state(replace(model.state)).ranker is model.ranker


def test_examples_are_refused(tmp_path: Path):
    given = {"resume": str(tmp_path), "overrides": [], "epochs": None, "workers": None, "data": None}
    with pytest.raises(ConfigError, match="baskets: is fitted on a dataset, not on examples"):
        run(Namespace(recipe="baskets", home=Home(tmp_path), **given))
