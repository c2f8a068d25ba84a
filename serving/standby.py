"""One more replica, outside Ray: it answers while Ray starts, when Ray is gone, and where Ray has no replica left.

In:  what replicas are built from, the address that HAProxy will have, HAProxy's two other ports.  Out: answers.
Knows nothing of how Ray is started (command.py). The same code on the same log and registry as a replica of Ray.

    clients ──▶ host:port ──▶ HAProxy ──▶ replicas
                    │            └─ none is well ──▶ fallback port ─▶ standby
                    └─ HAProxy has not come up, or is gone ─────────▶ standby

The address is shared: the standby listens first and so gets every connection until it stands back, which it does one
connection after the other: those it has are answered and closed.
"""

import asyncio
import dataclasses
import socket
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.haproxy import count_replicas
from cluster.registry import Registry
from serving import shared_port
from serving.encoders import LocalEncoder, VersionEncoders
from serving.replica import Replica, ReplicaSettings

FALLBACK_HOST = "127.0.0.1"
HEALTH_PATH = "/-/healthz"
"""What HAProxy asks its servers, a fallback too."""
IDLE_POLL_S = 1.0
"""How often a standby that stands back looks for new weights."""
LOOKS_TO_TRUST = 3
"""How many looks in a row must find HAProxy with replicas before the standby stands back."""
HANDOVER_S = 0.05
"""For connections that were made but not yet accepted when the other listener was chosen."""
LEAVING_S = 2.0
"""How long clients may use connections that they have, each of which is closed with its next answer."""
KEEP_ALIVE_S = 60
JOIN_PATIENCE_S = 10.0


class Standby:
    """The replica with its ports, while the block lasts."""

    def __init__(self, settings: ReplicaSettings, host: str, port: int, *, fallback_port: int, stats_port: int) -> None:
        registry = Registry(settings.registry_uri)
        # Loaded when first asked: the standby's own model costs memory that Ray's replicas do without as a rule.
        serve = dataclasses.replace(settings.serve, warm_encoder=False)
        self._encoders = VersionEncoders(settings.cache, serve, registry)
        encoder = LocalEncoder(self._encoders, settings.serve.encoder_timeout_s)
        self._address = (host, port)
        self._fallback_port = fallback_port
        self._stats_port = stats_port
        self._busy_poll_s = settings.serve.poll_interval_ms / 1e3
        self._replica = Replica(settings, encoder, rank=settings.serve.most_replicas)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="standby", daemon=True)
        self._public: _Endpoint | None = None
        self._found_well = 0

    def __enter__(self) -> Self:
        self._replica.load()
        self._api = self._replica.build_api()
        self._thread.start()
        self._fallback = self._open(FALLBACK_HOST, self._fallback_port)
        self._take_over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for endpoint in (self._public, self._fallback):
            if endpoint is not None:
                self._run(endpoint.close(at_once=True))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(JOIN_PATIENCE_S)
        self._replica.close()
        self._encoders.stop()

    def look(self) -> bool:
        """Take over or stand back, as HAProxy is; return whether HAProxy has been well for some looks."""
        self._found_well = self._found_well + 1 if self._ray_answers() else 0
        if self._found_well == 0 and self._public is None:
            self._take_over()
        elif self._found_well >= LOOKS_TO_TRUST and self._public is not None:
            leaving, self._public = self._public, None
            self._replica.refresher.poll_interval_s = IDLE_POLL_S
            asyncio.run_coroutine_threadsafe(leaving.close(), self._loop)
        return self._found_well >= LOOKS_TO_TRUST

    def _ray_answers(self) -> bool:
        """Whether HAProxy is there with a replica; without one it asks the fallback, which needs no second listener."""
        try:
            replicas = count_replicas(self._stats_port)
        except OSError:
            return False
        return replicas > 0 or self._public is None

    def _take_over(self) -> None:
        self._replica.refresher.poll_interval_s = self._busy_poll_s
        self._public = self._open(*self._address)

    def _open(self, host: str, port: int) -> "_Endpoint":
        endpoint = _Endpoint(self._api, shared_port.listen(host, port))
        self._run(endpoint.open())
        return endpoint

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _Endpoint:
    """The app on one listening socket, until closed."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self._app = app
        self._listener = listener
        self._leaving = False
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._server = uvicorn.Server(config)

    async def open(self) -> None:
        """Answer from now on."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started:
            await asyncio.sleep(0)

    async def close(self, *, at_once: bool = False) -> None:
        """Leave new connections to the other listener, and end once the present ones have had time to turn away."""
        if not at_once:
            shared_port.choose(self._listener, 1)
            await asyncio.sleep(HANDOVER_S)
            for server in self._server.servers:
                server.close()
            self._leaving = True
            await asyncio.sleep(LEAVING_S)
        self._server.should_exit = True
        await self._task

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == HEALTH_PATH:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"success"})
            return

        async def send_and_leave(message: Message) -> None:
            if self._leaving and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, send_and_leave)
