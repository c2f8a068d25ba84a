"""The home folder: where one installation keeps its registry, log, cache, runs, datasets and reports.

In:  `--home`, else `$RECLOOP_HOME`, else `./recloop-home`.  Out: paths.
Knows nothing of the files inside; each has one owner.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError

HOME_VARIABLE = "RECLOOP_HOME"
DEFAULT_HOME = "recloop-home"


@dataclass(frozen=True, slots=True)
class Home:
    """Paths under one folder. Reading a path creates nothing; `ensure` does."""

    path: Path

    @property
    def registry(self) -> Path:
        """Published versions."""
        return self.path / "registry"

    @property
    def log(self) -> Path:
        """The event log's database file."""
        return self.path / "events" / "events.db"

    @property
    def keys(self) -> Path:
        """API keys, hashed; none are needed where it is missing."""
        return self.path / "keys.json"

    @property
    def cache(self) -> Path:
        """What can be computed again: downloads, text vectors."""
        return self.path / "cache"

    @property
    def runs(self) -> Path:
        """Training runs: checkpoints and scalars."""
        return self.path / "runs"

    @property
    def datasets(self) -> Path:
        """Prepared datasets."""
        return self.path / "datasets"

    @property
    def default_dataset(self) -> Path:
        """The dataset that commands take when none is named: what `recloop prepare movielens` writes."""
        return self.datasets / "movielens"

    @property
    def reports(self) -> Path:
        """Tables and pictures."""
        return self.path / "reports"

    def ensure(self) -> "Home":
        """Create the folders that are not there yet. Raises `ConfigError` where that is not possible."""
        for folder in (self.registry, self.log.parent, self.cache, self.runs, self.datasets, self.reports):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"--home {self.path}: cannot be used as home ({error}); name another") from error
        return self


def find_home(path: str | os.PathLike[str] | None = None) -> Home:
    """Return the home that a flag, the environment or the working folder names, as an absolute path."""
    return Home(Path(path or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME).expanduser().resolve())
