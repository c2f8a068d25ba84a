"""`recloop serve --local`: the same API from one process, without Ray."""

import signal
import subprocess
import sys

import psutil
import pytest

from cluster.errors import EngineError
from cluster.log import EventLog
from cluster.ray_session import find_free_port
from serving.local import running_locally
from tests.serving.test_command import get, post, running_server


def test_it_answers_takes_feedback_and_new_items_and_follows_versions(versions, home):
    with running_locally(versions.recipe, home, "127.0.0.1", find_free_port()) as url:
        assert get(f"{url}/readyz")["version"] == "1.0"
        seq = post(f"{url}/v1/feedback", {"user_id": "u0", "item_id": "i5", "kind": "like"})["last_seq"]
        answer = post(f"{url}/v1/recommend", {"user_id": "u0", "k": 30, "min_seq": seq})
        assert answer["reflects_min_seq"]
        assert "i5" not in {item["item_id"] for item in answer["items"]}
        assert get(f"{url}/v1/versions")["arms"] == dict.fromkeys(("live", "state", "frozen"), "1.0")
    with EventLog(home.log) as log:
        assert log.head_seq() == seq


def test_an_address_that_is_taken_is_an_error_by_name(versions, home):
    port = find_free_port()
    again = running_locally(versions.recipe, home, "127.0.0.1", port)
    with (
        running_locally(versions.recipe, home, "127.0.0.1", port),
        pytest.raises(EngineError, match=f"127.0.0.1:{port}: cannot be listened on"),
    ):
        again.__enter__()


def test_the_command_starts_no_ray_and_ends_with_ctrl_c(versions, home):
    with running_server(home, "--local", "--set", "online.enabled=false") as (server, url):
        assert get(f"{url}/readyz")["version"] == "1.0"
        assert psutil.Process(server.pid).children(recursive=True) == []
        server.send_signal(signal.SIGINT)
        _, messages = server.communicate(timeout=30)
    assert (server.returncode, messages) == (130, "recloop: interrupted\n")


def test_several_workers_of_online_training_are_refused_by_name(versions, home):
    port = str(find_free_port())
    command = [sys.executable, "-m", "cluster", "serve", "--local", "--home", str(home.path), "--port", port]
    ended = subprocess.run([*command, "--set", "online.workers=2"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "online.workers=2: several workers need Ray" in ended.stderr
