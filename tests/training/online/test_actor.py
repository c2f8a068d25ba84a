"""The online trainer as a process: killed at any moment, it goes on after its last delta."""

import contextlib
import multiprocessing
import os
import random
import time
from collections import Counter

import psutil
import pytest
import ray

from cluster.log import EventLog
from cluster.manifest import VersionRef
from training.models.version import COUNT_ROWS, read_version
from training.online.actor import OnlineTrainer, running_trainer
from training.online.learner import CONSUMER

KILLS = 5
PATIENCE_S = 30.0


@pytest.fixture
def start_trainer():
    """Start real trainer processes, forked from a server that has imported everything; none outlives the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.online.actor", "torchrec.distributed.model_parallel", "transformers"])
    started = []

    def start(tiny):
        process = context.Process(target=OnlineTrainer, args=(tiny.recipe.to_toml(), tiny.home))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_for(condition, patience_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, "has not come about in time"
        time.sleep(0.005)


def learned_seq(tiny) -> int:
    return tiny.registry.manifest(tiny.registry.current()).last_seq


def seed(log: EventLog, tiny) -> None:
    log.seed_history("training-history", tiny.registry.open_version(1).table("history"))


def test_killed_again_and_again_while_events_come_it_learns_each_once(build_home, start_trainer):
    folding = ("online.compact_every=15", "online.keep_versions=100", "online.keep_chains=100")
    tiny = build_home("online.publish_interval_ms=1", "online.step_events=3", "online.max_events=3", *folding)
    rng = random.Random(0)
    with EventLog(tiny.home.log) as log:
        seed(log, tiny)
        for _ in range(KILLS):
            trainer = start_trainer(tiny)
            before = learned_seq(tiny)
            log.append(tiny.live_events(30, first=log.head_seq()))
            wait_for(lambda before=before: learned_seq(tiny) > before)
            time.sleep(rng.random() * 0.2)
            trainer.kill()
            trainer.join()
            log.append(tiny.live_events(10, first=log.head_seq()))
        start_trainer(tiny)
        wait_for(lambda: learned_seq(tiny) == log.head_seq())
        assert log.verify().sound
        events = log.head_seq()

    versions = [m.ref.version for m in tiny.registry.versions()]
    deltas = [delta for version in versions for delta in tiny.registry.deltas(version)]
    assert events == KILLS * 40
    assert [m.first_seq for m in deltas] == [1, *(m.last_seq + 1 for m in deltas[:-1])]
    assert [m.metrics["events"] for m in deltas] == [m.last_seq - m.first_seq + 1 for m in deltas]
    assert sum(m.metrics["events"] for m in deltas) == deltas[-1].metrics["events_total"] == events
    assert not any("rolled_back_to" in m.metrics for m in tiny.registry.versions()), "a crash was taken for a rollback"
    assert not any("set_aside" in m.metrics for m in deltas)
    before, after = (read_version(tiny.registry, ref) for ref in (VersionRef(1), tiny.registry.current()))
    counted = dict(zip(after.item_ids, (after.rows[COUNT_ROWS] - before.rows[COUNT_ROWS]).tolist(), strict=True))
    assert Counter(counted) == Counter(event.item_id for event in tiny.live_events(events))


def test_a_trainer_on_ray_is_ready_learns_and_publishes_what_is_left_when_its_block_ends(ray_cluster, build_home):
    tiny = build_home("online.publish_interval_ms=60000")
    with EventLog(tiny.home.log) as log:
        seed(log, tiny)
        with running_trainer(tiny.recipe, tiny.home) as trainer:
            assert ray.get(trainer.status.remote())["version"] == "1.0"
            log.append(tiny.live_events(40))
            wait_for(lambda: ray.get(trainer.status.remote())["lag_events"] == 0)
            assert tiny.registry.current() == VersionRef(1)
        assert [(m.first_seq, m.last_seq) for m in tiny.registry.deltas(1)] == [(1, 40)]


def test_a_killed_actor_is_started_again_and_goes_on(ray_cluster, build_home):
    tiny = build_home()
    with EventLog(tiny.home.log) as log, running_trainer(tiny.recipe, tiny.home) as trainer:
        seed(log, tiny)
        log.append(tiny.live_events(20))
        wait_for(lambda: learned_seq(tiny) == 20)
        ray.kill(trainer, no_restart=False)
        log.append(tiny.live_events(20, first=20))
        wait_for(lambda: learned_seq(tiny) == 40)
    assert sum(m.metrics["events"] for m in tiny.registry.deltas(1)) == 40


def workers_of(trainer) -> dict[str, psutil.Process]:
    """Return the trainer's processes by their titles."""
    root = psutil.Process(ray.get(trainer.__ray_call__.remote(lambda _: os.getpid())))
    session = root.parent()
    assert session is not None
    titles = [(" ".join(process.cmdline()).partition(".")[0].strip(), process) for process in session.children()]
    return {title: process for title, process in titles if title.startswith("ray::Online")}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", ["ray::OnlineFollower", pytest.param("ray::OnlineTrainer", marks=pytest.mark.slow)])
def test_two_workers_learn_each_event_once_whichever_of_them_is_killed(ray_cluster, build_home, killed):
    tiny = build_home("online.workers=2", "online.step_events=3", "online.publish_interval_ms=1")
    with EventLog(tiny.home.log) as log, running_trainer(tiny.recipe, tiny.home) as trainer:
        seed(log, tiny)
        log.append(tiny.live_events(30))
        wait_for(lambda: learned_seq(tiny) > 0)
        learning = workers_of(trainer)
        assert set(learning) == {"ray::OnlineFollower", "ray::OnlineTrainer"}
        learning[killed].kill()
        log.append(tiny.live_events(30, first=30))
        wait_for(lambda: learned_seq(tiny) == 60, patience_s=4 * PATIENCE_S)
        assert not any(process.is_running() for process in learning.values()), "one worker outlived the other"
        status = ray.get(trainer.status.remote())
        assert (status["workers"], status["lag_events"]) == (2, 0)
    deltas = tiny.registry.deltas(1)
    assert [m.first_seq for m in deltas] == [1, *(m.last_seq + 1 for m in deltas[:-1])]
    assert sum(m.metrics["events"] for m in deltas) == deltas[-1].metrics["events_total"] == 60
    assert {m.metrics["workers"] for m in deltas} == {2}
    before, after = (read_version(tiny.registry, ref) for ref in (VersionRef(1), tiny.registry.current()))
    counted = dict(zip(after.item_ids, (after.rows[COUNT_ROWS] - before.rows[COUNT_ROWS]).tolist(), strict=True))
    assert Counter(counted) == Counter(event.item_id for event in tiny.live_events(60))


def test_a_recipe_that_turns_online_training_off_starts_nothing(build_home):
    tiny = build_home("online.enabled=false")
    with running_trainer(tiny.recipe, tiny.home) as trainer:
        assert trainer is None
    with contextlib.closing(EventLog(tiny.home.log)) as log:
        assert log.head_seq() == 0


def test_it_waits_while_a_version_that_does_not_learn_is_promoted_and_loses_nothing_of_that_time(
    ray_cluster, build_home, publish_classical
):
    tiny = build_home()
    with EventLog(tiny.home.log) as log, running_trainer(tiny.recipe, tiny.home) as trainer:

        def status() -> dict:
            return ray.get(trainer.status.remote())

        seed(log, tiny)
        log.append(tiny.live_events(20))
        wait_for(lambda: learned_seq(tiny) == 20)
        learned = tiny.registry.current()
        ease = publish_classical(tiny.registry)
        wait_for(lambda: not status()["learns"])
        log.append(tiny.live_events(30, first=20))
        assert {status()[name] for name in ("version", "lag_events")} == {str(ease), 0}
        assert log.committed_offset(CONSUMER) == status()["applied_seq"] == 0  # version 1 has learned nothing of it
        tiny.registry.promote(learned, "it learns")
        wait_for(lambda: learned_seq(tiny) == 50)
        assert status()["learns"]
        assert sum(m.metrics["events"] for m in tiny.registry.deltas(1)) == 50
        assert not any("rolled_back_to" in m.metrics for m in tiny.registry.versions())


def test_it_starts_and_waits_where_the_promoted_version_does_not_learn(ray_cluster, build_home, publish_classical):
    tiny = build_home()
    publish_classical(tiny.registry)
    with EventLog(tiny.home.log) as log, running_trainer(tiny.recipe, tiny.home) as trainer:
        seed(log, tiny)
        log.append(tiny.live_events(20))
        assert not ray.get(trainer.status.remote())["learns"]
        assert ray.get(trainer.status.remote())["version"] == "2.0"
        tiny.registry.promote(VersionRef(1), "it learns")
        wait_for(lambda: learned_seq(tiny) == 20)
