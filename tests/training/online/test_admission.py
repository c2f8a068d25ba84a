"""Quarantine in step with what is published: nothing held is learned, nothing released is learned twice."""

import contextlib

import pytest
import torch

from cluster.events import Event
from cluster.log import EventLog
from training.online.learner import OnlineLearner

pytestmark = pytest.mark.usefixtures("process_group")


class Loop:
    def __init__(self, tiny, log) -> None:
        self.tiny, self.log = tiny, log
        self.learner = self.open_learner()

    def open_learner(self) -> OnlineLearner:
        device = torch.device("cpu")
        return OnlineLearner(self.tiny.registry, self.log, self.tiny.recipe, self.tiny.home.cache, device)

    def follow(self, events=(), learner=None) -> None:
        learner = learner or self.learner
        self.log.append(list(events))
        while fresh := learner.read():
            learner.learn(fresh)
            learner.publish()


@pytest.fixture
def loop(build_home):
    tiny = build_home("intake.enabled=true", "intake.burst_events=1000", "intake.max_repeats=2")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(EventLog(tiny.home.log))
        log.seed_history("training-history", tiny.registry.open_version(1).table("history"))
        yield Loop(tiny, log)


def pushes(count: int, first: int = 0) -> list[Event]:
    return [
        Event(event_id=f"push{n}", user_id="bot", item_id="i29", kind="click", ts_us=n * 1_000_000)
        for n in range(first, first + count)
    ]


def count_of(loop, item_id: str) -> int:
    return int(loop.learner.live.counts[loop.learner.live.items.row(item_id)])


def test_what_is_held_moves_no_weight_and_is_on_record_with_its_reason(loop):
    before = count_of(loop, "i29")
    loop.follow([*loop.tiny.live_events(8), *pushes(6)])
    assert count_of(loop, "i29") == before + 2
    held = loop.learner.intake.quarantine.find()
    assert [(entry.seq, entry.reasons, entry.state) for entry in held] == [
        (seq, ("repeats",), "held") for seq in (11, 12, 13, 14)
    ]
    assert loop.learner.events_total == 14
    assert loop.learner.set_aside_total == 4
    assert loop.log.verify().events == 14


def test_what_is_released_is_learned_once_whoever_takes_over(loop):
    loop.follow([*loop.tiny.live_events(8), *pushes(6)])
    before = count_of(loop, "i29")
    loop.learner.intake.quarantine.release([11, 12])
    assert loop.learner.publish() is not None
    assert count_of(loop, "i29") == before + 2
    assert loop.learner.publish() is None
    loop.learner = loop.open_learner()
    assert loop.learner.publish() is None
    assert count_of(loop, "i29") == before + 2
    assert loop.learner.intake.quarantine.counts() == {"held": 2, "released": 0, "learned": 2, "dropped": 0}


def test_an_end_before_the_quarantine_has_heard_of_a_delta_is_made_good(loop):
    loop.follow([*loop.tiny.live_events(8), *pushes(4)])
    loop.learner.intake.quarantine.release([11])
    loop.learner.intake.note_published = lambda: None  # the process ends just before
    loop.learner.publish()
    assert loop.learner.intake.quarantine.find(states=["learned"]) == []
    successor = loop.open_learner()
    assert [entry.seq for entry in successor.intake.quarantine.find(states=["learned"])] == [11]
    assert successor.publish() is None


def test_what_was_judged_and_not_published_is_judged_again(loop):
    loop.log.append([*loop.tiny.live_events(8), *pushes(6)])
    loop.learner.learn(loop.learner.read())
    assert loop.learner.intake.quarantine.find() == []
    loop.learner = loop.open_learner()
    loop.follow()
    assert [entry.seq for entry in loop.learner.intake.quarantine.find()] == [11, 12, 13, 14]


def test_a_restart_in_the_middle_judges_on_as_before(loop):
    loop.follow([*loop.tiny.live_events(8), *pushes(3)])
    loop.learner = loop.open_learner()
    loop.follow(pushes(1, first=3))
    assert [entry.seq for entry in loop.learner.intake.quarantine.find()] == [11, 12]
