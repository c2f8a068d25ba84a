"""Repair saves what can be read, at its place, and says by number what cannot."""

import sqlite3
from pathlib import Path

import pytest

from cluster.catalogue import Item, User
from cluster.errors import EngineError
from cluster.events import Event, events_table
from cluster.log import Appended, EventLog
from cluster.log.repair import repair_log
from cluster.log.retention import LogConfig
from cluster.log.swap import finish_swap

SEALING = LogConfig(seal_after_events=100, segment_events=150)
FRAME_BYTES = 24 + 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "events.db"


def make_events(first, last):
    return [
        Event(
            user_id=f"u{n % 7}",
            item_id=f"m{n}" * (1 + 700 * (n % 97 == 0)),
            kind=("click", "skip")[n % 5 == 0],
            ts_us=n,
            event_id=f"e{n}",
            value=float(n) if n % 2 else None,
            context={"n": str(n)} if n % 3 else {},
        )
        for n in range(first, last + 1)
    ]


def crashed(path, last=600):
    """Return a log's whole content, and leave its files as a kill would: nothing checkpointed, nothing closed."""
    log = EventLog(path)
    log.seed_history("ml", events_table([Event(user_id="u1", item_id="old", kind="click", ts_us=1, event_id="p1")]))
    log.put_items([Item(item_id="m9", text="Ran")])
    log.put_users([User(user_id="u1", attributes={"plan": "family"})])
    log.commit_offset("trainer", 5)
    for first in range(1, last + 1, 20):
        log.append(make_events(first, first + 19))
    events, folder = log.read(0, 10_000), path.parent
    frozen = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    log.close()
    for file in folder.iterdir():
        file.unlink()
    for name, content in frozen.items():
        if not name.endswith("-shm"):
            (folder / name).write_bytes(content)
    return events


def closed(path, config=None, last=600):
    log = EventLog(path, config)
    log.seed_history("ml", events_table([Event(user_id="u1", item_id="old", kind="click", ts_us=1, event_id="p1")]))
    log.put_items([Item(item_id="m9", text="Ran")])
    log.put_users([User(user_id="u1", attributes={"plan": "family"})])
    log.append(make_events(1, last))
    log.seal()
    events = log.read(0, 10_000)
    log.close()
    return events


def flip(path, *places):
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 0x55
    path.write_bytes(data)


def check(path, before, report):
    """Assert that what is left is what there was, that the rest is named, and that the log goes on soundly."""
    lost = {seq for first, last in report.lost for seq in range(first, last + 1)}
    with EventLog(path) as log:
        assert log.read(0, 10_000) == [logged for logged in before if logged.seq not in lost]
        verified = log.verify()
        assert verified.sound, verified
        assert verified.lost == len(lost)
        known = [logged.event for logged in before if logged.seq not in lost]
        assert {ack.duplicate for ack in log.append(known)} <= {True}
        assert log.append(make_events(5_000, 5_000)) == [Appended("e5000", before[-1].seq + 1, False)]
    return lost


def test_a_sound_log_is_the_same_after_repair(path):
    before = crashed(path)
    report = repair_log(path)
    assert check(path, before, report) == set()
    with EventLog(path) as log:
        assert log.user_state("u1", 1_000).history[0].item_id == "old"
        assert log.read_items(0, 10) == [(1, Item(item_id="m9", text="Ran"))]
        assert log.find_user("u1") == User(user_id="u1", attributes={"plan": "family"})
        assert log.committed_offset("trainer") == 5
    assert (Path(report.kept) / "events.db-wal").exists()


@pytest.mark.parametrize("frame", [30, 60, 90])
def test_a_flipped_byte_in_the_write_ahead_log_is_refused_and_costs_no_event(path, frame):
    before = crashed(path)
    flip(path.with_name("events.db-wal"), 32 + frame * FRAME_BYTES + 2_000)
    with pytest.raises(EngineError, match=f"frame {frame + 1} of .* is damaged"):
        EventLog(path)
    lost = check(path, before, repair_log(path))
    assert len(lost) <= 20  # at most what one page held that no other copy has


def test_a_damaged_header_of_the_write_ahead_log_costs_nothing(path):
    before = crashed(path)
    flip(path.with_name("events.db-wal"), 17)
    with pytest.raises(EngineError, match="is damaged"):
        EventLog(path)
    assert check(path, before, repair_log(path)) == set()


def test_a_write_ahead_log_cut_off_keeps_whole_appends(path):
    before = crashed(path)
    journal = path.with_name("events.db-wal")
    journal.write_bytes(journal.read_bytes()[: 32 + 60 * FRAME_BYTES + 999])
    repair_log(path)
    with EventLog(path) as log:
        head = log.head_seq()
        assert log.read(0, 10_000) == before[:head]
        assert 0 < head < 600
        assert head % 20 == 0
        assert log.verify().sound


def page_kinds(path):
    data = path.read_bytes()
    return {number: data[number * 4096] for number in range(1, len(data) // 4096)}


@pytest.mark.parametrize("kind", [0x02, 0x05, 0x0A])
def test_damage_to_indexes_and_inner_pages_costs_no_event(path, kind):
    before = closed(path)
    hit = [number * 4096 + 5 for number, found in page_kinds(path).items() if found == kind]
    assert hit
    flip(path, *hit, *(place + 8 for place in hit))
    assert check(path, before, repair_log(path)) == set()


def test_a_page_wiped_out_costs_its_own_events_only(path):
    before = closed(path)
    data = bytearray(path.read_bytes())
    leaves = [number for number, found in page_kinds(path).items() if found == 0x0D]
    hit = next(number for number in leaves if b"e300" in data[number * 4096 : (number + 1) * 4096])
    data[hit * 4096 : (hit + 1) * 4096] = bytes(4096)
    path.write_bytes(data)
    lost = check(path, before, repair_log(path))
    assert 0 < len(lost) < 60
    assert max(lost) - min(lost) < 60


def test_a_file_cut_in_half_keeps_what_is_in_the_first_half(path):
    before = closed(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    report = repair_log(path)
    with EventLog(path) as log:
        kept = log.read(0, 10_000)
        assert len(kept) > 100
        assert set(map(repr, kept)) <= set(map(repr, before))
        assert log.verify().sound
    known = {seq for first, last in report.lost for seq in range(first, last + 1)} | {logged.seq for logged in kept}
    assert sorted(known) == list(range(1, max(known) + 1))


def test_a_lost_first_page_leaves_events_and_segments(path):
    before = closed(path, SEALING)
    data = bytearray(path.read_bytes())
    data[:4096] = bytes(4096)
    path.write_bytes(data)
    with pytest.raises(EngineError, match=r"events\.db"):
        EventLog(path)
    assert check(path, before, repair_log(path)) == set()


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_segment_is_filled_up_from_deleted_rows_and_the_rest_is_named(path, damage):
    before = closed(path, SEALING)
    segment = sorted((path.parent / "segments").glob("*.parquet"))[1]
    if damage == "flip":
        flip(segment, segment.stat().st_size // 3)
    elif damage == "cut":
        segment.write_bytes(segment.read_bytes()[:-40])
    else:
        segment.unlink()
    lost = check(path, before, repair_log(path))
    assert lost <= set(range(151, 301))


def test_numbers_of_lost_events_are_not_given_again(path):
    before = closed(path, last=599)
    connection = sqlite3.connect(path)
    connection.execute("DELETE FROM events WHERE seq > 590")
    connection.commit()
    connection.close()
    report = repair_log(path)
    with EventLog(path) as log:
        assert log.append(make_events(9_000, 9_000))[0].seq == before[-1].seq + 1
        assert log.verify().sound
    assert all(first > 590 for first, _ in report.lost)


def test_wrong_history_is_made_anew(path):
    before = closed(path)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE user_history SET item_id = 'other' WHERE seq = 4")
    connection.execute("DELETE FROM user_history WHERE seq = 7")
    connection.commit()
    connection.close()
    assert check(path, before, repair_log(path)) == set()


def test_a_log_in_use_is_not_repaired(path):
    with EventLog(path) as log:
        log.append(make_events(1, 3))
        with pytest.raises(EngineError, match="in use"):
            repair_log(path)


def test_a_file_that_is_no_log_is_left_alone(path):
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 1_000)
    with pytest.raises(EngineError, match="nothing that can be read"):
        repair_log(path)
    assert path.read_bytes() == b"not a database" * 1_000


def test_a_swap_that_was_cut_short_is_finished_by_whoever_opens_the_log(path):
    before = closed(path)
    repaired = path.with_name("events.db.repaired")
    path.rename(repaired)  # the old file was moved aside, the new one is not in place yet
    path.with_name("events.db.swap").write_text('{"finished": "events.db.repaired", "kept": "events.db.damaged-1"}')
    with EventLog(path) as log:
        assert log.read(0, 10_000) == before
    assert not repaired.exists()
    finish_swap(path)
