"""Follow the registry: load, verify, warm up, swap one reference.

In:  the registry's pointer and the live catalogue.  Out: `Residents`, what every request is answered from.
Knows nothing of HTTP. A version or delta that does not hold is refused: what was served before stays, and the reason is
reported. The replica never leaves rotation; what it served before the last swap stays in memory, for instant rollback.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.canary import Canary
from cluster.errors import CorruptVersionError, NoVersionError, RecloopError
from cluster.log import EventLog, Interaction
from cluster.manifest import VersionRef
from cluster.registry import Registry
from serving.catalogue import LiveCatalogue
from serving.experiments import Arm
from serving.freshness import LearnedEvents
from serving.metrics import Metrics
from training.models.classical import build_resident
from training.models.resident import Resident
from training.models.tags import PutTags
from training.models.version import VersionState, apply_delta, read_version

RETRY_REFUSED_S = 5.0
"""How long a version that did not hold is left alone, unless the pointer moves."""
NICENESS = 10
"""How far reading and building a version stands back behind requests, by the kernel's measure."""
PAUSE_S = 0.01
"""Before each step of a swap, of a millisecond or two: a thread that stands back still holds the interpreter's lock at
times, and a request should meet one step at most."""
WARM_UP_ITEMS = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Residents:
    """Everything in memory that answers requests; replaced as a whole where any of it is another, never changed."""

    live: Resident
    """The promoted version, as far as it holds."""
    pinned: Resident | None
    """What the arms that do not follow promotions are answered from."""
    canary: Resident | None = None
    """The version on trial, if there is one that holds."""
    trial: Canary | None = None
    """Who is answered from it."""
    previous: Resident | None = None
    """What `live` was before the last swap."""
    unavailable: frozenset[str] = frozenset()
    """Items outside their time of availability."""
    tags: PutTags = field(default_factory=PutTags)
    """What the items put since are told to be."""

    def model_of(self, arm: Arm, user_id: str | None = None) -> Resident:
        """Return the model of an arm that is switched on; for users on trial that of their trial."""
        if arm.follows_promotions and self.canary is not None and user_id is not None:
            assert self.trial is not None, "a canary is on trial"
            if self.trial.takes(user_id):
                return self.canary
        model = self.live if arm.follows_promotions else self.pinned
        assert model is not None, f"{arm.name} is on, so its version was loaded"
        return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A version, promoted or on trial, that does not hold, at least not as a whole."""

    target: VersionRef
    reason: str
    retry_s: float
    """When to try again, on the monotonic clock."""


class Refresher:
    """Keeps one replica's residents up to date, in a thread of its own."""

    def __init__(
        self,
        registry: Registry,
        event_log: EventLog,
        catalogue: LiveCatalogue,
        metrics: Metrics,
        *,
        poll_interval_s: float,
    ) -> None:
        self._registry = registry.paced(self._pause)
        self._catalogue = catalogue
        self._metrics = metrics
        self.poll_interval_s = poll_interval_s
        """How often it looks; may be changed at any time."""
        self._residents: Residents | None = None
        self._refusal: Refusal | None = None
        self._canary_refusal: Refusal | None = None
        self._problems: dict[str, str] = {}
        self._learned = LearnedEvents(registry, event_log, metrics)
        self._writing = threading.Lock()
        """Held by whoever makes the next residents; requests only read the reference."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refresh", daemon=True)

    @property
    def residents(self) -> Residents:
        """Return what is served now; raises `NoVersionError` before `load`."""
        if self._residents is None:
            raise NoVersionError("no version is loaded yet")
        return self._residents

    @property
    def problems(self) -> Mapping[str, str]:
        """Return what keeps the promoted "version", the "canary" or the newest "items" from being served."""
        return dict(self._problems)

    def load(self, pinned_version: int | None) -> None:
        """Load the promoted version, up to the first delta that does not hold, and the pinned one if any.

        Raises `RegistryError` where there is nothing to serve.
        """
        with self._writing:
            self._learned.start()
            self._catalogue.poll()
            live = self._load(VersionRef(self._registry.current().version), None)
            pinned = None
            if pinned_version is not None:
                same = VersionRef.parse(live.name).version == pinned_version
                pinned = live if same else self._load(VersionRef(pinned_version), live)
            unavailable = self._catalogue.unavailable(_now_us())
            self._residents = Residents(live=live, pinned=pinned, unavailable=unavailable, tags=self._catalogue.tags)
            self._metrics.set_learned_seq(live.learned_seq)
            self._metrics.set_version(live.state.ref)
            self._attempt("version", self._follow_pointer)
            self._attempt("canary", self._follow_canary)

    def start(self) -> None:
        """Follow from now on."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def refresh_items(self) -> None:
        """Make the items that are in the log recommendable now; raises `EngineError` without the encoder."""
        with self._writing:
            self._follow_items()

    def follow(self) -> None:
        """Take up new items and the promoted version; what cannot be is noted in `problems`."""
        with self._writing:
            self._attempt("items", self._follow_items)
            self._attempt("version", self._follow_pointer)
            self._attempt("canary", self._follow_canary)

    def _run(self) -> None:
        niceness = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICENESS, 19)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)  # of this thread alone, on Linux
        while not self._stopping.wait(self.poll_interval_s):
            self.follow()

    def _attempt(self, subject: str, step: Callable[[], None]) -> None:
        """Run a step; whatever goes wrong in it, requests are answered from the residents there are."""
        try:
            step()
        except Exception as error:  # the boundary of a thread that must outlive any one version
            problem = str(error) if isinstance(error, RecloopError) else repr(error)
            if self._problems.get(subject) != problem:
                self._problems[subject] = problem
                log.error("still serving %s: %s", self.residents.live.name, problem, exc_info=error)
        else:
            self._problems.pop(subject, None)

    def _follow_items(self) -> None:
        self._catalogue.poll()
        before = self.residents
        unavailable, tags = self._catalogue.unavailable(_now_us()), self._catalogue.tags
        if unavailable != before.unavailable or tags is not before.tags:
            before = self._residents = replace(before, unavailable=unavailable, tags=tags)  # also without the encoder
        models = (before.live, before.pinned, before.canary)
        live, pinned, canary = (model and self._catalogue.lay_over(model) for model in models)
        assert live is not None, "only the other two may be missing"
        if live is not before.live or pinned is not before.pinned or canary is not before.canary:
            self._residents = replace(before, live=live, pinned=pinned, canary=canary)

    def _follow_pointer(self) -> None:
        """Serve the promoted version, or as much of its chain as holds; raises `CorruptVersionError` for the rest."""
        target = self._registry.current()
        before = self.residents.live
        if before.name == str(target):
            return
        refused = self._refusal
        if refused and refused.target == target and time.monotonic() < refused.retry_s:
            raise CorruptVersionError(refused.reason)

        reached, failure = self._reach(target)
        try:
            self._warm_up(reached)
        except Exception as error:  # what cannot answer, for whatever reason, is not served
            reached, failure = before, error
        if reached is not before:
            self._swap(reached)
        if failure is not None:
            reason = f"{target} is promoted but {reached.name} is served: {failure}"
            self._refusal = Refusal(target=target, reason=reason, retry_s=time.monotonic() + RETRY_REFUSED_S)
            self._metrics.count_swap("refused")
            raise CorruptVersionError(reason) from failure

    def _follow_canary(self) -> None:
        """Have the version on trial ready for its users; one that does not hold is not served to anyone."""
        trial, before = self._registry.canary(), self.residents
        if trial == before.trial and (trial is None or before.canary is not None):
            return
        refused = self._canary_refusal
        if trial and refused and refused.target == trial.ref and time.monotonic() < refused.retry_s:
            raise CorruptVersionError(refused.reason)
        self._residents = replace(before, trial=trial, canary=None)
        if trial is None:
            return
        try:
            model = self._load(trial.ref, before.live)
            self._warm_up(model)
        except Exception as error:  # what cannot answer, for whatever reason, is not served
            reason = f"{trial.ref} is on trial but served to nobody: {error}"
            retry_s = time.monotonic() + RETRY_REFUSED_S
            self._canary_refusal = Refusal(target=trial.ref, reason=reason, retry_s=retry_s)
            raise CorruptVersionError(reason) from error
        self._residents = replace(self.residents, canary=model)

    def _reach(self, target: VersionRef) -> tuple[Resident, Exception | None]:
        """Return the model nearest to the target whose files hold, and what stopped short of the target."""
        residents = self.residents
        if residents.previous is not None and residents.previous.name == str(target):
            return self._catalogue.lay_over(residents.previous), None
        model, ref = residents.live, VersionRef.parse(residents.live.name)
        try:
            if ref.version != target.version or ref.delta > target.delta:
                ref = VersionRef(target.version)
                model = self._load(ref, model)
            state, failure = self._apply_deltas(model.state, ref, target)
            self._pause()
            return (model if state is model.state else model.with_state(state)), failure
        except Exception as error:  # what cannot be loaded, for whatever reason, is not served
            return model, error

    def _apply_deltas(
        self, state: VersionState, ref: VersionRef, target: VersionRef
    ) -> tuple[VersionState, Exception | None]:
        """Return the state after as many deltas towards the target as hold, and what is wrong with the next."""
        try:
            parent = self._registry.manifest(ref)
            for number in range(ref.delta + 1, target.delta + 1):
                reader = self._registry.open_delta(target.version, number)
                if reader.manifest.parent_sha256 != parent.sha256:
                    raise CorruptVersionError(f"delta {reader.manifest.ref} is not a child of {parent.ref} as it is")
                state, parent = apply_delta(state, reader), reader.manifest
        except Exception as error:  # as above
            return state, error
        return state, None

    def _load(self, ref: VersionRef, resident: Resident | None) -> Resident:
        state = read_version(self._registry, ref, resident=resident.state if resident else None)
        self._pause()
        return self._catalogue.lay_over(build_resident(state, {}, resident))

    def _warm_up(self, model: Resident) -> None:
        """Answer a stranger and a known user before anyone asks; raises `CorruptVersionError` for scores like NaN."""
        self._pause()
        stranger = model.recommend("", (), WARM_UP_ITEMS, frozenset())
        self._pause()
        history = [Interaction(item_id, "click", None, 0, 0) for item_id in stranger.item_ids]
        known = model.recommend("", history, WARM_UP_ITEMS, frozenset())
        if not (np.isfinite(stranger.scores).all() and np.isfinite(known.scores).all()):
            raise CorruptVersionError(f"{model.name}: scores are not finite")

    def _pause(self) -> None:
        """Let requests go first, where this is done beside them."""
        if threading.current_thread() is self._thread:
            self._stopping.wait(PAUSE_S)

    def _swap(self, after: Resident) -> None:
        before = self.residents
        self._residents = replace(before, live=after, previous=before.live)
        self._metrics.count_swap("swapped")
        self._metrics.set_learned_seq(after.learned_seq)
        self._metrics.set_version(after.state.ref)
        self._learned.note_swap(before.live, after)


def _now_us() -> int:
    return time.time_ns() // 1_000
