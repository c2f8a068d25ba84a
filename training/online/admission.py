"""Events on their way to be learned: judged, weighed, held in quarantine, and let in once they are released.

In:  events in order.  Out: those to learn, with weights; the quarantine, kept in step with what is published.
Knows nothing of how events are judged (intake.py) or learned.

A delta says what was held and what of it was let in since, in quarantine.parquet: published in one step with the
learning, it is the truth, and the quarantine beside the log follows it. Whoever takes a version up reads the chain
again, so that an end between the two loses nothing and lets nothing in twice.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import pyarrow as pa

from cluster.log import EventLog, LoggedEvent
from cluster.log.quarantine import Quarantine, Quarantined
from cluster.manifest import VersionRef
from cluster.registry import Registry
from training.models.version import Draft
from training.online.intake import IntakeConfig, IntakeGuard

TABLE = "quarantine"
_NOT_HELD = ("released", "learned")


class Intake:
    """What of the log goes to the learner."""

    def __init__(self, log: EventLog, config: IntakeConfig) -> None:
        self._log = log
        self._config = config
        self.quarantine = Quarantine(log.path)
        self._guard = IntakeGuard(config, lambda _: 0.0)
        self._held: dict[int, str] = {}
        """Number of each event in quarantine, and whose it is."""
        self._held_of: Counter[str] = Counter()
        self._let_in: set[int] = set()
        self._new: list[Quarantined] = []
        self._learned: list[Quarantined] = []

    def take_up(
        self, registry: Registry, ref: VersionRef, applied_seq: int, past_share: Callable[[str], float]
    ) -> None:
        """Begin behind `applied_seq`: read what the chain has held, and judge the newest events before it again."""
        for manifest in registry.deltas(ref.version)[: ref.delta]:
            if f"{TABLE}.parquet" in manifest.files:
                self._follow(_read(registry.open_delta(ref.version, manifest.ref.delta).table(TABLE)))
        self._new, self._learned = [], []
        known = self.quarantine.find()
        self._held = {entry.seq: entry.user_id for entry in known if entry.state not in _NOT_HELD}
        self._held_of = Counter(self._held.values())
        self._let_in = {entry.seq for entry in known if entry.state in _NOT_HELD}
        self._guard = IntakeGuard(self._config, past_share)
        first_seq = max(applied_seq - self._config.window_events, 0)
        self._guard.judge(self._log.read(first_seq, applied_seq - first_seq) if applied_seq > first_seq else [])

    def admit(self, events: Sequence[LoggedEvent]) -> tuple[list[LoggedEvent], dict[int, float]]:
        """Return the events to learn, and the weight of each; the others are held from the next delta on."""
        admitted, weights = [], {}
        for logged, verdict in zip(events, self._guard.judge(events), strict=True):
            if logged.seq in self._held or (verdict.reasons and logged.seq not in self._let_in):
                self._hold(logged, verdict.reasons, verdict.score)
            else:
                admitted.append(logged)
                weights[logged.seq] = verdict.weight if logged.seq not in self._let_in else 1.0
        return admitted, weights

    def holds(self, seq: int) -> bool:
        """Whether an event is in quarantine."""
        return seq in self._held

    def has_held(self, seq: int) -> bool:
        """Whether an event is in quarantine, or was and has been released."""
        return seq in self._held or seq in self._let_in

    def holds_any_of(self, user_id: str) -> bool:
        """Whether an event of the user is in quarantine."""
        return self._held_of[user_id] > 0

    def take_released(self, max_events: int) -> list[LoggedEvent]:
        """Return events that were released and wait to be learned, oldest first; the next delta says that they were."""
        waiting = self.quarantine.find(states=["released"], limit=max_events)
        taken = {entry.seq for entry in self._learned}
        found = []
        for entry in (entry for entry in waiting if entry.seq not in taken):
            found += self._log.read(entry.seq - 1, 1)
            self._learned.append(entry)
            if self._held.pop(entry.seq, None) is not None:
                self._held_of[entry.user_id] -= 1
            self._let_in.add(entry.seq)
        return found

    def write(self, draft: Draft) -> None:
        """Add what was held and let in to a delta, if anything was."""
        if self._new or self._learned:
            draft.add_table(TABLE, _table([("held", self._new), ("learned", self._learned)]))

    def note_published(self) -> None:
        """Have the quarantine follow the delta that was written."""
        self._follow([("held", self._new), ("learned", self._learned)])
        self._new, self._learned = [], []

    def _hold(self, logged: LoggedEvent, reasons: tuple[str, ...], score: float) -> None:
        event = logged.event
        if logged.seq not in self._held:
            self._held_of[event.user_id] += 1
        self._held[logged.seq] = event.user_id
        self._new.append(
            Quarantined(
                seq=logged.seq,
                user_id=event.user_id,
                item_id=event.item_id,
                kind=event.kind,
                score=score,
                reasons=reasons,
            )
        )

    def _follow(self, parts: Sequence[tuple[str, Sequence[Quarantined]]]) -> None:
        for state, entries in parts:
            if state == "held":
                self.quarantine.add(entries)
            else:
                self.quarantine.mark_learned(entry.seq for entry in entries)


def _table(parts: Sequence[tuple[str, Sequence[Quarantined]]]) -> pa.Table:
    rows = [
        {
            "change": change,
            "seq": entry.seq,
            "user_id": entry.user_id,
            "item_id": entry.item_id,
            "kind": entry.kind,
            "score": entry.score,
            "reasons": list(entry.reasons),
        }
        for change, entries in parts
        for entry in entries
    ]
    return pa.Table.from_pylist(rows)


def _read(table: pa.Table) -> list[tuple[str, list[Quarantined]]]:
    parts: list[tuple[str, list[Quarantined]]] = []
    for row in table.to_pylist():
        change = row.pop("change")
        parts.append((change, [Quarantined(**{**row, "reasons": tuple(row["reasons"])})]))
    return parts
