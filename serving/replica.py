"""What answers requests in one process, wired: log, versions, recommender, HTTP surface.

In:  settings that travel to wherever the process starts, and an encoder.  Out: an ASGI app.
Knows nothing of Ray: an ingress replica (app.py) and the standby (standby.py) are both one of these.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from fastapi import FastAPI

from cluster.config import EngineConfig, Recipe
from cluster.engine import open_registry, open_served_log
from cluster.home import Home
from cluster.keys import KeyFile, KeyRing
from cluster.log.retention import LogConfig
from cluster.registry import Registry
from embeddings.text_encoder import EncoderConfig
from serving.batching import Embedder
from serving.catalogue import LiveCatalogue
from serving.config import ServeConfig
from serving.experiments import ARMS
from serving.gateway import Gateway
from serving.metrics import Metrics
from serving.past import trained_version
from serving.preflight import check_version
from serving.recommender import Recommender
from serving.refresh import Refresher
from training.policies import PolicyConfig

CATCH_UP_S = 600.0
"""How long a node that is new may take to read what was logged before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSettings:
    """What a replica is built from."""

    registry_uri: str
    log_path: Path
    engine: EngineConfig
    log: LogConfig
    serve: ServeConfig
    policy: PolicyConfig
    encoder: EncoderConfig
    """The one that made the version's item vectors, whatever the recipe at hand says."""
    cache: Path
    keys: Path
    keys_required: bool
    """Whether nobody is answered without a key even where the file of keys is not: gone, or on another node."""


def resolve_settings(recipe: Recipe, home: Home, *, keys_required: bool = False) -> ReplicaSettings:
    """Return what replicas of the promoted version are built from, with the pinned version as a number.

    Unless stated, that is the trained version that the promoted one grew from: a folded one has learned live events.
    None is pinned where no arm needs it. Keys that there are now are required from now on, whatever becomes of them.

    Raises `ConfigError` for a damaged file of keys; `NoVersionError`, `CorruptVersionError` or `RegistryError`.
    """
    registry, config = open_registry(recipe, home), recipe.section(ServeConfig)
    promoted = registry.current()
    pinned = None
    if any(not ARMS[name].follows_promotions for name in config.arms):
        pinned = config.pinned_version or trained_version(registry, promoted)
    check_version(registry, pinned)
    trained_with = Recipe.from_resolved(registry.open_version(promoted.version).text("recipe.toml"))
    return ReplicaSettings(
        registry_uri=registry.uri,
        log_path=home.log,
        engine=recipe.section(EngineConfig),
        log=recipe.section(LogConfig),
        serve=dataclasses.replace(config, pinned_version=pinned),
        policy=recipe.section(PolicyConfig),
        encoder=trained_with.section(EncoderConfig),
        cache=home.cache,
        keys=home.keys,
        keys_required=keys_required or bool(KeyFile(home.keys).read()),
    )


class Replica:
    """One process's parts."""

    def __init__(self, settings: ReplicaSettings, encoder: Embedder, *, rank: int) -> None:
        """Open the log; what differs between replicas follows from their rank."""
        config = settings.serve
        torch.set_num_threads(config.torch_threads)
        registry, metrics = Registry(settings.registry_uri), Metrics()
        self._pinned_version = config.pinned_version
        self._log = open_served_log(settings.engine, settings.log, settings.log_path)
        catalogue = LiveCatalogue(self._log, encoder.encode)
        interval_s = config.poll_interval_ms / 1e3
        self.refresher = Refresher(registry, self._log, catalogue, metrics, poll_interval_s=interval_s)
        self.recommender = Recommender(
            self._log,
            lambda: self.refresher.residents,
            settings.policy,
            seed=config.seed + rank,
            candidates=config.candidates,
            kept_users=config.kept_users,
            metrics=metrics,
        )
        self._gateway = Gateway(
            config,
            registry=registry,
            log=self._log,
            refresher=self.refresher,
            recommender=self.recommender,
            encoder=encoder,
            encoder_config=settings.encoder,
            keys=KeyRing(KeyFile(settings.keys), required=settings.keys_required),
            metrics=metrics,
        )

    def load(self) -> None:
        """Load the promoted version and follow from now on; blocks. Raises `RegistryError`, `EngineError`."""
        self._log.catch_up(CATCH_UP_S)
        self.refresher.load(self._pinned_version)
        self.refresher.start()

    def build_api(self) -> FastAPI:
        """Return the ASGI app."""
        return self._gateway.build_api()

    def close(self) -> None:
        """Finish what is queued for the log."""
        self.refresher.stop()
        self._log.close()
