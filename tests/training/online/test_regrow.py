"""What is damaged is left behind: learning goes on from the newest whole state and learns the rest again."""

import contextlib
from pathlib import Path

import pytest
import torch

from cluster.errors import CorruptVersionError
from cluster.log import EventLog
from cluster.manifest import VersionRef
from training.models.served import ServedModel
from training.online.learner import OnlineLearner

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def open_loop(build_home):
    with contextlib.ExitStack() as stack:

        def open_one(*overrides: str, events: int = 48):
            tiny = build_home(*overrides)
            log = stack.enter_context(EventLog(tiny.home.log))
            log.seed_history("training-history", tiny.registry.open_version(1).table("history"))
            log.append(tiny.live_events(events))
            learner = open_learner(tiny, log)
            follow(learner)
            return tiny, log, learner

        yield open_one


def open_learner(tiny, log) -> OnlineLearner:
    return OnlineLearner(tiny.registry, log, tiny.recipe, tiny.home.cache, torch.device("cpu"))


def follow(learner) -> None:
    while fresh := learner.read():
        learner.learn(fresh)
        learner.publish()


def file_of(tiny, ref: VersionRef, name: str) -> Path:
    return tiny.home.registry / ref.folder / name


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["rows.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_damaged_delta_is_learned_again_from_the_log(open_loop, name):
    tiny, log, _ = open_loop()
    flip_a_bit(file_of(tiny, VersionRef(1, 3), name))
    successor = open_learner(tiny, log)
    assert (successor.ref, successor.applied_seq) == (VersionRef(2), 32)
    assert tiny.registry.manifest(successor.ref).parent == VersionRef(1, 2)
    assert tiny.registry.history()[-1].reason.startswith("1.3 is damaged: ")
    follow(successor)
    assert successor.events_total == 48
    assert ServedModel.load(tiny.registry, tiny.registry.current()).learned_seq == 48


def test_what_follows_a_damaged_delta_goes_with_it(open_loop):
    tiny, log, _ = open_loop()
    file_of(tiny, VersionRef(1, 1), "dense.safetensors").unlink()
    assert open_learner(tiny, log).applied_seq == 0


def test_a_damaged_version_falls_back_to_what_it_grew_from(open_loop):
    tiny, log, learner = open_loop("online.compact_every=2")
    assert learner.ref == VersionRef(2, 1)
    flip_a_bit(file_of(tiny, VersionRef(2), "rows.safetensors"))
    successor = open_learner(tiny, log)
    assert (successor.ref, successor.applied_seq) == (VersionRef(3), 32)
    assert tiny.registry.manifest(VersionRef(3)).parent == VersionRef(1, 2)


def test_what_was_set_aside_stays_so(open_loop):
    tiny, log, _ = open_loop("online.learning_rate=1000.0", "online.clip_norm=1000.0")  # every step ruins the weights
    flip_a_bit(file_of(tiny, VersionRef(1, 2), "rows.safetensors"))
    successor = open_learner(tiny, log)
    assert successor.exclusions.ranges == {(1, 16), (17, 32), (33, 48)}
    follow(successor)
    assert successor.events_total == successor.set_aside_total == 48


def test_when_nothing_is_whole_it_is_said(open_loop):
    tiny, log, _ = open_loop()
    flip_a_bit(file_of(tiny, VersionRef(1), "rows.safetensors"))
    with pytest.raises(CorruptVersionError, match=r"1\.3: nothing that it grew from is whole; train and publish again"):
        open_learner(tiny, log)
