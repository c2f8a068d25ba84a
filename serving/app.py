"""The Ray Serve application: one ingress deployment that answers everything, and the encoder beside it.

In:  a recipe, a home with a published version, an address.  Out: a running app and its URL.
Knows nothing of routes (gateway.py) or of how an answer is made (recommender.py).

Weights are never passed through Serve: replicas pull them (refresh.py), because a reconfigured replica leaves rotation
(ray-project/ray#54509).
"""

import asyncio
import contextlib
import dataclasses
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from cluster.config import EngineConfig, Recipe
from cluster.dataset import Dataset
from cluster.engine import open_log, open_registry
from cluster.errors import EngineError
from cluster.home import Home
from cluster.log.retention import LogConfig
from cluster.ray_session import serve_http
from cluster.registry import Registry
from embeddings.text_encoder import EncoderConfig
from serving.catalogue import LiveCatalogue
from serving.config import ServeConfig
from serving.encoder import Encoder, RemoteEncoder
from serving.experiments import ARMS
from serving.gateway import Gateway
from serving.metrics import Metrics
from serving.past import seed_history, trained_version
from serving.preflight import check_version
from serving.problems import RETRY_AFTER_S
from serving.recommender import Recommender
from serving.refresh import Refresher
from training.policies import PolicyConfig

if TYPE_CHECKING:
    from ray.serve import Application

APP_NAME = "recloop"
READY_PATIENCE_S = 60.0
READY_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSettings:
    """What a replica is built from; it travels to wherever the replica starts."""

    registry_uri: str
    log_path: Path
    engine: EngineConfig
    log: LogConfig
    serve: ServeConfig
    policy: PolicyConfig


@serve.deployment(name="Ingress", max_constructor_retry_count=1)
@serve.ingress()
class Ingress:
    """One replica: its parts, wired."""

    async def __init__(self, settings: IngressSettings, encoder: DeploymentHandle) -> None:
        config = settings.serve
        torch.set_num_threads(config.torch_threads)
        loop = asyncio.get_running_loop()
        registry, metrics = Registry(settings.registry_uri), Metrics()
        self._log = open_log(settings.engine, settings.log, settings.log_path)
        encode = RemoteEncoder(encoder, loop, config.encoder_timeout_s).encode
        catalogue = LiveCatalogue(self._log, encode)
        interval_s = config.poll_interval_ms / 1e3
        self._refresher = Refresher(registry, self._log, catalogue, metrics, poll_interval_s=interval_s)
        # Off the loop, which the encoder's answers arrive on. A replica is in rotation only once this has returned.
        await loop.run_in_executor(None, self._refresher.load, config.pinned_version)
        self._refresher.start()
        recommender = Recommender(
            self._log,
            lambda: self._refresher.residents,
            settings.policy,
            seed=config.seed + serve.get_replica_context().rank.rank,
            candidates=config.candidates,
        )
        self._gateway = Gateway(
            config,
            registry=registry,
            log=self._log,
            refresher=self._refresher,
            recommender=recommender,
            encode=encode,
            metrics=metrics,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the ASGI app; Serve asks for it once the constructor has returned."""
        return self._gateway.build_api()

    def __del__(self) -> None:
        """Finish what is queued for the log; Serve calls this when the replica ends."""
        if hasattr(self, "_refresher"):  # a constructor that failed has less to stop
            self._refresher.stop()
            self._log.close()


@contextlib.contextmanager
def running_app(recipe: Recipe, home: Home, host: str, port: int, dataset: Dataset | None = None) -> Iterator[str]:
    """Serve the promoted version while the block lasts; yield the base URL. Call it inside a Ray session.

    With the dataset it was trained on, users' histories also hold the events that training did not see.

    Raises `NoVersionError`, `CorruptVersionError`, `PortTakenError`, or `EngineError` where replicas do not start.
    """
    registry = open_registry(recipe, home)
    config = _resolve(recipe.section(ServeConfig), registry)
    home.ensure()
    seed_history(registry, home, dataset)
    serve_http(host, port)
    try:
        _deploy(_build_app(recipe, home, registry, config))
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        _wait_until_ready(url)
        yield url
    finally:
        serve.delete(APP_NAME)


def _resolve(config: ServeConfig, registry: Registry) -> ServeConfig:
    """Return the settings with the pinned version as a number, or without one where no arm needs it.

    Unless stated, it is the trained version that the promoted one grew from: a folded one has learned live events.
    """
    if any(not ARMS[name].follows_promotions for name in config.arms):
        pinned = config.pinned_version or trained_version(registry, registry.current())
    else:
        pinned = None
    check_version(registry, pinned)
    return dataclasses.replace(config, pinned_version=pinned)


def _build_app(recipe: Recipe, home: Home, registry: Registry, config: ServeConfig) -> "Application":
    trained_with = Recipe.from_toml(registry.open_version(registry.current().version).text("recipe.toml"))
    settings = IngressSettings(
        registry_uri=registry.uri,
        log_path=home.log,
        engine=recipe.section(EngineConfig),
        log=recipe.section(LogConfig),
        serve=config,
        policy=recipe.section(PolicyConfig),
    )
    ingress = Ingress.options(
        num_replicas=config.replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        logging_config={"enable_access_log": False},
    )
    # The encoder is the one that made the version's item vectors, whatever the recipe at hand says.
    return ingress.bind(settings, Encoder.bind(trained_with.section(EncoderConfig), home.cache))


def _deploy(app: "Application") -> None:
    try:
        serve.run(app, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:  # what Serve raises when a constructor did, with the whole traceback in its text
        reason = serve.status().applications[APP_NAME].message.strip().splitlines()[-1]
        raise EngineError(f"the app did not start: {reason}") from error


def _wait_until_ready(url: str) -> None:
    """Return once the ingress routes to a replica that is ready; it hears of replicas a moment after Serve does."""
    deadline_s = time.monotonic() + READY_PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=READY_PATIENCE_S):
                return
        except OSError as error:  # includes urllib's: refused, 404 or 503 until then
            if time.monotonic() > deadline_s:
                raise EngineError(f"{url}: not ready within {READY_PATIENCE_S:.0f} s ({error})") from error
        time.sleep(READY_POLL_S)
