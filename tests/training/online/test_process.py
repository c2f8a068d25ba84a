"""The online trainer beside a server without Ray: it learns, comes back when killed, and outlives nobody."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cluster.log import EventLog
from training.online.process import running_process

PATIENCE_S = 60.0


def wait_for(condition) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "has not come about in time"
        time.sleep(0.02)


def learned_seq(tiny) -> int:
    return tiny.registry.manifest(tiny.registry.current()).last_seq


def trainers(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if "training.online.process" in child.cmdline()]


@pytest.fixture
def tiny(build_home):
    built = build_home("online.publish_interval_ms=20", "online.step_events=3")
    with EventLog(built.home.log) as log:
        log.seed_history("training-history", built.registry.open_version(1).table("history"))
    return built


@pytest.mark.slow
def test_it_learns_what_is_logged_and_once_killed_goes_on(tiny):
    with EventLog(tiny.home.log) as log, running_process(tiny.recipe, tiny.home):
        log.append(tiny.live_events(12))
        wait_for(lambda: learned_seq(tiny) == 12)
        (trainer,) = trainers(os.getpid())
        trainer.kill()
        log.append(tiny.live_events(12, first=12))
        wait_for(lambda: learned_seq(tiny) == 24)
    assert trainers(os.getpid()) == []


def test_it_publishes_what_it_has_learned_before_it_ends(tiny):
    slow = tiny.recipe.with_overrides(["online.publish_interval_ms=600000"])
    with EventLog(tiny.home.log) as log, running_process(slow, tiny.home):
        log.append(tiny.live_events(12))
        time.sleep(2.0)
        assert learned_seq(tiny) == 0
    assert learned_seq(tiny) == 12


@pytest.mark.slow
def test_it_ends_when_the_one_that_started_it_is_killed(tiny):
    program = (
        "import sys, time, pathlib\n"
        "from cluster.config import Recipe\nfrom cluster.home import Home\n"
        "from training.online.process import running_process\n"
        "recipe = Recipe.from_toml(sys.stdin.read())\n"
        "with running_process(recipe, Home(pathlib.Path(sys.argv[1]))):\n"
        "    print('runs', flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(tiny.home.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        server.stdin.write(tiny.recipe.to_toml())
        server.stdin.close()
        assert server.stdout.readline() == "runs\n"
        (trainer,) = trainers(server.pid)
        server.send_signal(signal.SIGKILL)
        psutil.wait_procs([trainer], timeout=PATIENCE_S)
        assert not trainer.is_running()


def test_where_online_training_is_off_nothing_is_started(tiny):
    with running_process(tiny.recipe.with_overrides(["online.enabled=false"]), tiny.home):
        assert trainers(os.getpid()) == []
