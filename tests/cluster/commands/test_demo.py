"""What `recloop demo` checks before and after its stages; the stages themselves run in tests/test_loop.py."""

import socket

import pytest

from cluster.cli import main
from cluster.commands.demo import _audit, _fresh_home
from cluster.home import Home
from cluster.log import EventLog


def publish_delta(tiny, first_seq: int, last_seq: int, events_total: int) -> None:
    draft = tiny.registry.draft_delta(1)
    draft.publish(first_seq, last_seq, {"events": last_seq - first_seq + 1, "events_total": events_total})


@pytest.mark.parametrize(
    ("acked", "last_seq", "events_total", "lost", "twice"),
    [
        (10, 10, 10, 0, 0),
        (12, 10, 10, 2, 0),  # two acks without an event in the log
        (10, 7, 7, 3, 0),  # three events that are not learned yet
        (10, 10, 9, 1, 0),  # one that was left out along the chain
        (10, 10, 11, 0, 1),
    ],
)
def test_events_that_were_lost_or_learned_twice_are_counted(build_home, acked, last_seq, events_total, lost, twice):
    tiny = build_home()
    with EventLog(tiny.home.log) as log:
        log.append(tiny.live_events(10))
    publish_delta(tiny, 1, last_seq, events_total)
    expected = {"lost": lost, "applied": events_total, "applied_twice": twice, "set_aside": 0}
    assert _audit(tiny.registry, tiny.home, acked) == expected


def test_each_demo_starts_from_nothing_but_the_text_vectors(tmp_path):
    home = Home(tmp_path).ensure()
    (home.cache / "text.db").write_text("vectors")
    (_fresh_home(home).registry / "versions").mkdir()
    again = _fresh_home(home)
    assert list(again.registry.iterdir()) == []
    assert (again.cache / "text.db").read_text() == "vectors"
    assert not again.log.exists()


def test_a_taken_port_is_said_before_anything_is_prepared(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert main(["demo", "--home", str(tmp_path), "--port", str(port)]) == 5
    assert f"127.0.0.1:{port}: another process listens there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_key_is_said_before_anything_is_prepared(tmp_path, capsys):
    assert main(["demo", "--home", str(tmp_path), "--set", "train.epoch=3"]) == 2
    assert "did you mean train.epochs?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
