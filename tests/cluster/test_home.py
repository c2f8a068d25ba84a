from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.home import Home, find_home


def test_the_flag_goes_before_the_environment_and_that_before_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECLOOP_HOME", "from-environment")

    assert find_home("from-flag").path == tmp_path / "from-flag"
    assert find_home().path == tmp_path / "from-environment"
    monkeypatch.delenv("RECLOOP_HOME")
    assert find_home().path == tmp_path / "recloop-home"


def test_reading_paths_creates_nothing_and_ensure_creates_every_folder(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    folders = (home.registry, home.log.parent, home.cache, home.runs, home.datasets, home.reports)
    assert list(tmp_path.iterdir()) == []

    assert home.ensure() == home.ensure() == home
    assert all(folder.is_dir() for folder in folders)
    assert len(set(folders)) == 6
    assert not home.log.exists()


def test_a_home_below_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--home .*file/home"):
        Home(tmp_path / "file" / "home").ensure()
