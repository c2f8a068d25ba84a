"""The packages resolve to this checkout and the folders keep their roles."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "embeddings", "training", "serving")


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_resolves_to_this_checkout(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / package


@pytest.mark.parametrize("package", PACKAGES)
def test_every_source_file_says_what_it_is_for(package: str) -> None:
    silent = [path for path in (ROOT / package).rglob("*.py") if not path.read_text("utf-8").startswith('"""')]
    assert silent == []


def test_tests_mirror_the_source_tree() -> None:
    tested = {path.relative_to(ROOT / "tests").parent for path in (ROOT / "tests").rglob("test_*.py")} - {Path()}
    assert [folder for folder in tested if not (ROOT / folder).is_dir()] == []


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = "import sys, cluster.cli; print(sorted({'torch', 'ray', 'pandas', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_readme_s_tree_names_every_module() -> None:
    tree = (ROOT / "README.md").read_text("utf-8").partition("## What is where")[2]
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = {path.name for path in modules if not path.name.startswith("__")}
    assert sorted(name for name in names if name not in tree) == []
