"""The HAProxy that Ray Serve puts before its replicas: how a private Ray sets it up, and whether it has a replica.

In:  the session's folder.  Out: environment variables that Ray's processes read; a look at HAProxy's statistics.
Knows nothing of who answers when no replica does (serving/standby.py).
"""

import csv
import io
import os
import urllib.request
from pathlib import Path

STATS_PORT = "RAY_SERVE_HAPROXY_STATS_PORT"
FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
SHARE_PORTS = "SERVE_SOCKET_REUSE_PORT_ENABLED"
STATS_TIMEOUT_S = 2.0


def build_settings(folder: Path, free_port: int, *more_free_ports: int) -> dict[str, str]:
    """Return Ray's settings of an HAProxy whose files lie in the folder; ports that are set already stay."""
    haproxy = folder / "h"
    names = ("RAY_SERVE_HAPROXY_METRICS_PORT", STATS_PORT, FALLBACK_PORT)
    ports = {name: str(port) for name, port in zip(names, (free_port, *more_free_ports), strict=True)}
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "state"),
        # HAProxy or a replica that ends is missed within a second or two, where the defaults take 10 to 30.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "500ms",
        **{name: os.environ.get(name, port) for name, port in ports.items()},
    }


def count_replicas(stats_port: int) -> int:
    """Return how many replicas HAProxy finds well; raises `OSError` where there is no HAProxy."""
    url = f"http://127.0.0.1:{stats_port}/stats;csv"
    with urllib.request.urlopen(url, timeout=STATS_TIMEOUT_S) as answer:
        rows = list(csv.DictReader(io.StringIO(answer.read().decode().removeprefix("# "))))
    servers = [row for row in rows if row["svname"] not in ("FRONTEND", "BACKEND")]
    return sum(row["act"] == "1" and row["status"].startswith("UP") for row in servers)  # a fallback is not active
