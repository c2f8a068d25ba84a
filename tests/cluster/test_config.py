import tomllib
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from cluster.config import EngineConfig, Recipe, load_recipe
from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerConfig:
    layers: tuple[int, ...] = (64, 32)
    rate: float = 0.5
    epochs: int = 3
    resume: bool = False
    kind: Literal["mlp", "dcn"] = "mlp"
    note: str = ""
    dim: int | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"tower.epochs={self.epochs}: must be at least 1")


SECTIONS = types.MappingProxyType(
    {
        "engine": "cluster.config:EngineConfig",
        "tower": f"{__name__}:TowerConfig",
        "absent": "no_such_module:Config",
    }
)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this file's section be found by import string, as an owner's is."""
    module = types.ModuleType(__name__)
    module.TowerConfig = TowerConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, __name__, module)


def load_tower(*overrides: str) -> TowerConfig:
    return Recipe.from_toml("", sections=SECTIONS).with_overrides(overrides).section(TowerConfig)


def test_a_section_that_is_not_mentioned_has_its_owners_defaults() -> None:
    assert load_tower() == TowerConfig()


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("tower.epochs=7", "epochs", 7),
        ("tower.rate=1", "rate", 1.0),
        ("tower.rate = 1e-3", "rate", 0.001),
        ("tower.resume=true", "resume", True),
        ("tower.layers=[8, 4]", "layers", (8, 4)),
        ("tower.kind=dcn", "kind", "dcn"),
        ("tower.note=plain text = here", "note", "plain text = here"),
        ("tower.note=12", "note", "12"),
        ('tower.note="quoted"', "note", "quoted"),
        ("tower.dim=4", "dim", 4),
        ("tower.dim=none", "dim", None),
        ('tower.names=["a", "b"]', "names", ("a", "b")),
    ],
)
def test_an_override_is_read_as_the_declared_type(override: str, field: str, value: object) -> None:
    got = getattr(load_tower(override), field)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tower.epocs=3", r"tower\.epocs: unknown; did you mean tower\.epochs\? known: layers, rate"),
        ("towr.epochs=3", r"\[towr\]: unknown; did you mean tower\? known: engine, tower"),
        ("tower.epochs=many", r"tower\.epochs='many': must be a whole number, not str"),
        ("tower.epochs=true", r"tower\.epochs=True: must be a whole number, not bool"),
        ("tower.epochs=1.5", r"tower\.epochs=1\.5: must be a whole number, not float"),
        ("tower.layers=[8, 1.5]", r"tower\.layers\[1\]=1\.5: must be a whole number"),
        ("tower.kind=lstm", r"""tower\.kind='lstm': must be "mlp" or "dcn\""""),
        ("tower.dim=wide", r"tower\.dim='wide': must be a whole number or left out"),
        ("tower.epochs=0", r"tower\.epochs=0: must be at least 1"),
        ("tower.epochs", r"--set tower\.epochs: must be section\.key=value"),
        ("epochs=3", r"--set epochs=3: must be section\.key=value"),
    ],
)
def test_a_wrong_override_is_an_error_that_names_key_value_and_fix(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tower(override)


def test_the_last_override_of_a_key_holds() -> None:
    assert load_tower("tower.epochs=4", "tower.epochs=5").epochs == 5


def test_a_recipe_file_is_read_by_path_and_its_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[tower]\nepochs = 9\n")
    assert load_recipe(str(path), sections=SECTIONS).section(TowerConfig).epochs == 9

    path.write_text("[tower]\nepoch = 9\n")
    with pytest.raises(ConfigError, match=r"tower\.epoch: unknown; did you mean tower\.epochs"):
        load_recipe(str(path), sections=SECTIONS)


@pytest.mark.parametrize("text", ["[tower", "tower = 3", "[tower.deep]\nepochs = 1"])
def test_text_that_is_no_recipe_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        Recipe.from_toml(text, sections=SECTIONS)


def test_a_recipe_that_does_not_exist_is_an_error_that_lists_the_packaged_ones() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml.*movielens"):
        load_recipe("nowhere.toml", sections=SECTIONS)


def test_resolved_toml_reads_back_to_equal_sections() -> None:
    known = {name: target for name, target in SECTIONS.items() if name != "absent"}
    overrides = ['tower.note="ä\\"\\\\ \\u007f\\n😀"', "tower.rate=1e-9", "tower.layers=[]"]
    recipe = Recipe.from_toml("", sections=known).with_overrides(overrides)
    again = Recipe.from_toml(recipe.to_toml(), sections=known)

    assert again.section(TowerConfig) == recipe.section(TowerConfig)
    assert again.section(EngineConfig) == recipe.section(EngineConfig)
    assert tomllib.loads(recipe.to_toml())["tower"]["epochs"] == 3, "defaults are written out"


def test_an_owner_that_does_not_import_says_so_and_only_when_it_is_asked_for() -> None:
    recipe = Recipe.from_toml("", sections=SECTIONS)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        recipe.named_section("absent")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        recipe.with_overrides(["absent.key=1"])


@pytest.mark.parametrize("override", ["engine.logical_cpus=0", "engine.ray_address="])
def test_the_engine_section_refuses_what_cannot_run(override: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\."):
        load_recipe("movielens", [override])
