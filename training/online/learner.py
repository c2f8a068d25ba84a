"""Online training: the batch train step on the event log, published as deltas.

In:  logged events after the last learned one.  Out: deltas of the promoted version, each with the range it covers.
Knows nothing of HTTP or processes: training/online/actor.py drives it.

    read events ─▶ predict them (progressive validation) ─▶ each user's own row ─▶ train_step with some old sequences
                ─▶ join impressions ─▶ what of the seen is chosen                       ─▶ guard ─▶ delta

Weights, optimiser and offset are one delta, published in one step: after a crash learning goes on from the last one,
so no event is learned twice and none is left out. When someone moved the pointer, learning continues from where it
points. What the guard objects to is undone and its range set aside on record: a step that ruined the weights, before
anyone is served by it; learning that predicts worse than the base, back to the delta before the window that shows it.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cluster.config import Recipe
from cluster.errors import ConfigError, CorruptVersionError, NothingToLearnError
from cluster.events import INTERACTION_KINDS
from cluster.log import EventLog, Interaction, LoggedEvent
from cluster.manifest import TWO_STAGE
from cluster.registry import Manifest, Registry, VersionRef
from embeddings.batch import PAD, Sequences, build_batch
from embeddings.quantized import FORMATS
from embeddings.text_encoder import EncoderConfig, TextEncoder
from embeddings.vocabulary import UNKNOWN_ROW
from training.models.version import (
    COUNT_ROWS,
    ENCODER,
    EVENTS,
    ROOT,
    SET_ASIDE,
    Change,
    VersionState,
    log_popularity,
    read_version,
    write_delta,
    write_version,
)
from training.online.adapter import Proposal, read_bridged, write_bridged
from training.online.admission import Intake
from training.online.drift import DriftConfig, DriftDetector
from training.online.exclusions import Exclusions
from training.online.guard import GuardConfig, ProgressiveValidation
from training.online.impressions import Fate, Impressions, ImpressionsConfig
from training.online.intake import IntakeConfig
from training.online.join import JoinConfig, Joined
from training.online.migration import move_to
from training.online.model import LiveModel
from training.online.regrow import publish_whole
from training.online.segments import NEW_USERS, Segments
from training.online.sent import SentRows
from training.online.sequences import LiveHistory, build_live_sequences, join_sequences, seen_before
from training.online.surprise import Surprise, SurpriseConfig
from training.online.workers import Workers
from training.step import StepConfig
from training.stream import DataConfig, NegativeSampler, build_history, build_sequences, windows_before

logger = logging.getLogger(__name__)

LAG_STEPS = 4
"""A trainer that is behind sizes its steps so as to catch up in about so many."""
CONSUMER = "online-trainer"
"""Whose offset in the log says what may be dropped: the events of every version of its own that stays are kept, since a
rollback learns them again."""
FOLDED = "folded"
"""Metric of a version made by folding deltas: the last of them."""
PUBLISHING = ("published", "delta")
"""Reasons with which the pointer moves as something is published, and not because someone chose."""
FINISHED = "delta, finished after a crash"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineConfig:
    """How the stream is learned."""

    enabled: bool = True
    workers: int = 1
    """Processes that learn together, each a part of the tables and the users of its own; on GPUs one each."""
    learning_rate: float = 0.00005
    """Of AdamW on the dense weights."""
    rate_strength: float = 0.0
    """How strongly that rate follows its hypergradient (training/hypergradient.py): a step that goes the very way of
    the one before multiplies it by e to this power, one that goes back divides it, to ten times or a tenth at most."""
    table_rate: float = 2.0
    """Learning rate of the tables as a share of their batch rate."""
    user_rate: float = 0.2
    """By how much, about, an interaction raises its item's score for its user alone, in the user's own row; 0 leaves
    that row to the tables' rate. Far above it a row follows a session so closely that it misleads an hour later."""
    clip_norm: float = 1.0
    batch_targets: int = 4096
    """Targets of a batch-training step: to the tables' Adagrad an event weighs what it weighed there."""
    step_events: int = 16
    """Events a step takes while it keeps up: small steps learn more of an event than large ones."""
    max_events: int = 64
    """Events a step takes at most, as it falls behind. Not more than `model.max_history`, or a user's could not fit."""
    rehearsal_sequences: int = 4
    """Sequences of the version's own history mixed into a step, against forgetting."""
    rehearsal_length: int = 50
    ranked_positions: int = 32
    """Targets of a step, old ones included, that train the ranker: most of what a step costs."""
    publish_interval_ms: int = 500
    """Least time between deltas."""
    niceness: int = 10
    """How far learning stands back, by the kernel's measure, where it shares a processor with requests."""
    poll_interval_ms: int = 50
    """How often an idle trainer looks for events."""
    delta_rows: str = "float32"
    """What deltas hold rows in for replicas: float32, float16 or int8. The trainer's own stay float32."""
    delta_threshold: float = 0.0
    """Share of its length by which a row must differ from what replicas have before it is sent; what is not sent adds
    up until it is."""
    compact_every: int = 50
    """Deltas after which they are folded into a new version."""
    keep_chains: int = 2
    """Versions before the present one whose deltas stay, for rollback to each of them."""
    keep_versions: int = 48
    """Versions of the online trainer's own that stay; trained ones always do."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("learning_rate", "table_rate", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"online.{name}={getattr(self, name)}: must be above 0")
        for name in (
            "workers",
            "step_events",
            "max_events",
            "keep_chains",
            "keep_versions",
            "rehearsal_length",
            "ranked_positions",
            "publish_interval_ms",
            "poll_interval_ms",
            "compact_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"online.{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.niceness <= 19:
            raise ConfigError(f"online.niceness={self.niceness}: must be from 0 to 19")
        if self.delta_rows not in FORMATS:
            raise ConfigError(f"online.delta_rows={self.delta_rows!r}: is none of {', '.join(FORMATS)}")
        if not 0 <= self.delta_threshold < 1:
            raise ConfigError(f"online.delta_threshold={self.delta_threshold}: must be in [0, 1)")
        if not 0 <= self.rate_strength <= 1:
            raise ConfigError(f"online.rate_strength={self.rate_strength}: must be from 0 to 1")
        if self.rehearsal_sequences < 0:
            raise ConfigError(f"online.rehearsal_sequences={self.rehearsal_sequences}: must be 0 or more")
        if not 0 <= self.user_rate <= 2:
            raise ConfigError(f"online.user_rate={self.user_rate}: must be from 0 to 2")

    def step(self) -> StepConfig:
        """Return what a train step does beside the model."""
        return StepConfig(
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            clip_norm=self.clip_norm,
            rate_strength=self.rate_strength,
        )


class Slate(NamedTuple):
    """What was shown to a user at once, and what came of it."""

    history: LiveHistory
    examples: list[Joined]


class OnlineLearner:
    """The promoted version, learning the log."""

    def __init__(
        self,
        registry: Registry,
        log: EventLog,
        recipe: Recipe,
        cache_folder: Path | None,
        device: torch.device,
        workers: Workers | None = None,
    ) -> None:
        """Take up the promoted version. Raises `NoVersionError`, `CorruptVersionError` or `NothingToLearnError`.

        How to learn and what to let through is `recipe`'s; the model and the encoder are the version's own.
        """
        self.registry = registry
        self.log = log
        self.config = recipe.section(OnlineConfig)
        self.guard_config = recipe.section(GuardConfig)
        self.drift = DriftDetector(recipe.section(DriftConfig))
        self.surprise = Surprise(recipe.section(SurpriseConfig))
        self.intake = Intake(log, recipe.section(IntakeConfig))
        self.impressions = Impressions(recipe.section(ImpressionsConfig), recipe.section(JoinConfig))
        self.cache_folder = cache_folder
        self.device = device
        self.workers = workers or Workers()
        self._follow_pointer(registry.current(), took_up=False)
        self._free_events()  # from now on nothing is dropped that is not learned

    def _take_up(self, ref: VersionRef) -> None:
        """Make weights, optimiser and offset those of a version."""
        if (system := self.registry.manifest(VersionRef(ref.version)).system) != TWO_STAGE:
            raise NothingToLearnError(f"version {ref}: is of {system}, which does not learn while it serves")
        state = read_version(self.registry, ref, with_optimizer=True)
        self.ref, self.recipe, self.applied_seq = ref, state.recipe, state.learned_seq
        self.data = state.recipe.section(DataConfig)
        self._encoder_name = state.encoder
        self._system = state.system  # beside the model: it does not learn, and goes along
        self._tags = state.tags  # as well
        self.encoder = TextEncoder(state.recipe.section(EncoderConfig), self.cache_folder, state.adapter)
        sent = SentRows(self.config.delta_rows, self.config.delta_threshold)
        self.live = LiveModel(
            state,
            self.config.step(),
            self.config.table_rate,
            self.device,
            self.config.seed,
            sent,
            self.config.ranked_positions,
            self.workers,
        )
        self.guard = ProgressiveValidation(self.guard_config)
        self._segments = Segments(self.live.counts[: len(self.live.items)], len(self.live.users))
        self._good = deque([(ref, 0)])
        self.history_table = self.registry.open_version(ref.version).table("history")
        has_row = pc.is_in(self.history_table["user_id"], pa.array(self.live.users.ids, pa.string()))
        self._rehearsal = build_history(self.history_table.filter(has_row), self.live.items, self.live.users)
        self._rehearsed = np.setdiff1d(np.arange(len(self._rehearsal)), self._rehearsal.starts)
        self._rng = np.random.default_rng((self.config.seed, self.applied_seq))
        self._item_seq = 0
        self._bridged = read_bridged(self.registry, ref)
        """Rows of items whose vectors are a bridge's, hottest first."""
        self._redescribed = False
        metrics = self.registry.manifest(ref).metrics
        self.events_total, self.set_aside_total = (int(metrics.get(name, 0)) for name in (EVENTS, SET_ASIDE))
        self._past_total = int(self.live.counts.sum())
        if not self.surprise.metrics():
            self.surprise.restore(metrics)
        self.exclusions = Exclusions.read(self.registry.manifest(VersionRef(ref.version)).metrics)
        self.intake.take_up(self.registry, ref, self.applied_seq, self._past_share)
        self.impressions.take_up(self.registry, state, self.log, self._fate)
        self._start_delta()

    def _fate(self, logged: LoggedEvent) -> Fate:
        if self.exclusions.covers_everyone(logged.seq):
            return Fate.ALL_FORGOTTEN
        if self.exclusions.covers(logged.seq, logged.event.user_id):
            return Fate.LEFT_OUT
        return Fate.USER_FORGOTTEN if self.intake.has_held(logged.seq) else Fate.JOINED

    def _past_share(self, item_id: str) -> float:
        """Return an item's share of all interactions counted; as if each item had one more."""
        row, counts = self.live.items.row(item_id), self.live.counts[: len(self.live.items)]
        return ((int(counts[row]) if row != UNKNOWN_ROW else 0) + 1) / (self._past_total + len(counts))

    def _start_delta(self) -> None:
        """Collect what the next delta holds."""
        self.pending_events = 0
        self._redescribed = False
        self._newest: tuple[Sequences, np.ndarray] | None = None
        self._first_seq = self.applied_seq + 1

    def read(self) -> list[LoggedEvent]:
        """Return the events of the next step: the further behind, the more at once."""
        behind = self.log.head_seq() - self.applied_seq
        wanted = max(self.config.step_events, behind // LAG_STEPS)
        return self.log.read(self.applied_seq, min(wanted, self.config.max_events, self.live.dense.config.max_history))

    def learn(self, events: Sequence[LoggedEvent]) -> None:
        """Predict and then learn the events that follow the last learned one in the log, but for those left out."""
        self._describe_put_items()
        included = [logged for logged in events if not self.exclusions.covers(logged.seq, logged.event.user_id)]
        counted, weights = self.intake.admit(included)
        self.set_aside_total += len(events) - len(counted)
        self._learn(counted, weights, self.impressions.add(events, self._fate))
        self.applied_seq = events[-1].seq
        self.pending_events += len(events)

    def learn_released(self) -> int:
        """Learn what has been released from quarantine since; return how many events that were."""
        released = self.intake.take_released(self.live.dense.config.max_history)
        for logged in released:  # one by one: each is learned after its user's history of then
            self._learn([logged], {})
        return len(released)

    def _learn(
        self, counted: Sequence[LoggedEvent], weights: Mapping[int, float], joined: Sequence[Joined] = ()
    ) -> None:
        interactions = [logged for logged in counted if logged.event.kind in INTERACTION_KINDS]
        for logged in interactions:
            self.live.count(logged.event.item_id, logged.event.user_id)
        slates = self._slates(joined)
        for first in range(0, len(slates), self.config.max_events):
            self._learn_shown(slates[first : first + self.config.max_events])
        histories = self._histories(interactions)
        if histories:
            sequences = build_live_sequences(histories, self.live.items, weights)
            self._validate(sequences)
            self._train(sequences)

    def _validate(self, sequences: Sequences) -> None:
        """Predict what is about to be learned, with the present weights and with those they grew from."""
        base = self.live.predict_base(sequences)
        target_P = sequences.target_row_BL[sequences.target_row_BL != PAD]
        popularity_loss_P = -log_popularity(torch.from_numpy(self.live.counts[: len(self.live.items)]))[target_P]
        segments = self._segments.of(sequences, self.live.reused_rows)
        learned = self.live.predict(sequences)
        self.guard.record(learned, base, popularity_loss_P, segments)
        self.surprise.record(base.loss_P)
        self.drift.record(
            {
                "new users": segments[NEW_USERS],
                "popularity of items": -popularity_loss_P,
                "confidence": learned.confidence_P,
                "log loss": learned.loss_P,
                "log loss above the base's": learned.loss_P - base.loss_P,
            }
        )
        self._newest = sequences, base.loss_P

    def publish(self) -> VersionRef | None:
        """Publish a delta of what was learned since the last, or undo that learning where the guard objects.

        Returns the delta's name, or none when there is nothing to publish or someone moved the pointer meanwhile.
        Raises `NothingToLearnError` where it was moved to a version that does not learn.
        """
        if (current := self.registry.current()) != self.ref:
            self._follow_pointer(current, took_up=True)
            return None
        released = self.learn_released()
        if not self.pending_events and not released and not self._redescribed:
            return None
        change = self.impressions.added_to(self.live.change())
        if (damage := self._damage(change)) is not None:
            return self._set_aside(damage)
        if (objection := self.guard.objection()) is not None:
            return self._roll_back(objection, self.guard.window_start)
        if (objection := self.surprise.objection()) is not None:
            return self._roll_back(objection, self.guard.recorded - self.surprise.discard())
        metrics: dict[str, object] = {"validation": self.guard.metrics(), **self.surprise.metrics()}
        metrics |= self.impressions.metrics()
        if (factor := self.live.rate_factor) is not None:
            metrics["rate_factor"] = factor
        if drifts := self.drift.take():
            metrics["drift"] = [asdict(drift) for drift in drifts]
        ref = self._publish_delta(change, metrics)
        self._good.append((ref, self.guard.recorded))
        if ref.delta >= self.config.compact_every:
            self._publish_version({FOLDED: str(ref)})
            self._drop_old_versions()
            self._free_events()
        return ref

    def _publish_delta(self, change: Change, metrics: dict[str, object]) -> VersionRef:
        draft = self.registry.draft_delta(self.ref.version)
        write_delta(draft, change)
        self.intake.write(draft)
        self.events_total += self.pending_events
        totals = {EVENTS: self.events_total, SET_ASIDE: self.set_aside_total}
        metrics = {"events": self.pending_events, "workers": self.workers.count} | totals | metrics
        self.ref = draft.publish(first_seq=self._first_seq, last_seq=self.applied_seq, metrics=metrics)
        self.intake.note_published()
        self.live.mark_published(change)
        self.impressions.mark_published()
        self._start_delta()
        return self.ref

    def adopt(self, proposal: Proposal) -> VersionRef | None:
        """Publish the newest state as another encoder tells its items; nothing that was learned meanwhile is lost.

        The projection is refitted so that items stay where they were, and users and the ranker with them. Returns none
        where the encoder is not the one to be replaced any more, or someone moved the pointer. What the proposal does
        not know is encoded now; what it has bridged is encoded between steps from here on.
        """
        before = self.ref
        if proposal.refused or proposal.before != self.encoder.fingerprint or self.registry.current() != before:
            return None
        published = self.publish()  # what is pending is judged first, and goes out as a delta
        if published is None and self.ref != before:  # it has followed someone to where they moved the pointer
            return None
        if self.pending_events or self.registry.current() != self.ref or proposal.before != self.encoder.fingerprint:
            return None
        if self.live.dense.config.media:  # of the version that it has followed: its projection is refitted for no other
            return None
        encoder = TextEncoder(self.encoder.config, self.cache_folder, proposal.adapter)
        state = self._state()
        text_IE, bridged = proposal.vectors_for(state.item_ids, state.item_texts, encoder)
        state, moved = move_to(state, text_IE, encoder)
        coverage = 1 - len(bridged) / max(len(text_IE), 1)
        told = proposal.metrics | {"items_moved": moved, "coverage": coverage, "bridged": len(bridged)}
        grown_from = self.ref
        self._bridged = sorted(bridged, key=lambda row: -int(state.rows[COUNT_ROWS][row]))
        self._publish_version({"adapter": told, "encoder_before": proposal.before}, state=state)
        if self.registry.current() != self.ref:
            self._follow_pointer(self.registry.current(), took_up=True)
            return None
        logger.info("%s: the encoder is %s, it was %s to %s", self.ref, state.encoder, proposal.before, grown_from)
        self._take_up(self.ref)
        return self.ref

    def encode_bridged(self, most: int) -> int:
        """Encode some of the items whose vectors are bridged; return how many are left.

        Raises what the encoder does; these items then stay bridged, and their turn is after all others.
        """
        now, others = self._bridged[:most], self._bridged[most:]
        if now:
            texts = [self.live.item_texts[row] for row in now]
            self._bridged = others + now
            vectors = self.encoder.encode(texts)
            self._bridged = others
            for row, text, vector in zip(now, texts, vectors, strict=True):
                self.live.describe(self.live.items.ids[row], text, vector)
            self._redescribed = True
        return len(self._bridged)

    def _publish_version(
        self,
        metrics: dict[str, object],
        promote_from: VersionRef | None = None,
        state: VersionState | None = None,
    ) -> None:
        """Publish the present state, or one made of it, as a version of its own, child of the one it grew from.

        The pointer follows unless someone has moved it from `promote_from` (the version grown from) meanwhile; the next
        `publish` then sees that.
        """
        state = state or self._state()
        draft = self.registry.draft_version()
        write_version(draft, state, self.history_table)
        self.impressions.write_open(draft)
        write_bridged(draft, self._bridged)
        totals = {EVENTS: self.events_total, SET_ASIDE: self.set_aside_total, ROOT: self._root(self.ref)}
        totals |= {"workers": self.workers.count, ENCODER: state.encoder}
        self.ref = draft.publish(
            offset=self.applied_seq,
            metrics=totals | self.exclusions.metrics() | self.surprise.metrics() | self.impressions.metrics() | metrics,
            parent=self.ref,
            promote_from=promote_from or self.ref,
        )
        self.live.mark_published()
        self.impressions.mark_published()
        self._start_delta()

    def _state(self) -> VersionState:
        """Return all that has been learned so far, as a version holds it."""
        rows, dense, optimizer = self.live.tensors()
        return VersionState(
            ref=self.ref,
            recipe=self.recipe,
            learned_seq=self.applied_seq,
            item_ids=self.live.items.ids,
            item_texts=self.live.item_texts,
            user_ids=self.live.users.ids,
            rows=rows,
            dense=dense,
            optimizer=optimizer | self.impressions.tensors(),
            seen=self.impressions.weight,
            system=self._system,
            tags=self._tags,
            encoder=self._encoder_name,
            adapter=self.encoder.adapter,
        )

    def _drop_old_versions(self) -> None:
        """Keep the deltas of the newest versions, the bases of many, and every trained version."""
        canary = self.registry.readable_canary()
        on_trial = canary.ref.version if canary else 0
        earlier = [
            m for m in self.registry.versions() if m.ref.version < self.ref.version and m.ref.version != on_trial
        ]
        for manifest in earlier[: -self.config.keep_chains]:
            self.registry.drop_deltas(manifest.ref.version)
        for manifest in earlier[: -self.config.keep_versions]:
            if ROOT in manifest.metrics:
                self.registry.drop_version(manifest.ref.version)
        chains = {manifest.ref.version for manifest in earlier[-self.config.keep_chains :]} | {self.ref.version}
        self._good = deque(entry for entry in self._good if entry[0].version in chains) or deque([(self.ref, 0)])

    def _free_events(self) -> None:
        """Let the log drop what no version of this trainer's own, and no trial, would have to be read again for."""
        own = [manifest.last_seq for manifest in self.registry.versions() if ROOT in manifest.metrics]
        own.append(self.registry.manifest(VersionRef(self.ref.version)).last_seq)  # whose impressions are joined again
        canary = self.registry.readable_canary()
        trial = [canary.from_seq] if canary else []
        self.log.commit_offset(CONSUMER, min([self.applied_seq, *own, *trial]))

    def _damage(self, change: Change) -> str | None:
        """Return why the learning since the last delta ruined the weights, or none."""
        rows = [part for _, sent in change.rows.values() for part in (sent.value, sent.scale_N) if part is not None]
        own = [value for _, value in change.optimizer_rows.values()]
        tensors = [*rows, *own, *change.dense.values(), *change.optimizer.values()]
        if not all(tensor.isfinite().all() for tensor in tensors):
            return "a weight is not finite"
        if self._newest is None:
            return None
        sequences, base_loss_P = self._newest
        return self.guard.damage(self.live.predict(sequences).loss_P, base_loss_P)

    def _set_aside(self, objection: str) -> VersionRef:
        """Undo the learning since the last delta; a delta that changes nothing records the range and the reason."""
        events, last_seq = self.pending_events, self.applied_seq
        self._take_up(self.ref)
        self.impressions.clear()
        self.pending_events, self.applied_seq = events, last_seq
        self.set_aside_total += events
        metrics: dict[str, object] = {"set_aside": objection}
        return self._publish_delta(self.live.change(), metrics | self.impressions.metrics())

    def _roll_back(self, objection: str, since: int) -> VersionRef:
        """Undo the learning since so many events were recorded: go on from the delta that was the newest then."""
        while len(self._good) > 1 and self._good[1][1] <= since:
            self._good.popleft()
        good = self._good[0][0]
        if good == self.ref:
            return self._set_aside(objection)
        self._restart(good, self.applied_seq, self.events_total + self.pending_events, {"set_aside": objection})
        return self.ref

    def _follow_pointer(self, current: VersionRef, *, took_up: bool) -> None:
        """Take up the promoted version. What was learned on top of it has been rolled back and is not learned again.

        A learner that starts may find one delta whose publisher ended before it moved the pointer: that one counts.
        What is damaged is left behind: learning goes on from the newest that is whole, and learns again what followed.
        """
        try:
            self._follow(current, took_up=took_up)
        except CorruptVersionError as error:
            logger.error("%s is not whole, going on from before it: %s", current, error)
            self._take_up(publish_whole(self.registry, current, str(error)))

    def _follow(self, current: VersionRef, *, took_up: bool) -> None:
        later = self.registry.deltas(current.version, after=current.delta)
        if not took_up and len(later) == 1 and self.registry.history()[-1].reason in PUBLISHING:
            current = later[0].ref
            self.registry.promote(current, FINISHED)
        undone = max(self._grown_from(current), key=lambda manifest: manifest.last_seq)
        if undone.last_seq > self.registry.manifest(current).last_seq:
            self._restart(current, undone.last_seq, int(undone.metrics[EVENTS]), {})
        else:
            self._take_up(current)

    def _grown_from(self, ref: VersionRef) -> list[Manifest]:
        """Return the version itself and all that was published on top of it, as far as it is still there."""
        later = [m for m in self.registry.versions() if m.ref >= ref and self._root(m.ref) == self._root(ref)]
        chains = [self.registry.deltas(m.ref.version) for m in later]
        own = self.registry.deltas(ref.version, after=ref.delta)
        return [self.registry.manifest(ref), *later, *own, *(chain[-1] for chain in chains if chain)]

    def _root(self, ref: VersionRef) -> int:
        """Return the trained version that a version grew from, by deltas, folding and rollbacks."""
        return int(self.registry.manifest(VersionRef(ref.version)).metrics.get(ROOT, ref.version))

    def _restart(self, ref: VersionRef, last_seq: int, events_total: int, metrics: dict[str, object]) -> None:
        """Publish a new version with the weights of `ref` and its offset behind what was learned after them."""
        was_promoted = self.registry.current()
        self._take_up(ref)
        self.impressions.clear()
        first_seq, self.applied_seq = self.applied_seq + 1, last_seq
        self.set_aside_total += events_total - self.events_total
        self.events_total = events_total
        self._publish_version(
            {"rolled_back_to": str(ref), "set_aside_from_seq": first_seq} | metrics, promote_from=was_promoted
        )

    def _describe_put_items(self) -> None:
        """Take in the text of items put since the last look."""
        put = self.log.read_items(self._item_seq, max_items=1_000)
        if not put:
            return
        for (_, item), vector in zip(put, self.encoder.encode([item.text for _, item in put]), strict=True):
            self.live.describe(item.item_id, item.text, vector)
        self._item_seq = put[-1][0]

    def _histories(self, interactions: Sequence[LoggedEvent]) -> list[LiveHistory]:
        """Return each user's history up to the newest of these interactions, where there is one to predict."""
        seqs_of: dict[str, list[int]] = {}
        for logged in interactions:
            seqs_of.setdefault(logged.event.user_id, []).append(logged.seq)
        found = [self._history(user_id, first_new_seq=seqs[0], last_seq=seqs[-1]) for user_id, seqs in seqs_of.items()]
        return [history for history in found if history is not None]

    def _history(self, user_id: str, first_new_seq: int, last_seq: int) -> LiveHistory | None:
        known = self._known(user_id, self.live.dense.config.max_history + 1, last_seq + 1)
        if len(known) < 2 or known[-1].seq < first_new_seq:
            return None
        return LiveHistory(self.live.users.row(user_id), known, first_new_seq)

    def _known(self, user_id: str, max_history: int, before_seq: int) -> list[Interaction]:
        """Return a user's newest interactions before an event, less those that learning leaves out."""
        return [
            entry
            for entry in self.log.user_state(user_id, max_history, before_seq=before_seq).history
            if self.live.items.row(entry.item_id) != UNKNOWN_ROW
            and not self.exclusions.covers(entry.seq, user_id)
            and not self.intake.holds(entry.seq)
        ]

    def _slates(self, joined: Sequence[Joined]) -> list[Slate]:
        """Return what was shown at once to a user who had a history then; users under suspicion teach nothing.

        The user's own row is left out: it has followed the choice before the choice is certain, and would tell it.
        """
        examples_of: dict[tuple[str, str | int], list[Joined]] = {}
        for example in joined:
            if self.live.items.row(example.item_id) != UNKNOWN_ROW and not self.intake.holds_any_of(example.user_id):
                examples_of.setdefault((example.user_id, example.request_id or example.seq), []).append(example)
        slates = []
        for (user_id, _), examples in examples_of.items():
            first_seq = min(example.seq for example in examples)
            if known := self._known(user_id, self.live.dense.config.max_history, first_seq):
                slates.append(Slate(seen_before(PAD, known), examples))
        return slates

    def _learn_shown(self, slates: Sequence[Slate]) -> None:
        """Learn what of the seen was chosen."""
        examples = [example for slate in slates for example in slate.examples]
        before = build_live_sequences([slate.history for slate in slates], self.live.items)
        sequence_K = np.repeat(np.arange(len(slates)), [len(slate.examples) for slate in slates])
        item_row_K = np.array([self.live.items.row(example.item_id) for example in examples], np.int64)
        pairs = self.live.predict_shown(before, sequence_K, item_row_K)
        self.impressions.learn(examples, pairs, self.live.item_scale)

    def _train(self, sequences: Sequences) -> None:
        """Take one step on the new interactions, with some of the version's own history again."""
        if self.config.user_rate:
            self.live.learn_users(sequences, self.config.user_rate)
        if self.config.rehearsal_sequences and len(self._rehearsed):
            targets = self._rng.choice(self._rehearsed, self.config.rehearsal_sequences)
            windows = windows_before(self._rehearsal, targets, self.config.rehearsal_length)
            old = build_sequences(self._rehearsal, windows)
            old.user_row_B[np.isin(old.user_row_B, list(self.live.reused_rows))] = PAD  # somebody else's by now
            sequences = join_sequences(sequences, old)
        sampler = NegativeSampler(self.live.counts[: len(self.live.items)], self.data)
        negatives = sampler.draw(self._rng)
        loss_scale = float((sequences.target_row_BL != PAD).sum() / self.config.batch_targets)
        self.live.learn(build_batch(sequences, negatives, self.live.text, sampler.log_q), loss_scale)
