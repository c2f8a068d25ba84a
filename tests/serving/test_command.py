import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

from cluster.cli import main
from cluster.manifest import MANIFEST_FILE, VersionRef
from cluster.ray_session import find_free_port
from serving.command import WATCH_S
from serving.standby import LOOKS_TO_TRUST


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def serve(home, capsys, *flags) -> tuple[int, str]:
    code = main(["serve", "--home", str(home.path), "--port", str(find_free_port()), *flags])
    return code, capsys.readouterr().err


def test_a_home_without_a_version_is_said(home, capsys):
    code, message = serve(home, capsys)
    assert code == 4
    assert "no version is published yet; train one and publish it" in message


def test_a_taken_port_is_named(versions, home, taken_port, capsys):
    code, message = serve(home, capsys, "--port", str(taken_port))
    assert code == 5
    assert f"127.0.0.1:{taken_port}: another process listens there" in message


def test_an_unknown_recipe_key_is_answered_with_the_nearest(home, capsys):
    code, message = serve(home, capsys, "--set", "serve.replica=2")
    assert code == 2
    assert "did you mean serve.replicas?" in message


@pytest.mark.parametrize("file_name", [MANIFEST_FILE, "rows.safetensors", "history.parquet"])
def test_a_corrupt_file_of_the_version_is_named(versions, home, capsys, file_name):
    versions.flip_bit(VersionRef(1), file_name)
    code, message = serve(home, capsys)
    assert code == 4
    assert f"{VersionRef(1).folder}/{file_name}" in message


def test_a_host_that_is_no_name_is_said(versions, home, capsys):
    code, message = serve(home, capsys, "--host", "a..b")
    assert code == 5
    assert "a..b: is not a host name" in message


def test_a_pinned_version_that_is_not_published_is_said(versions, home, capsys):
    code, message = serve(home, capsys, "--set", "serve.pinned_version=7")
    assert code == 4
    assert "7.0 is not published; versions here: 1" in message


@contextlib.contextmanager
def running_server(home, *flags) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command as a child; yield it and its URL."""
    command = [sys.executable, "-m", "cluster", "serve", "--home", str(home.path), "--port", str(find_free_port())]
    server = subprocess.Popen(
        [*command, "--json", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line, server.communicate()
        yield server, json.loads(line)["url"]
    finally:
        server.kill()


def get(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def test_ctrl_c_ends_the_server_and_everything_it_started(versions, home):
    with running_server(home, "--set", "online.enabled=false") as (server, url):
        assert get(f"{url}/readyz")["version"] == "1.0"
        started = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGINT)
        _, messages = server.communicate(timeout=30)
    assert (server.returncode, messages) == (130, "recloop: interrupted\n")
    assert [process for process in started if process.is_running()] == []


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def wait_for(condition, patience_s: float) -> float:
    """Return after how many seconds the condition held; errors of the network mean that it does not."""
    began_s = time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return time.monotonic() - began_s
        assert time.monotonic() - began_s < patience_s
        time.sleep(0.05)


def find_processes(server, name: str) -> list[psutil.Process]:
    return [process for process in psutil.Process(server.pid).children(recursive=True) if process.name() == name]


def test_the_standby_answers_before_ray_does_and_after_ray_is_gone(versions, home):
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "cluster", "serve", "--home", str(home.path), "--port", str(port), "--json"]
    with subprocess.Popen(
        [*command, "--set", "online.enabled=false"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            wait_for(lambda: get(f"{url}/readyz")["version"] == "1.0", patience_s=30)
            assert find_processes(server, "haproxy") == []
            first = post(f"{url}/v1/feedback", {"user_id": "u0", "item_id": "i5", "kind": "like"})["last_seq"]
            assert server.stdout is not None
            assert json.loads(server.stdout.readline())["url"] == url

            (raylet,) = find_processes(server, "raylet")
            time.sleep(LOOKS_TO_TRUST * WATCH_S + 1)  # the standby has stood back
            raylet.kill()
            raylet.wait()
            assert wait_for(lambda: get(f"{url}/readyz")["version"] == "1.0", patience_s=30) <= 5
            seq = post(f"{url}/v1/feedback", {"user_id": "u0", "item_id": "i6", "kind": "like"})["last_seq"]
            answer = post(f"{url}/v1/recommend", {"user_id": "u0", "k": 30, "min_seq": seq})
            assert (first, seq, answer["reflects_min_seq"]) == (1, 2, True)
            assert not {"i5", "i6"} & {item["item_id"] for item in answer["items"]}

            wait_for(lambda: find_processes(server, "haproxy") != [], patience_s=60)  # and Ray is there again
            started = psutil.Process(server.pid).children(recursive=True)
            server.send_signal(signal.SIGINT)
            _, messages = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 130
    assert "raylet has ended, and Ray with it; starting it again" in messages
    assert [process for process in started if process.is_running()] == []


@pytest.mark.slow
def test_without_a_standby_the_command_ends_with_everything_it_started_when_rays_daemon_is_killed(versions, home):
    with running_server(home, "--set", "online.enabled=false", "--set", "serve.standby=false") as (server, _):
        started = psutil.Process(server.pid).children(recursive=True)
        (raylet,) = [process for process in started if process.name() == "raylet"]
        raylet.kill()
        _, messages = server.communicate(timeout=30)
    assert server.returncode == 5
    assert "raylet has ended, and Ray with it; start `recloop serve` again" in messages
    psutil.wait_procs(started, timeout=5)
    assert [process for process in started if process.is_running()] == []


def test_a_damaged_delta_is_said_and_what_is_whole_is_served(versions, home):
    ref = versions.publish_delta()
    versions.flip_bit(ref, "rows.safetensors")
    with running_server(home, "--set", "online.enabled=false") as (server, url):
        assert get(f"{url}/readyz")["version"] == "1.0"
        server.send_signal(signal.SIGINT)
        _, messages = server.communicate(timeout=30)
    assert f"1.1 is served as far as it is whole, and learned again from there: {home.registry}" in messages
    assert f"{ref.folder}/rows.safetensors: checksum differs" in messages


def test_a_version_is_loaded_without_pandas_whose_import_would_be_a_fifth_of_the_start(versions, home):
    script = (
        "import sys; from cluster.manifest import VersionRef; from cluster.registry import Registry;"
        "from training.models.served import ServedModel;"
        "ServedModel.load(Registry(sys.argv[1]), VersionRef(1)); sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, home.registry]).returncode == 0


@pytest.mark.slow
def test_a_click_is_reflected_by_the_next_answer_with_redis_and_while_it_is_away(versions, home, redis_server):
    def click_and_look(item_id: str) -> dict:
        seq = post(f"{url}/v1/feedback", {"user_id": "u0", "item_id": item_id, "kind": "like"})["last_seq"]
        answer = post(f"{url}/v1/recommend", {"user_id": "u0", "k": 500, "min_seq": seq})
        assert answer["reflects_min_seq"]
        assert answer["state_seq"] == seq
        assert item_id not in [item["item_id"] for item in answer["items"]]
        return answer

    def redis_answers() -> bool:
        return "state" not in get(f"{url}/readyz")["problems"]

    settings = ("engine.state=redis", f"engine.redis_url={redis_server.url}", "serve.standby=false", "serve.replicas=1")
    with running_server(
        home, "--set", "online.enabled=false", *(flag for setting in settings for flag in ("--set", setting))
    ) as (server, url):
        wait_for(redis_answers, patience_s=20)
        assert "state_fallback" not in click_and_look("i5")
        assert len(redis_server.client.keys("recloop:*:u0")) == 1
        redis_server.kill()
        wait_for(lambda: not redis_answers(), patience_s=20)
        assert click_and_look("i6")["state_fallback"]
        redis_server.start()
        wait_for(redis_answers, patience_s=20)
        assert "state_fallback" not in click_and_look("i7")
        (key,) = redis_server.client.keys("recloop:*:u0")
        assert redis_server.client.llen(key) == 3 + 1
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    assert server.returncode == 130
