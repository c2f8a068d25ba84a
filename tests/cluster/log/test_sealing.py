"""Sealing does not show: every event is read once and in order, and its id is known, wherever it is."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConfigError, EngineError
from cluster.events import Event
from cluster.log import Appended, EventLog
from cluster.log.retention import LogConfig
from cluster.log.sealing import Sealer
from cluster.log.state import NEWEST_OF_USER

ROOT = Path(__file__).parents[3]
SMALL = LogConfig(seal_after_events=20, segment_events=40)

GROWING = textwrap.dedent(
    """
    import sys
    from cluster.events import Event
    from cluster.log import EventLog
    from cluster.log.retention import LogConfig
    log = EventLog(sys.argv[1], LogConfig(seal_after_events=5, segment_events=20))
    for post in range(100_000):
        names = [f"{sys.argv[2]}-{post}-{n}" for n in range(10)]
        events = [Event(user_id=name[-1:], item_id=name, kind="click", ts_us=post, event_id=name) for name in names]
        for ack in log.append(events):
            print(ack.event_id, ack.seq)
        sys.stdout.flush()
    """
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "events.db"


def make_events(first, last, **fields):
    return [
        Event(
            **{"user_id": f"u{n % 7}", "item_id": f"m{n}", "kind": ("click", "skip")[n % 5 == 0], "ts_us": n}
            | {"event_id": f"e{n}", "context": {"n": str(n)} if n % 3 else {}}
            | fields
        )
        for n in range(first, last + 1)
    ]


def filled(path, events=200, config=SMALL, sealed=True):
    log = EventLog(path, replace(config, seal_after_events=10_000))
    log.append(make_events(1, events))
    log.close()
    log = EventLog(path, config)
    if sealed:
        log.seal()
    return log


def files(path):
    return sorted(entry.name for entry in (path.parent / "segments").iterdir())


def execute(path, *statements):
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def count_live(path):
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT count(*) FROM events").fetchone()[0]
    connection.close()
    return rows


def test_all_but_the_newest_events_leave_sqlite_and_are_read_as_before(path):
    with filled(path, sealed=False) as log:
        before = log.read(0, 1_000)
        states = [log.user_state(f"u{n}", 50) for n in range(7)]
        segments = log.seal()
        assert [(s.first_seq, s.last_seq, s.rows) for s in segments] == [
            (1, 40, 40),
            (41, 80, 40),
            (81, 120, 40),
            (121, 160, 40),
            (161, 180, 20),
        ]
        assert count_live(path) == 20
        assert log.read(0, 1_000) == before
        assert [log.user_state(f"u{n}", 50) for n in range(7)] == states
        report = log.verify()
        assert report.sound
        assert (report.events, report.first_seq, report.last_seq, report.segments) == (200, 1, 200, 5)


@pytest.mark.parametrize("step", [1, 7, 39, 40, 41, 199, 500])
def test_reading_in_steps_crosses_from_segment_to_segment_to_sqlite(path, step):
    with filled(path) as log:
        seen: list[int] = []
        while events := log.read(seen[-1] if seen else 0, step):
            assert len(events) <= step
            seen += [logged.seq for logged in events]
        assert seen == list(range(1, 201))


def test_a_duplicate_of_a_sealed_event_keeps_its_first_place(path):
    with filled(path) as log:
        assert log.append(make_events(3, 3)) == [Appended("e3", 3, True)]
        assert log.append(make_events(200, 201)) == [Appended("e200", 200, True), Appended("e201", 201, False)]


def test_the_newest_event_of_a_user_is_known_though_it_is_sealed_and_no_choice(path):
    with EventLog(path, LogConfig(seal_after_events=1, segment_events=5)) as log:
        log.append(make_events(1, 1, user_id="old", kind="skip"))
        log.append(make_events(2, 20, user_id="new"))
        log.seal()
        assert log.user_state("old", 10).seq == 1


def test_numbers_go_on_where_every_event_was_sealed(path):
    filled(path).close()
    execute(path, "DELETE FROM events", "DELETE FROM user_history WHERE seq > 180")
    with EventLog(path) as log:
        assert log.head_seq() == 180
        assert [ack.seq for ack in log.append(make_events(300, 301))] == [181, 182]


def test_a_log_that_grows_seals_itself(path):
    with EventLog(path, SMALL) as log:
        for first in range(1, 400, 10):
            log.append(make_events(first, first + 9))
        deadline = time.monotonic() + 20
        while count_live(path) >= 60 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 20 <= count_live(path) < 60
        assert [logged.seq for logged in log.read(0, 1_000)] == list(range(1, 401))
        assert log.verify().sound


@pytest.mark.parametrize("crash", ["written", "noted"])
def test_what_a_crash_before_the_commit_leaves_is_removed_and_sealed_again(path, monkeypatch, crash):
    log = filled(path, sealed=False)
    failing = "cluster.log.sealing._note" if crash == "written" else "cluster.log.sealing._record"

    def fail(*_):
        raise EngineError("the power is out")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(EngineError, match="power"):
            log.seal()
    log.close()
    assert len(files(path)) == 2
    with EventLog(path, SMALL) as log:
        assert files(path) == []
        assert [logged.seq for logged in log.read(0, 1_000)] == list(range(1, 201))
        assert log.append(make_events(5, 5)) == [Appended("e5", 5, True)]
        assert len(log.seal()) == 5
        assert log.verify().sound


def test_a_writer_killed_while_sealing_loses_nothing_and_doubles_nothing(path):
    acked = {}
    for round_number in range(4):
        command = [sys.executable, "-c", GROWING, str(path), f"r{round_number}"]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(2_000 + 1_370 * round_number)]
        os.kill(writer.pid, signal.SIGKILL)
        lines += writer.stdout.read().splitlines()
        writer.stdout.close()
        writer.wait()
        pairs = [line.split() for line in lines]
        acked |= {pair[0]: int(pair[1]) for pair in pairs[:-1] if len(pair) == 2}  # the last line may be torn
    with EventLog(path) as log:
        logged = {entry.event.event_id: entry.seq for entry in log.read(0, 1_000_000)}
        assert len(logged) == log.head_seq()
        assert acked.items() <= logged.items()
        report = log.verify()
        assert report.sound, report
        assert report.segments > 10
        again = log.append([Event(user_id="u", item_id="m", kind="click", ts_us=1, event_id=name) for name in acked])
        assert {ack.event_id: ack.seq for ack in again if ack.duplicate} == acked


@pytest.mark.parametrize(
    ("schema", "tables"),
    [(1, ("segments", "sealed_ids", "sealed_users", "absences", "users")), (2, ("users",)), (3, ("users",))],
    ids=["1", "2", "3"],
)
def test_a_log_of_an_older_schema_is_carried_on(path, schema, tables):
    filled(path, sealed=False).close()
    execute(path, *(f"DROP TABLE {name}" for name in tables))
    if schema < 3:
        execute(path, "DROP INDEX others_of_user", "CREATE INDEX events_of_user ON events (user_id)")
    execute(path, f"PRAGMA user_version = {schema}")
    with EventLog(path, SMALL) as log:
        assert len(log.read(0, 1_000)) == 200
        assert log.find_user("u1") is None
        assert log.append(make_events(200, 201)) == [Appended("e200", 200, True), Appended("e201", 201, False)]
        assert [log.user_state(f"u{n}", 1).seq for n in range(7)] == [196, 197, 198, 199, 200, 201, 195]
        log.seal()
        assert log.verify().sound
    indexes = "SELECT name FROM sqlite_schema WHERE tbl_name = 'events' AND name LIKE '%_of_user'"
    assert sqlite3.connect(path).execute(indexes).fetchall() == [("others_of_user",)]


def test_a_users_newest_event_is_found_whatever_its_kind_and_place(path):
    config = replace(SMALL, seal_after_events=2, segment_events=4)
    with filled(path, events=0, config=config, sealed=False) as log:
        chosen, skipped = make_events(1, 3, user_id="one"), make_events(5, 5, user_id="one")
        log.append([*chosen, *make_events(4, 4, user_id="two"), *skipped])  # the fifth is no interaction
        for _ in range(2):  # all live, then the first three sealed
            assert [log.user_state("one", 1, bound).seq for bound in (None, 5, 3, 1)] == [5, 3, 2, 0]
            assert (log.user_state("two", 1).seq, log.user_state("nobody", 1).seq) == (4, 0)
            log.seal()
        assert log.verify().segments == 1
    plan = sqlite3.connect(path).execute(f"EXPLAIN QUERY PLAN {NEWEST_OF_USER}", {"user": "one", "bound": 5})
    assert not any("SCAN events" in step for *_, step in plan)


def test_nothing_is_dropped_that_a_consumer_still_needs(path):
    config = replace(SMALL, keep_bytes=1)
    with filled(path, config=config) as log:
        assert log.verify().dropped == 0  # nobody committed an offset
        log.commit_offset("trainer", 200)
        log.commit_offset("guard", 85)
        log.seal()
        report = log.verify()
        assert (report.sound, report.dropped, report.first_seq, report.events) == (True, 80, 81, 120)
        assert [logged.seq for logged in log.read(0, 3)] == [81, 82, 83]
        assert len(files(path)) == 2 * report.segments
        assert log.append(make_events(7, 7)) == [Appended("e7", 7, True)]
        assert "m1" in log.seen_items("u1")


def test_with_dropped_events_users_forget_but_their_newest_interactions(path):
    def history(log, user):
        return [entry.seq for entry in log.user_state(user, 1_000).history]

    with filled(path) as log:
        before = {user: history(log, user) for user in ("u1", "u2", "u3")}
        log.commit_offset("trainer", 85)
    with EventLog(path, replace(SMALL, keep_bytes=1, keep_history=20)) as log:
        log.seal()
        assert log.verify().dropped == 80
        assert log.verify().sound
        for user, seqs in before.items():
            newest = set(seqs[-20:])
            assert history(log, user) == [seq for seq in seqs if seq > 80 or seq in newest]
            assert len(history(log, user)) < len(seqs)


def test_old_segments_are_dropped_by_age(path):
    filled(path).close()
    execute(
        path, "INSERT INTO offsets VALUES ('trainer', 200)", "UPDATE segments SET last_acked_us = 1 WHERE rowid < 90"
    )
    with EventLog(path, replace(SMALL, keep_days=1.0)) as log:
        log.seal()
        assert log.verify().dropped == 120


def test_files_of_dropped_segments_that_a_crash_left_are_removed(path):
    with filled(path) as log:
        kept = {name: (log.path.parent / "segments" / name).read_bytes() for name in files(path)[:2]}
        log.commit_offset("trainer", 60)
    with EventLog(path, replace(SMALL, keep_bytes=1)) as log:
        log.seal()
    for name, content in kept.items():
        (path.parent / "segments" / name).write_bytes(content)
    with EventLog(path) as log:
        assert not kept.keys() & set(files(path))
        assert log.read(0, 1)[0].seq == 41


def test_a_file_that_is_no_leftover_stays(path):
    with filled(path) as log:
        name = log.seal() or files(path)[0]
    execute(path, "DELETE FROM segments WHERE first_seq = 1")  # a log that forgot its segment has nothing else
    with EventLog(path, SMALL) as log:
        assert name in files(path)
        assert log.verify().gaps == 40


def test_ids_beyond_the_horizon_are_new_again(path):
    with filled(path, config=replace(SMALL, dedupe_events=50)) as log:
        assert log.append(make_events(131, 131)) == [Appended("e131", 131, True)]
        assert log.append(make_events(130, 130)) == [Appended("e130", 201, False)]


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_a_damaged_segment_is_an_error_that_names_its_events(path, damage):
    with filled(path) as log:
        segment = path.parent / "segments" / files(path)[3]
        data = bytearray(segment.read_bytes())
        data[len(data) // 3] ^= 0x10
        segment.write_bytes(data)
        if damage == "missing":
            segment.unlink()
        with pytest.raises(EngineError, match="41"):
            log.read(0, 1_000)
        report = log.verify()
        assert not report.sound
        assert report.damaged[0].startswith("events 41 to 80")


def test_a_sealer_waits_for_another_process(path):
    with filled(path) as log, EventLog(path, replace(SMALL, seal_after_events=5)) as other:
        other.seal()
        log.append(make_events(201, 260))
        assert [segment.first_seq for segment in log.seal()] == [196, 236]
        assert log.verify().sound
        assert isinstance(log._sealer, Sealer)


def test_settings_out_of_range_name_the_key():
    with pytest.raises(ConfigError, match=r"log\.keep_days=0"):
        LogConfig(keep_days=0)
