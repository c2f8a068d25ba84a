"""The online trainer as a Serve application of its own, for a cluster that is run by import strings.

In:  the recipe and the home's folder.  Out: one replica that learns, and answers nobody.
Knows nothing of who serves. While a cluster is being replaced there are two of these for a time: the new one waits for
the lock of the registry's folder, where it is a folder that both see, and publishing settles what remains, since a
delta exists once or not at all.
"""

import asyncio
import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve

from cluster.config import EngineConfig, load_recipe
from cluster.errors import EngineError
from cluster.home import Home, find_home
from training.online.actor import START_PATIENCE_S, OnlineTrainer

if TYPE_CHECKING:
    from ray.serve import Application

LOCK_FILE = "learner.lock"


@serve.deployment(name="Trainer", num_replicas=1, ray_actor_options={"num_cpus": 0}, health_check_period_s=10)
class Trainer:
    """Learns for as long as it lives. Crash-only: what fails ends the process, and Serve starts another."""

    async def __init__(self, recipe_toml: str, home: Home, lock: Path | None) -> None:
        self._lock = contextlib.ExitStack()
        if lock is not None:
            await asyncio.to_thread(self._lock.enter_context, only_learner(lock))
        self._trainer = OnlineTrainer(recipe_toml, home)
        if not await asyncio.to_thread(self._trainer.wait_ready, START_PATIENCE_S):
            raise EngineError(f"online training has not taken up the version within {START_PATIENCE_S:.0f} s")

    def status(self) -> dict[str, Any]:  # Any: JSON
        """Return what is published and learned."""
        return self._trainer.status()

    def __del__(self) -> None:
        """Publish what was learned, and let the next one learn; Serve calls this when the replica ends."""
        if hasattr(self, "_trainer"):
            self._trainer.stop()
        self._lock.close()


def build_trainer(args: Mapping[str, str]) -> "Application":
    """Return the application: `recipe` is a packaged one's name or a file, `home` a folder of each node's own."""
    recipe, home = load_recipe(args["recipe"]), find_home(args.get("home")).ensure()
    uri = recipe.section(EngineConfig).registry_uri or str(home.registry)
    bind: Any = Trainer  # Any: Ray's types do not say what a decorated class offers
    return bind.bind(recipe.to_toml(), home, Path(uri) / LOCK_FILE if "://" not in uri else None)


@contextlib.contextmanager
def only_learner(path: Path) -> Iterator[None]:
    """Wait until nobody else holds the lock, and hold it for the block; it is let go of when the process ends."""
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
