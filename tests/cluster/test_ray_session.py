import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.errors import EngineError, PortTakenError
from cluster.ray_session import assert_port_free, find_free_port

PROGRAM = Path(__file__).parent / "session_program.py"


@contextmanager
def running_program(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the program as the leader of a process group of its own, as a shell would."""
    program = subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield program
    finally:
        program.kill()
        program.communicate()


def read_report(program: subprocess.Popen[str]) -> dict:
    assert program.stdout is not None
    line = program.stdout.readline()
    assert line, program.communicate()
    return json.loads(line)


def find_survivors(report: dict) -> list[str]:
    survivors = []
    for pid, create_time, name in report["started"]:
        try:
            if psutil.Process(pid).create_time() == create_time:
                survivors.append(f"{pid} {name}")
        except psutil.NoSuchProcess:
            pass
    return survivors


def test_two_sessions_in_a_row_use_tokens_and_leave_nothing_behind() -> None:
    with running_program("return") as program:
        first, second = read_report(program), read_report(program)
        stdout, stderr = program.communicate(timeout=60)

        assert program.returncode == 0, stderr
        assert json.loads(stdout) == {"after": None}
        for report in (first, second):
            assert report["auth_mode"] == "token"
            assert len(report["started"]) > 3
            assert find_survivors(report) == []
            assert not Path(report["folder"]).exists()


def test_ctrl_c_while_serving_ends_haproxy_and_every_other_process() -> None:
    port = find_free_port()
    with running_program("wait", str(port)) as program:
        report = read_report(program)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as response:
            assert int(response.read()) in [pid for pid, *_ in report["started"]]
        assert "haproxy" in [name for _, _, name in report["started"]]
        with pytest.raises(PortTakenError, match=str(port)):
            assert_port_free("127.0.0.1", port)

        os.killpg(program.pid, signal.SIGINT)
        stdout, stderr = program.communicate(timeout=60)

        assert stdout == "", "the session prints nothing of its own"
        assert "KeyboardInterrupt" in stderr
        assert find_survivors(report) == []
        assert not Path(report["folder"]).exists()
        assert_port_free("127.0.0.1", port)


def test_sigterm_ends_a_session_in_order_with_exit_code_143() -> None:
    with running_program("wait") as program:
        report = read_report(program)
        program.terminate()
        program.communicate(timeout=60)

        assert program.returncode == 143
        assert find_survivors(report) == []


@pytest.mark.parametrize("delay_s", [0.8, 2.0])
def test_ctrl_c_during_start_up_leaves_nothing_behind(delay_s: float) -> None:
    with running_program("wait") as program:
        time.sleep(delay_s)
        started = psutil.Process(program.pid).children(recursive=True)
        os.killpg(program.pid, signal.SIGINT)
        program.communicate(timeout=60)

        assert program.returncode != 0
        _, alive = psutil.wait_procs(started, timeout=5)
        assert alive == []


def test_a_listening_port_is_taken_and_a_closed_one_is_free_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"127.0.0.1:{port}"):
            assert_port_free("127.0.0.1", port)
    assert_port_free("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 70_000), ("192.0.2.200", 8_000), ("no.such.host.invalid", 80)]
)
def test_an_address_that_is_not_ours_is_an_engine_error(host: str, port: int) -> None:
    with pytest.raises(EngineError, match=str(port)):
        assert_port_free(host, port)


def test_a_free_port_lies_below_the_range_the_kernel_uses() -> None:
    assert 20_000 <= find_free_port() < 30_000
