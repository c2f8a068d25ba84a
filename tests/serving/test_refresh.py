from collections.abc import Iterator

import numpy as np
import pytest

from cluster.catalogue import Item
from cluster.errors import CorruptVersionError, EngineError, NoVersionError
from cluster.events import Event
from cluster.log import EventLog
from cluster.manifest import VersionRef
from serving.catalogue import READ_ITEMS, LiveCatalogue
from serving.experiments import ARMS
from serving.metrics import Metrics
from serving.refresh import Refresher


class OneHotEncoder:
    """Vectors that tell texts apart by length, and a switch to be out of order, perhaps only for one text."""

    def __init__(self):
        self.answers = True
        self.stumbles_over = ""

    def __call__(self, texts, version=None):
        if not self.answers or self.stumbles_over in texts:
            raise EngineError("the text encoder does not answer")
        return np.eye(384, dtype=np.float32)[[len(text) % 384 for text in texts]]


@pytest.fixture
def log(home) -> Iterator[EventLog]:
    with EventLog(home.log) as log:
        yield log


@pytest.fixture
def encoder():
    return OneHotEncoder()


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def start(versions, log, encoder, metrics):
    """Return a function that makes a loaded replica's refresher, as a new process would."""

    def start(pinned_version: int | None = None) -> Refresher:
        refresher = Refresher(versions.registry, log, LiveCatalogue(log, encoder), metrics, poll_interval_s=3600)
        refresher.load(pinned_version)
        return refresher

    return start


def slate(model):
    answer = model.recommend("u0", (), 10, frozenset())
    return answer.item_ids, answer.scores.tolist()


def test_a_replica_that_starts_late_loads_what_is_promoted(versions, start):
    versions.publish_delta(seed=1)
    versions.publish_delta(seed=2)
    assert start().residents.live.name == "1.2"


def test_a_replica_that_starts_on_a_broken_chain_serves_as_much_of_it_as_holds(versions, start):
    versions.publish_delta(seed=1)
    versions.flip_bit(versions.publish_delta(seed=2), "rows.safetensors")
    versions.publish_delta(seed=3)
    refresher = start()
    assert refresher.residents.live.name == "1.1"
    assert "1.3 is promoted but 1.1 is served" in refresher.problems["version"]


def test_a_replica_whose_version_does_not_hold_does_not_start(versions, start):
    versions.flip_bit(VersionRef(1), "rows.safetensors")
    with pytest.raises(CorruptVersionError, match=r"rows\.safetensors"):
        start()


def test_before_loading_there_is_nothing_to_answer_from(versions, log, encoder):
    refresher = Refresher(versions.registry, log, LiveCatalogue(log, encoder), Metrics(), poll_interval_s=3600)
    with pytest.raises(NoVersionError):
        _ = refresher.residents


def test_pinned_arms_keep_the_version_as_published(versions, start):
    versions.publish_delta(seed=1)
    versions.publish_version(seed=5)
    residents = start(pinned_version=1).residents
    names = {name: residents.model_of(arm).name for name, arm in ARMS.items()}
    assert names == {"live": "2.0", "state": "1.0", "frozen": "1.0"}


def test_an_item_that_was_put_is_known_to_replicas_that_start_later_and_to_versions_published_later(
    versions, log, start
):
    log.put_items([Item(item_id="new", text="a new film")])
    refresher = start(pinned_version=1)
    versions.publish_version(seed=5)
    refresher.follow()
    residents = refresher.residents
    assert residents.live.name == "2.0"
    assert residents.live.text_of("new") == residents.model_of(ARMS["frozen"]).text_of("new") == "a new film"


def test_an_item_that_is_put_again_is_read_anew(log, start):
    log.put_items([Item(item_id="i3", text="another description")])
    refresher = start()
    assert refresher.residents.live.text_of("i3") == "another description"
    log.put_items([Item(item_id="i3", text="a third one")])
    refresher.refresh_items()
    assert refresher.residents.live.text_of("i3") == "a third one"
    assert refresher.residents.live.item_count == 30


def test_without_the_encoder_weights_are_still_followed_and_items_catch_up_later(versions, log, encoder, start):
    refresher = start()
    encoder.answers = False
    log.put_items([Item(item_id="new", text="a new film")])
    versions.publish_delta(seed=1)
    refresher.follow()
    assert refresher.residents.live.name == "1.1"
    assert "does not answer" in refresher.problems["items"]
    encoder.answers = True
    refresher.follow()
    assert refresher.residents.live.knows("new")
    assert refresher.problems == {}


def test_items_that_were_encoded_before_the_encoder_failed_are_not_lost(log, encoder, start):
    refresher = start(pinned_version=1)
    encoder.stumbles_over = "the last film"
    log.put_items([Item(item_id=f"new{n}", text="a new film") for n in range(READ_ITEMS)])
    log.put_items([Item(item_id="last", text=encoder.stumbles_over)])
    with pytest.raises(EngineError):
        refresher.refresh_items()
    encoder.stumbles_over = ""
    refresher.refresh_items()
    put = {"last", *(f"new{n}" for n in range(READ_ITEMS))}
    for arm in ("live", "frozen"):
        assert put <= set(refresher.residents.model_of(ARMS[arm]).item_ids)


def test_the_model_before_the_last_swap_stays_in_memory(versions, start):
    refresher = start()
    before = refresher.residents.live
    versions.publish_delta(seed=1)
    refresher.follow()
    assert refresher.residents.previous is before
    versions.registry.promote(VersionRef(1), "worse")
    refresher.follow()
    assert refresher.residents.live is before


def test_the_same_version_loaded_twice_answers_alike(versions, start):
    versions.publish_delta(seed=1)
    assert slate(start().residents.live) == slate(start().residents.live)


def test_each_event_is_timed_once_and_those_before_the_replica_never(versions, log, metrics, start):
    log.append([Event(user_id="u0", item_id="i2", kind="like", ts_us=0) for _ in range(3)])
    versions.publish_delta(seed=1, last_seq=2)
    refresher = start()
    log.append([Event(user_id="u0", item_id="i3", kind="like", ts_us=0) for _ in range(3)])
    versions.publish_delta(seed=2, last_seq=5)
    refresher.follow()
    assert metrics.recent_freshness("weights")["events"] == 2  # 4 and 5; 6 is not learned yet
    versions.registry.promote(VersionRef(1, 1), "worse")
    refresher.follow()
    versions.registry.promote(VersionRef(1, 2), "better after all")
    refresher.follow()
    assert metrics.recent_freshness("weights")["events"] == 2


def timed(metrics):
    return [metrics.recent_freshness(name)["events"] for name in ("weights", "dense", "row")]


def test_an_event_whose_item_s_row_a_delta_leaves_out_waits_for_the_one_that_has_it(versions, log, metrics, start):
    refresher = start()
    log.append([Event(user_id="u0", item_id=item_id, kind="like", ts_us=0) for item_id in ("i2", "i3", "i3")])
    versions.publish_delta(seed=1, last_seq=3, items=[2])
    refresher.follow()
    assert timed(metrics) == [3, 3, 1]
    log.append([Event(user_id="u0", item_id="i4", kind="like", ts_us=0)])
    versions.publish_delta(seed=2, items=[3])
    refresher.follow()
    assert timed(metrics) == [4, 4, 3]
    versions.publish_version(seed=5)  # has every row
    refresher.follow()
    assert timed(metrics) == [4, 4, 4]


def test_a_stranger_s_first_event_is_not_waited_for_since_there_is_nothing_to_learn_it_from(
    versions, log, metrics, start
):
    refresher = start()
    log.append([Event(user_id="nobody yet", item_id=item_id, kind="like", ts_us=0) for item_id in ("i3", "i4")])
    versions.publish_delta(seed=1, last_seq=2, items=[2])
    refresher.follow()
    assert timed(metrics) == [2, 2, 0]
    versions.publish_delta(seed=2, items=[3, 4])
    refresher.follow()
    assert timed(metrics) == [2, 2, 1]  # the second


def test_what_teaches_nothing_is_timed_as_passed_over_only(versions, log, metrics, start):
    refresher = start()
    log.append(
        [
            Event(user_id="u0", item_id="i2", kind="impression", ts_us=0),
            Event(user_id="u0", item_id="in no catalogue", kind="like", ts_us=0),
            Event(user_id="u0", item_id="i3", kind="like", ts_us=0),
        ]
    )
    versions.publish_delta(seed=1, last_seq=2)
    versions.publish_delta(seed=2, last_seq=3, set_aside="log loss rose")
    refresher.follow()
    assert timed(metrics) == [3, 1, 0]


def test_what_did_not_change_between_two_versions_is_in_memory_once(versions, start):
    refresher = start(pinned_version=1)
    before = refresher.residents.live
    versions.publish_version(seed=5)
    refresher.follow()
    after = refresher.residents.live
    assert (after.name, after.index_of is before.index_of) == ("2.0", True)
