"""What is done to a server: its processes killed or stopped, its disk filled, its newest files damaged.

In:  a running `Server`, its home.  Out: what was done, to whom, when.
Knows nothing of traffic or of what should come of it. Seeded: the same seed does the same in the same order, as far as
the processes are there.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.chaos.server import Server, signal_all, wait_until_dead

KILLED_PARTS = ("ingress", "trainer", "encoder", "controller", "proxy", "haproxy", "raylet", "gcs", "driver", "command")
STOPPED_PARTS = ("ingress", "trainer", "proxy")
PRESENCE_S = 240.0
"""How long a part may take to come back before it is an error that it has not: longer than the command waits for Ray
(`START_PATIENCE_S`) before it starts another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing done."""

    kind: str
    at_s: float
    """On the monotonic clock, when it was done; of a stop or a full disk, when it began."""
    pids: list[int]
    detail: str = ""


@dataclass(slots=True)
class Faults:
    """Does one thing after another."""

    server: Server
    home: Path
    small_disk: Path | None
    """A file system that is the home's alone, to be filled; none leaves that fault out."""
    rng: random.Random
    done: list[Fault] = field(default_factory=list)

    def kinds(self) -> list[str]:
        """Return every fault there is."""
        kills = [f"kill {part}" for part in KILLED_PARTS] + ["kill all"]
        damages = ["truncate newest delta", "flip a bit of newest delta"]
        return [
            *kills,
            *(f"stop {part}" for part in STOPPED_PARTS),
            *damages,
            *(["fill disk"] if self.small_disk else []),
        ]

    def can_do(self, kind: str) -> bool:
        """Whether the part that it is done to is there now."""
        verb, _, part = kind.partition(" ")
        return verb not in ("kill", "stop") or part == "all" or bool(self.server.part(part))

    def do(self, kind: str) -> Fault:
        """Do one, and return when it was done. Raises `TimeoutError` where its part does not come back."""
        verb, _, part = kind.partition(" ")
        acts: dict[str, Callable[[str], Fault]] = {
            "kill": self._kill,
            "stop": self._stop,
            "truncate": self._damage,
            "flip": self._damage,
            "fill": self._fill,
        }
        fault = acts[verb](part if verb in ("kill", "stop") else kind)
        self.done.append(fault)
        return fault

    def _kill(self, part: str) -> Fault:
        victims = self._wait_for(part)
        if part != "all":
            victims = [self.rng.choice(victims)]
        names = ", ".join(victim.name() for victim in victims[:3])
        at_s = time.monotonic()
        return Fault(kind=f"kill {part}", at_s=at_s, pids=signal_all(victims, signal.SIGKILL), detail=names)

    def _stop(self, part: str) -> Fault:
        victims = self._wait_for(part)
        at_s = time.monotonic()
        reached = signal_all(victims, signal.SIGSTOP)
        time.sleep(self.rng.uniform(0.5, 3.0))
        signal_all(victims, signal.SIGCONT)
        return Fault(kind=f"stop {part}", at_s=at_s, pids=reached, detail=f"{time.monotonic() - at_s:.1f} s")

    def _damage(self, kind: str) -> Fault:
        """Kill everything and damage the newest delta before it starts again."""
        victims = self._wait_for("all")
        at_s = time.monotonic()
        reached = signal_all(victims, signal.SIGKILL)
        wait_until_dead(victims)
        manifests = sorted((self.home / "registry" / "versions").glob("*/deltas/*/manifest.json"))
        if not manifests:
            return Fault(kind=kind, at_s=at_s, pids=reached, detail="there is no delta")
        file = self.rng.choice(sorted(manifests[-1].parent.glob("*.safetensors")))
        data = bytearray(file.read_bytes())
        if kind.startswith("truncate"):
            del data[len(data) // 2 :]
        else:
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        file.write_bytes(data)
        return Fault(kind=kind, at_s=at_s, pids=reached, detail=str(file.relative_to(self.home)))

    def _fill(self, kind: str) -> Fault:
        assert self.small_disk is not None, "else it is not among the kinds"
        filler = self.small_disk / "filler"
        at_s = time.monotonic()
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while stream.write(bytes(1 << 20)):
                pass
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as stream:
            while stream.write(bytes(512)):
                pass
        filled_bytes = filler.stat().st_size
        time.sleep(self.rng.uniform(1.0, 3.0))
        filler.unlink()
        return Fault(kind=kind, at_s=at_s, pids=[], detail=f"{filled_bytes >> 20} MiB, {time.monotonic() - at_s:.1f} s")

    def _wait_for(self, part: str) -> list[psutil.Process]:
        deadline_s = time.monotonic() + PRESENCE_S
        while time.monotonic() < deadline_s:
            found = self.server.processes() if part == "all" else self.server.part(part)
            if found:
                return found
            time.sleep(0.1)
        raise TimeoutError(f"there has been no {part} for {PRESENCE_S:.0f} s")


def is_mounted(folder: Path) -> bool:
    """Whether the folder is a file system of its own."""
    return os.path.ismount(folder)
