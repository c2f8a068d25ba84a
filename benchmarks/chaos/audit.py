"""What was promised, against what there is.

In:  what clients saw; the log and the registry they came from, after the server has ended.  Out: counts, all 0 if held.
Knows nothing of faults. Reads log and registry directly, not through the server.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.chaos.traffic import Traffic
from cluster.errors import RegistryError
from cluster.log import EventLog
from cluster.manifest import Manifest, VersionRef
from cluster.registry import Registry

READ_EVENTS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Broken promises, by kind."""

    lost: list[str]
    """Acknowledged events that the log does not have."""
    twice: list[str]
    """Events that it has more than once."""
    elsewhere: list[str]
    """Events at another sequence number than was acknowledged."""
    unsound: str
    """What the log's own verification says is wrong: user state that is not the fold of the log, among others."""
    learned_apart: str
    """How what was learned differs from the log; empty where it is the same events, each once."""
    unknown_versions: list[str]
    """Versions that answered and are not published, or are not whole."""
    contradictions: list[str]
    facts: Mapping[str, int] = field(default_factory=dict)

    def broken(self) -> int:
        """Return how many promises were broken."""
        texts = (self.unsound, self.learned_apart)
        lists = (self.lost, self.twice, self.elsewhere, self.unknown_versions, self.contradictions)
        return sum(map(bool, texts)) + sum(map(len, lists))


def audit(traffic: Traffic, log: EventLog, registry: Registry, damaged: set[str]) -> Verdict:
    """Compare everything. `damaged` versions, which the harness has broken itself, may have answered before that."""
    seqs: dict[str, list[int]] = {}
    after = 0
    while events := log.read(after, READ_EVENTS):
        for logged in events:
            seqs.setdefault(logged.event.event_id, []).append(logged.seq)
        after = events[-1].seq
    report = log.verify()
    return Verdict(
        lost=[event_id for event_id in traffic.acked if event_id not in seqs],
        twice=[event_id for event_id, found in seqs.items() if len(found) > 1],
        elsewhere=[event_id for event_id, seq in traffic.acked.items() if seqs.get(event_id, [seq])[0] != seq],
        unsound="" if report.sound else str(report),
        learned_apart=_compare_learned(registry, len(seqs), after),
        unknown_versions=[name for name in sorted(traffic.versions - damaged) if not _is_whole(registry, name)],
        contradictions=list(traffic.contradictions),
        facts={"acked": len(traffic.acked), "logged": len(seqs), "answers": len(traffic.answers)},
    )


def _compare_learned(registry: Registry, logged: int, head_seq: int) -> str:
    """Walk the promoted version's ancestry: every range must begin where the one before ended, and all be learned."""
    problems = []
    manifest = registry.manifest(registry.current())
    if manifest.last_seq != head_seq:
        problems.append(f"{manifest.ref} has learned up to {manifest.last_seq}, the log ends at {head_seq}")
    if (counted := int(manifest.metrics.get("events_total", 0))) != logged:
        problems.append(f"{manifest.ref} counts {counted} events, the log holds {logged}")
    while manifest.parent is not None:
        parent = _parent(registry, manifest)
        if parent is None:
            break
        if manifest.first_seq is not None and manifest.first_seq != parent.last_seq + 1:
            problems.append(f"{manifest.ref} begins at {manifest.first_seq}, {parent.ref} ended at {parent.last_seq}")
        manifest = parent
    return "; ".join(problems)


def _parent(registry: Registry, manifest: Manifest) -> Manifest | None:
    """Return the parent's manifest, none where retention has dropped it."""
    assert manifest.parent is not None, "asked only then"
    try:
        return registry.manifest(manifest.parent)
    except RegistryError:
        return None


def _is_whole(registry: Registry, name: str) -> bool:
    """Whether a version or delta is published."""
    try:
        registry.manifest(VersionRef.parse(name))
    except RegistryError:
        return False
    return True
