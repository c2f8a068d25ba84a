"""`recloop keys`: make, list and revoke API keys.

In:  the home folder.  Out: a new key, once; rows of what is known of all.
Knows nothing of who asks with them.
"""

import argparse
from datetime import UTC, datetime

from cluster.errors import ConfigError
from cluster.keys import Key, KeyFile
from cluster.output import Result


def run(args: argparse.Namespace) -> Result:
    """Do one of the three."""
    file = KeyFile(args.home.keys)
    if args.action == "list":
        return {"keys": [_describe(key) for key in file.read().values()]}
    if args.name is None:
        raise ConfigError(f"recloop keys {args.action}: which one? Give a name to add, an id to revoke")
    if args.action == "revoke":
        return _describe(file.revoke(args.name))
    key, presented = file.add(args.name, args.role, args.rate)
    return {**_describe(key), "key": presented, "note": "it is not kept and cannot be shown again"}


def _describe(key: Key) -> Result:
    return {
        "id": key.key_id,
        "name": key.name,
        "role": key.role,
        "rate_per_s": key.rate_per_s,
        "created": _told(key.created_us),
        "revoked": _told(key.revoked_us),
    }


def _told(ts_us: int | None) -> str | None:
    return None if ts_us is None else datetime.fromtimestamp(ts_us / 1e6, UTC).isoformat(timespec="seconds")
