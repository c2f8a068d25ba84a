"""Open what a recipe's `[engine]` names.

In:  a recipe and a home.  Out: the registry; the event log, perhaps with user state beside it.
Knows nothing of what is kept there.
"""

import os
from pathlib import Path

from cluster.config import EngineConfig, Recipe
from cluster.errors import ConfigError
from cluster.home import Home
from cluster.log import EventLog
from cluster.log.retention import LogConfig
from cluster.registry import Registry

REDIS_PASSWORD = "RECLOOP_REDIS_PASSWORD"


def open_registry(recipe: Recipe, home: Home) -> Registry:
    """Return the registry that the recipe names, or the home folder's."""
    return Registry(recipe.section(EngineConfig).registry_uri or home.registry)


def open_log(engine: EngineConfig, config: LogConfig, path: Path) -> EventLog:
    """Open this node's log at `path`: the events themselves, or its fold of the topic that the engine names.

    Raises `ConfigError` without Kafka's client, `EngineError` where the log cannot be used.
    """
    if engine.log == "sqlite":
        return EventLog(path, config)
    try:
        from cluster.log.kafka import KafkaLog
    except ImportError as error:
        raise ConfigError('engine.log="kafka": the client is not installed; pip install confluent-kafka') from error
    return KafkaLog(path, servers=engine.kafka_servers, topic=engine.kafka_topic, config=config)


def open_served_log(engine: EngineConfig, config: LogConfig, path: Path) -> EventLog:
    """Open this node's log to answer requests with user state from where the engine names it.

    Raises `ConfigError` without a client, `EngineError` where the log or Redis cannot be used.
    """
    if engine.state == "sqlite":
        return open_log(engine, config, path)
    try:
        from cluster.log.redis import RedisStore
    except ImportError as error:
        raise ConfigError('engine.state="redis": the client is not installed; pip install redis') from error
    password = os.environ.get(REDIS_PASSWORD)
    log = open_log(engine, config, path)
    try:
        log.share_state(lambda name: RedisStore(engine.redis_url, name, password=password, keep=config.keep_history))
    except BaseException:
        log.close()
        raise
    return log
