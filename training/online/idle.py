"""What the online trainer is while the promoted version has nothing to learn.

In:  the registry, the log.  Out: the offset in the log from which a version that learns would go on.
Knows nothing of learning. Nothing lags, since nothing is to be learned; but what any version that learns, and may be
promoted again, has not learned yet stays in the log: the trainer's own versions, the newest of all, one on trial.
"""

import time
from collections.abc import Sequence

from cluster.log import EventLog, LoggedEvent
from cluster.manifest import TWO_STAGE, VersionRef
from cluster.registry import Registry
from training.models.version import ROOT

LOOK_S = 10.0
"""How often it looks for versions published meanwhile."""


class Idle:
    """Reads and learns nothing."""

    def __init__(self, registry: Registry, log: EventLog, consumer: str) -> None:
        self._registry = registry
        self._log = log
        self._consumer = consumer
        self._looked_s = float("-inf")
        self.publish()

    @property
    def ref(self) -> VersionRef:
        """The promoted version."""
        return self._registry.current()

    def is_over(self) -> bool:
        """Whether the promoted version learns."""
        return self._registry.manifest(VersionRef(self.ref.version)).system == TWO_STAGE

    @property
    def applied_seq(self) -> int:
        """Event after which a version that learns would go on."""
        return self._log.committed_offset(self._consumer)

    def read(self) -> list[LoggedEvent]:
        """Return nothing."""
        return []

    def learn(self, events: Sequence[LoggedEvent]) -> None:
        """Do nothing."""

    def publish(self) -> None:
        """Keep the offset where it has to be."""
        if time.monotonic() - self._looked_s < LOOK_S:
            return
        self._looked_s = time.monotonic()
        head_seq = self._log.head_seq()
        learning = [manifest for manifest in self._registry.versions() if manifest.system == TWO_STAGE]
        needed = [manifest.last_seq for manifest in learning if ROOT in manifest.metrics or manifest is learning[-1]]
        if (canary := self._registry.readable_canary()) is not None:
            needed.append(canary.from_seq)
        self._log.commit_offset(self._consumer, min([head_seq, *needed]))

    def status(self) -> dict[str, object]:
        """Return what there is to say of it."""
        return {
            "ready": True,
            "learns": False,
            "version": str(self.ref),
            "applied_seq": self.applied_seq,
            "lag_events": 0,
            "validation": {},
        }
