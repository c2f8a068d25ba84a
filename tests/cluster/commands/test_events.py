"""`recloop events`: what it seals, exports, replays and repairs, as a person types it."""

import json
from pathlib import Path

import pytest

from cluster.catalogue import Item
from cluster.cli import main
from cluster.dataset import load_dataset
from cluster.events import Event
from cluster.log import EventLog
from cluster.log.quarantine import Quarantine, Quarantined


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECLOOP_HOME", str(tmp_path / "home"))
    with EventLog(tmp_path / "home" / "events" / "events.db") as log:
        log.put_items([Item(item_id="m1", text="Ran", categories=("war",))])
        log.append(
            [
                Event(user_id=f"u{n % 3}", item_id=f"m{n}", kind="click", ts_us=1_000 - n, event_id=f"e{n}")
                for n in range(1, 101)
            ]
        )
    return tmp_path / "home"


def run_json(capsys, *words):
    assert main(["events", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def seal(capsys):
    return run_json(capsys, "seal", "--set", "log.seal_after_events=10", "--set", "log.segment_events=40")


def test_sealed_events_are_shown_and_verified_like_the_others(home, capsys):
    sealed = seal(capsys)
    assert sealed["sealed_events"] == 90
    assert [segment["rows"] for segment in sealed["segments"]] == [40, 40, 10]
    assert [row["seq"] for row in run_json(capsys, "tail", "--last", "15")["events"]] == list(range(86, 101))
    report = run_json(capsys, "verify")
    assert (report["events"], report["segments"], report["gaps"]) == (100, 3, 0)


def test_an_unknown_key_of_the_log_section_is_named(home, capsys):
    assert main(["events", "seal", "--set", "log.keep_day=3"]) == 2
    assert "log.keep_days" in capsys.readouterr().err


def test_an_exported_range_is_a_dataset(home, tmp_path, capsys):
    seal(capsys)
    shown = run_json(capsys, "export", "--to", str(tmp_path / "out"), "--from", "30", "--until", "95")
    assert shown["events"] == 66
    dataset = load_dataset(tmp_path / "out")
    assert dataset.events(["event_id"])["event_id"].to_pylist() == [f"e{n}" for n in range(95, 29, -1)]  # by time
    texts = dict(zip(*(dataset.items()[name].to_pylist() for name in ("item_id", "text")), strict=True))
    assert (texts["m1"], texts["m30"]) == ("Ran", "m30")
    assert dataset.users().num_rows == 3


@pytest.mark.parametrize("words", [["export"], ["replay"]])
def test_where_to_is_asked_for(words, home, capsys):
    assert main(["events", *words]) == 2
    assert "--to" in capsys.readouterr().err


def test_an_empty_range_is_an_error(home, tmp_path, capsys):
    assert main(["events", "export", "--to", str(tmp_path / "out"), "--from", "500"]) == 3
    assert "no events from 500" in capsys.readouterr().err


def test_a_replayed_range_is_in_the_other_log_once(home, tmp_path, capsys):
    seal(capsys)
    other = str(tmp_path / "other")
    first = run_json(capsys, "replay", "--from", "41", "--to", other)
    assert (first["appended"], first["duplicates"], first["head_seq"]) == (60, 0, 60)
    again = run_json(capsys, "replay", "--from", "31", "--to", other)
    assert (again["appended"], again["duplicates"], again["head_seq"]) == (10, 60, 70)
    with EventLog(tmp_path / "other" / "events" / "events.db") as log:
        assert log.read(0, 1)[0].event.event_id == "e41"
        assert log.verify().sound


def test_a_log_is_not_replayed_into_itself(home, capsys):
    assert main(["events", "replay", "--to", str(home)]) == 2
    assert "is the home that is read" in capsys.readouterr().err


def test_a_damaged_log_is_refused_then_repaired(home, capsys):
    path = home / "events" / "events.db"
    data = bytearray(path.read_bytes())
    data[:4_096] = bytes(4_096)
    path.write_bytes(data)
    assert main(["events", "verify"]) == 5
    assert "recloop: error" in capsys.readouterr().err
    report = run_json(capsys, "verify", "--repair")
    assert (report["repaired"], report["events"], report["lost_ranges"]) == (True, 100, [])
    assert Path(report["kept"]).is_dir()
    assert run_json(capsys, "verify", "--repair")["repaired"] is False


def test_impressions_are_joined_with_their_feedback_into_a_file(home, tmp_path, capsys):
    shown = Event(user_id="u", item_id="i", kind="impression", ts_us=1, request_id="r", position=0)
    clicked = Event(user_id="u", item_id="i", kind="click", ts_us=2_000_000, request_id="r")
    with EventLog(home / "events" / "events.db") as log:
        log.append([shown, clicked])
    told = run_json(capsys, "join", "--to", str(tmp_path / "joined.parquet"))
    assert (told["events"], told["examples"]) == (102, 101)  # of the hundred nothing is known but that they were chosen
    assert main(["events", "join"]) == 2
    assert "--to is missing; name the Parquet file for the examples" in capsys.readouterr().err


def test_what_is_in_quarantine_is_listed_released_and_dropped(home, capsys):
    quarantine = Quarantine(home / "events" / "events.db")
    quarantine.add(
        Quarantined(seq=seq, user_id=user, item_id="i", kind="click", score=0.5, reasons=("repeats",))
        for seq, user in ((1, "u1"), (2, "u2"))
    )
    quarantine.close()
    assert run_json(capsys, "quarantine")["counts"]["held"] == 2
    assert run_json(capsys, "quarantine", "--user", "u1", "--release")["released"] == 1
    told = run_json(capsys, "quarantine", "--drop")
    assert told["counts"] == {"held": 0, "released": 1, "learned": 0, "dropped": 1}
    assert [entry["reasons"] for entry in told["events"]] == ["repeats", "repeats"]
