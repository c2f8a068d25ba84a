"""What users did before the log's first event, and the version that was trained on it."""

import pyarrow as pa
import pytest

from cluster.config import Recipe
from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, write_dataset
from cluster.events import Event, events_table
from cluster.log import EventLog
from cluster.manifest import VersionRef
from serving.past import LATER_SEED, count_training_events, seed_history, trained_version
from serving.replica import resolve_settings


def test_a_version_trained_on_something_else_brings_its_own_past(versions, home):
    seed_history(versions.registry, home.log)
    with EventLog(home.log) as log:
        log.append([Event(user_id="u0", item_id="i9", kind="like", ts_us=1)])
        assert log.seen_items("u0") == {"i0", "i1", "i9"}
        versions.publish_version(history=versions.likes(4))
        seed_history(versions.registry, home.log)
        assert log.seen_items("u0") == {"i0", "i1", "i2", "i3", "i9"}


def test_a_dataset_s_later_events_follow_those_that_were_trained_on(versions, home, tmp_path):
    later = [Event(event_id=f"later{n}", user_id="u0", item_id=f"i{n}", kind="like", ts_us=10 + n) for n in (7, 8)]
    dataset = write_dataset(
        tmp_path / "data",
        name="likes",
        events=pa.concat_tables([versions.likes(2), events_table(later)]),
        items=pa.Table.from_pylist([], schema=ITEM_SCHEMA),
        users=pa.Table.from_pylist([], schema=USER_SCHEMA),
        label="likes",
        sources=[],
        rejected={},
    )
    seed_history(versions.registry, home.log, dataset)
    with EventLog(home.log) as log:
        assert [entry.item_id for entry in log.user_state("u0", 10).history] == ["i0", "i1", "i7", "i8"]
        assert log.count_seeded(LATER_SEED) == 2
    assert count_training_events(versions.registry, 1) == 8


def test_a_folded_version_grew_from_the_trained_one(versions):
    versions.publish_version(trained_version=1)
    assert trained_version(versions.registry, VersionRef(2, 3)) == 1
    assert trained_version(versions.registry, VersionRef(1)) == 1


@pytest.mark.parametrize(("stated", "pinned"), [(None, 1), (2, 2)])
def test_arms_that_follow_nothing_are_pinned_to_the_trained_version_unless_another_is_stated(
    versions, home, stated, pinned
):
    versions.publish_version(trained_version=1)
    recipe = versions.recipe

    def pinned_for(**serve):
        changed = Recipe(recipe.name, {**recipe.values, "serve": serve}, recipe.sections)
        return resolve_settings(changed, home).serve.pinned_version

    assert pinned_for(arms=["live", "frozen"], **({"pinned_version": stated} if stated else {})) == pinned
    assert pinned_for(arms=["live"]) is None
