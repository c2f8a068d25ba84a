"""`recloop serve` as a child, started again whenever it ends, and its processes by their part.

In:  a home, a port, overrides of the recipe.  Out: the processes of each part, to do something to.
Knows nothing of faults or traffic. Only processes that it started, and theirs, are ever named.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

PARTS = {
    "ingress": "ray::ServeReplica:recloop:Ingress",
    "encoder": "ray::ServeReplica:recloop:Encoder",
    "controller": "ray::ServeController",
    "proxy": "ray::ProxyActor",
    "haproxy": "haproxy",
    "trainer": "ray::OnlineTrainer",
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
}
"""Parts by what the first word of their processes' command line holds."""
BEHIND_STANDBY = "--behind-standby"
"""Flag of the command's own child, which runs Ray."""
RESTART_PAUSE_S = 0.2
EXIT_PATIENCE_S = 60.0
LEFTOVERS_PATIENCE_S = 5.0


class Server:
    """The server while the block lasts."""

    def __init__(self, home: Path, port: int, overrides: Sequence[str], log_file: Path) -> None:
        sets = [flag for override in overrides for flag in ("--set", override)]
        self._command = [sys.executable, "-m", "cluster", "serve", "--home", str(home), "--port", str(port), *sets]
        self._log_file = log_file
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._supervise, name="supervisor")
        self._seen: set[psutil.Process] = set()
        self.starts = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        child = self._child
        if child is not None and child.poll() is None:
            self.processes()
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(EXIT_PATIENCE_S)
        self._thread.join(EXIT_PATIENCE_S)
        self._end_leftovers()

    def processes(self) -> list[psutil.Process]:
        """Return the server's process and all that it has started, those of a session before excepted."""
        child = self._child
        if child is None or child.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(child.pid)
            found = [root, *root.children(recursive=True)]
            self._seen.update(found)
            return found
        return []

    def part(self, name: str) -> list[psutil.Process]:
        """Return the live processes of a part; "command" is the one started here, "driver" its child that runs Ray."""
        found = self.processes()
        if name == "command":
            return found[:1]
        if name == "driver":
            return [process for process in found if BEHIND_STANDBY in _command_line(process)]
        return [process for process in found if PARTS[name] in "".join(_command_line(process)[:1])]

    def _supervise(self) -> None:
        with self._log_file.open("ab") as log:
            while not self._stopping.is_set():
                self._child = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
                self.starts += 1
                while self._child.poll() is None:
                    time.sleep(0.05)
                self._end_leftovers()
                self._stopping.wait(RESTART_PAUSE_S)

    def _end_leftovers(self) -> None:
        """End what outlived a killed session, as a supervisor ends a service's control group."""
        for process in self._seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until_dead(self._seen)
        self._seen.clear()


def wait_until_dead(processes: Iterable[psutil.Process]) -> None:
    """Wait for killed processes, some seconds at most."""
    deadline_s = time.monotonic() + LEFTOVERS_PATIENCE_S
    while any(map(_is_alive, processes)) and time.monotonic() < deadline_s:
        time.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    """Whether it still holds anything: what has ended and is not yet reaped does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


def signal_all(processes: Sequence[psutil.Process], number: int) -> list[int]:
    """Send a signal to each that is still there; return whom it reached."""
    reached = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            os.kill(process.pid, number)
            reached.append(process.pid)
    return reached
