"""`recloop versions`: list what is published, promote, roll back.

In:  the home's registry.  Out: rows of versions, or the move that was made.
Knows nothing of what a version holds.
"""

import argparse
import datetime

from cluster.config import load_recipe
from cluster.engine import open_registry
from cluster.errors import ConfigError, NoVersionError, RegistryError
from cluster.manifest import Manifest, VersionRef
from cluster.output import Result
from cluster.registry import Registry


def run(args: argparse.Namespace) -> Result:
    """Do what `args.action` says."""
    registry = open_registry(load_recipe(args.recipe, args.overrides), args.home)
    if args.action == "list":
        return _list(registry)
    if args.action == "rollback":
        return _promote(registry, _previous(registry), args.reason or "rollback")
    if not args.version:
        raise ConfigError("versions promote: name the version; try `recloop versions promote 1`")
    return _promote(registry, VersionRef.parse(args.version), args.reason)


def current_or_none(registry: Registry) -> VersionRef | None:
    """Return the promoted version, or None before the first."""
    try:
        return registry.current()
    except NoVersionError:
        return None


def _list(registry: Registry) -> Result:
    current = current_or_none(registry)
    return {
        "registry": registry.uri,
        "current": str(current) if current else None,
        "versions": [_row(registry, manifest, current) for manifest in registry.versions()],
    }


def _row(registry: Registry, manifest: Manifest, current: VersionRef | None) -> Result:
    created = datetime.datetime.fromtimestamp(manifest.created_us / 1e6, datetime.UTC)
    deltas = registry.deltas(manifest.ref.version)
    return {
        "version": manifest.ref.version,
        "deltas": len(deltas),
        "created": created.isoformat(timespec="seconds"),
        "offset": (deltas[-1] if deltas else manifest).last_seq,
        "promoted": str(current) if current and current.version == manifest.ref.version else None,
        "metrics": manifest.metrics,
    }


def _previous(registry: Registry) -> VersionRef:
    """Return the newest promoted version before the current one, skipping this version's own deltas."""
    current = registry.current()
    for move in reversed(registry.history()):
        if move.ref.version != current.version:
            return move.ref
    if current.delta:
        return VersionRef(current.version)
    raise RegistryError(f"versions rollback: {current} is the first that was promoted; there is none before it")


def _promote(registry: Registry, ref: VersionRef, reason: str) -> Result:
    before = current_or_none(registry)
    registry.promote(ref, reason)
    return {"promoted": str(ref), "before": str(before) if before else None, "reason": reason or None}
