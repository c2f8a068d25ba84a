import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster.cli import main
from cluster.commands.parser import build_parser
from cluster.events import Event
from cluster.log import EventLog
from cluster.registry import Registry

COMMANDS = (
    "prepare",
    "examples",
    "plan",
    "train",
    "evaluate",
    "publish",
    "serve",
    "replay",
    "demo",
    "versions",
    "events",
    "status",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of this test alone, named by the environment as a user would."""
    monkeypatch.setenv("RECLOOP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main([*words, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def publish_version(home: Path) -> str:
    draft = Registry(home / "registry").draft_version()
    draft.add_tensors("dense", {"weight": torch.zeros(1)})
    return str(draft.publish(offset=0, metrics={"ndcg_at_10": 0.125}))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert f"examples:\n  recloop {command}" in text
    assert "--json" in text


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["no-such-command"],
        ["prepare"],
        ["prepare", "movielens", "--events", "x.csv"],
        ["prepare", "--events", "x.csv", "--columns", "user"],
        ["train", "--workers", "0"],
        ["serve", "--port", "http"],
        ["versions", "--jso"],
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_why(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: " in captured.err


def test_column_mappings_are_read_as_pairs() -> None:
    args = build_parser().parse_args(["prepare", "--events", "e.csv", "--columns", "user=u, item = i,time=at"])
    assert args.columns == {"user": "u", "item": "i", "time": "at"}
    assert args.item_columns == {}


def test_an_unknown_recipe_key_exits_with_2_and_no_traceback(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["versions", "--set", "engine.ray_adress=x"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("recloop: error: engine.ray_adress: unknown; did you mean engine.ray_address?")
    assert "Traceback" not in captured.err


def test_versions_are_listed_promoted_and_rolled_back(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "versions")["current"] is None
    assert [publish_version(home), publish_version(home)] == ["1.0", "2.0"]

    listed = run_json(capsys, "versions")
    assert listed["current"] == "2.0"
    assert [(row["version"], row["promoted"]) for row in listed["versions"]] == [(1, None), (2, "2.0")]

    assert run_json(capsys, "versions", "rollback")["promoted"] == "1.0"
    assert run_json(capsys, "versions")["current"] == "1.0"
    assert run_json(capsys, "versions", "promote", "2", "--reason", "fixed")["before"] == "1.0"
    assert run_json(capsys, "versions")["current"] == "2.0"


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (["promote"], 2, "name the version"),
        (["promote", "7"], 4, "7.0 is not published"),
        (["promote", "latest"], 4, "latest"),
        (["rollback"], 4, "no version"),
    ],
)
def test_a_promotion_that_cannot_be_made_is_an_error(
    words: list[str], exit_code: int, message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["versions", *words]) == exit_code
    assert message in capsys.readouterr().err


def test_a_rollback_before_the_first_promotion_is_an_error(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_version(home)
    assert main(["versions", "rollback"]) == 4
    assert "1.0 is the first" in capsys.readouterr().err


def test_events_are_shown_newest_last_and_verified(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EventLog(home / "events" / "events.db") as log:
        log.append([Event(user_id="u", item_id=f"i{n}", kind="click", ts_us=n) for n in range(5)])

    shown = run_json(capsys, "events", "tail", "--last", "2")["events"]
    assert [(row["seq"], row["item_id"]) for row in shown] == [(4, "i3"), (5, "i4")]
    report = run_json(capsys, "events", "verify")
    assert (report["events"], report["gaps"], report["integrity"]) == (5, 0, "ok")

    assert main(["events"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["5", "4", "u"]


def test_a_home_without_a_log_is_an_engine_error_and_nothing_is_made(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["events", "verify"]) == 5
    captured = capsys.readouterr()
    assert captured.err.startswith("recloop: error: ")
    assert "no event log here yet" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (home / "events").exists()


def test_status_of_an_empty_home_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    status = run_json(capsys, "status", "--url", f"http://127.0.0.1:{port}")
    assert (status["current"], status["versions"], status["logged_seq"]) == (None, 0, None)
    assert status["server_answers"] == "no"


def test_status_shows_what_is_published_and_logged(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_version(home)
    with EventLog(home / "events" / "events.db") as log:
        log.append([Event(user_id="u", item_id="i", kind="click", ts_us=1)])
    status = run_json(capsys, "status")
    assert (status["current"], status["versions"], status["logged_seq"]) == ("1.0", 1, 1)


def ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_following_events_ends_with_130_on_sigint_even_as_a_scripts_background_job(home: Path) -> None:
    with EventLog(home / "events" / "events.db") as log:
        log.append([Event(user_id="u", item_id="i", kind="click", ts_us=1)])
    command = [sys.executable, "-m", "cluster", "events", "--follow"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=ignore_sigint) as program:
        assert program.stdout is not None
        assert json.loads(program.stdout.readline())["item_id"] == "i"
        program.send_signal(signal.SIGINT)
        _, stderr = program.communicate(timeout=30)
    assert program.returncode == 130
    assert stderr == "recloop: interrupted\n"


def test_a_reader_that_has_enough_ends_the_command_quietly(home: Path) -> None:
    with EventLog(home / "events" / "events.db") as log:
        log.append([Event(user_id="u" * 1_000, item_id=f"i{n}", kind="click", ts_us=n) for n in range(200)])
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cluster", "events", "--last", "200"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=30)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
