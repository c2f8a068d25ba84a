"""Recipes: TOML in, checked dataclasses out, the resolved TOML back.

In:  a packaged recipe's name or a TOML path, and overrides such as `train.epochs=3`.
Out: one frozen dataclass a section, built by the section's owner, and the text that rebuilds it.
Knows nothing of what a section means: owners are named by import string and imported when their section is asked for.
"""

import difflib
import importlib
import importlib.resources
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar, cast
from urllib.parse import urlsplit

from cluster.errors import ConfigError

SECTIONS: Mapping[str, str] = types.MappingProxyType(
    {
        "engine": "cluster.config:EngineConfig",
        "log": "cluster.log.retention:LogConfig",
        "system": "training.baselines.config:SystemConfig",
        "data": "training.stream:DataConfig",
        "encoder": "embeddings.text_encoder:EncoderConfig",
        "finetune": "training.encoder.config:FinetuneConfig",
        "student": "training.encoder.config:StudentConfig",
        "tables": "embeddings.tables:TablesConfig",
        "model": "training.models.two_stage:ModelConfig",
        "ids": "embeddings.ids.config:IdsConfig",
        "index": "embeddings.index:IndexConfig",
        "train": "training.run:TrainConfig",
        "tracking": "training.tracking:TrackingConfig",
        "ease": "training.baselines.config:EaseConfig",
        "item_neighbours": "training.baselines.config:ItemNeighboursConfig",
        "user_neighbours": "training.baselines.config:UserNeighboursConfig",
        "text_neighbours": "training.baselines.config:TextNeighboursConfig",
        "als": "training.baselines.config:AlsConfig",
        "bpr": "training.baselines.config:BprConfig",
        "baskets": "training.baskets.ranker:BasketConfig",
        "hybrid": "training.baselines.config:HybridConfig",
        "stream": "training.examples.stream:StreamConfig",
        "click": "training.models.click:ClickConfig",
        "ratings": "training.models.rating:RatingConfig",
        "policy": "training.policies:PolicyConfig",
        "online": "training.online.learner:OnlineConfig",
        "adapter": "training.online.adapter:AdapterConfig",
        "guard": "training.online.guard:GuardConfig",
        "canary": "training.online.canary:CanaryConfig",
        "drift": "training.online.drift:DriftConfig",
        "join": "training.online.join:JoinConfig",
        "impressions": "training.online.impressions:ImpressionsConfig",
        "surprise": "training.online.surprise:SurpriseConfig",
        "intake": "training.online.intake:IntakeConfig",
        "serve": "serving.config:ServeConfig",
    }
)
"""Section name to the dataclass that owns it, as an import string."""

Section = TypeVar("Section")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the loop runs on."""

    ray_address: str = "local"
    """`local` starts a private Ray that ends with the command; anything else is a cluster's address."""
    logical_cpus: int | None = None
    """CPUs a private Ray hands out; none takes the machine's, four at least."""
    registry_uri: str | None = None
    """Folder or object-store URI of the registry; none is `registry/` under the home folder."""
    log: Literal["sqlite", "kafka"] = "sqlite"
    """Where events are durable: in the home folder's file, or in a topic that every node folds into its own file."""
    kafka_servers: str = "127.0.0.1:9092"
    """Brokers, as host:port separated by commas."""
    kafka_topic: str = "recloop-events"
    """A topic of one partition; made where it is missing."""
    state: Literal["sqlite", "redis"] = "sqlite"
    """Where requests find what users did: in this node's file, or in a Redis that nodes share."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """Saved with every version, so without a password: that is read from RECLOOP_REDIS_PASSWORD."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("ray_address", "kafka_servers", "kafka_topic", "redis_url"):
            if not getattr(self, name):
                raise ConfigError(f'engine.{name}="": must not be empty; leave it out for the default')
        if self.logical_cpus is not None and self.logical_cpus < 1:
            raise ConfigError(f"engine.logical_cpus={self.logical_cpus}: must be at least 1")
        if urlsplit(self.redis_url).password is not None:
            raise ConfigError("engine.redis_url: is saved with every version; set RECLOOP_REDIS_PASSWORD instead")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One checked recipe; sections that it does not mention have their owners' defaults."""

    name: str
    values: Mapping[str, Mapping[str, object]]
    """What the recipe and the overrides state, section by section."""
    sections: Mapping[str, str] = field(default_factory=lambda: SECTIONS)

    @classmethod
    def from_toml(cls, text: str, *, name: str = "recipe", sections: Mapping[str, str] = SECTIONS) -> "Recipe":
        """Read a recipe's text. Raises `ConfigError` naming the first key that is unknown or wrong."""
        try:
            raw = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{name}: not TOML: {error}") from error
        return _check_recipe(name, raw, sections)

    @classmethod
    def from_resolved(cls, text: str, *, name: str = "recipe", sections: Mapping[str, str] = SECTIONS) -> "Recipe":
        """Read what `to_toml` wrote: a section is checked, and its owner imported, only when it is asked for."""
        return cls(name, tomllib.loads(text), sections)

    def section(self, section_type: type[Section]) -> Section:
        """Return the section that `section_type` owns."""
        owner = f"{section_type.__module__}:{section_type.__qualname__}"
        for section, target in self.sections.items():
            if target == owner:
                return cast(Section, self.named_section(section))
        raise ConfigError(f"{owner} owns no section; owners are {', '.join(self.sections.values())}")

    def named_section(self, section: str) -> object:
        """Return a section by its name."""
        return _check_section(section, self.values.get(section, {}), self.sections)[1]

    def with_overrides(self, overrides: Sequence[str]) -> "Recipe":
        """Return the recipe with `section.key=value` overrides, applied in order. Raises `ConfigError`."""
        values = {section: dict(entries) for section, entries in self.values.items()}
        for override in overrides:
            section, key, text = _split_override(override)
            known = _fields_of(_find_owner(section, self.sections))
            _check_known(f"{section}.{key}", key, known, prefix=f"{section}.")
            kind = _kind_of(_find_owner(section, self.sections), key)
            values.setdefault(section, {})[key] = _parse_override(f"{section}.{key}", text, kind)
        return _check_recipe(self.name, values, self.sections)

    def to_toml(self) -> str:
        """Return the resolved recipe, defaults written out: reading it back gives equal sections."""
        blocks = []
        for section in self.sections:
            config = self.named_section(section)
            entries = ((f.name, getattr(config, f.name)) for f in _fields_of(type(config)).values())
            lines = [f"{key} = {_toml_value(value)}" for key, value in entries if value is not None]
            blocks.append("\n".join([f"[{section}]", *lines]))
        return "\n\n".join(blocks) + "\n"


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, sections: Mapping[str, str] = SECTIONS) -> Recipe:
    """Read a packaged recipe by name, or a TOML file by path, then apply `section.key=value` overrides in order.

    Raises `ConfigError` naming key, value and the nearest known key. Only the owners of sections that are mentioned
    are imported; an owner that fails to import raises its own error.
    """
    recipe = Recipe.from_toml(_read_recipe(name_or_path), name=name_or_path, sections=sections)
    return recipe.with_overrides(overrides)


def packaged_recipes() -> list[str]:
    """Return the names that `load_recipe` knows without a path."""
    folder = importlib.resources.files("cluster") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _read_recipe(name_or_path: str) -> str:
    if name_or_path in packaged_recipes():
        return (importlib.resources.files("cluster") / "recipes" / f"{name_or_path}.toml").read_text("utf-8")
    try:
        return Path(name_or_path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(packaged_recipes())
        raise ConfigError(f"--recipe {name_or_path}: cannot be read ({error}); packaged recipes: {known}") from error


def _split_override(override: str) -> tuple[str, str, str]:
    path, equals, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {override}: must be section.key=value; try --set train.epochs=3")
    return section, key, text.strip()


def _check_recipe(name: str, raw: Mapping[str, object], sections: Mapping[str, str]) -> Recipe:
    values: dict[str, Mapping[str, object]] = {}
    for section, entries in raw.items():
        if not isinstance(entries, Mapping):
            _find_owner(section, sections)
            raise ConfigError(f"{section}={entries!r}: must be a section; write [{section}] and its keys below")
        values[section], _ = _check_section(section, entries, sections)
    return Recipe(name, values, sections)


def _check_section(
    section: str, entries: Mapping[str, object], sections: Mapping[str, str]
) -> tuple[Mapping[str, object], object]:
    """Return a section's values, types checked, and the owner made of them, which makes checks of its own."""
    owner = _find_owner(section, sections)
    known = _fields_of(owner)
    for key in entries:
        _check_known(f"{section}.{key}", key, known, prefix=f"{section}.")
    values = {key: _check_value(f"{section}.{key}", value, _kind_of(owner, key)) for key, value in entries.items()}
    return values, owner(**values)


def _find_owner(section: str, sections: Mapping[str, str]) -> type:
    _check_known(f"[{section}]", section, sections)
    return _import_owner(sections[section])


def _check_known(shown: str, key: str, known: Mapping[str, object], prefix: str = "") -> None:
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {prefix}{nearest[0]}? " if nearest else ""
        raise ConfigError(f"{shown}: unknown; {hint}known: {', '.join(known)}")


@cache
def _import_owner(target: str) -> type:
    module, _, class_name = target.partition(":")
    return getattr(importlib.import_module(module), class_name)


def _fields_of(owner: type) -> dict[str, "Field[object]"]:
    return {f.name: f for f in fields(owner) if f.init}


@cache
def _kind_of(owner: type, key: str) -> object:
    """Return the declared type of a field; an optional one must default to none, which TOML writes by leaving out."""
    kind = typing.get_type_hints(owner)[key]
    default = _fields_of(owner)[key].default
    if type(None) in _alternatives(kind) and default not in (None, MISSING):
        raise TypeError(f"{owner.__qualname__}.{key} is optional, so its default must be None, not {default!r}")
    return kind


def _alternatives(kind: object) -> tuple[object, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _check_value(shown: str, value: object, kind: object) -> object:
    """Return `value` as the declared type; only int to float and list to tuple are converted."""
    for alternative in _alternatives(kind):
        if typing.get_origin(alternative) is tuple and isinstance(value, list | tuple):
            entry_kind = typing.get_args(alternative)[0]
            return tuple(_check_value(f"{shown}[{i}]", entry, entry_kind) for i, entry in enumerate(value))
        if typing.get_origin(alternative) is typing.Literal and value in typing.get_args(alternative):
            return value
        if isinstance(alternative, type) and type(value) is alternative:
            return value
        if alternative is float and type(value) is int:
            return float(value)
    raise ConfigError(f"{shown}={value!r}: must be {_describe(kind)}, not {type(value).__name__}")


def _describe(kind: object) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "left out"}

    def describe_one(alternative: object) -> str:
        origin, arguments = typing.get_origin(alternative), typing.get_args(alternative)
        if origin is tuple:
            return f"a list whose entries are each {_describe(arguments[0])}"
        if origin is typing.Literal:
            return " or ".join(json.dumps(choice) for choice in arguments)
        return names.get(cast(type, alternative), str(alternative))

    return " or ".join(describe_one(alternative) for alternative in _alternatives(kind))


def _parse_override(shown: str, text: str, kind: object) -> object:
    """Read the text of an override as TOML; a field that takes text also takes it without quotes."""
    alternatives = _alternatives(kind)
    if text == "none" and type(None) in alternatives:
        return None
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    takes_text = any(a is str or typing.get_origin(a) is typing.Literal for a in alternatives)
    if takes_text and not isinstance(value, str) and all(type(value) is not a for a in alternatives):
        value = text
    return _check_value(shown, value, kind)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(entry) for entry in value) + "]"
    return repr(value)
