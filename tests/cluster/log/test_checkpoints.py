"""The write-ahead log is copied and starts again beside the commits, long before a commit has to do it."""

import sqlite3
import time

from cluster.events import Event
from cluster.log import EventLog
from cluster.log.checkpoints import MOST_WAL_PAGES

PAGE_BYTES = 4_096
WAIT_S = 30.0


def append_until(log, is_over):
    deadline_s = time.monotonic() + WAIT_S
    while not is_over() and time.monotonic() < deadline_s:
        log.append([Event(user_id=f"u{number}", item_id="m", kind="click", ts_us=1) for number in range(500)])
    assert is_over()


def test_the_write_ahead_log_starts_again_before_a_commit_has_to_copy_it(tmp_path):
    path = tmp_path / "events.db"
    journal = path.with_name("events.db-wal")
    with EventLog(path) as log:
        log.append([Event(user_id="u", item_id="m", kind="click", ts_us=1)])
        first_header = journal.read_bytes()[:32]
        append_until(log, lambda: journal.read_bytes()[:32] != first_header)
        assert journal.stat().st_size < MOST_WAL_PAGES * PAGE_BYTES
        assert log.verify().sound


def test_a_reader_that_stays_holds_up_no_commit(tmp_path):
    path = tmp_path / "events.db"
    with EventLog(path) as log:
        log.append([Event(user_id="u", item_id="m", kind="click", ts_us=1)])
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM events").fetchone() == (1,)
        began_size = path.stat().st_size
        append_until(log, lambda: log.head_seq() > 5_000)
        assert reader.execute("SELECT count(*) FROM events").fetchone() == (1,)
        reader.close()
        append_until(log, lambda: path.stat().st_size > began_size)
        assert log.verify().sound
