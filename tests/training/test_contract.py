"""Every recommender passes one suite as a served version: the two-stage model, trained on Ray, and classical systems.

What needs items' texts (content, text neighbours, hybrids with them) passes the same in test_classical.py: this board's
squares have none.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from cluster.config import load_recipe
from cluster.dataset import write_dataset
from cluster.home import Home
from cluster.log import Interaction
from cluster.registry import Registry, VersionRef
from embeddings.vocabulary import Vocabulary
from training.classical import fit_system
from training.evaluation.system import Cases, ClassicalSystem, VersionSystem
from training.models.classical import load_resident
from training.models.resident import Resident
from training.models.served import ServedModel
from training.publish import publish_run
from training.stream import build_history
from training.trainer import train_on_ray

pytestmark = pytest.mark.timeout(300)  # the first test waits for the run, half a minute on idle cores

CLASSICAL = {
    "popularity": [],
    "item_neighbours": ["item_neighbours.neighbours=10"],
    "user_neighbours": ["user_neighbours.neighbours=50"],
    "als": ["als.factors=2"],
    "bpr": ["bpr.factors=2", "bpr.learning_rate=0.1"],
    "ease": ["ease.l2=20.0"],
}
SYSTEMS = ["two_stage", *CLASSICAL]
SPLIT = ["data.train_fraction=0.95", "data.validation_fraction=0.1"]
Loaded = Callable[[str], Resident]


@pytest.fixture(scope="module")
def registries(board, tmp_path_factory) -> Callable[[str], Registry]:
    """Return the registry of a system's own home, in which it is version 1."""
    made = {"two_stage": Registry(board.home.registry)}

    def published(name: str) -> Registry:
        if name not in made:
            home = Home(tmp_path_factory.mktemp(name)).ensure()
            recipe = load_recipe("popularity", [f"system.name={name}", *SPLIT, *CLASSICAL[name]])
            made[name] = Registry(home.registry)
            publish_run(fit_system(recipe, board.dataset, home), made[name])
        return made[name]

    return published


@pytest.fixture(params=SYSTEMS)
def system(request, registries) -> Resident:
    return load_resident(registries(request.param), VersionRef(1))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "popularity"])
def test_the_withheld_square_is_recovered(name, registries, board) -> None:
    model, missed = load_resident(registries(name), VersionRef(1)), []
    for user in range(board.USERS):
        met = board.met(user)
        for user_id in (f"u{user}", "a stranger who met the same"):
            found = model.recommend(user_id, met, 1, frozenset(entry.item_id for entry in met))
            missed += [] if found.item_ids == [board.withheld(user)] else [(user_id, found.item_ids)]
    assert missed == []


def test_loaded_again_it_answers_the_same(system, registries, board, request) -> None:
    again = load_resident(registries(request.node.callspec.params["system"]), VersionRef(1))
    for user in range(8):
        one, other = (model.recommend(f"u{user}", board.met(user), board.ITEMS) for model in (system, again))
        assert (one.item_ids, one.scores.tobytes()) == (other.item_ids, other.scores.tobytes())


def test_without_a_history_it_shows_what_is_popular(system, board) -> None:
    counts = dict(zip(system.state.item_ids, system.state.rows["count"].tolist(), strict=True))
    found = system.recommend("u0", [], board.ITEMS)
    assert found.cold_start
    assert (np.diff([counts[item_id] for item_id in found.item_ids]) <= 0).all()


def test_an_unknown_item_is_ignored(system, board) -> None:
    met = board.met(1)
    unknown = Interaction("unheard of", "rating", 4.0, met[1].ts_us, -1)
    with_unknown, without = (
        system.recommend("u1", past, board.ITEMS, frozenset({"unheard of either"} if unknown in past else ()))
        for past in ([met[0], unknown, *met[1:]], met)
    )
    assert with_unknown.item_ids == without.item_ids
    assert with_unknown.scores.tolist() == without.scores.tolist()


def test_a_batch_equals_one_by_one(system, board) -> None:
    events = board.dataset.events()
    user_ids = events["user_id"].unique()
    users, items = Vocabulary(user_ids.to_pylist(), board.USERS), Vocabulary(system.state.item_ids, board.ITEMS)
    history = build_history(events, items, users)
    targets = history.ends - 1  # each user's last, from the four before
    cases = Cases(history=history, targets=targets, user_ids=user_ids, item_ids=items.ids)
    evaluated = VersionSystem(system) if isinstance(system, ServedModel) else ClassicalSystem(system)
    together = np.concatenate(list(evaluated.scores(cases)))
    assert together.shape == (board.USERS, board.ITEMS)
    for row, (start, target) in enumerate(zip(history.starts, targets, strict=True)):
        user = int(users.ids[history.user_row[target]][1:])
        met = board.met(user)[: target - start]
        had = [items.ids[item] for item in history.item_row[start:target]]
        assert [entry.item_id for entry in met] == had
        together[row, history.item_row[start:target]] = -np.inf
        alone = system.recommend(f"u{user}", met, board.ITEMS, frozenset(had))
        of_item = dict(zip(alone.item_ids, alone.scores.tolist(), strict=True))
        ranked = [items.ids[item] for item in np.argsort(-together[row], kind="stable")[: len(alone.item_ids)]]
        assert [of_item[i] for i in ranked] == pytest.approx(sorted(of_item.values(), reverse=True), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_fitted_again_on_other_data_it_forgets_and_the_seed_decides(name, board, tmp_path) -> None:
    """A home that has seen the board trains on the board with items renamed as one that never has."""
    events = board.dataset.events()
    renamed = [f"i{(int(item_id[1:]) + 1) % board.ITEMS}" for item_id in events["item_id"].to_pylist()]
    place = events.schema.get_field_index("item_id")
    other = write_dataset(
        tmp_path / "other",
        name="renamed",
        events=events.set_column(place, events.schema.field(place), pa.array(renamed, pa.string())),
        items=board.dataset.items(),
        users=board.dataset.users(),
        label="a square of the other colour",
        sources=[],
        rejected={},
    )
    recipe = board.recipe.with_overrides(["train.workers=1", "train.epochs=1"])
    if name != "two_stage":
        recipe = load_recipe("popularity", [f"system.name={name}", *SPLIT, *CLASSICAL[name]])
    fit = train_on_ray if name == "two_stage" else fit_system
    answers = []
    for home, datasets in ((tmp_path / "used", (board.dataset, other)), (tmp_path / "new", (other,))):
        registry = Registry(Home(home).ensure().registry)
        for dataset in datasets:
            publish_run(fit(recipe, dataset, Home(home)), registry)
        model = load_resident(registry, VersionRef(len(datasets)))
        answers.append([model.recommend(f"u{u}", [], 3) for u in range(2)])
        answers[-1] += [model.recommend("a stranger", board.met(u)[:3], board.ITEMS) for u in range(4)]
    for one, another in zip(*answers, strict=True):
        assert (one.item_ids, one.scores.tolist()) == (another.item_ids, another.scores.tolist())
