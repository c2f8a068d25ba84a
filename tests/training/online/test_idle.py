"""What waits while nothing is to be learned: the log keeps what a version that learns may still need."""

import pytest

from cluster.log import EventLog
from cluster.manifest import VersionRef
from cluster.registry import Registry
from training.models.version import ROOT
from training.online import idle
from training.online.idle import Idle

CONSUMER = "trainer"


@pytest.fixture
def log(tmp_path):
    with EventLog(tmp_path / "log.db") as log:
        yield log


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(idle, "LOOK_S", 0.0)


def publish(registry, *, offset: int, **metrics) -> None:
    registry.draft_version().publish(offset=offset, metrics=metrics, promote=False)


def test_where_no_version_learns_nothing_is_kept_for_one(build_home, tmp_path, log, publish_classical):
    registry = Registry(tmp_path / "registry")
    publish_classical(registry)
    log.append(build_home().live_events(12))
    waiting = Idle(registry, log, CONSUMER)
    assert (waiting.applied_seq, waiting.read()) == (12, [])
    log.append(build_home().live_events(12, first=12))
    waiting.publish()
    assert waiting.status() == {
        "ready": True,
        "version": "1.0",
        "learns": False,
        "applied_seq": 24,
        "lag_events": 0,
        "validation": {},
    }


def test_what_any_version_that_learns_has_not_learned_is_kept(build_home, log, publish_classical):
    tiny = build_home()
    log.append(tiny.live_events(40))
    publish_classical(tiny.registry)
    waiting = Idle(tiny.registry, log, CONSUMER)
    assert waiting.applied_seq == 0  # version 1 was trained before the log
    publish(tiny.registry, offset=10, **{ROOT: 1})
    publish(tiny.registry, offset=30, **{ROOT: 1})
    waiting.publish()
    assert waiting.applied_seq == 10
    publish(tiny.registry, offset=0)  # trained anew
    waiting.publish()
    assert waiting.applied_seq == 0


def test_it_is_over_once_a_version_that_learns_is_promoted(build_home, log, publish_classical):
    tiny = build_home()
    publish_classical(tiny.registry)
    waiting = Idle(tiny.registry, log, CONSUMER)
    publish_classical(tiny.registry, "popularity")
    assert (str(waiting.ref), waiting.is_over()) == ("3.0", False)
    tiny.registry.promote(VersionRef(1))
    assert waiting.is_over()


def test_what_a_trial_is_judged_by_is_kept(build_home, log, publish_classical):
    tiny = build_home()
    log.append(tiny.live_events(40))
    publish_classical(tiny.registry)
    publish(tiny.registry, offset=30, **{ROOT: 1})
    tiny.registry.start_canary(publish_classical(tiny.registry, "popularity", promote=False), 0.5, 20)
    assert Idle(tiny.registry, log, CONSUMER).applied_seq == 20
