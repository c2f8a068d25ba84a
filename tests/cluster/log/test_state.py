"""User state, wherever it is kept: the fold of the log, whole, once, at the ack; Redis killed, emptied and put back."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cluster.config import EngineConfig
from cluster.engine import open_served_log
from cluster.errors import ConfigError, EngineError
from cluster.events import INTERACTION_KINDS, KINDS, Event, events_table
from cluster.log import EventLog, Interaction
from cluster.log.redis import RedisStore
from cluster.log.repair import repair_log
from cluster.log.retention import LogConfig
from cluster.log.state import FileStates
from cluster.ray_session import find_free_port

Open = Callable[..., EventLog]
APPENDER = """
import sys, time
from pathlib import Path
from cluster.config import EngineConfig
from cluster.engine import open_served_log
from cluster.events import Event
from cluster.log.retention import LogConfig

path, url, first = sys.argv[1:]
log = open_served_log(EngineConfig(state="redis", redis_url=url), LogConfig(), Path(path))
while log.state_problem is not None:
    time.sleep(0.001)
for number in range(int(first), 10**6):
    event = Event(user_id=f"u{number % 3}", item_id=f"m{number}", kind="click", ts_us=number, event_id=f"e{number}")
    print(log.append([event])[0].seq, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "events.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    """Open logs that are closed when the test ends; their state is wherever the engine says."""
    with ExitStack() as stack:

        def open_one(url: str | None, file: Path = path, config: LogConfig | None = None) -> EventLog:
            engine = EngineConfig(state="redis", redis_url=url) if url else EngineConfig()
            log = stack.enter_context(open_served_log(engine, config or LogConfig(), file))
            wait_for(lambda: log.state_problem is None)
            return log

        yield open_one


@pytest.fixture(params=["sqlite", "redis"])
def open_log(request: pytest.FixtureRequest, opened: Open) -> Open:
    """Open logs of one kind of state after the other: what holds for one holds for both."""
    url = request.getfixturevalue("redis_server").url if request.param == "redis" else None
    return lambda config=None: opened(url, config=config)


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def click(number: int, user_id: str = "u1", kind: str = "click", **fields: object) -> Event:
    named = {"event_id": f"e{number}", "item_id": f"m{number}", "ts_us": 1_000 + number}
    return Event(**{"user_id": user_id, "kind": kind, **named, **fields})


def fold(log: EventLog, user_id: str) -> tuple[list[Interaction], int]:
    """Return what the log's events say of a user: their interactions, and their newest event."""
    mine = [logged for logged in log.read(0, 10**6) if logged.event.user_id == user_id]
    chosen = [
        Interaction(event.item_id, event.kind, event.value, event.ts_us, seq)
        for seq, event, _ in mine
        if event.kind in INTERACTION_KINDS
    ]
    return chosen, max((logged.seq for logged in mine), default=0)


def assert_state_is_the_fold(log: EventLog, *user_ids: str) -> None:
    for user_id in user_ids:
        history, seq = fold(log, user_id)
        for length in (0, 1, 4, 10_000):
            state = log.user_state(user_id, length)
            assert (list(state.history), state.seq) == (history[-length:] if length else [], seq)
            assert not state.fallback
        assert log.seen_items(user_id) == {entry.item_id for entry in history}


def is_shared(log: EventLog, user_id: str = "u1") -> bool:
    """Whether Redis answers, and holds all of the log."""
    state = log.user_state(user_id, 1)
    return not state.fallback and state.up_to_seq == log.head_seq()


def test_state_equals_the_fold_of_the_log_for_random_events(open_log):
    log, random_ = open_log(), random.Random(7)
    for _ in range(40):
        numbers = [random_.randrange(400) for _ in range(random_.randrange(1, 30))]
        log.append([click(n, f"u{n % 5}", KINDS[n % len(KINDS)], value=n / 3) for n in numbers])
    assert_state_is_the_fold(log, *(f"u{n}" for n in range(5)), "nobody")


def test_an_ack_comes_after_the_state_has_the_event(open_log):
    log = open_log()
    for number in range(1, 50):
        (ack,) = log.append([click(number)])
        assert log.user_state("u1", 1).history[-1].seq == log.user_state("u1", 0).seq == ack.seq


def test_threads_that_share_the_log_each_read_their_own_click(open_log):
    log = open_log()

    def append_and_look(worker: int) -> None:
        for number in range(30):
            (ack,) = log.append([click(1_000 * worker + number, f"u{worker}")])
            assert log.user_state(f"u{worker}", 1).seq == ack.seq

    threads = [threading.Thread(target=append_and_look, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.head_seq() == 240
    assert_state_is_the_fold(log, *(f"u{worker}" for worker in range(8)))


def test_state_before_a_sequence_number_does_not_see_it(open_log):
    log = open_log()
    log.append([click(number) for number in range(1, 6)])
    state = log.user_state("u1", 10, before_seq=3)
    assert ([entry.seq for entry in state.history], state.seq) == ([1, 2], 2)
    assert log.seen_items("u1", before_seq=3) == {"m1", "m2"}


def test_the_imported_past_comes_before_live_events_and_may_be_replaced(open_log):
    log = open_log()
    log.append([click(1), click(2)])
    for item in ("old", "older"):
        log.seed_history("past", events_table([click(9, item_id=item, ts_us=1, event_id=f"p-{item}")]))
        assert [entry.item_id for entry in log.user_state("u1", 10).history] == [item, "m1", "m2"]
        assert [entry.item_id for entry in log.user_state("u1", 2).history] == ["m1", "m2"]
        assert log.seen_items("u1") == {item, "m1", "m2"}
        assert [entry.item_id for entry in log.user_state("u1", 10, before_seq=1).history] == [item]


def test_ids_of_any_alphabet_are_users_of_their_own(open_log):
    log = open_log()
    users = ["u", "u:1", "ü☃", "{u}", "*", "u 1\n", "state"]
    log.append([click(number, user, item_id=f'"{user}"') for number, user in enumerate(users)])
    assert_state_is_the_fold(log, *users)


def test_more_than_is_kept_of_a_user_is_still_the_fold(open_log):
    log = open_log(LogConfig(keep_history=3))
    log.append([click(number) for number in range(1, 11)])
    assert_state_is_the_fold(log, "u1")


def test_what_retention_dropped_stays_in_user_history_when_the_log_is_opened_again(open_log):
    config = LogConfig(seal_after_events=5, segment_events=5, keep_bytes=1)
    with open_log(config) as log:
        log.append([click(number) for number in range(1, 21)])
        log.commit_offset("trainer", 20)
        log.seal()
        assert log.read(0, 1)[0].seq == 16
    again = open_log(config)
    assert [entry.seq for entry in again.user_state("u1", 100).history] == list(range(1, 21))


def test_appending_the_same_again_changes_nothing(open_log):
    log = open_log()
    log.append([click(1), click(2)])
    assert [ack.duplicate for ack in log.append([click(2), click(1), click(3)])] == [True, True, False]
    assert [entry.seq for entry in log.user_state("u1", 10).history] == [1, 2, 3]


def test_everything_is_there_when_the_log_is_opened_again(open_log):
    with open_log() as log:
        log.append([click(1), click(2, kind="skip")])
    assert_state_is_the_fold(open_log(), "u1")


def test_redis_itself_keeps_no_more_of_a_user_than_the_recipe_says(redis_server, opened):
    log = opened(redis_server.url, config=LogConfig(keep_history=3))
    log.append([click(number) for number in range(1, 11)])
    (key,) = redis_server.client.keys("*:u1")
    assert redis_server.client.llen(key) == 3 + 1  # and the newest event's number
    assert is_shared(log)


def test_nodes_may_apply_the_same_events_again_in_any_order_and_each_counts_once(redis_server, opened, tmp_path):
    log = opened(None)
    log.append([click(number, f"u{number % 3}") for number in range(1, 101)])
    events = log.read(0, 100)
    nodes = [RedisStore(redis_server.url, "one log") for _ in range(3)]
    assert nodes[0].applied_seq() is None
    assert nodes[0].apply(0, events) is None
    nodes[0].fill(lambda _: True, FileStates(opened(None, tmp_path / "empty.db")._reader).everyone)
    random_, reached = random.Random(3), 0
    while reached < 100:
        after = random_.randrange(100)
        before = nodes[1].applied_seq()
        found = random_.choice(nodes).apply(after, events[after : after + random_.randrange(1, 20)])
        assert found is not None
        assert found >= before
        reached = found
    for user in range(3):
        shared = nodes[2].read(f"u{user}", None)
        assert shared is not None
        assert (shared.history, shared.seq) == fold(log, f"u{user}")
    for node in nodes:
        node.close()


def test_two_processes_on_one_file_agree_and_see_each_others_clicks(redis_server, opened):
    one, other = opened(redis_server.url), opened(redis_server.url)
    for number in range(0, 40, 2):
        (ack,) = one.append([click(number)])
        assert other.user_state("u1", 1).seq == ack.seq
        (ack,) = other.append([click(number + 1)])
        assert one.user_state("u1", 1).seq == ack.seq
    assert_state_is_the_fold(one, "u1")
    assert is_shared(one)
    assert is_shared(other)


def test_two_logs_in_one_redis_do_not_see_each_other(redis_server, opened, tmp_path):
    one, other = opened(redis_server.url), opened(redis_server.url, tmp_path / "other.db")
    one.append([click(1), click(2)])
    other.append([click(3)])
    assert_state_is_the_fold(one, "u1")
    assert_state_is_the_fold(other, "u1")


def test_what_a_process_committed_before_it_was_killed_is_applied_by_the_next(redis_server, opened, path):
    process = start_appender(path, redis_server, first=1)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    redis_server.signal(signal.SIGSTOP)  # the appender commits, and waits for Redis
    with EventLog(path) as log:
        head = log.head_seq()
        wait_for(lambda: log.head_seq() > head)
        process.kill()
        process.wait()
        process.stdout.close()
        redis_server.kill()  # what it was sent meanwhile is lost with it
        redis_server.start()
        committed = log.head_seq()
    (state,) = redis_server.client.keys("*:state")
    assert 5 <= int(redis_server.client.hget(state, "applied")) < committed
    log = opened(redis_server.url)
    assert is_shared(log)
    assert_state_is_the_fold(log, "u0", "u1", "u2")


def test_state_is_the_fold_after_any_kill(redis_server, opened, path):
    acked = 0
    for pause_s in (0.0, 0.01, 0.03):
        process = start_appender(path, redis_server, first=1_000 * acked)
        assert process.stdout is not None
        acked = max([acked, *(int(process.stdout.readline()) for _ in range(3))])
        time.sleep(pause_s)
        process.kill()
        acked = max([acked, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
    log = opened(redis_server.url)
    assert log.head_seq() >= acked >= 9
    assert is_shared(log)
    assert_state_is_the_fold(log, "u0", "u1", "u2")


def start_appender(path, redis_server, *, first: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", APPENDER, str(path), redis_server.url, str(first)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_an_emptied_redis_is_filled_again_while_the_file_answers(redis_server, opened):
    log = opened(redis_server.url)
    log.append([click(number) for number in range(1, 101)])
    redis_server.client.flushall()
    assert log.user_state("u1", 1).seq == 100
    (ack,) = log.append([click(101)])
    assert log.user_state("u1", 1).seq == ack.seq
    wait_for(lambda: is_shared(log))
    assert_state_is_the_fold(log, "u1")


@pytest.mark.parametrize("when", [0, 1_000, 2_000])
def test_a_redis_that_is_emptied_while_it_is_filled_never_shows_half_of_the_state(redis_server, opened, when):
    log, client = opened(redis_server.url), redis_server.client
    log.append([click(number, f"u{number}") for number in range(2_000)])
    file, store = FileStates(log._reader), RedisStore(redis_server.url, "another name")

    @contextmanager
    def everyone():
        with file.everyone() as (head_seq, states):
            yield head_seq, (state for place, state in enumerate(states) if place != when or client.flushall())
        if when == 2_000:  # all is written
            client.flushall()

    with pytest.raises(EngineError):
        store.fill(lambda _: True, everyone)
    assert store.applied_seq() is None
    store.close()


def test_a_redis_that_lost_its_last_seconds_is_caught_up_from_the_log(redis_server, opened):
    log, client = opened(redis_server.url), redis_server.client
    log.append([click(number) for number in range(1, 51)])
    before = {key: client.dump(key) for key in client.keys("*")}
    log.append([click(number) for number in range(51, 61)])
    with client.pipeline() as lost:
        lost.flushall()
        for key, value in before.items():
            lost.restore(key, 0, value)
        lost.execute()
    assert log.user_state("u1", 1).seq == 60  # of the file, which knows more
    wait_for(lambda: is_shared(log))
    assert_state_is_the_fold(log, "u1")


def test_a_log_put_back_from_an_older_copy_takes_its_state_with_it(redis_server, opened, path):
    with opened(redis_server.url) as log:
        log.append([click(1), click(2)])
    copy = path.read_bytes()
    with opened(redis_server.url) as log:
        log.append([click(3), click(4), click(5)])
    path.write_bytes(copy)
    log = open_served_log(EngineConfig(state="redis", redis_url=redis_server.url), LogConfig(), path)
    log.append([click(number) for number in range(6, 16)])  # at once, and beyond what Redis has
    wait_for(lambda: log.state_problem is None)
    assert_state_is_the_fold(log, "u1")
    assert is_shared(log)
    assert len(redis_server.client.keys("*:u1")) == 1  # the state that was replaced is gone
    log.close()


def test_a_repaired_log_has_a_state_of_its_own_which_is_its_fold(redis_server, opened, path):
    with opened(redis_server.url) as log:
        log.append([click(1), click(2), click(3)])
    repair_log(path)
    log = opened(redis_server.url)
    assert len(redis_server.client.keys("*:state")) == 2
    assert is_shared(log)
    assert_state_is_the_fold(log, "u1")


def test_what_was_dropped_while_redis_was_away_is_filled_from_user_history(redis_server, opened):
    log = opened(redis_server.url, config=LogConfig(seal_after_events=5, segment_events=5, keep_bytes=1))
    log.append([click(1)])
    redis_server.kill()
    log.append([click(number) for number in range(2, 21)])
    log.commit_offset("trainer", 20)
    log.seal()
    assert log.read(0, 1)[0].seq == 16
    redis_server.start()
    wait_for(lambda: log.state_problem is None)
    assert is_shared(log)
    assert [entry.seq for entry in log.user_state("u1", 100).history] == list(range(1, 21))


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_without_redis_appends_are_acked_and_the_file_answers_until_it_is_back(redis_server, opened, how):
    log = opened(redis_server.url)
    log.append([click(1)])
    if how == "kill":
        redis_server.kill()
    else:
        redis_server.signal(signal.SIGSTOP)
    for number in range(2, 30):
        (ack,) = log.append([click(number)])
        state = log.user_state("u1", 1)
        assert (state.seq, state.history[-1].seq, state.fallback) == (ack.seq, ack.seq, True)
        assert log.seen_items("u1") == {f"m{n}" for n in range(1, number + 1)}
    assert "Redis at 127.0.0.1" in str(log.state_problem)
    if how == "kill":
        redis_server.start()
    else:
        redis_server.signal(signal.SIGCONT)
    wait_for(lambda: log.state_problem is None)
    assert is_shared(log)
    assert_state_is_the_fold(log, "u1")


def test_a_redis_without_memory_is_away_and_holds_no_half_event(redis_server, opened):
    log = opened(redis_server.url)
    log.append([click(1)])
    redis_server.client.config_set("maxmemory", 1)
    log.append([click(2)])
    assert log.user_state("u1", 2).fallback
    assert log.user_state("u1", 2).seq == 2
    redis_server.client.config_set("maxmemory", 0)
    wait_for(lambda: log.state_problem is None)
    assert is_shared(log)
    assert_state_is_the_fold(log, "u1")


def test_no_redis_is_an_error_that_names_it(path):
    engine = EngineConfig(state="redis", redis_url=f"redis://127.0.0.1:{find_free_port()}/0")
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:\d+"):
        open_served_log(engine, LogConfig(), path)


def test_a_redis_that_would_evict_users_is_refused(redis_server, path):
    redis_server.client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(EngineError, match="set noeviction"):
        open_served_log(EngineConfig(state="redis", redis_url=redis_server.url), LogConfig(), path)


def test_an_address_that_is_none_is_said(path):
    with pytest.raises(ConfigError, match="try redis://"):
        open_served_log(EngineConfig(state="redis", redis_url="localhost:6379"), LogConfig(), path)


def test_a_password_in_the_recipe_is_refused():
    with pytest.raises(ConfigError, match="RECLOOP_REDIS_PASSWORD"):
        EngineConfig(redis_url="redis://:secret@127.0.0.1/0")


def test_a_missing_client_is_said(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "cluster.log.redis", raising=False)
    with pytest.raises(ConfigError, match="pip install redis"):
        open_served_log(EngineConfig(state="redis"), LogConfig(), path)
