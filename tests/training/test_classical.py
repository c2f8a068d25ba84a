"""Every classical system passes one suite as a version: fitted, published, loaded, asked."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.config import Recipe, load_recipe, packaged_recipes
from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, Dataset, write_dataset
from cluster.errors import ConfigError, DataError, RegistryError
from cluster.events import Event, events_table
from cluster.home import Home
from cluster.log import Interaction
from cluster.manifest import VersionRef
from cluster.registry import Registry
from training import classical
from training.baselines.config import HYBRID, TWO_STAGE, SystemConfig, fitting_bytes
from training.baselines.ease import Ease
from training.baselines.interface import UNKNOWN, seen_matrix
from training.classical import fit_system
from training.inputs import training_events
from training.models.classical import ServedClassical, build_resident, load_resident
from training.models.compare import compare_versions
from training.models.interests import Interests
from training.models.served import ServedModel
from training.models.version import read_version
from training.publish import publish_run, run
from training.run import TrainedRun, read_recipe
from training.stream import DataConfig
from training.trainer import run as train

USERS, ITEMS = 40, 20
TEXTS = ("a western with horses", "a love story in Paris")
"""Of even and of odd items."""
SETTINGS = {
    "popularity": [],
    "item_neighbours": [],
    "user_neighbours": [],
    "text_neighbours": ["text_neighbours.neighbours=10"],
    "content": [],
    "als": ["als.factors=2"],
    "bpr": ["bpr.factors=2", "bpr.iterations=200", "bpr.learning_rate=0.1"],
    "ease": ["ease.l2=20.0"],
    "hybrid": ["ease.l2=20.0", "hybrid.weights=[1.0, 0.5]"],
}
PERSONAL = [name for name in SETTINGS if name != "popularity"]


def recipe_of(name: str, *overrides: str) -> Recipe:
    split = ["data.train_fraction=0.95", "data.validation_fraction=0.2"]
    return load_recipe("popularity", [f"system.name={name}", *split, *SETTINGS[name], *overrides])


def met(user: int) -> list[Interaction]:
    """Return what a user did, oldest first: most items of the user's own colour, even or odd."""
    items = np.random.default_rng(user).permutation(np.arange(user % 2, ITEMS, 2))[:7]
    return [
        Interaction(f"i{item}", "click", None, (place * USERS + user) * 1_000_000, -1)
        for place, item in enumerate(items)
    ]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    events = [
        Event(user_id=f"u{user}", item_id=entry.item_id, kind=entry.kind, ts_us=entry.ts_us)
        for user in range(USERS)
        for entry in met(user)
    ]
    items = [
        {"item_id": f"i{item}", "domain": "default", "text": TEXTS[item % 2], "categories": []} for item in range(ITEMS)
    ]
    return write_dataset(
        tmp_path_factory.mktemp("colours") / "dataset",
        name="colours",
        events=events_table(events),
        items=pa.Table.from_pylist(items, schema=ITEM_SCHEMA),
        users=pa.Table.from_pylist([{"user_id": f"u{u}", "attributes": []} for u in range(USERS)], schema=USER_SCHEMA),
        label="a thing of one's own colour",
        sources=[],
        rejected={},
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("home")).ensure()


@pytest.fixture(scope="module")
def registry(home) -> Registry:
    return Registry(home.registry)


@pytest.fixture(scope="module")
def published(dataset, home, registry):
    """Return the run and the version of a system, made when it is first asked for."""
    made: dict[str, tuple[TrainedRun, VersionRef]] = {}

    def publish(name: str) -> tuple[TrainedRun, VersionRef]:
        if name not in made:
            trained = fit_system(recipe_of(name), dataset, home)
            made[name] = trained, publish_run(trained, registry)
        return made[name]

    return publish


@pytest.fixture(params=SETTINGS)
def model(request, published, registry) -> ServedClassical:
    model = load_resident(registry, published(request.param)[1])
    assert isinstance(model, ServedClassical)
    return model


def history(*items: int) -> list[Interaction]:
    return [Interaction(f"i{item}", "click", None, at, 1 + at) for at, item in enumerate(items)]


def colours(item_ids: list[str]) -> set[int]:
    return {int(item_id[1:]) % 2 for item_id in item_ids}


@pytest.mark.parametrize("name", PERSONAL)
def test_users_and_strangers_are_shown_what_is_missing_of_their_own_colour(name, published, registry):
    model = load_resident(registry, published(name)[1])
    missed = 0
    for user in range(USERS):
        owned = frozenset(entry.item_id for entry in met(user))
        for user_id in (f"u{user}", "a stranger"):
            missed += colours(model.recommend(user_id, met(user), 3, owned).item_ids) != {user % 2}
    assert missed <= 2  # of 80


def test_who_has_nothing_gets_what_is_popular(model):
    counts = dict(zip(model.state.item_ids, model.state.rows["count"].tolist(), strict=True))
    for user_id, told in (("u0", []), ("a stranger", []), ("u0", [Interaction("unheard of", "click", None, 0, 1)])):
        found = model.recommend(user_id, told, ITEMS)
        assert found.cold_start
        assert (np.diff([counts[item_id] for item_id in found.item_ids]) <= 0).all()


def test_candidates_are_ranked_as_they_are_recommended_and_interests_have_a_part(model):
    for told in ([], history(2, 4)):
        found = model.recommend("u1", told, ITEMS)
        assert model.rank("u1", told, model.item_ids[: model.item_count]).scores.tolist() == found.scores.tolist()
    liked_E = model.text_IE[1].numpy()
    interests = Interests(liked_E=liked_E, disliked_NE=np.empty((0, len(liked_E)), np.float32))
    said = model.recommend("a stranger", [], ITEMS, interests=interests)
    assert (said.cold_start, len(said.item_ids)) == (False, model.item_count)
    assert said.item_ids == model.rank("a stranger", [], model.item_ids[: model.item_count], interests).item_ids


def test_unknown_items_of_the_history_are_as_if_they_had_not_been(model):
    told = history(2, 4)
    unknown = Interaction("unheard of", "click", None, 1, 2)
    with_unknown, without = (model.recommend("u1", entries, 5) for entries in ([told[0], unknown, told[1]], told))
    assert with_unknown.item_ids == without.item_ids
    assert with_unknown.scores.tolist() == without.scores.tolist()


def test_what_is_excluded_is_never_shown_and_k_beyond_the_catalogue_gives_the_rest(model):
    exclude = frozenset({"i0", "i1", "not there"})
    for told in ([], history(3, 5)):
        found = model.recommend("u1", told, 1_000, exclude)
        assert sorted(found.item_ids) == sorted(set(model.item_ids) - exclude)
        assert (np.diff(found.scores) <= 0).all()
        assert model.recommend("u1", told, 4, exclude).item_ids == found.item_ids[:4]
    assert model.recommend("u1", history(3), 5, frozenset(model.item_ids)).item_ids == []


def test_one_by_one_they_get_what_they_get_as_a_batch(model):
    told = [met(user) for user in range(USERS)]
    rows = [[model.item_row[entry.item_id] for entry in entries] for entries in told]
    seen = seen_matrix(np.repeat(np.arange(USERS), 7), np.concatenate(rows), USERS, ITEMS)
    user_rows = np.array([model.user_row.get(f"u{user}", UNKNOWN) for user in range(USERS)])
    together = model.classical.system.scores(seen, user_rows)
    for user in range(USERS):
        alone = model.recommend(f"u{user}", told[user], ITEMS)
        of_item = dict(zip(alone.item_ids, alone.scores, strict=True))
        assert [of_item[item_id] for item_id in model.item_ids] == pytest.approx(together[user], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", PERSONAL)
@pytest.mark.parametrize("user_id", ["u0", "a stranger"])
def test_one_more_click_changes_the_scores(name, user_id, published, registry):
    model = load_resident(registry, published(name)[1])
    before, after = (model.recommend(user_id, [*met(0), *more], ITEMS) for more in ([], history(1)))
    of_before = dict(zip(before.item_ids, before.scores, strict=True))
    assert any(
        abs(of_before[item_id] - score) > 1e-6 for item_id, score in zip(after.item_ids, after.scores, strict=True)
    )


def test_it_looks_back_on_the_newest_interactions_only(published, registry):
    state = read_version(registry, published("ease")[1])
    system = {**state.recipe.values["system"], "max_history": 2}
    model = build_resident(
        replace(state, recipe=replace(state.recipe, values={**state.recipe.values, "system": system})), {}
    )
    assert model.max_history == 2
    assert (
        model.recommend("u0", history(1, 2, 4), 5).scores.tolist()
        == model.recommend("u0", history(2, 4), 5).scores.tolist()
    )


def vector_like(model: ServedClassical, item: int) -> np.ndarray:
    return model.state.rows["text"][item].numpy()


def test_an_item_put_is_known_and_recommended_where_its_text_can_place_it(model):
    put = model.with_items([("new", TEXTS[1])], vector_like(model, 1)[None])
    assert put.knows("new")
    assert put.text_of("new") == TEXTS[1]
    assert put.similar("new", 3)[0][1] == pytest.approx(1.0)
    assert colours([item_id for item_id, _ in put.similar("new", 3)]) == {1}
    places = model.state.recipe.section(SystemConfig).name in ("content", HYBRID)
    assert put.item_count == ITEMS + places
    for told in ([], history(1, 3)):
        found = put.recommend("u1", told, 1_000)
        assert ("new" in found.item_ids) == places
        assert np.isfinite(found.scores).all()
    odd, even = (put.recommend("a stranger", history(*range(first, ITEMS, 2)), 1_000) for first in (1, 0))
    if places:
        assert odd.scores[odd.item_ids.index("new")] > even.scores[even.item_ids.index("new")]
    assert put.with_state(put.state).text_of("new") == TEXTS[1]
    assert (
        put.recommend("u1", history(2, 4), ITEMS, frozenset({"new"})).item_ids
        == model.recommend("u1", history(2, 4), ITEMS).item_ids
    )


def test_an_item_put_again_is_told_anew(model):
    put = model.with_items([("i0", TEXTS[1])], vector_like(model, 1)[None])
    assert (put.text_of("i0"), put.item_count) == (TEXTS[1], ITEMS)
    assert {item_id for item_id, _ in put.similar("i1", ITEMS // 2)} >= {"i0"}


def test_similar_items_are_told_alike_nearest_first_without_the_item_itself(model):
    neighbours = model.similar("i3", 1_000)
    assert len(neighbours) == ITEMS - 1
    assert colours([item_id for item_id, _ in neighbours[:9]]) == {1}
    assert (np.diff([cosine for _, cosine in neighbours]) <= 0).all()
    with pytest.raises(KeyError):
        model.similar("unheard of", 3)


def test_a_version_is_tensors_tables_and_its_recipe_and_loads_to_the_same_answers(model, registry):
    reader = registry.open_version(model.state.ref.version)
    assert {Path(name).suffix for name in reader.manifest.files} == {".safetensors", ".parquet", ".toml", ".json"}
    assert reader.manifest.system == model.state.recipe.section(SystemConfig).name
    again = load_resident(registry, model.state.ref)
    for user in range(4):
        one, other = (m.recommend(f"u{user}", met(user), ITEMS) for m in (model, again))
        assert (one.item_ids, one.scores.tobytes()) == (other.item_ids, other.scores.tobytes())


def test_the_version_knows_what_it_was_fitted_on(published, registry, dataset):
    _, ref = published("ease")
    seen = training_events(dataset, recipe_of("ease").section(DataConfig))
    state = read_version(registry, ref, with_optimizer=True)
    assert registry.open_version(ref.version).table("history").equals(seen)
    assert (state.learned_seq, dict(state.dense), dict(state.optimizer)) == (0, {}, {})
    assert state.rows["count"].sum() == len(seen)
    assert state.system["weights"].shape == (ITEMS, ITEMS)
    gram = seen_matrix(
        *(np.array([int(value[1:]) for value in seen[name].to_pylist()]) for name in ("user_id", "item_id")),
        USERS,
        ITEMS,
    )
    assert state.system["popularity"].tolist() == gram.sum(axis=0).tolist(), "it is fitted on the validation share too"


def validation_ranks(split: str) -> np.ndarray:
    """Return the rank that EASE gives each validation interaction, event by event."""
    events = sorted(((entry, user) for user in range(USERS) for entry in met(user)), key=lambda pair: pair[0].ts_us)
    if split == "time":
        events = events[: int(len(events) * 0.95)]
        is_validation = [place >= int(len(events) * 0.8) for place in range(len(events))]
    else:  # each user's last of seven is not seen, the one before it validates
        events = [(entry, user) for entry, user in events if entry != met(user)[6]]
        is_validation = [entry == met(user)[5] for entry, user in events]
    pairs = np.array([(user, int(entry.item_id[1:])) for entry, user in events])
    train = pairs[~np.array(is_validation)]
    model = Ease.fit(train[:, 0], train[:, 1], n_items=ITEMS, l2=20.0)
    had: dict[int, list[int]] = {}
    ranks = []
    for (user, item), validates in zip(pairs.tolist(), is_validation, strict=True):
        own = had.setdefault(user, [])
        if validates and own:
            scores = model.scores(own)
            scores[own] = -np.inf
            ranks.append(1 + (scores > scores[item]).sum())
        own.append(item)
    return np.array(ranks)


@pytest.mark.parametrize("split", ["time", "leave_one_out"])
def test_a_run_states_how_well_it_names_the_validation_interactions(split, dataset, home):
    metrics = fit_system(recipe_of("ease", f"data.split={split}"), dataset, home).metrics
    ranks = validation_ranks(split)
    assert len(ranks) >= 40
    assert metrics["best_hit_at_10"] == pytest.approx((ranks <= 10).mean())
    assert metrics["best_ndcg_at_10"] == pytest.approx(((ranks <= 10) / np.log2(1 + ranks)).mean())


def test_a_hybrid_states_the_weights_that_it_chose_and_keeps_those_it_is_given(published, dataset, home):
    given = published("hybrid")[0].metrics
    chosen = fit_system(recipe_of("hybrid", "hybrid.weights=[]"), dataset, home).metrics
    assert (given["weight_ease"], given["weight_content"]) == (1.0, 0.5)
    assert chosen["weight_ease"] == 1.0
    assert chosen["best_ndcg_at_10"] >= given["best_ndcg_at_10"]


def test_what_takes_more_memory_than_is_free_is_refused_with_the_figure(dataset, home, monkeypatch):
    assert fitting_bytes(recipe_of("ease"), "ease", 0, 100_000) == 41 * 10**10
    monkeypatch.setattr(classical, "free_memory", lambda: 10_000)
    before = list(home.runs.iterdir())
    with pytest.raises(
        ConfigError, match=r"system\.name=ease: fitting 20 items and 40 users takes about 0\.0 GiB.*als"
    ):
        fit_system(recipe_of("ease"), dataset, home)
    assert list(home.runs.iterdir()) == before
    fit_system(recipe_of("popularity"), dataset, home)


@pytest.mark.parametrize(
    "override",
    [
        "system.name=eese",
        "system.max_history=0",
        "ease.l2=0",
        "ease.lambda=3",
        "item_neighbours.neighbours=0",
        "user_neighbours.shrink=-1",
        "als.factors=0",
        "bpr.iterations=0",
        'hybrid.parts=["ease"]',
        "hybrid.weights=[1.0]",
        "system.blend=als",  # beside EASE
        "system.blend_weight=1.0",
    ],
)
def test_settings_that_are_unknown_or_out_of_range_are_refused(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        load_recipe("ease", [override])


@pytest.mark.parametrize("name", ["popularity", "item_neighbours", "ease", "hybrid", "ratings", "baskets"])
def test_packaged_recipes_name_the_system_they_are_named_after(name):
    assert load_recipe(name).section(SystemConfig).name == name


def test_all_other_packaged_recipes_are_of_the_two_stage_model():
    systems = {name: load_recipe(name).section(SystemConfig).name for name in packaged_recipes()}
    two_stage = {name for name, system in systems.items() if system == TWO_STAGE}
    assert two_stage == {"clicks", "movielens", "two_tower", "text_lstm", "sasrec", "hstu", "deepfm"}
    assert len(systems) == len(two_stage) + 6


def test_the_commands_fit_and_publish_it(dataset, home):
    flags = {"resume": None, "overrides": ["ease.l2=2.0"], "epochs": None, "workers": None, "verbose": False}
    trained = train(argparse.Namespace(recipe="ease", data=str(dataset.path), home=home, **flags))
    assert json.loads((Path(trained["folder"]) / "run.json").read_text()) == trained
    assert read_recipe(Path(trained["folder"])).values["ease"] == {"l2": 2.0}
    told = run(argparse.Namespace(run=None, home=home, canary=False))
    assert (told["run"], told["metrics"]) == (trained["folder"], trained["metrics"])
    flags |= {"workers": (1, 1)}
    with pytest.raises(ConfigError, match="leave out --epochs and --workers"):
        train(argparse.Namespace(recipe="ease", data=str(dataset.path), home=home, **flags))


def test_two_versions_of_different_systems_can_be_compared(published, registry):
    found = compare_versions(registry, published("ease")[1], published("item_neighbours")[1])
    assert found["system"] == ["ease", "item_neighbours"]
    assert found["rows"]["text"] == {"common": ITEMS, "changed": 0, "relative_change": 0.0}
    assert found["recipe"]["system.name"] == ["ease", "item_neighbours"]
    assert "system.weights" in found["dense"]["reshaped"]


def test_it_is_no_two_stage_model(published, registry):
    with pytest.raises(RegistryError, match="it is of ease"):
        ServedModel.load(registry, published("ease")[1])


def test_too_little_to_learn_from_says_so(tmp_path, home):
    events = events_table([Event(user_id="u0", item_id="i0", kind="click", ts_us=1)])
    items = [{"item_id": "i0", "domain": "default", "text": "", "categories": []}]
    lonely = write_dataset(
        tmp_path / "lonely",
        name="lonely",
        events=events,
        items=pa.Table.from_pylist(items, schema=ITEM_SCHEMA),
        users=pa.Table.from_pylist([{"user_id": "u0", "attributes": []}], schema=USER_SCHEMA),
        label="",
        sources=[],
        rejected={},
    )
    with pytest.raises(DataError, match="no user has two interactions"):
        fit_system(recipe_of("ease"), lonely, home)
