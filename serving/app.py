"""The Ray Serve application: one ingress deployment that answers everything, and the encoder beside it.

In:  a recipe, a home with a published version, an address.  Out: a running app and its URL.
Knows nothing of routes (gateway.py) or of how an answer is made (recommender.py).

Weights are never passed through Serve: replicas pull them (refresh.py), because a reconfigured replica leaves rotation
(ray-project/ray#54509).
"""

import asyncio
import contextlib
import dataclasses
import os
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.handle import DeploymentHandle

from cluster.config import Recipe, load_recipe
from cluster.dataset import Dataset
from cluster.engine import open_registry
from cluster.errors import EngineError
from cluster.haproxy import STATS_PORT, count_replicas
from cluster.heap import settle_heap
from cluster.home import Home, find_home
from cluster.ray_session import serve_http
from cluster.registry import Registry
from serving.config import ServeConfig
from serving.encoder import Encoder, RemoteEncoder
from serving.past import seed_history
from serving.problems import RETRY_AFTER_S
from serving.replica import Replica, ReplicaSettings, resolve_settings

if TYPE_CHECKING:
    from ray.serve import Application

APP_NAME = "recloop"
READY_PATIENCE_S = 60.0
READY_POLL_S = 0.05
METRICS_INTERVAL_S = 2.0
"""How often copies tell how many requests they have under way, at most."""
LOOK_BACK_S = 10.0
"""Over how long these are averaged, at most."""
ENCODER_TARGET = 32.0
"""Requests that a copy of the encoder should have under way: it reads those that wait together."""


@serve.deployment(name="Ingress", max_constructor_retry_count=1)
@serve.ingress()
class Ingress:
    """One replica behind HAProxy."""

    async def __init__(self, settings: ReplicaSettings, encoder: DeploymentHandle) -> None:
        loop = asyncio.get_running_loop()
        remote = RemoteEncoder(encoder, loop, settings.serve.encoder_timeout_s)
        # Off the loop, which the encoder's answers arrive on. A replica is in rotation only once this has returned.
        await loop.run_in_executor(None, self._load, settings, remote, serve.get_replica_context().rank.rank)

    def _load(self, settings: ReplicaSettings, encoder: RemoteEncoder, rank: int) -> None:
        """Have this node's log hold what users did before it, and all that has been logged, then the version."""
        seed_history(Registry(settings.registry_uri), settings.log_path)
        self._replica = Replica(settings, encoder, rank=rank)
        self._replica.load()

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
    seed_history(open_registry(recipe, home), home.log, dataset)
    serve_http(host, port, shared=shared)
    try:
        _deploy(build_application(settings))
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        _wait_until_ready(url, shared=shared)
        yield url
    finally:
        serve.delete(APP_NAME)


def build_app(args: Mapping[str, str]) -> "Application":
    """Return what a cluster runs by import string, such as a KubeRay RayService or `serve run`.

    `recipe` is a packaged one's name or a file, `home` a folder that each node has for itself, `keys` the file of API
    keys where it lies elsewhere; without `keys`, `without_keys="true"` says that everybody is to be answered.

    Raises `ConfigError`, `NoVersionError` or `CorruptVersionError`.
    """
    recipe, home = load_recipe(args["recipe"]), find_home(args.get("home")).ensure()
    settings = resolve_settings(recipe, home, keys_required=args.get("without_keys") != "true")
    return build_application(dataclasses.replace(settings, keys=Path(args.get("keys", settings.keys))))


def build_application(settings: ReplicaSettings) -> "Application":
    """Return what Serve runs: the ingress with the encoder beside it, each in as many copies as the settings say."""
    config = settings.serve
    ingress = Ingress.options(
        **_copies(config, config.replicas, config.max_replicas, config.target_ongoing_requests),
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        logging_config={"enable_access_log": False},
    )
    encoder = Encoder.options(**_copies(config, config.encoder_replicas, config.encoder_max_replicas, ENCODER_TARGET))
    return ingress.bind(settings, encoder.bind(settings.cache, config, settings.registry_uri))


def _copies(
    config: ServeConfig, fewest: int, most: int | None, target: float
) -> dict[str, Any]:  # Any: Serve's options
    if most is None or most == fewest:
        return {"num_replicas": fewest}
    scaling = AutoscalingConfig(
        min_replicas=fewest,
        initial_replicas=fewest,
        max_replicas=most,
        target_ongoing_requests=target,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
        metrics_interval_s=min(METRICS_INTERVAL_S, config.upscale_delay_s),
        look_back_period_s=min(LOOK_BACK_S, 2 * config.upscale_delay_s),
    )
    return {"num_replicas": None, "autoscaling_config": scaling}


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
