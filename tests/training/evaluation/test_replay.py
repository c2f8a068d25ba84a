"""Replay against a real HTTP server that records who asked what, when, and answers from a script."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.config import load_recipe
from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, Dataset, write_dataset
from cluster.errors import DataError, EngineError
from cluster.events import Event, events_table
from training.evaluation.replay import (
    STATE_PROBE_EVERY,
    WeightsClock,
    arms_for_replay,
    known_users,
    replay,
    split_for_replay,
)
from training.evaluation.report import replay_and_report
from training.stream import DataConfig

ARMS = ("frozen", "state", "live")


@dataclass(frozen=True)
class Request:
    """One request, with its place among all beginnings and ends."""

    path: str
    body: dict
    began: int
    ended: int


@dataclass
class Recorder:
    """Answers recommendations with what `slate` says after so many events, and logs every request."""

    slate: Callable[[str, int], list[str]]
    """Arm and number of events posted so far to item ids."""
    lag: int = 0
    """Events by which the weights are behind."""
    learns: bool = True
    past: dict = field(default_factory=dict)
    """What the server says that it knew beforehand."""
    requests: list[Request] = field(default_factory=list)
    posted: dict[str, int] = field(default_factory=dict)
    """Event id to sequence number."""
    stumbles: list = field(default_factory=list)
    """What the next requests get instead of an answer: a status, or None for a dropped connection."""
    polls: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._clock = 0

    def tick(self) -> int:
        with self._lock:
            self._clock += 1
            return self._clock

    def stumble(self) -> object:
        with self._lock:
            return self.stumbles.pop(0) if self.stumbles else 200

    def answer(self, path: str, body: dict) -> dict:
        seq = len(self.posted)
        if path == "/v1/versions":
            self.polls += 1
            self.lag = max(0, self.lag - 1)  # the trainer catches up while it is asked
            learned_seq = max(0, seq - self.lag)
            return {"arms": list(ARMS), "learned_seq": learned_seq, "learns": self.learns, "served": "1.7"} | self.past
        if path == "/v1/feedback":
            return {"last_seq": self.posted.setdefault(body["event_id"], seq + 1)}
        items = [{"item_id": item_id} for item_id in self.slate(body["arm"], seq)[: body["k"]]]
        reflects = body.get("min_seq", 0) <= seq
        return {"items": items, "learned_seq": max(0, seq - self.lag), "reflects_min_seq": reflects}

    def of(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def asked(self) -> list[Request]:
        """Recommendations asked for, less the probes of user state."""
        return [request for request in self.of("/v1/recommend") if "min_seq" not in request.body]


@contextmanager
def listening(recorder: Recorder) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer is one packet

        def do_POST(self) -> None:
            began = recorder.tick()
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            status = recorder.stumble()
            if status is None:
                self.close_connection = True
                return
            answer = recorder.answer(self.path, body) if status == 200 else {"detail": "not now"}
            recorder.requests.append(Request(self.path, body, began, recorder.tick()))
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def stream(count: int, **given) -> pa.Table:
    return events_table(
        Event(event_id=f"e{n}", user_id=f"u{n % 3}", item_id=f"i{n}", kind="click", ts_us=n, **given)
        for n in range(count)
    )


def ten_events(path: Path) -> Dataset:
    return write_dataset(
        path,
        name="ten",
        events=stream(10).take(np.arange(10)[::-1]),
        items=pa.Table.from_pylist(
            [{"item_id": f"i{n}", "domain": "default", "text": "", "categories": []} for n in range(10)],
            schema=ITEM_SCHEMA,
        ),
        users=pa.Table.from_pylist([{"user_id": f"u{n}", "attributes": []} for n in range(3)], schema=USER_SCHEMA),
        label="clicks",
        sources=[],
        rejected={},
    )


def always(*item_ids: str) -> Callable[[str, int], list[str]]:
    return lambda arm, seq: list(item_ids)


def test_every_arm_is_answered_before_the_event_is_posted_and_no_arm_is_asked_before_the_last_one_was():
    recorder = Recorder(always("i1"))
    with listening(recorder) as url:
        replay(url, stream(50), ARMS, frozenset())
    posts, asked = recorder.of("/v1/feedback"), recorder.asked()
    assert [post.body["event_id"] for post in posts] == [f"e{n}" for n in range(50)]
    assert len(asked) == 50 * len(ARMS)
    before = 0
    for number, post in enumerate(posts):
        of_event = [request for request in asked if before < request.began < post.began]
        assert sorted(request.body["arm"] for request in of_event) == sorted(ARMS)
        assert {request.body["user_id"] for request in of_event} == {f"u{number % 3}"}
        assert max(request.ended for request in of_event) < post.began
        before = post.ended


def test_what_is_asked_names_nothing_of_the_event_but_its_user():
    recorder = Recorder(always())
    with listening(recorder) as url:
        replay(url, stream(5), ARMS, frozenset())
    assert all(set(request.body) == {"user_id", "k", "arm"} for request in recorder.asked())


def test_ranks_are_places_in_the_slates_that_were_answered():
    slates = {
        "frozen": lambda seq: ["i0", "i1", "i2", "i3"],
        "state": lambda seq: [f"x{n}" for n in range(9)] + [f"i{seq}", f"i{seq + 1}"],
        "live": lambda seq: [f"i{seq + 1}", f"i{seq}"],
    }
    recorder = Recorder(lambda arm, seq: slates[arm](seq))
    with listening(recorder) as url:
        record = replay(url, stream(6), ARMS, frozenset())
    assert record.ranks["frozen"].tolist() == [1, 2, 3, 4, 0, 0]
    assert record.ranks["state"].tolist() == [10] * 6
    assert record.ranks["live"].tolist() == [2] * 6


def test_an_event_that_is_no_interaction_is_posted_and_nobody_is_asked_to_predict_it():
    skipped = Event(event_id="shown", user_id="u9", item_id="i9", kind="skip", ts_us=2)
    mixed = pa.concat_tables([stream(2), events_table([skipped])])
    recorder = Recorder(always("i1"))
    with listening(recorder) as url:
        record = replay(url, mixed, ARMS, frozenset())
    assert len(recorder.of("/v1/feedback")) == len(record.acked_seqs) == 3
    assert "u9" not in {request.body["user_id"] for request in recorder.asked()}
    assert [len(ranks) for ranks in record.ranks.values()] == [2] * len(ARMS)


def test_an_arm_that_only_repeats_what_was_posted_never_hits():
    recorder = Recorder(lambda arm, seq: [f"i{n}" for n in range(seq)][-10:])
    with listening(recorder) as url:
        record = replay(url, stream(40), ARMS, frozenset())
    assert all(ranks.tolist() == [0] * 40 for ranks in record.ranks.values())


def test_the_record_names_users_cold_ones_sequence_numbers_and_the_version_that_learned_all():
    recorder = Recorder(always(), lag=4)
    with listening(recorder) as url:
        record = replay(url, stream(6), ARMS, known=frozenset({"u0", "u2"}))
    assert record.user_ids == ["u0", "u1", "u2"] * 2
    assert record.cold.tolist() == [False, True, False] * 2
    assert record.acked_seqs.tolist() == [1, 2, 3, 4, 5, 6]
    assert record.version == "1.7"
    assert len(record.weights_ms) == 6
    assert (record.weights_ms >= 0).all()
    assert recorder.polls >= 4  # until the trainer had caught up


def test_the_user_state_is_probed_now_and_then_with_the_sequence_number_of_the_ack():
    recorder = Recorder(always())
    with listening(recorder) as url:
        record = replay(url, stream(2 * STATE_PROBE_EVERY + 1), ARMS, frozenset())
    probes = [request.body for request in recorder.of("/v1/recommend") if "min_seq" in request.body]
    assert [body["min_seq"] for body in probes] == [1, STATE_PROBE_EVERY + 1, 2 * STATE_PROBE_EVERY + 1]
    assert {body["arm"] for body in probes} == {"state"}
    assert len(record.state_ms) == 3


def test_a_version_that_does_not_learn_is_not_waited_for():
    recorder = Recorder(always("i0"), lag=1_000, learns=False)
    with listening(recorder) as url:
        record = replay(url, stream(3), ARMS, frozenset())
    assert (len(record.weights_ms), record.version, recorder.polls) == (0, "1.7", 1)


def test_frozen_alone_needs_no_trainer_and_waits_for_none():
    recorder = Recorder(always("i0"), lag=1_000)
    with listening(recorder) as url:
        record = replay(url, stream(3), ["frozen"], frozenset())
    assert (len(record.weights_ms), len(record.state_ms), record.version) == (0, 0, "")
    assert recorder.polls == 0


def test_an_event_is_posted_without_what_it_does_not_state():
    recorder = Recorder(always())
    with listening(recorder) as url:
        replay(url, stream(1, context={"page": "home"}, value=2.5), ["frozen"], frozenset())
    assert recorder.of("/v1/feedback")[0].body == {
        "event_id": "e0",
        "ts_us": 0,
        "domain": "default",
        "user_id": "u0",
        "item_id": "i0",
        "kind": "click",
        "value": 2.5,
        "context": {"page": "home"},
    }


@pytest.mark.parametrize("stumbles", [[None], [503, 429], [None, 503, None]])
def test_after_a_dropped_connection_or_an_overload_the_same_request_is_made_again(stumbles):
    recorder = Recorder(always("i0"), stumbles=stumbles)
    with listening(recorder) as url:
        record = replay(url, stream(3), ["frozen"], frozenset())
    assert record.ranks["frozen"].tolist() == [1, 0, 0]
    assert record.acked_seqs.tolist() == [1, 2, 3]
    assert list(recorder.posted) == ["e0", "e1", "e2"]


def test_a_refusal_ends_the_replay_with_its_reason():
    recorder = Recorder(always(), stumbles=[422])
    with listening(recorder) as url, pytest.raises(EngineError, match=r"POST /v1/recommend .* 422: .*not now"):
        replay(url, stream(3), ["frozen"], frozenset())


def test_a_server_that_knows_what_came_before_the_replay_names_its_arms():
    recorder = Recorder(always(), past={"training_events": 8, "knows_later_events": False})
    with listening(recorder) as url:
        assert arms_for_replay(url, known_events=8) == list(ARMS)


@pytest.mark.parametrize(
    ("trained", "knows_later", "message"),
    [(8, True, "already knows the events to replay; start it without --data"), (9, False, "trained on 9 events")],
)
def test_a_server_that_knows_more_or_less_than_what_came_before_is_not_replayed_on(
    tmp_path, trained, knows_later, message
):
    recorder = Recorder(always(), past={"training_events": trained, "knows_later_events": knows_later})
    recipe = load_recipe("movielens", ["data.train_fraction=0.8"])
    with listening(recorder) as url, pytest.raises(DataError, match=message):
        replay_and_report(url, recipe, ten_events(tmp_path / "data"), tmp_path)
    assert recorder.posted == {}


def test_a_weight_is_fresh_once_an_answer_has_learned_its_event():
    clock = WeightsClock(acked=[(1, 0.0), (2, 0.0), (5, 0.0)])
    clock.observe(0)
    assert clock.waited_ms == []
    clock.observe(4)
    assert len(clock.waited_ms) == 2
    clock.observe(3)  # another replica, that is behind
    clock.observe(5)
    assert len(clock.waited_ms) == 3
    assert clock.waited_ms == sorted(clock.waited_ms)


@pytest.mark.parametrize(("limit", "replayed"), [(None, ["e8", "e9"]), (1, ["e8"]), (100, ["e8", "e9"])])
def test_what_training_may_not_see_is_replayed_in_order(tmp_path, limit, replayed):
    known, live = split_for_replay(ten_events(tmp_path / "data"), DataConfig(train_fraction=0.8), limit)
    assert known["event_id"].to_pylist() == [f"e{n}" for n in range(8)]
    assert live["event_id"].to_pylist() == replayed
    assert known_users(known) == {"u0", "u1", "u2"}
