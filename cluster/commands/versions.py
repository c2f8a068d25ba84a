"""`recloop versions`: list what is published, show one, compare two, promote, try on some users, roll back.

In:  the home's registry.  Out: rows of versions, what one states, what changed, or the move that was made.
Knows nothing of what a version holds: comparing two is training/models/compare.py's, undoing some of its learning
training/online/undo.py's.
"""

import argparse
import datetime

from cluster.config import load_recipe
from cluster.engine import open_registry
from cluster.errors import ConfigError, NoVersionError
from cluster.imports import load_target
from cluster.manifest import Manifest, VersionRef
from cluster.output import Result
from cluster.registry import Registry


def run(args: argparse.Namespace) -> Result:
    """Do what `args.action` says."""
    recipe = load_recipe(args.recipe, args.overrides)
    registry = open_registry(recipe, args.home)
    if args.action == "list":
        return _list(registry)
    if args.action == "rollback" and (args.without_seqs or args.without_users):
        undo = load_target("training.online.undo:undo_learning")
        return undo(recipe, args.home, args.without_seqs, args.without_users, args.reason)
    if args.action == "rollback":
        return _promote(registry, registry.previous(), args.reason or "rollback")
    if args.action == "canary" and (args.stop or not args.version):
        return _stop_canary(registry, args.reason) if args.stop else _show_canary(registry)
    if not args.version:
        raise ConfigError(f"versions {args.action}: name the version; try `recloop versions {args.action} 1`")
    ref = VersionRef.parse(args.version)
    if args.action == "show":
        return _show(registry, ref)
    if args.action == "diff":
        other = VersionRef.parse(args.other) if args.other else registry.current()
        return load_target("training.models.compare:compare_versions")(registry, ref, other)
    if args.action == "canary":
        canary = load_target("training.online.canary:begin_canary")(registry, recipe, args.home, ref, args.share)
        return {"on_trial": str(ref), "share": canary.share, "from_seq": canary.from_seq}
    return _promote(registry, ref, args.reason)


def _stop_canary(registry: Registry, reason: str) -> Result:
    running = registry.canaries()[-1] if registry.canaries() else None
    registry.end_canary(None, reason or "stopped by hand")
    return {"ended": running["ref"] if running and running["outcome"] == "started" else None}


def _show_canary(registry: Registry) -> Result:
    canary = registry.canary()
    return {
        "on_trial": str(canary.ref) if canary else None,
        "share": canary.share if canary else None,
        "trials": [{**line, "at": _time(line["at_us"])} for line in registry.canaries()],
    }


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
    deltas = registry.deltas(manifest.ref.version)
    return {
        "version": manifest.ref.version,
        "deltas": len(deltas),
        "created": _time(manifest.created_us),
        "offset": (deltas[-1] if deltas else manifest).last_seq,
        "promoted": str(current) if current and current.version == manifest.ref.version else None,
        "metrics": manifest.metrics,
    }


def _show(registry: Registry, ref: VersionRef) -> Result:
    manifest = registry.manifest(ref)
    files = {name: entry.size_bytes for name, entry in sorted(manifest.files.items())}
    moves = [move for move in registry.history() if ref in (move.ref, move.previous)]
    return {
        "version": str(ref),
        "promoted": current_or_none(registry) == ref,
        "created": _time(manifest.created_us),
        "parent": str(manifest.parent) if manifest.parent else None,
        "learned": {"first_seq": manifest.first_seq, "last_seq": manifest.last_seq},
        "deltas": len(registry.deltas(ref.version, after=ref.delta)),
        "metrics": dict(manifest.metrics),
        "files": files,
        "bytes": sum(files.values()),
        "moves": [
            {
                "at": _time(move.at_us),
                "from": str(move.previous) if move.previous else None,
                "to": str(move.ref),
                "reason": move.reason,
            }
            for move in moves
        ],
    }


def _time(at_us: int) -> str:
    return datetime.datetime.fromtimestamp(at_us / 1e6, datetime.UTC).isoformat(timespec="seconds")


def _promote(registry: Registry, ref: VersionRef, reason: str) -> Result:
    before = current_or_none(registry)
    registry.promote(ref, reason)
    return {"promoted": str(ref), "before": str(before) if before else None, "reason": reason or None}
