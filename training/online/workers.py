"""The processes that learn one version together: worker 0 leads, the others do what it says, each with its own part.

In:  a store to meet at.  Out: a process group; commands with their arguments, heard by every other worker in order.
Knows nothing of what is commanded, nor of how processes are started (training/online/actor.py).

Commands travel over a gloo group of their own, in the leader's order: each worker runs the same collectives one after
the other. A worker that is gone ends the wait of all others with an error.
"""

import socket
import time
import zlib
from datetime import timedelta
from typing import cast

import torch.distributed as dist

LEADER = 0
BEAT_S = 60.0
"""How often an idle leader is heard: a worker waits `PATIENCE` for a command, not for ever."""
PATIENCE = timedelta(minutes=30)
_BEAT, _END = "beat", "end"


class Workers:
    """The workers as one of them sees them. By itself: the one worker of a group of one, who tells nobody."""

    def __init__(self, control: dist.ProcessGroup | None = None) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.control = control
        """Moves what is in host memory; none where the default group does."""
        self._told_s = time.monotonic()

    @classmethod
    def join(cls, store: dist.Store, rank: int, count: int, device_type: str) -> "Workers":
        """Collective. Make the default process group, as for batch training, and the one for commands."""
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
        return cls(cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=PATIENCE)))

    @property
    def lead(self) -> bool:
        """Whether others do what this worker says."""
        return self.rank == LEADER and self.count > 1

    def tell(self, command: str, *args: object) -> None:
        """Have every other worker hear the command; only the leader's are."""
        if self.lead:
            dist.broadcast_object_list([command, args], LEADER, self.control)
            self._told_s = time.monotonic()

    def hear(self) -> tuple[str, tuple[object, ...]] | None:
        """Wait for the leader's next command; returns none when there will be no other."""
        heard: list = [_BEAT, ()]
        while heard[0] == _BEAT:
            dist.broadcast_object_list(heard, LEADER, self.control)
        return None if heard[0] == _END else (heard[0], heard[1])

    def beat(self) -> None:
        """Be heard, if it has been a while."""
        if time.monotonic() - self._told_s >= BEAT_S:
            self.tell(_BEAT)

    def end(self) -> None:
        """Tell every other worker that there will be no other command."""
        self.tell(_END)


def open_store(host: str, patience: timedelta) -> tuple[dist.TCPStore, int]:
    """Return a store to meet at and its port, on this address alone: by itself it would listen on every interface."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    fd = listener.detach()
    store = dist.TCPStore(host, port, is_master=True, timeout=patience, wait_for_workers=False, master_listen_fd=fd)
    return store, port


def worker_of(user_id: str, workers: int) -> int:
    """Return whose a user is: by a hash of the id, as a topic keyed by user is divided into partitions."""
    return zlib.crc32(user_id.encode()) % workers
