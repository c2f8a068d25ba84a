"""The HAProxy that Ray Serve puts before its replicas: how a private Ray sets it up, and whether it has a replica.

In:  the session's folder.  Out: environment variables that Ray's processes read; a look at HAProxy's statistics.
Knows nothing of who answers when no replica does (serving/standby.py).
"""

import csv
import io
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path

CONFIG_FILE = "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"
"""Every process of a private Ray has this variable, and no two of them the same."""
STATS_PORT = "RAY_SERVE_HAPROXY_STATS_PORT"
FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
GIVEN_PORTS = {STATS_PORT: "RECLOOP_STATS_PORT", FALLBACK_PORT: "RECLOOP_FALLBACK_PORT"}
"""Ray's variables, and those by which whoever starts the session names the port."""
STATS_TIMEOUT_S = 2.0


def share_ports(*, stats_port: int, fallback_port: int) -> dict[str, str]:
    """Return the environment of a session whose HAProxy shares its ports and has these two."""
    return {
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "1",
        GIVEN_PORTS[STATS_PORT]: str(stats_port),
        GIVEN_PORTS[FALLBACK_PORT]: str(fallback_port),
    }


def build_settings(folder: Path, find_port: Callable[[], int]) -> dict[str, str]:
    """Return Ray's settings of an HAProxy whose files lie in the folder, at ports given or found free."""
    haproxy = folder / "h"
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        CONFIG_FILE: str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "state"),
        # HAProxy or a replica that ends is missed within a second or two, where the defaults take 10 to 30.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "500ms",
        # A replica whose connections fail is left out at once. One that is only busy, two cores while others start,
        # has two seconds to answer: with the default of two looks, a quarter of a second apart, nobody was left at all.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "500ms",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "4",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(find_port()),
        **{name: os.environ.get(given) or str(find_port()) for name, given in GIVEN_PORTS.items()},
    }


def count_replicas(stats_port: int) -> int:
    """Return how many replicas HAProxy finds well; raises `OSError` where there is no HAProxy."""
    url = f"http://127.0.0.1:{stats_port}/stats;csv"
    with urllib.request.urlopen(url, timeout=STATS_TIMEOUT_S) as answer:
        rows = list(csv.DictReader(io.StringIO(answer.read().decode().removeprefix("# "))))
    servers = [row for row in rows if row["svname"] not in ("FRONTEND", "BACKEND")]
    return sum(row["act"] == "1" and row["status"].startswith("UP") for row in servers)  # a fallback is not active
