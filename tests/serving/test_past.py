"""What users did before the log's first event, and the version that was trained on it."""

import pytest

from cluster.events import Event
from cluster.log import EventLog
from cluster.manifest import VersionRef
from serving.app import _resolve
from serving.config import ServeConfig
from serving.past import seed_history, trained_version


def test_a_version_trained_on_something_else_brings_its_own_past(versions, home):
    seed_history(versions.registry, home)
    with EventLog(home.log) as log:
        log.append([Event(user_id="u0", item_id="i9", kind="like", ts_us=1)])
        assert log.seen_items("u0") == {"i0", "i1", "i9"}
        versions.publish_version(likes=4)
        seed_history(versions.registry, home)
        assert log.seen_items("u0") == {"i0", "i1", "i2", "i3", "i9"}


def test_a_folded_version_grew_from_the_trained_one(versions):
    versions.publish_version(trained_version=1)
    assert trained_version(versions.registry, VersionRef(2, 3)) == 1
    assert trained_version(versions.registry, VersionRef(1)) == 1


@pytest.mark.parametrize(("stated", "pinned"), [(None, 1), (2, 2)])
def test_arms_that_follow_nothing_are_pinned_to_the_trained_version_unless_another_is_stated(versions, stated, pinned):
    versions.publish_version(trained_version=1)
    config = ServeConfig(arms=("live", "frozen"), pinned_version=stated)
    assert _resolve(config, versions.registry).pinned_version == pinned
    assert _resolve(ServeConfig(arms=("live",)), versions.registry).pinned_version is None
