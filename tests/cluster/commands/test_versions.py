"""`recloop versions` and `status` of a home whose version has deltas."""

import json

from cluster.cli import main
from cluster.manifest import VersionRef


def publish_deltas(tiny, count: int) -> None:
    for _ in range(count):
        last_seq = tiny.registry.manifest(tiny.registry.current()).last_seq
        tiny.registry.draft_delta(tiny.registry.current().version).publish(last_seq + 1, last_seq + 5)


def ask(tiny, capsys, *words: str) -> dict:
    assert main([*words, "--home", str(tiny.home.path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_version_is_listed_with_its_deltas_and_its_offset(build_home, capsys):
    tiny = build_home()
    publish_deltas(tiny, 3)
    tiny.publish_version()
    first, second = ask(tiny, capsys, "versions")["versions"]
    assert (first["version"], first["deltas"], first["offset"], first["promoted"]) == (1, 3, 15, None)
    assert (second["version"], second["deltas"], second["offset"], second["promoted"]) == (2, 0, 0, "2.0")


def test_a_rollback_skips_the_versions_own_deltas(build_home, capsys):
    tiny = build_home()
    publish_deltas(tiny, 2)
    tiny.publish_version()
    publish_deltas(tiny, 2)
    assert ask(tiny, capsys, "versions", "rollback") == {"promoted": "1.2", "before": "2.2", "reason": "rollback"}


def test_a_rollback_of_the_only_version_goes_back_to_before_its_deltas(build_home, capsys):
    tiny = build_home()
    publish_deltas(tiny, 2)
    assert ask(tiny, capsys, "versions", "rollback", "--reason", "worse")["promoted"] == "1.0"
    move = tiny.registry.history()[-1]
    assert (move.ref, move.previous, move.reason) == (VersionRef(1), VersionRef(1, 2), "worse")


def test_a_single_delta_can_be_promoted(build_home, capsys):
    tiny = build_home()
    publish_deltas(tiny, 3)
    assert ask(tiny, capsys, "versions", "promote", "1.2")["before"] == "1.3"
    assert tiny.registry.current() == VersionRef(1, 2)


def test_status_tells_the_learned_event_from_the_logged_one(build_home, capsys):
    tiny = build_home()
    publish_deltas(tiny, 2)
    status = ask(tiny, capsys, "status", "--url", "http://127.0.0.1:9")
    assert (status["current"], status["learned_seq"], status["logged_seq"]) == ("1.2", 10, None)
    assert status["server_answers"] == "no"


def test_status_says_how_many_workers_learn(build_home, capsys):
    tiny = build_home()
    assert ask(tiny, capsys, "status", "--url", "http://127.0.0.1:9")["learning_workers"] is None  # nobody has yet
    tiny.registry.draft_delta(1).publish(first_seq=1, last_seq=4, metrics={"workers": 2})
    assert ask(tiny, capsys, "status", "--url", "http://127.0.0.1:9")["learning_workers"] == 2


def test_a_status_address_that_is_none_is_an_error(build_home, capsys):
    assert main(["status", "--home", str(build_home().home.path), "--url", "nonsense"]) == 2
    assert "--url nonsense" in capsys.readouterr().err


def test_show_says_what_a_delta_learned_and_weighs(build_home, capsys):
    tiny = build_home()
    publish_deltas(tiny, 2)
    shown = ask(tiny, capsys, "versions", "show", "1.2")
    assert (shown["version"], shown["promoted"], shown["parent"]) == ("1.2", True, "1.1")
    assert shown["learned"] == {"first_seq": 6, "last_seq": 10}
    assert [(move["from"], move["to"]) for move in shown["moves"]] == [("1.1", "1.2")]
    base = ask(tiny, capsys, "versions", "show", "1")
    assert base["deltas"] == 2
    assert base["bytes"] == sum(base["files"].values()) > 0


def test_diff_is_empty_between_a_version_and_itself(build_home, capsys):
    tiny = build_home()
    same = ask(tiny, capsys, "versions", "diff", "1")
    assert (same["from"], same["to"]) == ("1.0", "1.0")
    assert same["dense"]["tensors"] == same["recipe"] == {}
    assert all(table["changed"] == 0 for table in same["rows"].values())


def test_show_of_no_version_says_what_to_try(build_home, capsys):
    tiny = build_home()
    assert main(["versions", "show", "--home", str(tiny.home.path)]) == 2
    assert "recloop versions show 1" in capsys.readouterr().err


def test_a_canary_is_started_shown_and_stopped(build_home, capsys):
    tiny = build_home()
    tiny.publish_version(seed=1)
    tiny.registry.promote(VersionRef(1), "back")
    assert ask(tiny, capsys, "versions", "canary", "2", "--share", "0.2") == {
        "on_trial": "2.0",
        "share": 0.2,
        "from_seq": 0,
    }
    shown = ask(tiny, capsys, "versions", "canary")
    assert (shown["on_trial"], shown["trials"][0]["outcome"]) == ("2.0", "started")
    assert ask(tiny, capsys, "versions", "canary", "--stop", "--reason", "enough") == {"ended": "2.0"}
    assert ask(tiny, capsys, "versions", "canary")["trials"][-1]["reason"] == "enough"
    assert tiny.registry.current() == VersionRef(1)
