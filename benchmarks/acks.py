"""How fast is a durable ack, against Redis that syncs every write, behind the same HTTP layer?

    python -m benchmarks.acks [--quick] [--redis-server PATH]

In:  feedback as clients post it: 64 connections, each waiting for its answer before the next post.
Out: posts and events a second, p50, p95 and p99 of a post, for the embedded log and for Redis in turns.
Both are behind one uvicorn process that checks events as serving does, on loopback. Redis (`appendfsync always`, XADD
of the event and SET NX of its id, pipelined a post) keeps neither user history nor an order of ids across streams: it
does less. Bound by one Python process that reads HTTP, checks and answers, by the disk's sync, and by two cores for
three processes. The clients are one of them: their posts are made before the clock starts, and they read of an answer
only how many events it says were accepted.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pydantic_core
import uvloop

from benchmarks.harness import build_check, build_parser, interleave, percentiles, print_result
from cluster.errors import EngineError
from cluster.events import Event
from cluster.heap import settle_heap
from cluster.log import Appended, EventLog
from cluster.ray_session import find_free_port
from serving.feedback import Intake

CLIENTS = 64
BULK_EVENTS = 500
BULK_CLIENTS = 8
POSTS = {"single": 10_000, "bulk": 200}
"""In one turn."""
QUICK_POSTS = {"single": 500, "bulk": 20}
USERS, ITEMS = 10_000, 2_000
START_S = 30.0
HOST = "127.0.0.1"
REQUEST = (
    b"POST /v1/feedback HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)")


class RedisLog:
    """A Redis stream with what `Intake` asks of a log; the ack comes after Redis's sync."""

    def __init__(self, port: int) -> None:
        from redis.asyncio import Redis  # Debian's server, PyPI's client: this benchmark alone needs them

        self._redis = Redis(port=port)

    def append_async(self, events: Sequence[Event]) -> Future[list[Appended]]:
        """Add the events in one round trip."""
        acked: Future[list[Appended]] = Future()
        task = asyncio.ensure_future(self._append(events))
        task.add_done_callback(
            lambda done: acked.set_exception(error) if (error := done.exception()) else acked.set_result(done.result())
        )
        return acked

    async def _append(self, events: Sequence[Event]) -> list[Appended]:
        pipeline = self._redis.pipeline(transaction=False)
        for event in events:
            pipeline.set(f"id:{event.event_id}", 1, nx=True)
            fields = {name: str(getattr(event, name)) for name in ("event_id", "ts_us", "user_id", "item_id", "kind")}
            pipeline.xadd("events", fields)  # pyright: ignore[reportArgumentType]  # invariant key type
        answers = await pipeline.execute()
        return [Appended(event.event_id, 0, is_new is None) for event, is_new in zip(events, answers[::2], strict=True)]


def serve(log_path: str, redis_port: int, port: int) -> None:
    """Serve `POST /v1/feedback` from one process until it is ended."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    log: Any = RedisLog(redis_port) if redis_port else EventLog(log_path)
    intake = Intake(log)

    async def feedback(request: Request) -> JSONResponse:
        stated = pydantic_core.from_json(await request.body())
        receipt = await intake.take(stated if isinstance(stated, list) else [stated])
        return JSONResponse({"accepted": receipt.accepted, "results": [one._asdict() for one in receipt.appended]})

    app = Starlette(routes=[Route("/v1/feedback", feedback, methods=["POST"])])
    settle_heap()
    uvicorn.run(app, host=HOST, port=port, log_level="warning", access_log=False)


@contextlib.contextmanager
def started(command: Sequence[str], port: int) -> Iterator[None]:
    """Run a server while the block lasts, from when its port answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + START_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise EngineError(f"{command[0]}: does not answer on port {port}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(START_S)


class Client(asyncio.Protocol):
    """One connection that posts what `requests` still has, each after the answer to the one before.

    A whole HTTP client would take from the two cores about as much as the server does.
    """

    def __init__(self, requests: Iterator[bytes], events_a_post: int, took_s: list[float]) -> None:
        self._requests = requests
        self._wanted = f'"accepted":{events_a_post},'.encode()
        self._took_s = took_s
        self._answer = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Post for the first time."""
        self._transport = cast(asyncio.Transport, transport)
        self._post()

    def data_received(self, data: bytes) -> None:
        """Post again once the answer is whole."""
        self._answer += data
        head, _, body = self._answer.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if length is None or len(body) < int(length[1]):
            return
        self._took_s.append(time.perf_counter() - self._begun_s)
        if head.startswith(b"HTTP/1.1 200") and self._wanted in body:
            self._post()
        else:
            self._transport.close()
            self.done.set_exception(EngineError(f"not all events were accepted: {self._answer[:300]!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Say so, unless nothing was left to post."""
        if not self.done.done():
            self.done.set_exception(exc or EngineError("the server has closed a connection"))

    def _post(self) -> None:
        self._answer = b""
        if (request := next(self._requests, None)) is None:
            self.done.set_result(None)
            self._transport.close()
            return
        self._begun_s = time.perf_counter()
        self._transport.write(request)


def load(port: int, requests: Sequence[bytes], clients: int, events_a_post: int) -> dict[str, float]:
    """Post the requests on so many connections; every event must be accepted as new."""

    async def run() -> dict[str, float]:
        took_s: list[float] = []
        left = iter(requests)
        begun_s = time.perf_counter()
        connect = asyncio.get_running_loop().create_connection
        made = [await connect(lambda: Client(left, events_a_post, took_s), HOST, port) for _ in range(clients)]
        await asyncio.gather(*(client.done for _, client in made))
        passed_s = time.perf_counter() - begun_s
        in_ms = {name: value * 1e3 for name, value in percentiles(took_s).items()}
        return {"posts_s": len(took_s) / passed_s, "events_s": len(took_s) * events_a_post / passed_s, **in_ms}

    return uvloop.run(run())


def build_requests(posts: int, events_a_post: int, numbers: Iterator[int]) -> list[bytes]:
    """Return so many posts of new events, as bytes."""
    requests = []
    for _ in range(posts):
        made = [_event(next(numbers)) for _ in range(events_a_post)]
        body = json.dumps(made[0] if events_a_post == 1 else made).encode()
        requests.append(REQUEST % len(body) + body)
    return requests


def main() -> None:
    """Measure both in turns and print."""
    args = _parse()
    if args.serve:
        serve(args.log, args.redis_port, args.port)
        return
    posts = QUICK_POSTS if args.quick else POSTS
    numbers = itertools.count()
    latest: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        # Not /dev/shm: both must pay for a real disk's sync.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="acks-")))
        redis_port = find_free_port()
        stack.enter_context(started(_redis_command(args.redis_server, redis_port, folder), redis_port))
        ports = {}
        for name, port_of_redis in (("recloop", 0), ("redis", redis_port)):
            port = find_free_port()
            flags = ["--log", str(folder / "log.sqlite"), "--redis-port", str(port_of_redis), "--port", str(port)]
            stack.enter_context(started([sys.executable, "-m", "benchmarks.acks", "--serve", *flags], port))
            ports[name] = port

        def measure(name: str, kind: str, clients: int, events_a_post: int) -> float:
            figures = load(ports[name], build_requests(posts[kind], events_a_post, numbers), clients, events_a_post)
            for key, value in figures.items():
                latest.setdefault(f"{name}_{kind}", {}).setdefault(key, []).append(value)
            return figures["events_s"]

        variants = {
            f"{name}_{kind}": lambda name=name, how=(kind, *sizes): measure(name, *how)
            for kind, sizes in {"single": (CLIENTS, 1), "bulk": (BULK_CLIENTS, BULK_EVENTS)}.items()
            for name in ports
        }
        turns = interleave(variants, args.repeats)
    p99_ms = sorted(latest["recloop_single"]["p99"][1:])[args.repeats // 2]  # the first was the warm-up
    checks = [
        build_check("acks_vs_redis", turns.ratio("recloop_single", "redis_single"), ">=1.0"),
        build_check("p99_ms_at_64_clients", p99_ms, "<=25"),
        build_check("bulk_events_s", turns.median("recloop_bulk"), ">=20000"),
    ]
    for check in checks:
        print(f"{check.name:24} {check.value:>12,.2f}  bar {check.bar:9} {'holds' if check.holds else 'MISSED'}")
    config = {"clients": CLIENTS, "bulk_events": BULK_EVENTS, "posts": posts, "quick": args.quick}
    print_result(results=turns.summary() | {"latency": latest}, config=config, checks=checks)


def _event(number: int) -> dict[str, object]:
    user, item = number * 7919 % USERS, number * 104729 % ITEMS
    return {"event_id": f"acks-{number}", "user_id": f"user-{user}", "item_id": f"item-{item}", "kind": "click"}


def _redis_command(path: str | None, port: int, folder: Path) -> list[str]:
    server = path or shutil.which("redis-server")
    if server is None:
        raise EngineError("redis-server: not found; install it (Debian: redis-server) or name it by --redis-server")
    settings = {"appendonly": "yes", "appendfsync": "always", "save": "", "bind": "127.0.0.1", "dir": str(folder)}
    flags = itertools.chain.from_iterable((f"--{name}", value) for name, value in settings.items())
    return [server, "--port", str(port), *flags]


def _parse() -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--redis-server", help="the program; found on the PATH unless given")
    parser.add_argument("--serve", action="store_true", help="run the HTTP layer itself; started by the benchmark")
    parser.add_argument("--log", default="", help=argparse.SUPPRESS)
    parser.add_argument("--redis-port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
