"""The Ray Serve application: one ingress deployment that answers everything, and the encoder beside it.

In:  a recipe, a home with a published version, an address.  Out: a running app and its URL.
Knows nothing of routes (gateway.py) or of how an answer is made (recommender.py).

Weights are never passed through Serve: replicas pull them (refresh.py), because a reconfigured replica leaves rotation
(ray-project/ray#54509).
"""

import asyncio
import contextlib
import os
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from cluster.config import Recipe
from cluster.dataset import Dataset
from cluster.engine import open_registry
from cluster.errors import EngineError
from cluster.haproxy import STATS_PORT, count_replicas
from cluster.heap import settle_heap
from cluster.home import Home
from cluster.ray_session import serve_http
from serving.encoder import Encoder, RemoteEncoder
from serving.past import seed_history
from serving.problems import RETRY_AFTER_S
from serving.replica import Replica, ReplicaSettings, resolve_settings

if TYPE_CHECKING:
    from ray.serve import Application

APP_NAME = "recloop"
READY_PATIENCE_S = 60.0
READY_POLL_S = 0.05


@serve.deployment(name="Ingress", max_constructor_retry_count=1)
@serve.ingress()
class Ingress:
    """One replica behind HAProxy."""

    async def __init__(self, settings: ReplicaSettings, encoder: DeploymentHandle) -> None:
        loop = asyncio.get_running_loop()
        remote = RemoteEncoder(encoder, loop, settings.serve.encoder_timeout_s)
        self._replica = Replica(settings, remote, rank=serve.get_replica_context().rank.rank)
        # Off the loop, which the encoder's answers arrive on. A replica is in rotation only once this has returned.
        await loop.run_in_executor(None, self._replica.load)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the ASGI app; Serve asks for it once the constructor has returned."""
        api = self._replica.build_api()
        settle_heap()
        return api

    def __del__(self) -> None:
        """Finish what is queued for the log; Serve calls this when the replica ends."""
        if hasattr(self, "_replica"):  # a constructor that failed has less to stop
            self._replica.close()


@contextlib.contextmanager
def running_app(
    recipe: Recipe,
    home: Home,
    host: str,
    port: int,
    dataset: Dataset | None = None,
    *,
    shared: bool = False,
    keys_required: bool = False,
) -> Iterator[str]:
    """Serve the promoted version while the block lasts; yield the base URL. Call it inside a Ray session.

    With the dataset it was trained on, users' histories also hold the events that training did not see. A `shared` port
    is also listened on by the standby, which stands back once HAProxy has replicas. Keys are required where there are
    some now, or where `keys_required` says that there were.

    Raises `NoVersionError`, `CorruptVersionError`, `PortTakenError`, or `EngineError` where replicas do not start.
    """
    settings = resolve_settings(recipe, home, keys_required=keys_required)
    home.ensure()
    seed_history(open_registry(recipe, home), home, dataset)
    serve_http(host, port, shared=shared)
    try:
        _deploy(_build_app(settings))
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        _wait_until_ready(url, shared=shared)
        yield url
    finally:
        serve.delete(APP_NAME)


def _build_app(settings: ReplicaSettings) -> "Application":
    config = settings.serve
    ingress = Ingress.options(
        num_replicas=config.replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        logging_config={"enable_access_log": False},
    )
    return ingress.bind(settings, Encoder.bind(settings.cache, config, settings.registry_uri))


def _deploy(app: "Application") -> None:
    try:
        serve.run(app, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:  # what Serve raises when a constructor did, with the whole traceback in its text
        reason = serve.status().applications[APP_NAME].message.strip().splitlines()[-1]
        raise EngineError(f"the app did not start: {reason}") from error


def _wait_until_ready(url: str, *, shared: bool) -> None:
    """Return once the ingress routes to a replica that is ready; it hears of replicas a moment after Serve does."""
    deadline_s = time.monotonic() + READY_PATIENCE_S
    while True:
        try:
            if shared:  # at the URL, the standby would answer
                ready = count_replicas(int(os.environ[STATS_PORT])) > 0
            else:
                with urllib.request.urlopen(f"{url}/readyz", timeout=READY_PATIENCE_S):
                    ready = True
            reason = "no replica is well"
        except OSError as error:  # includes urllib's: refused, 404 or 503 until then
            ready, reason = False, str(error)
        if ready:
            return
        if time.monotonic() > deadline_s:
            raise EngineError(f"{url}: not ready within {READY_PATIENCE_S:.0f} s ({reason})")
        time.sleep(READY_POLL_S)
