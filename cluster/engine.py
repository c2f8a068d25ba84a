"""Open what a recipe's `[engine]` names.

In:  a recipe and a home.  Out: the registry; the event log.
Knows nothing of what is kept there.
"""

from pathlib import Path

from cluster.config import EngineConfig, Recipe
from cluster.errors import ConfigError
from cluster.home import Home
from cluster.log import EventLog
from cluster.log.retention import LogConfig
from cluster.registry import Registry


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
