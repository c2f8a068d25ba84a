"""`recloop status`: what is published, logged and learned in a home, and whether a server answers.

In:  the home folder and a server's address.  Out: one row of each.
Knows nothing of models.
"""

import argparse
import http.client
import urllib.error
import urllib.request

from cluster.commands.versions import current_or_none
from cluster.config import load_recipe
from cluster.engine import open_registry
from cluster.errors import ConfigError
from cluster.home import Home
from cluster.log import EventLog
from cluster.manifest import TWO_STAGE, VersionRef
from cluster.output import Result
from cluster.registry import Registry

PROBE_TIMEOUT_S = 2.0


def run(args: argparse.Namespace) -> Result:
    """Look at everything, change nothing."""
    return {
        "home": str(args.home.path),
        **_describe_registry(open_registry(load_recipe(args.recipe, args.overrides), args.home)),
        **_describe_log(args.home),
        "server": args.url,
        "server_answers": _probe(args.url),
    }


def _describe_registry(registry: Registry) -> Result:
    current = current_or_none(registry)
    if current is None:
        nothing = {"learned_seq": None, "learning": None, "learning_workers": None}
        return {"current": None, "system": None, "versions": 0} | nothing
    manifest = registry.manifest(current)
    system = registry.manifest(VersionRef(current.version)).system
    return {
        "current": str(current),
        "system": system,
        "versions": len(registry.versions()),
        "learned_seq": manifest.last_seq,
        "learning": "from the log" if system == TWO_STAGE else f"nothing: {system} is fitted once",
        "learning_workers": manifest.metrics.get("workers"),
    }


def _describe_log(home: Home) -> Result:
    if not home.log.exists():
        return {"logged_seq": None}
    with EventLog(home.log) as log:
        return {"logged_seq": log.head_seq()}


def _probe(url: str) -> str:
    """Return what the server says of its readiness, in a word."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/readyz", timeout=PROBE_TIMEOUT_S) as response:
            return "ready" if response.status == 200 else f"HTTP {response.status}"
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (ValueError, http.client.InvalidURL) as error:
        raise ConfigError(f"--url {url}: {error}; try http://127.0.0.1:8000") from error
    except OSError:
        return "no"
