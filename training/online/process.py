"""The online trainer as a plain process beside a server without Ray.

In:  a recipe and a home.  Out: deltas, from a process that is started anew whenever it ends.
Knows nothing of how learning works, nor of who serves. It ends in order when its standard input does, which is when the
process that started it has ended, however that came about.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from cluster.config import Recipe
from cluster.errors import ConfigError, EngineError
from cluster.home import Home
from training.online.actor import RESTART_PAUSE_S, START_PATIENCE_S, OnlineTrainer
from training.online.learner import OnlineConfig

READY = b"ready\n"
END_PATIENCE_S = 30.0
"""How long it may take to publish what it has learned."""


@contextlib.contextmanager
def running_process(recipe: Recipe, home: Home) -> Iterator[None]:
    """Learn from the log while the block lasts, unless the recipe turns online training off.

    Call it with a version promoted. Raises `EngineError` when the trainer does not take it up, and `ConfigError` for
    several workers.
    """
    config = recipe.section(OnlineConfig)
    if config.workers > 1:
        raise ConfigError(f"online.workers={config.workers}: several workers need Ray; set 1, or serve without --local")
    if not config.enabled:
        yield
        return
    keeper = _Keeper(recipe, home)
    try:
        keeper.wait_ready()
        yield
    finally:
        keeper.close()


class _Keeper:
    """Starts the process, and again when it ends."""

    def __init__(self, recipe: Recipe, home: Home) -> None:
        self._told = json.dumps({"recipe": recipe.to_toml(), "home": str(home.path)}).encode() + b"\n"
        self._ready, self._stopping, self._changing = threading.Event(), threading.Event(), threading.Lock()
        self._process = self._start()
        self._thread = threading.Thread(target=self._keep, name="online-trainer", daemon=True)
        self._thread.start()

    def wait_ready(self) -> None:
        """Return once the promoted version was taken up; raises `EngineError` where it is not within the time."""
        if not self._ready.wait(START_PATIENCE_S):
            raise EngineError(f"online training has not taken up the promoted version within {START_PATIENCE_S:.0f} s")

    def close(self) -> None:
        """Let it publish what was learned, and end it."""
        with self._changing:
            self._stopping.set()
        assert self._process.stdin is not None, "asked for where it starts"
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(END_PATIENCE_S)
        finally:
            self._process.kill()
            self._thread.join()

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-m", "training.online.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, whose end this process hears of
        )
        assert process.stdin is not None, "asked for above"
        process.stdin.write(self._told)
        process.stdin.flush()
        return process

    def _keep(self) -> None:
        while not self._stopping.is_set():
            assert self._process.stdout is not None, "asked for where it starts"
            if self._process.stdout.readline() == READY:
                self._ready.set()
            self._process.wait()
            self._process.stdout.close()
            self._stopping.wait(RESTART_PAUSE_S)
            with self._changing:
                if not self._stopping.is_set():
                    self._process = self._start()


def main() -> None:
    """Learn until standard input ends."""
    logging.basicConfig(level=logging.WARNING, format="recloop: %(message)s")
    told = json.loads(sys.stdin.buffer.readline())
    trainer = OnlineTrainer(told["recipe"], Home(Path(told["home"])))
    if trainer.wait_ready(START_PATIENCE_S):
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
    sys.stdin.buffer.read()
    trainer.stop()
    os._exit(0)  # an encoder that is being tuned has its own process, which ends with this one


if __name__ == "__main__":
    main()
