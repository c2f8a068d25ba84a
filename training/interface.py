"""Have gloo listen where the other machines can reach it: on the interface of the node's own Ray address.

In:  a worker process of Ray Train, before its process group is made.  Out: GLOO_SOCKET_IFNAME, unless it was set.
Knows nothing of what is trained.

Left to itself, gloo listens where the host's name resolves to. On many machines (Debian writes the name to /etc/hosts)
that is the loopback, and workers of other machines are refused.
"""

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has the address; None where there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return name
    return None


def name_interface() -> None:
    """Set GLOO_SOCKET_IFNAME in this process; what the user has set stays."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(VARIABLE, name)


class _Backend(_TorchBackend):
    """Ray Train's own, after every worker has named its interface."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:  # noqa: ANN401  (Ray's, not public)
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class ReachableTorchConfig(TorchConfig):
    """Process groups whose workers may be on several machines."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """Return what sets the process group up."""
        return _Backend
