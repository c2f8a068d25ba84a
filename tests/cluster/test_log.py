"""The log's promises: acked is durable, an id has one place, order has no gaps, state is the fold of the log."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.catalogue import Item, User
from cluster.errors import EngineError
from cluster.events import INTERACTION_KINDS, KINDS, Event, events_table
from cluster.log import Appended, EventLog, Interaction
from cluster.log.commit import GroupCommit
from cluster.log.schema import connect

ROOT = Path(__file__).parents[2]

APPENDER = textwrap.dedent(
    """
    import sys
    from cluster.events import Event
    from cluster.log import EventLog
    log = EventLog(sys.argv[1])
    for number in range(int(sys.argv[3]), int(sys.argv[4])):
        event = Event(user_id=f"u{number % 7}", item_id=f"m{number}", kind="click", ts_us=number,
                      event_id=f"{sys.argv[2]}{number}")
        ack = log.append([event])[0]
        print(ack.event_id, ack.seq, ack.duplicate, flush=True)
    log.close()
    """
)

FILLER = textwrap.dedent(
    """
    import resource, sys
    from cluster.errors import EngineError
    from cluster.events import Event
    from cluster.log import EventLog
    log, acked = EventLog(sys.argv[1]), 0
    limit_bytes, hard = 300_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        while True:
            acked += len(log.append([Event(user_id="u", item_id="x" * 500, kind="click", ts_us=1) for _ in range(3)]))
    except EngineError:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    acked += len(log.append([Event(user_id="u", item_id="after", kind="click", ts_us=1)]))
    log.close()
    print(acked)
    """
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "events.db"


@pytest.fixture
def log(path: Path):
    with EventLog(path) as opened:
        yield opened


def make_event(number, user_id="u1", kind="click", **fields):
    named = {"event_id": f"e{number}", "item_id": f"m{number}", "ts_us": 1_000 + number}
    return Event(**{"user_id": user_id, "kind": kind, **named, **fields})


def start_appender(path, prefix, first, end):
    command = [sys.executable, "-c", APPENDER, str(path), prefix, str(first), str(end)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def assert_sound(log):
    report = log.verify()
    assert report.sound, report
    return report


def fold(log, user_id):
    entries = [entry for entry in log.read(0, 1_000_000) if entry.event.user_id == user_id]
    return tuple(
        Interaction(event.item_id, event.kind, event.value, event.ts_us, seq)
        for seq, event, _ in entries
        if event.kind in INTERACTION_KINDS
    )


def test_an_empty_log_is_empty_and_sound(log):
    assert log.head_seq() == 0
    assert log.read(0, 10) == []
    assert log.append([]) == []
    assert log.user_state("nobody", 10).history == ()
    assert log.user_state("nobody", 10).seq == 0
    assert log.seen_items("nobody") == frozenset()
    assert log.committed_offset("trainer") == 0
    report = assert_sound(log)
    assert (report.events, report.first_seq, report.last_seq) == (0, 0, 0)


def test_events_are_read_back_equal_and_in_order(log):
    full = make_event(
        2,
        domain="films",
        value=3.5,
        request_id="r1",
        position=4,
        propensity=0.25,
        version="1.37",
        context={"device": "tv", "ä": "☃"},
    )
    events = [make_event(1), full, make_event(3, user_id="ü" * 1_024)]
    assert log.append(events) == [Appended(f"e{number}", number, False) for number in (1, 2, 3)]
    assert [entry.event for entry in log.read(0, 10)] == events
    assert [entry.seq for entry in log.read(1, 1)] == [2]
    assert log.read(3, 10) == []
    assert abs(log.read(0, 1)[0].acked_us - time.time_ns() // 1_000) < 60_000_000


def test_an_id_posted_again_keeps_its_first_place_and_content(log):
    log.append([make_event(1), make_event(2)])
    again = make_event(1, item_id="other")
    assert log.append([again, make_event(3), again]) == [
        Appended("e1", 1, True),
        Appended("e3", 3, False),
        Appended("e1", 1, True),
    ]
    assert [entry.event.item_id for entry in log.read(0, 10)] == ["m1", "m2", "m3"]
    assert log.seen_items("u1") == {"m1", "m2", "m3"}
    assert_sound(log)


def test_the_same_id_twice_in_one_call_is_one_event(log):
    assert [ack.duplicate for ack in log.append([make_event(1), make_event(1)])] == [False, True]
    assert log.head_seq() == 1


def test_state_holds_the_last_choices_oldest_first(log):
    log.append([make_event(number) for number in range(1, 6)])
    state = log.user_state("u1", 3)
    assert [entry.item_id for entry in state.history] == ["m3", "m4", "m5"]
    assert state.history[-1] == Interaction("m5", "click", None, 1_005, 5)


def test_state_before_a_sequence_number_does_not_see_it(log):
    log.append([make_event(number) for number in range(1, 6)])
    state = log.user_state("u1", 10, before_seq=3)
    assert [entry.seq for entry in state.history] == [1, 2]
    assert state.seq == 2
    assert log.seen_items("u1", before_seq=3) == {"m1", "m2"}


def test_a_skip_is_reflected_though_it_is_no_choice(log):
    log.append([make_event(1), make_event(2, kind="skip"), make_event(3, user_id="u2")])
    state = log.user_state("u1", 10)
    assert [entry.item_id for entry in state.history] == ["m1"]
    assert state.seq == 2


def test_state_equals_the_fold_of_the_log_for_random_events(log):
    random_ = random.Random(7)
    for _ in range(40):
        numbers = [random_.randrange(400) for _ in range(random_.randrange(1, 30))]
        log.append(
            [make_event(n, user_id=f"u{n % 5}", kind=KINDS[n % len(KINDS)], value=float(n % 3)) for n in numbers]
        )
    for user_id in (f"u{n}" for n in range(5)):
        assert log.user_state(user_id, 1_000).history == fold(log, user_id)
        assert log.user_state(user_id, 4).history == fold(log, user_id)[-4:]
    assert_sound(log)


def test_everything_survives_reopening(path):
    with EventLog(path) as log:
        log.append([make_event(1), make_event(2)])
        log.commit_offset("trainer", 2)
        log.put_items([Item(item_id="m9", text="Ran")])
    with EventLog(path) as log:
        assert log.append([make_event(2), make_event(3)]) == [Appended("e2", 2, True), Appended("e3", 3, False)]
        assert log.committed_offset("trainer") == 2
        assert log.read_items(0, 10) == [(1, Item(item_id="m9", text="Ran"))]


def test_offsets_belong_to_their_consumers(log):
    log.commit_offset("trainer", 5)
    log.commit_offset("guard", 3)
    log.commit_offset("trainer", 9)
    assert (log.committed_offset("trainer"), log.committed_offset("guard")) == (9, 3)


def past(*rows):
    return events_table(
        make_event(n, user_id=user, kind=kind, ts_us=ts, event_id=f"p{n}") for n, user, kind, ts in rows
    )


def test_imported_history_comes_before_live_events_in_order_of_time(log):
    log.append([make_event(1)])
    seeded = log.seed_history(
        "ml", past((7, "u1", "click", 30), (8, "u1", "rating", 10), (9, "u1", "skip", 20), (5, "u1", "like", 30))
    )
    assert seeded == 3
    state = log.user_state("u1", 10)
    assert [entry.item_id for entry in state.history] == ["m8", "m7", "m5", "m1"]
    assert all(entry.seq <= 0 for entry in state.history[:-1])
    assert state.seq == 1
    assert log.seen_items("u1") == {"m8", "m7", "m5", "m1"}


def test_imported_history_is_never_read_as_events(log):
    log.seed_history("ml", past((7, "u1", "click", 30)))
    assert log.head_seq() == 0
    assert log.read(-(2**62), 10) == []
    assert log.user_state("u1", 10).seq == 0
    assert_sound(log)


def test_importing_the_same_past_again_changes_nothing(log):
    table = past((7, "u1", "click", 30), (8, "u2", "click", 31))
    assert [log.seed_history("ml", table), log.seed_history("ml", table)] == [2, 0]
    assert log.seed_history("more", past((9, "u1", "click", 1))) == 1
    assert [entry.item_id for entry in log.user_state("u1", 10).history] == ["m7", "m9"]


def history(log, user_id):
    return [entry.item_id for entry in log.user_state(user_id, 10).history]


def test_another_past_of_the_same_kind_takes_its_place_and_live_history_stays(log):
    log.append([make_event(1)])
    log.seed_history("ml", past((7, "u1", "click", 30), (8, "u2", "click", 31)))
    assert log.seed_history("ml", past((7, "u1", "click", 30), (9, "u1", "like", 31), (5, "u1", "click", 32))) == 3
    assert (history(log, "u1"), history(log, "u2")) == (["m7", "m9", "m5", "m1"], [])
    assert log.count_seeded("ml") == 3
    assert log.head_seq() == 1
    assert_sound(log)


@pytest.mark.parametrize("changed", [(6, "u1", "click", 30), (7, "u2", "click", 30), (7, "u1", "like", 30)])
def test_a_past_is_known_by_what_it_holds_whatever_its_events_are_called(log, changed):
    log.seed_history("ml", past((7, "u1", "click", 30)))
    other = past(changed)
    assert log.seed_history("ml", other.set_column(0, "event_id", past((7, "u1", "click", 30))["event_id"])) == 1


def test_replacing_a_past_removes_what_was_imported_after_it_and_nothing_before(log):
    log.seed_history("trained", past((1, "u1", "click", 1)))
    log.seed_history("later", past((2, "u1", "click", 2)))
    log.seed_history("later", past((3, "u1", "click", 2), (4, "u1", "click", 3)))
    assert history(log, "u1") == ["m1", "m3", "m4"]
    log.seed_history("trained", past((5, "u1", "click", 1)))
    assert history(log, "u1") == ["m5"]
    assert (log.count_seeded("trained"), log.count_seeded("later")) == (1, 0)


def test_a_past_that_cannot_be_written_leaves_the_one_there_was(log):
    log.seed_history("ml", past((7, "u1", "click", 30)))
    table = past((8, "u1", "click", 30), (9, "u1", "click", 31))
    with pytest.raises(EngineError, match="user_id"):
        log.seed_history("ml", table.set_column(table.schema.get_field_index("user_id"), "user_id", [["u1", None]]))
    assert history(log, "u1") == ["m7"]


def test_a_failed_import_leaves_nothing_behind(log):
    broken = pa.table({"user_id": ["u1", None], "item_id": ["a", "b"], "kind": ["click"] * 2})
    broken = broken.append_column("value", pa.nulls(2, pa.float64())).append_column("ts_us", pa.array([1, 2]))
    with pytest.raises(EngineError, match="user_id"):
        log.seed_history("ml", broken)
    assert log.user_state("u1", 10).history == ()
    assert log.seed_history("ml", past((7, "u1", "click", 30))) == 1


def test_items_are_read_once_at_their_newest(log):
    alien, ran = Item(item_id="a", text="Alien"), Item(item_id="r", text="Ran", categories=("war", "drama"))
    longer = Item(item_id="a", text="Alien (1979)", available_from_us=1, available_until_us=2)
    assert log.put_items([alien, ran]) == 2
    assert log.put_items([longer]) == 3
    assert log.read_items(0, 10) == [(2, ran), (3, longer)]
    assert log.read_items(2, 10) == [(3, longer)]
    assert log.put_items([]) == 3


def test_what_was_told_last_of_a_user_counts(log):
    log.put_users([User(user_id="a", attributes={"plan": "free"}), User(user_id="b")])
    log.put_users([User(user_id="a", attributes={"plan": "family"})])
    assert log.find_user("a") == User(user_id="a", attributes={"plan": "family"})
    assert log.find_user("c") is None
    assert [user.user_id for _, user in log.read_users(0, 10)] == ["b", "a"]


def test_an_item_is_found_as_it_was_put_or_deleted_last(log):
    ran = Item(item_id="r", text="Ran", categories=("war",), available_from_us=1)
    log.put_items([ran])
    assert log.find_item("r") == ran
    log.put_items([ran.as_deleted()])
    assert log.find_item("r") == ran.as_deleted()
    assert log.find_item("r").is_deleted
    assert log.find_item("a") is None


def test_many_threads_share_the_log(log):
    def append_and_look(worker):
        for number in range(50):
            ack = log.append([make_event(1_000 * worker + number, user_id=f"u{worker}")])[0]
            assert log.user_state(f"u{worker}", 1).seq == ack.seq

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(append_and_look, range(8)))
    assert assert_sound(log).events == 400


def test_what_arrives_during_a_commit_shares_the_next_one(tmp_path):
    connection = connect(tmp_path / "jobs.db", cache_bytes=1 << 20)
    statements = []
    connection.set_trace_callback(statements.append)
    writer = GroupCommit(connection, "jobs.db")
    release = threading.Event()
    first = writer.submit(lambda _: release.wait(10))
    while not first.running():
        time.sleep(0.001)
    others = [writer.submit(lambda _, number=number: number) for number in range(100)]
    assert not any(future.done() for future in others)
    release.set()
    assert [future.result(10) for future in others] == list(range(100))
    writer.close()
    assert statements.count("COMMIT") == 2


def test_parts_of_a_job_that_wait_together_run_as_one_without_those_that_make_it_raise(tmp_path):
    writer = GroupCommit(connect(tmp_path / "jobs.db", cache_bytes=1 << 20), "jobs.db")
    release, ran = threading.Event(), []

    def double(_, numbers):
        ran.append(list(numbers))
        return [2 * 12 // (12 // number) for number in numbers]

    blocker = writer.submit(lambda _: release.wait(10))
    while not blocker.running():
        time.sleep(0.001)
    good = [writer.submit_part(double, number) for number in (1, 2)]
    other = writer.submit(lambda _: "other")
    mixed = [writer.submit_part(double, number) for number in (3, 0, 4)]
    release.set()
    assert [future.result(10) for future in (*good, other, mixed[0], mixed[2])] == [2, 4, "other", 6, 8]
    with pytest.raises(ZeroDivisionError):
        mixed[1].result(10)
    writer.close()
    assert ran == [[1, 2], [3, 0, 4], [3], [0, 4], [0], [4]]


def test_one_bad_event_does_not_fail_its_neighbours(log):
    bad = make_event(1, position=2**70)
    before, failed, after = (log.append_async([event]) for event in (make_event(2), bad, make_event(3)))
    assert [before.result()[0].seq, after.result()[0].seq] == [1, 2]
    with pytest.raises(OverflowError):
        failed.result()
    assert log.append([make_event(1)])[0].seq == 3
    assert_sound(log)


def test_a_call_is_written_whole_or_not_at_all(log):
    with pytest.raises(OverflowError):
        log.append([make_event(1), make_event(2, position=2**70)])
    assert log.head_seq() == 0


def test_a_closed_log_refuses_and_has_written_what_was_queued(path):
    log = EventLog(path)
    futures = [log.append_async([make_event(number)]) for number in range(100)]
    log.close()
    log.close()
    assert all(future.done() for future in futures)
    with pytest.raises(EngineError, match="closed"):
        log.append([make_event(1)])
    with EventLog(path) as reopened:
        assert reopened.head_seq() == 100


def test_a_full_disk_is_an_error_and_nothing_is_half_written(path):
    command = [sys.executable, "-c", FILLER, str(path)]
    acked = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    with EventLog(path) as log:
        assert log.head_seq() == acked > 0
        assert log.append([make_event(1)])[0].seq == acked + 1
        assert_sound(log)


def test_commits_are_synced_to_the_disk(path):
    EventLog(path).close()
    connection = connect(path, cache_bytes=1 << 20)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_two_processes_appending_at_once_share_one_order(path):
    appenders = [start_appender(path, prefix, 0, 200) for prefix in ("a", "b", "a")]  # two send the same ids
    acks = [line.split() for appender in appenders for line in appender.communicate(timeout=60)[0].splitlines()]
    places = {}
    for event_id, seq, _ in acks:
        assert places.setdefault(event_id, seq) == seq
    assert len(acks) == 600
    assert sorted(int(seq) for seq in places.values()) == list(range(1, 401))
    assert sum(duplicate == "True" for _, _, duplicate in acks) == 200
    with EventLog(path) as log:
        assert assert_sound(log).events == 400


def test_a_writer_killed_mid_append_loses_no_acked_event_and_doubles_none(path):
    acked = {}
    for round_number in range(3):
        writer = start_appender(path, f"round{round_number}-", 0, 1_000_000)
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(20)]
        time.sleep(0.01 * round_number)
        os.kill(writer.pid, signal.SIGKILL)
        lines += writer.stdout.read().splitlines()
        writer.stdout.close()
        writer.wait()
        acked |= {event_id: int(seq) for event_id, seq, _ in map(str.split, lines)}
    with EventLog(path) as log:
        logged = [entry.event.event_id for entry in log.read(0, 1_000_000)]
        assert len(logged) == len(set(logged))
        assert {event_id: logged.index(event_id) + 1 for event_id in acked} == acked
        retried = log.append([make_event(0, event_id=event_id) for event_id in acked])
        assert {ack.event_id: ack.seq for ack in retried if ack.duplicate} == acked
        assert_sound(log)


def test_readers_work_while_another_process_writes(path):
    with EventLog(path) as log:
        writer = start_appender(path, "w", 0, 300)
        seen = []
        deadline = time.monotonic() + 60
        while len(seen) < 300 and time.monotonic() < deadline:
            seen += [entry.seq for entry in log.read(len(seen), 7)]
        writer.communicate(timeout=60)
        assert seen == list(range(1, 301))


def test_a_log_cut_off_by_a_power_loss_keeps_whole_appends_in_order(path):
    log = EventLog(path)
    for number in range(1, 30):
        log.append([make_event(number), make_event(-number)])
    journal = path.with_name(f"{path.name}-wal")
    data, copied = journal.read_bytes(), path.with_name("copy.db")
    heads = []
    for cut in range(0, len(data), max(1, len(data) // 12)):
        copied.write_bytes(path.read_bytes())
        copied.with_name("copy.db-wal").write_bytes(data[:cut])
        if cut < 20_000:  # not even the tables are there yet
            continue
        with EventLog(copied) as recovered:
            heads.append(assert_sound(recovered).last_seq)
        for leftover in copied.parent.glob("copy.db*"):
            leftover.unlink()
    log.close()
    assert heads == sorted(heads)
    assert all(head % 2 == 0 for head in heads)


def test_verification_counts_what_is_wrong(path):
    with EventLog(path) as log:
        log.append([make_event(number) for number in range(1, 6)])
    vandal = sqlite3.connect(path)
    vandal.execute("DELETE FROM events WHERE seq = 2")
    vandal.execute("UPDATE user_history SET item_id = 'other' WHERE seq = 4")
    vandal.commit()
    vandal.close()
    with EventLog(path) as log:
        report = log.verify()
    assert not report.sound
    assert (report.events, report.gaps, report.duplicates) == (4, 1, 0)
    assert report.state_mismatches == 3  # the history entry of 2; the true and the altered entry of 4
    assert report.integrity == "ok"


def test_a_file_that_is_no_log_is_named(path):
    path.parent.mkdir()
    path.write_bytes(b"not a database, though it is long enough to be looked at" * 100)
    with pytest.raises(EngineError, match=r"events\.db"):
        EventLog(path)


def test_a_damaged_page_is_an_error_that_names_the_file(path):
    with EventLog(path) as log:
        log.append([make_event(number, item_id="x" * 900) for number in range(200)])
    data = bytearray(path.read_bytes())
    data[4_096:] = bytes(len(data) - 4_096)
    path.write_bytes(data)
    with EventLog(path) as log, pytest.raises(EngineError, match=r"events\.db"):
        log.read(0, 1_000)


def test_a_log_of_another_schema_is_refused(path):
    EventLog(path).close()
    other = sqlite3.connect(path)
    other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(EngineError, match="schema 99"):
        EventLog(path)


def test_a_cancelled_append_is_not_written_and_the_others_are(log, path):
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    first = log.append_async([make_event(0)])
    while not first.running():
        time.sleep(0.001)
    second, third = (log.append_async([make_event(number)]) for number in (1, 2))
    cancelled = third.cancel()
    blocker.execute("COMMIT")
    blocker.close()
    assert cancelled
    assert second.result(10)[0].seq == 2
    log.append([make_event(9)])
    assert [entry.event.event_id for entry in log.read(0, 10)] == ["e0", "e1", "e9"]


def test_no_thread_is_left_after_closing(path):
    before = set(threading.enumerate())
    EventLog(path).close()
    assert set(threading.enumerate()) == before
