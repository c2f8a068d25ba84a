"""Undoing some learning: the outcome is that of a log without it, whatever happened since."""

import contextlib
from dataclasses import replace

import pytest
import torch

from cluster.errors import ConfigError, NothingToLearnError, RegistryError
from cluster.log import EventLog
from cluster.log.retention import LogConfig
from cluster.manifest import VersionRef
from training.models.version import read_version
from training.online.learner import OnlineLearner
from training.online.undo import publish_without, undo_learning

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def open_loop(build_home):
    with contextlib.ExitStack() as stack:

        def open_one(*overrides: str, name: str = "home"):
            tiny = build_home(*overrides, name=name)
            log = stack.enter_context(EventLog(tiny.home.log))
            log.seed_history("training-history", tiny.registry.open_version(1).table("history"))
            learner = OnlineLearner(tiny.registry, log, tiny.recipe, tiny.home.cache, torch.device("cpu"))
            return tiny, log, learner

        yield open_one


def follow(log, learner, events=()) -> None:
    log.append(list(events))
    torch.manual_seed(0)  # of dropout
    while fresh := learner.read():
        learner.learn(fresh)
        learner.publish()


def assert_equal_weights(one, other) -> None:
    for some, others in zip(one.live.tensors(), other.live.tensors(), strict=True):
        for tensor_name, tensor in others.items():
            assert torch.equal(some[tensor_name], tensor), tensor_name


def test_weights_do_not_tell_any_more_what_an_undone_range_held(open_loop):
    learners = []
    for name, items in (("one", ("i1", "i2")), ("two", ("i20", "i21"))):
        tiny, log, learner = open_loop(name=name)
        events = tiny.live_events(60)
        for place in range(22, 28):  # sequence numbers 23 to 28
            events[place] = replace(events[place], user_id=f"mallory-{place % 2}", item_id=items[place % 2])
        follow(log, learner, events)
        ref = publish_without(tiny.registry, log, [(23, 28)], [], "a broken client")
        assert (ref, tiny.registry.history()[-1].reason) == (VersionRef(2), "a broken client")
        assert tiny.registry.manifest(ref).parent == VersionRef(1, 1)
        assert learner.publish() is None
        assert learner.applied_seq == 16
        follow(log, learner)
        metrics = tiny.registry.manifest(tiny.registry.current()).metrics
        assert (metrics["events_total"], metrics["set_aside_total"]) == (60, 6)
        assert not {"mallory-0", "mallory-1"} & set(learner.live.users.ids)
        learners.append(learner)
    assert_equal_weights(*learners)


def test_undoing_a_user_leaves_out_all_of_theirs_and_learns_what_they_do_later(open_loop):
    tiny, log, learner = open_loop()
    events = tiny.live_events(48)
    events[20], events[40] = (replace(events[n], user_id="mallory") for n in (20, 40))
    follow(log, learner, events)
    publish_without(tiny.registry, log, [], ["mallory"])
    learner.publish()
    follow(log, learner)
    assert "mallory" not in learner.live.users.ids
    assert learner.set_aside_total == 2
    follow(log, learner, [replace(event, user_id="mallory") for event in tiny.live_events(16, first=48)])
    assert "mallory" in learner.live.users.ids
    assert learner.set_aside_total == 2


def test_whoever_takes_over_leaves_out_the_same_over_folds_and_later_undoing(open_loop):
    tiny, log, learner = open_loop("online.compact_every=2")
    follow(log, learner, tiny.live_events(48))
    publish_without(tiny.registry, log, [(40, 44)], [])
    learner.publish()
    follow(log, learner, tiny.live_events(64, first=48))
    publish_without(tiny.registry, log, [(18, 19)], [])
    successor = OnlineLearner(tiny.registry, log, tiny.recipe, tiny.home.cache, torch.device("cpu"))
    assert successor.exclusions.ranges == {(40, 44), (18, 19)}
    assert successor.applied_seq <= 17
    follow(log, successor)
    assert successor.set_aside_total == 7
    assert successor.events_total == 112


def test_what_the_guard_had_set_aside_since_is_not_learned_by_the_replay(open_loop):
    tiny, log, learner = open_loop()
    follow(log, learner, tiny.live_events(32))
    poison = replace(tiny.live_events(1, first=32)[0], kind="rating", value=3e38)
    follow(log, learner, [poison])
    follow(log, learner, tiny.live_events(16, first=33))
    publish_without(tiny.registry, log, [(20, 20)], [])
    learner.publish()
    assert learner.exclusions.ranges == {(20, 20), (33, 33)}


def test_with_its_parents_gone_it_begins_at_the_trained_version(open_loop):
    tiny, log, learner = open_loop("online.compact_every=1", "online.keep_versions=1", "online.keep_chains=1")
    follow(log, learner, tiny.live_events(96))
    assert [m.ref.version for m in tiny.registry.versions()] == [1, 6, 7]
    ref = publish_without(tiny.registry, log, [(20, 20)], [])
    assert tiny.registry.manifest(ref).parent == VersionRef(1)
    one, other = (read_version(tiny.registry, found) for found in (VersionRef(1), ref))
    assert torch.equal(one.rows["item"], other.rows["item"])


def test_what_cannot_be_undone_is_said(open_loop):
    tiny, log, learner = open_loop()
    follow(log, learner, tiny.live_events(16))
    with pytest.raises(ConfigError, match=r"--without-seqs 5\.\.4: give the first and the last"):
        publish_without(tiny.registry, log, [(5, 4)], [])
    with pytest.raises(ConfigError, match=r"--without-user nobody: 1\.1 has learned from no event"):
        publish_without(tiny.registry, log, [], ["nobody"])
    trained = tiny.registry.draft_version().publish(offset=16, metrics={})
    with pytest.raises(RegistryError, match=r"2\.0: there is none from before event 3 that it grew from"):
        publish_without(tiny.registry, log, [(3, 4)], [])
    assert tiny.registry.current() == trained


def test_the_command_says_what_will_be_learned_again(open_loop):
    tiny, log, learner = open_loop()
    follow(log, learner, tiny.live_events(48))
    told = undo_learning(tiny.recipe, tiny.home, [(20, 21)], ["u1"], "bots")
    assert told == {
        "promoted": "2.0",
        "before": "1.3",
        "reason": "bots",
        "grown_from": "1.0",  # u1's first event is the second of the log
        "to_learn_again": 48,
        "ranges": [[20, 21]],
        "users": {"u1": 48},
    }


def test_what_retention_has_dropped_is_not_undone_over(open_loop):
    tiny, log, learner = open_loop("online.compact_every=2", "online.keep_versions=1", "online.keep_chains=1")
    follow(log, learner, tiny.live_events(150))
    log.close()
    keep_little = LogConfig(seal_after_events=5, segment_events=10, keep_bytes=1)
    with EventLog(tiny.home.log, keep_little) as short:
        assert 0 < short.committed_offset("online-trainer") < 150
        short.seal()
        oldest = short.read(0, 1)[0].seq
        assert 1 < oldest <= short.committed_offset("online-trainer") + 1
        with pytest.raises(RegistryError, match=rf"events 1 to {oldest - 1} are no longer in the log"):
            publish_without(tiny.registry, short, [(3, 4)], [])
        assert publish_without(tiny.registry, short, [(149, 150)], []) == tiny.registry.current()


def test_where_nothing_was_learned_there_is_nothing_to_undo(open_loop, publish_classical):
    tiny, log, _ = open_loop()
    ref = publish_classical(tiny.registry)
    with pytest.raises(NothingToLearnError, match="is of ease"):
        publish_without(tiny.registry, log, [(1, 2)], [])
    assert tiny.registry.current() == ref
