"""The online trainer on a real log and registry: exactly once, under guard, after whatever happens to the pointer."""

import contextlib
import math
import random
from dataclasses import replace

import pytest
import torch

from cluster.catalogue import Item
from cluster.errors import ConfigError, NothingToLearnError, RegistryError
from cluster.events import Event
from cluster.log import EventLog
from cluster.manifest import VersionRef
from training.baselines.config import SystemConfig
from training.models.served import ServedModel
from training.models.version import ITEM_ROWS, read_version, write_delta, write_version
from training.online.learner import CONSUMER, OnlineConfig, OnlineLearner

pytestmark = pytest.mark.usefixtures("process_group")


class Loop:
    """A home's log, its learner, and what can be asked of both."""

    def __init__(self, tiny, log: EventLog) -> None:
        self.tiny = tiny
        self.log = log
        self.registry = tiny.registry
        self.learner = self.open_learner()

    def open_learner(self) -> OnlineLearner:
        return OnlineLearner(self.registry, self.log, self.tiny.recipe, self.tiny.home.cache, torch.device("cpu"))

    def learn(self, events, learner: OnlineLearner | None = None) -> None:
        """Log the events and learn everything there is, without publishing."""
        learner = learner or self.learner
        self.log.append(events)
        while fresh := learner.read():
            learner.learn(fresh)

    def follow(self, events=(), learner: OnlineLearner | None = None) -> list[VersionRef | None]:
        """Log the events and learn, publishing after every batch; return what `publish` returned."""
        learner = learner or self.learner
        self.log.append(list(events))
        published = []
        while fresh := learner.read():
            learner.learn(fresh)
            published.append(learner.publish())
        return published

    def ranges(self, version: int = 1) -> list[tuple[int, int]]:
        return [(m.first_seq, m.last_seq) for m in self.registry.deltas(version)]

    def metrics(self) -> dict:
        return dict(self.registry.manifest(self.registry.current()).metrics)


@pytest.fixture
def open_loop(build_home):
    with contextlib.ExitStack() as stack:

        def open_one(*overrides: str, **given) -> Loop:
            tiny = build_home(*overrides, **given)
            log = stack.enter_context(EventLog(tiny.home.log))
            log.seed_history("training-history", tiny.registry.open_version(1).table("history"))
            return Loop(tiny, log)

        yield open_one


def assert_same_state(found: OnlineLearner, expected: OnlineLearner) -> None:
    for some, others in zip(found.live.tensors(), expected.live.tensors(), strict=True):
        assert set(some) == set(others)
        for name, tensor in others.items():
            assert torch.equal(some[name], tensor), name
    for name in ("ref", "applied_seq", "events_total"):
        assert getattr(found, name) == getattr(expected, name), name


def assert_serves_the_same(registry, one: VersionRef, other: VersionRef) -> None:
    before, after = read_version(registry, one), read_version(registry, other)
    for name, tensor in before.rows.items():
        assert torch.equal(after.rows[name], tensor), name
    for name, tensor in before.dense.items():
        assert torch.equal(after.dense[name], tensor), name


def noise(tiny, count: int) -> list[Event]:
    """Clicks on items drawn blindly."""
    rng = random.Random(0)
    return [replace(event, item_id=f"i{rng.randrange(tiny.ITEMS)}") for event in tiny.live_events(count, first=10_000)]


def test_the_chain_covers_the_log_once_without_a_gap(open_loop):
    loop = open_loop()
    events = loop.tiny.live_events(75)
    loop.log.append(events[:40])
    loop.follow(events)  # the first forty once more: clients repeat what was not acked to them
    assert loop.ranges() == [(1, 16), (17, 32), (33, 48), (49, 64), (65, 75)]
    deltas = loop.registry.deltas(1)
    assert sum(m.metrics["events"] for m in deltas) == loop.log.verify().events == 75
    assert loop.metrics()["events_total"] == 75
    assert loop.registry.current() == VersionRef(1, 5)


def test_base_and_chain_give_the_learners_state_bit_for_bit(open_loop):
    loop = open_loop()
    loop.follow(loop.tiny.live_events(75))
    assert_same_state(loop.open_learner(), loop.learner)


def test_what_was_not_published_is_learned_by_whoever_comes_next(open_loop):
    loop = open_loop()
    loop.follow(loop.tiny.live_events(16))
    loop.learn(loop.tiny.live_events(10, first=16))
    survivor = loop.open_learner()
    assert survivor.applied_seq == 16
    loop.follow(learner=survivor)
    assert loop.ranges() == [(1, 16), (17, 26)]


def test_a_learner_that_was_given_up_for_dead_cannot_publish_what_another_has(open_loop):
    loop = open_loop()
    successor = loop.open_learner()
    loop.learn(loop.tiny.live_events(16))
    loop.follow(learner=successor)
    loop.registry.promote(VersionRef(1), "so that the late one sees the pointer where it left it")
    with pytest.raises(RegistryError, match=r"1\.1 has learned up to 16"):
        loop.learner.publish()
    assert loop.ranges() == [(1, 16)]


def test_events_are_predicted_before_they_are_learned(open_loop):
    loop = open_loop()
    loop.learn(loop.tiny.live_events(16))
    metrics = loop.learner.guard.metrics()
    assert metrics["events"] == 16
    assert metrics["log_loss"] == metrics["base_log_loss"]  # not a step taken yet


def test_learning_the_stream_predicts_it_better(open_loop):
    loop = open_loop("online.max_events=6")
    loop.follow(loop.tiny.live_events(360))
    metrics = loop.metrics()["validation"]
    assert metrics["log_loss"] < metrics["base_log_loss"] - 0.5


def test_a_followed_rate_moves_and_is_told(open_loop):
    loop = open_loop("online.rate_strength=0.1")
    loop.follow(loop.tiny.live_events(75))
    assert 0.5 < loop.metrics()["rate_factor"] < 2.0
    assert loop.metrics()["rate_factor"] != 1.0


def test_a_delta_tells_figures_by_segment_and_what_has_drifted(open_loop):
    loop = open_loop("online.max_events=6", "online.compact_every=1000")
    loop.follow(loop.tiny.live_events(300))
    newcomers = [replace(event, user_id=f"new-{event.user_id}") for event in loop.tiny.live_events(300, first=300)]
    loop.follow(newcomers)
    segments = loop.metrics()["validation"]["segments"]
    assert set(segments) == {"known users", "new users", "head items", "tail items"}
    assert segments["known users"]["events"] + segments["new users"]["events"] == loop.metrics()["validation"]["events"]
    drifts = [
        drift
        for m in loop.registry.versions()
        for d in loop.registry.deltas(m.ref.version)
        for drift in d.metrics.get("drift", ())
    ]
    assert "new users" in {drift["figure"] for drift in drifts}


def test_impressions_move_the_offset_and_no_weight(open_loop):
    loop = open_loop()
    loop.follow([replace(event, kind="impression") for event in loop.tiny.live_events(20)])
    assert loop.ranges() == [(1, 16), (17, 20)]
    assert loop.metrics()["events_total"] == 20
    assert_serves_the_same(loop.registry, VersionRef(1), VersionRef(1, 2))


def test_with_nothing_new_nothing_is_published(open_loop):
    loop = open_loop()
    assert loop.learner.publish() is None
    loop.follow(loop.tiny.live_events(3))
    assert loop.learner.publish() is None
    assert loop.registry.current() == VersionRef(1, 1)


def test_after_a_rollback_a_new_version_goes_on_and_does_not_relearn_the_range(open_loop):
    loop = open_loop()
    loop.follow(loop.tiny.live_events(48))
    loop.registry.promote(VersionRef(1, 1), "worse since")
    assert loop.learner.publish() is None
    assert loop.registry.current() == VersionRef(2)
    assert_serves_the_same(loop.registry, VersionRef(1, 1), VersionRef(2))
    manifest = loop.registry.manifest(VersionRef(2))
    assert (manifest.parent, manifest.last_seq) == (VersionRef(1, 1), 48)
    assert (manifest.metrics["rolled_back_to"], manifest.metrics["set_aside_from_seq"]) == ("1.1", 17)

    loop.follow(loop.tiny.live_events(20, first=48))
    assert loop.ranges(version=2) == [(49, 64), (65, 68)]
    assert loop.metrics()["events_total"] == 68
    assert_same_state(loop.open_learner(), loop.learner)


def test_events_learned_but_not_published_when_someone_rolls_back_are_not_lost(open_loop):
    loop = open_loop()
    loop.follow(loop.tiny.live_events(32))
    loop.learn(loop.tiny.live_events(8, first=32))
    loop.registry.promote(VersionRef(1), "back to the start")
    assert loop.learner.publish() is None
    loop.follow()
    assert loop.ranges(version=2) == [(33, 40)]
    assert loop.metrics()["events_total"] == 40


def test_a_delta_published_while_someone_rolls_back_is_set_aside_with_the_rest(open_loop):
    loop = open_loop()
    loop.follow(loop.tiny.live_events(32))
    loop.learn(loop.tiny.live_events(8, first=32))
    loop.registry.promote(VersionRef(1, 1), "worse")
    loop.learner._publish_delta(loop.learner.live.change(), {})  # it had looked at the pointer just before
    assert loop.registry.current() == VersionRef(1, 1)
    assert loop.learner.publish() is None
    loop.follow(loop.tiny.live_events(8, first=40))
    assert loop.ranges(version=2) == [(41, 48)]


def test_a_rollback_while_no_trainer_ran_is_found_by_the_next_one(open_loop):
    loop = open_loop()
    loop.follow(loop.tiny.live_events(48))
    loop.registry.promote(VersionRef(1, 1), "worse since")
    successor = loop.open_learner()
    assert (successor.ref, successor.applied_seq, successor.events_total) == (VersionRef(2), 48, 48)


def test_a_rollback_over_a_fold_while_no_trainer_ran_relearns_nothing_either(open_loop):
    loop = open_loop("online.compact_every=2", "online.keep_chains=1")
    loop.follow(loop.tiny.live_events(16 * 6))
    assert loop.registry.deltas(1) == []  # the chain that was rolled back is not there to be read
    loop.registry.promote(VersionRef(1), "worse since long")
    successor = loop.open_learner()
    assert successor.applied_seq == successor.events_total == successor.set_aside_total == 96
    assert_serves_the_same(loop.registry, VersionRef(1), successor.ref)


def test_a_choice_made_while_a_version_is_being_folded_stands(open_loop):
    loop = open_loop()
    loop.follow(loop.tiny.live_events(48))
    loop.registry.promote(VersionRef(1, 1), "chosen meanwhile")
    loop.learner._publish_version({})  # it had looked at the pointer just before
    assert loop.registry.current() == VersionRef(1, 1)
    assert loop.learner.publish() is None
    assert_serves_the_same(loop.registry, VersionRef(1, 1), loop.registry.current())


def test_a_delta_whose_publisher_died_before_it_moved_the_pointer_counts(open_loop):
    loop = open_loop()
    loop.follow(loop.tiny.live_events(16))
    loop.learn(loop.tiny.live_events(16, first=16))
    draft = loop.registry.draft_delta(1)
    write_delta(draft, loop.learner.live.change())
    draft.publish(17, 32, {"events": 16, "events_total": 32}, promote=False)
    successor = loop.open_learner()
    assert (successor.ref, successor.applied_seq, successor.events_total) == (VersionRef(1, 2), 32, 32)
    assert loop.registry.current() == VersionRef(1, 2)
    loop.follow(loop.tiny.live_events(5, first=32), learner=successor)
    assert loop.ranges() == [(1, 16), (17, 32), (33, 37)]


def test_a_rollback_over_a_fold_goes_back_to_the_old_version_and_relearns_nothing(open_loop):
    loop = open_loop("online.compact_every=2")
    loop.follow(loop.tiny.live_events(48))
    assert loop.registry.current() == VersionRef(2, 1)
    loop.registry.promote(VersionRef(1, 1), "worse since long")
    assert loop.learner.publish() is None
    assert loop.registry.current() == VersionRef(3)
    assert_serves_the_same(loop.registry, VersionRef(1, 1), VersionRef(3))
    assert loop.registry.manifest(VersionRef(3)).last_seq == 48
    loop.follow(loop.tiny.live_events(16, first=48))
    assert loop.ranges(version=3) == [(49, 64)]
    assert loop.metrics()["events_total"] == 64


def test_old_folded_versions_are_dropped_and_the_trained_one_stays(open_loop):
    loop = open_loop("online.compact_every=1", "online.keep_versions=2", "online.keep_chains=1")
    loop.follow(loop.tiny.live_events(16 * 5))
    assert [m.ref.version for m in loop.registry.versions()] == [1, 4, 5, 6]
    assert loop.registry.deltas(1) == []
    assert loop.metrics()["events_total"] == 80
    assert_same_state(loop.open_learner(), loop.learner)


def test_a_freshly_trained_version_that_is_promoted_learns_the_whole_log(open_loop):
    loop = open_loop()
    loop.follow(loop.tiny.live_events(20))
    loop.tiny.publish_version(seed=1)
    assert loop.learner.publish() is None
    assert loop.learner.applied_seq == 0
    loop.follow()
    assert loop.ranges(version=2) == [(1, 16), (17, 20)]


def test_a_step_that_ruins_the_weights_is_never_served_and_its_range_is_on_record(open_loop):
    loop = open_loop("online.learning_rate=1000.0", "online.clip_norm=1000.0")
    loop.follow(loop.tiny.live_events(32))
    assert loop.ranges() == [(1, 16), (17, 32)]
    for manifest in loop.registry.deltas(1):
        assert "events just learned" in manifest.metrics["set_aside"]
        assert_serves_the_same(loop.registry, VersionRef(1), manifest.ref)
    assert loop.metrics()["events_total"] == 32
    assert loop.learner.applied_seq == 32


def test_a_poisoned_event_cannot_make_a_served_weight_other_than_a_number(open_loop):
    loop = open_loop()
    loop.follow(loop.tiny.live_events(16))
    clean, poison = loop.tiny.live_events(17, first=16)[:16], loop.tiny.live_events(17, first=16)[16]
    loop.follow([replace(poison, kind="rating", value=3e38)])  # twice that is no float32
    loop.follow(clean)
    deltas = loop.registry.deltas(1)
    assert [m.metrics.get("set_aside") for m in deltas] == [None, "a weight is not finite", None]
    assert_serves_the_same(loop.registry, VersionRef(1, 1), VersionRef(1, 2))
    state = read_version(loop.registry, VersionRef(1, 3), with_optimizer=True)
    for tensors in (state.rows, state.dense, state.optimizer):
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    history = loop.log.user_state(poison.user_id, 10).history
    served = ServedModel.load(loop.registry, loop.registry.current())
    assert all(map(torch.isfinite, served.user_vector(poison.user_id, history)))


@pytest.mark.parametrize("value", [1e308, -1e308, 1e-308, 0.0, -5.0])
@pytest.mark.parametrize("kind", ["rating", "dwell"])
def test_no_event_that_the_log_takes_stops_learning_or_serving(open_loop, kind, value):
    loop = open_loop()
    odd = [replace(event, kind=kind, value=value) for event in loop.tiny.live_events(12)]
    odd = [replace(event, ts_us=(2**61 if n % 2 else 0)) for n, event in enumerate(odd)]  # back and forth in time
    loop.follow(odd)
    loop.follow(loop.tiny.live_events(16, first=12))
    assert loop.learner.applied_seq == loop.metrics()["events_total"] == 28
    served = ServedModel.load(loop.registry, loop.registry.current())
    found = served.recommend("u0", loop.log.user_state("u0", served.max_history).history, 10)
    assert len(found.item_ids) == 10
    assert all(map(math.isfinite, found.scores))


def test_learning_that_predicts_worse_than_its_base_is_undone_to_before_the_window(open_loop):
    window = (
        "guard.window_events=60",
        "guard.min_events=20",
        "guard.max_loss_increase=0.0",
        "online.compact_every=1000",
    )
    loop = open_loop(*window, "online.max_events=6")
    loop.follow(loop.tiny.live_events(720))
    last_good = loop.registry.current()
    loop.follow(noise(loop.tiny, 60))  # sure of what comes next, and wrong: worse than a version that knows little

    versions = loop.registry.versions()
    assert [m.ref for m in versions] == [VersionRef(1), VersionRef(2)]
    undone = versions[1]
    assert "log loss rose by" in undone.metrics["set_aside"]
    assert undone.parent is not None
    assert VersionRef(1) < undone.parent <= last_good
    assert undone.metrics["set_aside_from_seq"] == loop.registry.manifest(undone.parent).last_seq + 1
    assert_serves_the_same(loop.registry, undone.parent, VersionRef(2))
    assert loop.metrics()["events_total"] == loop.log.head_seq() == 780
    assert_same_state(loop.open_learner(), loop.learner)


def test_a_window_without_a_delta_in_it_is_set_aside_by_a_delta(open_loop):
    quiet = ("guard.window_events=40", "guard.min_events=20", "guard.max_learned_loss_increase=1e9")
    loop = open_loop(*quiet, "online.learning_rate=10.0")
    loop.learn(loop.tiny.live_events(48))
    assert loop.learner.publish() == VersionRef(1, 1)
    assert "log loss rose by" in loop.metrics()["set_aside"]
    assert loop.ranges() == [(1, 48)]
    assert_serves_the_same(loop.registry, VersionRef(1), VersionRef(1, 1))


def test_new_items_and_users_are_in_the_delta_and_served_after_it(open_loop):
    loop = open_loop()
    served = ServedModel.load(loop.registry, VersionRef(1))
    loop.log.put_items([Item(item_id="put", text="a sea captain hunts a white whale")])
    loop.log.append(
        [
            Event(user_id="stranger", item_id="put", kind="click", ts_us=1),
            Event(user_id="stranger", item_id="in no catalogue", kind="click", ts_us=2),
            Event(user_id="u0", item_id="put", kind="like", ts_us=3),
        ]
    )
    loop.follow()
    after = served.with_delta(loop.registry.open_delta(1, 1))
    assert after.knows("put")
    assert not after.knows("in no catalogue")
    assert after.text_of("put") == "a sea captain hunts a white whale"
    assert after.user_row["stranger"] == loop.tiny.USERS
    history = loop.log.user_state("stranger", 10).history
    assert not after.recommend("stranger", history, 5).cold_start
    assert "put" in after.recommend("u1", loop.log.user_state("u1", 10).history, 100).item_ids
    assert after.state.rows["item"][after.index_of["put"]].abs().sum() > 0  # its row has learned
    assert_same_state(loop.open_learner(), loop.learner)


def test_full_tables_ignore_new_items_and_hand_users_rows_on_and_learning_goes_on(open_loop):
    loop = open_loop("tables.spare_rows=0")
    loop.log.put_items([Item(item_id="put", text="no room")])
    newcomers = [Event(user_id="stranger", item_id=item, kind="click", ts_us=1) for item in ("put", "i3", "new", "i4")]
    loop.follow([*newcomers, *loop.tiny.live_events(6)])
    assert loop.ranges() == [(1, 10)]
    after = ServedModel.load(loop.registry, VersionRef(1, 1))
    assert after.item_count == loop.tiny.ITEMS
    assert "stranger" in after.user_row
    assert len(after.user_row) == loop.tiny.USERS
    assert loop.learner.guard.metrics()["events"] == 7  # i4 of the stranger and six of those that are known


def test_after_enough_deltas_the_chain_becomes_a_version_and_goes_on_there(open_loop):
    loop = open_loop("online.compact_every=2")
    loop.follow(loop.tiny.live_events(48))
    assert loop.registry.current() == VersionRef(2, 1)
    assert_serves_the_same(loop.registry, VersionRef(1, 2), VersionRef(2))
    manifest = loop.registry.manifest(VersionRef(2))
    assert (manifest.parent, manifest.last_seq) == (VersionRef(1, 2), 32)
    assert (loop.ranges(1), loop.ranges(2)) == ([(1, 16), (17, 32)], [(33, 48)])
    assert loop.metrics()["events_total"] == 48
    assert_same_state(loop.open_learner(), loop.learner)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"learning_rate": 0.0}, "online.learning_rate=0.0: must be above 0"),
        ({"table_rate": -1.0}, "online.table_rate=-1.0: must be above 0"),
        ({"rate_strength": -0.1}, "online.rate_strength=-0.1: must be from 0 to 1"),
        ({"niceness": 20}, "online.niceness=20: must be from 0 to 19"),
        ({"delta_rows": "int4"}, "online.delta_rows='int4': is none of float32, float16, int8"),
        ({"delta_threshold": 1.0}, r"online.delta_threshold=1.0: must be in \[0, 1\)"),
        ({"max_events": 0}, "online.max_events=0: must be at least 1"),
        ({"rehearsal_sequences": -1}, "online.rehearsal_sequences=-1: must be 0 or more"),
    ],
)
def test_a_setting_out_of_range_is_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        OnlineConfig(**setting)


def test_what_stands_beside_the_model_goes_along_when_deltas_are_folded(open_loop, with_ease):
    loop = open_loop("online.compact_every=2")
    beside = with_ease(read_version(loop.registry, VersionRef(1), with_optimizer=True), 0.5)
    draft = loop.registry.draft_version()
    write_version(draft, beside, loop.registry.open_version(1).table("history"))
    assert draft.publish(offset=0, metrics={}) == VersionRef(2)
    loop.follow()
    loop.learner.publish()  # takes it up
    for first in (0, 12):
        loop.follow(loop.tiny.live_events(12, first=first))
    current = loop.registry.current()
    assert current == VersionRef(3)
    folded = read_version(loop.registry, current)
    assert folded.recipe.section(SystemConfig).blend_weight == 0.5
    assert folded.system.keys() == beside.system.keys()
    assert all(torch.equal(folded.system[name], tensor) for name, tensor in beside.system.items())
    assert not torch.equal(folded.rows[ITEM_ROWS], beside.rows[ITEM_ROWS])


def test_a_version_that_does_not_learn_is_left_to_others(open_loop, publish_classical):
    loop = open_loop()
    loop.follow(loop.tiny.live_events(8))
    learned, ease = loop.registry.current(), publish_classical(loop.registry)
    loop.learn(loop.tiny.live_events(4, first=8))
    for attempt in (loop.learner.publish, loop.open_learner):
        with pytest.raises(NothingToLearnError, match=f"{ease}: is of ease"):
            attempt()
    assert loop.log.committed_offset(CONSUMER) <= 8
    loop.registry.promote(learned, "back")
    again = loop.open_learner()
    assert (again.ref, again.applied_seq) == (learned, 8)
    loop.follow(learner=again)
    assert loop.ranges()[-1][1] == 12
