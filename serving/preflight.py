"""Checks before anything starts, so that what cannot be served is one clear line instead of a failed deployment.

In:  a registry and an address.  Out: the promoted version, or the error that names what is wrong.
Knows nothing of Ray Serve or of what a version's files mean.
"""

from cluster.errors import CorruptVersionError
from cluster.manifest import Manifest, VersionRef
from cluster.registry import Registry
from cluster.storage import Storage


def check_version(registry: Registry, pinned_version: int | None) -> VersionRef:
    """Return the promoted version once the files of its base, and of the pinned version, match their manifests.

    Deltas are left to the replicas, which serve as much of a chain as holds. Raises `NoVersionError`,
    `CorruptVersionError` naming the file, or `RegistryError` for a version that is not published.
    """
    promoted = registry.current()
    for version in {promoted.version, pinned_version or promoted.version}:
        _check_files(Storage(registry.uri), registry.manifest(VersionRef(version)))
    return promoted


def check_chain(registry: Registry, ref: VersionRef) -> None:
    """Check that all files of a version, and of its deltas up to the one named, match their manifests.

    Raises `CorruptVersionError` naming the file, or `RegistryError` for what is not published.
    """
    registry.manifest(ref)
    for manifest in (registry.manifest(VersionRef(ref.version)), *registry.deltas(ref.version)[: ref.delta]):
        _check_files(Storage(registry.uri), manifest)


def describe_damage(registry: Registry, promoted: VersionRef) -> str:
    """Return what is wrong with the deltas up to the promoted one; empty where they hold."""
    try:
        for manifest in registry.deltas(promoted.version)[: promoted.delta]:
            _check_files(Storage(registry.uri), manifest)
    except CorruptVersionError as error:
        return str(error)
    return ""


def _check_files(storage: Storage, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        path = f"{manifest.ref.folder}/{name}"
        if not storage.exists(path):
            raise CorruptVersionError(f"{storage.uri}/{path}: missing though its manifest names it")
        if storage.sha256(path) != entry.sha256:
            raise CorruptVersionError(f"{storage.uri}/{path}: checksum differs from its manifest's; publish it again")
