"""Replay a dataset's last events as live traffic over HTTP, and measure what a user would have been shown.

In:  a server's URL, events in time order, the arms to compare.  Out: a `ReplayRecord`: ranks, freshness, acks.
Knows nothing of models. Before each event every arm is asked what to recommend to that user; only then is the event
posted, so no arm has seen what it is asked to predict.

    event e of user u     POST /v1/recommend {u, arm}  × arms, in parallel     rank of e's item in each slate
                          POST /v1/feedback e                                  ack, sequence number
    now and then          POST /v1/recommend {u, min_seq}                      ack → user state
    each live answer      learned_seq                                          ack → served weights, for all up to it
"""

import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa

from cluster.dataset import Dataset
from cluster.errors import DataError, EngineError
from cluster.events import INTERACTION_KINDS
from cluster.progress import progress
from training.inputs import training_events
from training.stream import DataConfig

SLATE = 10
STATE_PROBE_EVERY = 20
"""Every so many events, the time until the state reflects one is measured."""
ATTEMPTS = 8
TIMEOUT_S = 30.0
DRAIN_S = 60.0

LIVE_ARM = "live"
STATE_ARM = "state"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRecord:
    """What happened, one entry an interaction unless said; nobody is asked to predict other events."""

    user_ids: list[str]
    cold: np.ndarray
    """Whether the user was not in the training part."""
    ranks: dict[str, np.ndarray]
    """Arm to the rank of the event's item in its slate; 0 when it was not in it."""
    acked_seqs: np.ndarray
    """Sequence number of every event posted."""
    state_ms: np.ndarray
    """Ack to reflected user state, of the events probed."""
    weights_ms: np.ndarray
    """Ack to served weights that learned the event, in order of sequence number."""
    version: str
    """Version that answered the live arm last."""
    seconds: float


class Client:
    """One keep-alive connection a thread; asks again after a dropped connection or an overload."""

    def __init__(self, url: str) -> None:
        address = urllib.parse.urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 80
        self._local = threading.local()
        self._opened: list[http.client.HTTPConnection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._opened:
            connection.close()

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:  # Any: JSON
        """Return the answer. Raises `EngineError` when the server does not answer or refuses the request.

        Posting an event again is safe: its id makes it the same event.
        """
        data = json.dumps(body) if body is not None else None
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                status, answer = self._exchange(method, path, data)
            except (OSError, http.client.HTTPException) as error:
                self._local.connection = None
                reason = f"{type(error).__name__}: {error}"
            else:
                if status == http.HTTPStatus.OK:
                    return json.loads(answer)
                reason = f"{status}: {answer[:300]!r}"
                if status not in (http.HTTPStatus.TOO_MANY_REQUESTS, http.HTTPStatus.SERVICE_UNAVAILABLE):
                    break
            time.sleep(0.05 * 2**attempt)
        raise EngineError(f"{method} {path} at {self._host}:{self._port}: {reason}")

    def _exchange(self, method: str, path: str, data: str | None) -> tuple[int, bytes]:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
            self._opened.append(connection)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


@dataclass(slots=True)
class WeightsClock:
    """Ack to served weights: an event counts when a live answer's weights have learned it."""

    acked: list[tuple[int, float]] = field(default_factory=list)
    """(sequence number, time of ack), in order."""
    waited_ms: list[float] = field(default_factory=list)

    def observe(self, learned_seq: int) -> None:
        """Note that an answer came from weights that learned events up to `learned_seq`."""
        now_s = time.monotonic()
        while len(self.waited_ms) < len(self.acked) and self.acked[len(self.waited_ms)][0] <= learned_seq:
            self.waited_ms.append((now_s - self.acked[len(self.waited_ms)][1]) * 1_000)


def split_for_replay(dataset: Dataset, data: DataConfig, limit: int | None = None) -> tuple[pa.Table, pa.Table]:
    """Return the events that training saw and those to replay, at most `limit`."""
    known = training_events(dataset, data)
    live = dataset.events().slice(len(known))
    return known, live.slice(0, limit) if limit is not None else live


def arms_for_replay(url: str, known_events: int) -> list[str]:
    """Return the arms that a server answers.

    Raises `DataError` where the server knew other events beforehand than those before the replay.
    """
    with Client(url) as client:
        server = client.request("GET", "/v1/versions")
    if server["knows_later_events"]:
        raise DataError(
            f"{url}: the server already knows the events to replay; start it without --data, "
            "from a home that was never served with it"
        )
    if (trained := server["training_events"]) != known_events:
        raise DataError(
            f"{url}: the server's version was trained on {trained:,} events, the replay begins after {known_events:,}; "
            "give the dataset and the data.train_fraction it was trained with"
        )
    return list(server["arms"])


def known_users(events: pa.Table) -> frozenset[str]:
    """Return the users who occur in the events."""
    return frozenset(events["user_id"].unique().to_pylist())


def replay(url: str, events: pa.Table, arms: Sequence[str], known: frozenset[str]) -> ReplayRecord:
    """Send every event, in order, and return what came back. Raises `EngineError` when the server gives up."""
    clock = WeightsClock()
    started_s = time.monotonic()
    ranks: dict[str, list[int]] = {arm: [] for arm in arms}
    state_ms: list[float] = []
    rows = events.to_pylist()
    with (
        Client(url) as client,
        ThreadPoolExecutor(len(arms)) as pool,
        progress(len(rows), "replaying", unit="event") as bar,
    ):
        for number, row in enumerate(rows):
            asked = arms if row["kind"] in INTERACTION_KINDS else ()
            answers = pool.map(lambda arm, user_id=row["user_id"]: _recommend(client, user_id, arm), asked)
            for arm, answer in zip(asked, list(answers), strict=True):
                ranks[arm].append(_rank(row["item_id"], answer))
                if arm == LIVE_ARM:
                    clock.observe(answer["learned_seq"])
            seq = client.request("POST", "/v1/feedback", _event_body(row))["last_seq"]
            acked_s = time.monotonic()
            clock.acked.append((seq, acked_s))
            if number % STATE_PROBE_EVERY == 0 and STATE_ARM in arms:
                state_ms.append(_wait_for_state(client, row["user_id"], seq, acked_s))
            bar.update()
        version = _drain(client, clock) if LIVE_ARM in arms else ""
    user_ids = [row["user_id"] for row in rows if row["kind"] in INTERACTION_KINDS]
    return ReplayRecord(
        user_ids=user_ids,
        cold=np.array([user_id not in known for user_id in user_ids], dtype=bool),
        ranks={arm: np.array(found, np.int64) for arm, found in ranks.items()},
        acked_seqs=np.array([seq for seq, _ in clock.acked], np.int64),
        state_ms=np.array(state_ms),
        weights_ms=np.array(clock.waited_ms),
        version=version,
        seconds=time.monotonic() - started_s,
    )


def _recommend(client: Client, user_id: str, arm: str) -> dict[str, Any]:
    return client.request("POST", "/v1/recommend", {"user_id": user_id, "k": SLATE, "arm": arm})


def _rank(item_id: str, answer: Mapping[str, Any]) -> int:
    shown = [item["item_id"] for item in answer["items"]]
    return shown.index(item_id) + 1 if item_id in shown else 0


def _event_body(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the event as a client posts it: without the fields that are not set."""
    stated = {name: value for name, value in row.items() if value is not None}
    return stated | {"context": dict(row["context"] or [])}


def _wait_for_state(client: Client, user_id: str, seq: int, acked_s: float) -> float:
    """Return the milliseconds from ack until a recommendation reflects the event."""
    body = {"user_id": user_id, "k": 1, "arm": STATE_ARM, "min_seq": seq}
    while not client.request("POST", "/v1/recommend", body)["reflects_min_seq"]:
        if time.monotonic() - acked_s > TIMEOUT_S:
            raise EngineError(f"event {seq} is not in the user state {TIMEOUT_S:.0f} s after its ack")
    return (time.monotonic() - acked_s) * 1_000


def _drain(client: Client, clock: WeightsClock) -> str:
    """Wait until the served weights have learned every event, if they learn; return the version that is served then."""
    deadline_s = time.monotonic() + DRAIN_S
    while True:
        answer = client.request("GET", "/v1/versions")
        clock.observe(answer["learned_seq"])
        if len(clock.waited_ms) == len(clock.acked) or not answer["learns"]:
            return answer["served"]
        if time.monotonic() > deadline_s:
            behind = len(clock.acked) - len(clock.waited_ms)
            raise EngineError(f"{behind:,} events are not in the served weights {DRAIN_S:.0f} s after the last one")
        time.sleep(0.05)
