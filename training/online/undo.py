"""Undo learning: as if ranges of events, or users, had never been learned from.

In:  the registry, the log, what to leave out.  Out: a promoted version from before it, from where the trainer goes on.
Knows nothing of how learning works: the trainer (learner.py) replays the log from that version's offset and leaves out
what the version says. Until it has caught up, what is served lacks the newest learning too. User state is not touched.
"""

from collections.abc import Sequence

from cluster.config import EngineConfig, Recipe
from cluster.engine import open_log, open_registry
from cluster.errors import ConfigError, NothingToLearnError, RegistryError
from cluster.home import Home
from cluster.log import EventLog
from cluster.log.retention import LogConfig
from cluster.manifest import TWO_STAGE, VersionRef
from cluster.output import Result
from cluster.registry import Registry
from training.online.exclusions import Exclusions
from training.online.regrow import learned_before, publish_before

UNDONE = "some learning undone"
"""Reason with which the pointer moves when none is given."""
READ_EVENTS = 10_000


def undo_learning(
    recipe: Recipe, home: Home, ranges: Sequence[tuple[int, int]], users: Sequence[str], reason: str
) -> Result:
    """Publish a version without it, and say what the trainer will learn again: `recloop versions rollback --without-…`.

    Raises as `publish_without` does.
    """
    registry = open_registry(recipe, home)
    with open_log(recipe.section(EngineConfig), recipe.section(LogConfig), home.log) as log:
        before = registry.current()
        ref = publish_without(registry, log, ranges, users, reason)
        learned = registry.manifest(ref)
        return {
            "promoted": str(ref),
            "before": str(before),
            "reason": reason or None,
            "grown_from": str(learned.parent),
            "to_learn_again": log.head_seq() - learned.last_seq,
        } | dict(learned.metrics["excluded"])


def publish_without(
    registry: Registry, log: EventLog, ranges: Sequence[tuple[int, int]], users: Sequence[str], reason: str = ""
) -> VersionRef:
    """Publish and promote the newest state from before the first event to undo, which states what to leave out.

    Raises `ConfigError` for a range that is none and for a user without an event that was learned, `RegistryError`
    when nothing from before is left or the promoted version does not learn.
    """
    current = registry.manifest(registry.current())
    if current.system != TWO_STAGE:
        raise NothingToLearnError(f"{current.ref}: is of {current.system}, so that there is nothing to undo")
    if backwards := [f"{first}..{last}" for first, last in ranges if not 1 <= first <= last]:
        raise ConfigError(f"--without-seqs {backwards[0]}: give the first and the last sequence number, from 1")
    firsts = _first_events(log, users, current.last_seq)
    if unknown := [user_id for user_id in users if user_id not in firsts]:
        raise ConfigError(f"--without-user {unknown[0]}: {current.ref} has learned from no event of that user")
    wanted = Exclusions(ranges=frozenset(ranges), users=dict.fromkeys(users, log.head_seq()))
    first_seq = min([first for first, _ in ranges] + list(firsts.values()))
    learned = learned_before(registry, first_seq)
    again = log.read(learned, 1)
    if again and again[0].seq > learned + 1:
        gone = f"events {learned + 1} to {again[0].seq - 1}"
        raise RegistryError(f"{gone} are no longer in the log, so what was learned since cannot be learned again")
    return publish_before(registry, first_seq, wanted, reason or UNDONE)


def _first_events(log: EventLog, users: Sequence[str], last_seq: int) -> dict[str, int]:
    """Return each user's first event up to `last_seq`; a pass over the log."""
    firsts: dict[str, int] = {}
    seq = 0
    while len(firsts) < len(set(users)) and seq < last_seq and (events := log.read(seq, READ_EVENTS)):
        for logged in events:
            if logged.event.user_id in users and logged.seq <= last_seq:
                firsts.setdefault(logged.event.user_id, logged.seq)
        seq = events[-1].seq
    return firsts
