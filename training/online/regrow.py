"""Grow a promoted version anew from an earlier state: without some of the log, or without what is damaged.

In:  the registry, and what may not be part of it.  Out: a promoted version with the earlier state and its offset.
Knows nothing of learning: whoever learns on from there learns the log again from that offset, except for what the
version says is left out. Until then what is served lacks the newest learning.
"""

from collections.abc import Iterator

from cluster.errors import CorruptVersionError, RegistryError
from cluster.manifest import Manifest, VersionRef
from cluster.registry import Registry
from training.models.version import (
    ENCODER,
    EVENTS,
    ROOT,
    SET_ASIDE,
    VersionState,
    apply_delta,
    find_set_aside,
    read_version,
    write_version,
)
from training.online.adapter import read_bridged, write_bridged
from training.online.exclusions import Exclusions


def publish_before(registry: Registry, seq: int, wanted: Exclusions, reason: str) -> VersionRef:
    """Publish the newest state that has learned nothing from `seq` on, leaving out `wanted` from there on.

    What had been set aside since is left out too. Raises `RegistryError` when nothing from before is left.
    """
    current = registry.current()
    left_out = wanted.joined(_stated(registry, current))
    for manifest in _manifests(registry, current):
        if manifest.last_seq < seq:
            state = read_version(registry, manifest.ref, with_optimizer=True)
            return _publish(registry, state, left_out, reason)
        left_out = left_out.joined(_set_aside_by(manifest))
    raise RegistryError(f"{current}: there is none from before event {seq} that it grew from")


def learned_before(registry: Registry, seq: int) -> int:
    """Return the last event that the newest state from before event `seq` has learned; 0 where there is none."""
    found = (m.last_seq for m in _manifests(registry, registry.current()) if m.last_seq < seq)
    return next(found, 0)


def publish_whole(registry: Registry, damaged: VersionRef, problem: str) -> VersionRef:
    """Publish the newest state that `damaged` grew from and whose files hold.

    Raises `CorruptVersionError` when there is none.
    """
    left_out = _stated(registry, damaged)
    for manifest in _manifests(registry, damaged):
        left_out = left_out.joined(_set_aside_by(manifest))
    for ref in _lineage(registry, damaged):
        try:
            state = read_version(registry, VersionRef(ref.version), with_optimizer=True)
            state = _as_far_as_whole(registry, state, ref.delta)
            return _publish(registry, state, left_out, f"{damaged} is damaged: {problem}")
        except CorruptVersionError:
            continue
    raise CorruptVersionError(f"{damaged}: nothing that it grew from is whole; train and publish again ({problem})")


def _publish(registry: Registry, state: VersionState, left_out: Exclusions, reason: str) -> VersionRef:
    stated = registry.manifest(state.ref).metrics
    metrics = {name: stated.get(name, 0) for name in (EVENTS, SET_ASIDE)}
    metrics |= {ENCODER: state.encoder, ROOT: _root(registry, state.ref), "rolled_back_to": str(state.ref)}
    metrics |= left_out.metrics()
    history, bridged = registry.open_version(state.ref.version).table("history"), read_bridged(registry, state.ref)
    draft = registry.draft_version()
    write_version(draft, state, history)
    write_bridged(draft, bridged)
    ref = draft.publish(offset=state.learned_seq, metrics=metrics, parent=state.ref, promote=False)
    registry.promote(ref, reason)
    return ref


def _lineage(registry: Registry, ref: VersionRef) -> Iterator[VersionRef]:
    """Yield the version, and each that it grew from at the delta at which it did.

    Versions long gone are dropped; the trained one that all grew from is always there.
    """
    while True:
        yield ref
        parent = registry.manifest(VersionRef(ref.version)).parent
        if parent is None:
            return
        ref = parent if _is_there(registry, parent) else VersionRef(_root(registry, ref))


def _manifests(registry: Registry, ref: VersionRef) -> Iterator[Manifest]:
    """Yield the manifests of the lineage with all deltas, newest first, but for those that are damaged themselves."""
    for at in _lineage(registry, ref):
        for number in range(at.delta, -1, -1):
            try:
                yield registry.manifest(VersionRef(at.version, number))
            except CorruptVersionError:
                continue


def _as_far_as_whole(registry: Registry, state: VersionState, deltas: int) -> VersionState:
    for number in range(1, deltas + 1):
        try:
            state = apply_delta(state, registry.open_delta(state.ref.version, number))
        except CorruptVersionError:
            break
    return state


def _stated(registry: Registry, ref: VersionRef) -> Exclusions:
    return Exclusions.read(registry.manifest(VersionRef(ref.version)).metrics)


def _set_aside_by(manifest: Manifest) -> Exclusions:
    span = find_set_aside(manifest)
    return Exclusions() if span is None else Exclusions(ranges=frozenset({(span.start, span.stop - 1)}))


def _root(registry: Registry, ref: VersionRef) -> int:
    return int(registry.manifest(VersionRef(ref.version)).metrics.get(ROOT, ref.version))


def _is_there(registry: Registry, ref: VersionRef) -> bool:
    try:
        registry.manifest(ref)
    except CorruptVersionError:
        return True
    except RegistryError:
        return False
    return True
