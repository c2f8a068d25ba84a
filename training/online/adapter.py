"""Propose a better encoder for what is served, from what users did lately: an adapter trained beside online learning.

In:  the registry, the log, the recipe.  Out: a `Proposal` in a folder: the adapter, every item's vector by it, figures.
Knows nothing of the learner that adopts it (training/online/learner.py). Runs in a process of its own, on a schedule.

    |──── interactions up to T1: the adapter learns ────|──── T1 … now: items held out ────|
                                                          half stops training, half judges: better beyond chance?

Whatever is learned online meanwhile is not touched: the learner lays the proposal over its newest state.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cluster.config import EngineConfig, Recipe
from cluster.engine import open_log, open_registry
from cluster.errors import ConfigError
from cluster.events import INTERACTION_KINDS, events_table
from cluster.home import Home
from cluster.log import EventLog
from cluster.log.quarantine import Quarantine
from cluster.log.retention import LogConfig
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.adapter import Adapter
from embeddings.text_encoder import EncoderConfig, TextEncoder
from embeddings.vocabulary import Vocabulary
from training.encoder.config import FinetuneConfig
from training.encoder.inputs import FinetuneInputs, lay_out, split_cold
from training.encoder.learner import TUNE, EncoderLearner, Progress, choice_ranks
from training.encoder.tuned import TunedEncoder
from training.evaluation.metrics import difference_interval, ndcg_at_k
from training.models.two_stage import ModelConfig
from training.models.version import (
    COUNT_ROWS,
    TEXT_ROWS,
    TUNED_SEQ,
    Draft,
    VersionState,
    find_set_aside,
    read_version,
)
from training.online.exclusions import Exclusions
from training.online.migration import bridge
from training.stream import History, build_history

PROPOSAL_FILE, VECTORS_FILE = "proposal.json", "vectors.npy"
BRIDGED = "bridged"
"""File of a version some of whose text vectors are a bridge's: their rows."""
READ_EVENTS = 10_000
NICENESS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """When the encoder is tuned anew while it serves, and what it takes to be adopted."""

    every_s: float = 0.0
    """Time between two proposals; 0 never makes any by time."""
    events: int = 0
    """New events after which one is made; 0 never makes any by events."""
    min_targets: int = 100
    """Later choices of items held out without which nothing is judged, and so nothing adopted."""
    min_gain: float = 0.0
    """NDCG@10 by which the lower end of the gain's 95% interval must be above that of the present encoder."""
    encode_items: int = 0
    """Items, the most popular of late first, that are encoded before the switch; the others are bridged and encoded
    after it. 0 encodes all before."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("every_s", "events", "encode_items"):
            if getattr(self, name) < 0:
                raise ConfigError(f"adapter.{name}={getattr(self, name)}: must be 0 or more")
        if self.min_targets < 1:
            raise ConfigError(f"adapter.min_targets={self.min_targets}: must be at least 1")

    def is_due(self, seconds: float, events: int) -> bool:
        """Whether it is time, so long and so many events after the last."""
        return bool((self.every_s and seconds >= self.every_s) or (self.events and events >= self.events))


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """An encoder for the items of a version, or why there is none."""

    before: str
    """Fingerprint of the encoder that it takes the place of."""
    fingerprint: str
    item_ids: list[str]
    item_texts: list[str]
    vector_NE: np.ndarray
    is_encoded_N: np.ndarray
    adapter: Adapter | None
    refused: str | None
    """Why it is not to be adopted."""
    metrics: dict[str, object]

    def vectors_for(
        self, item_ids: Sequence[str], item_texts: Sequence[str], encoder: TextEncoder
    ) -> tuple[np.ndarray, list[int]]:
        """Return the vectors of a catalogue, and the places where they are bridged, in the order of its ids.

        What has another text, or came since, is encoded.
        """
        place = {item_id: n for n, item_id in enumerate(self.item_ids)}
        vector_IE = np.zeros((len(item_ids), encoder.dim), np.float32)
        new: list[int] = []
        bridged: list[int] = []
        for row, (item_id, text) in enumerate(zip(item_ids, item_texts, strict=True)):
            known = place.get(item_id)
            if known is None or self.item_texts[known] != text:
                new.append(row)
                continue
            vector_IE[row] = self.vector_NE[known]
            if not self.is_encoded_N[known]:
                bridged.append(row)
        if new:
            vector_IE[new] = encoder.encode([item_texts[row] for row in new])
        return vector_IE, bridged

    def save(self, folder: Path) -> None:
        """Write it, the statement last."""
        folder.mkdir(parents=True)
        if self.adapter is not None:
            self.adapter.save(folder)
        np.save(folder / VECTORS_FILE, self.vector_NE)
        told = {"before": self.before, "fingerprint": self.fingerprint, "refused": self.refused}
        told |= {"item_ids": self.item_ids, "item_texts": self.item_texts, "metrics": self.metrics}
        told["encoded"] = np.flatnonzero(self.is_encoded_N).tolist()
        (folder / PROPOSAL_FILE).write_text(json.dumps(told))

    @classmethod
    def load(cls, folder: Path) -> "Proposal":
        """Read what `save` wrote."""
        told = json.loads((folder / PROPOSAL_FILE).read_text())
        is_encoded_N = np.zeros(len(told["item_ids"]), bool)
        is_encoded_N[told.pop("encoded")] = True
        adapter = None if told["refused"] else Adapter.load(folder)
        return cls(vector_NE=np.load(folder / VECTORS_FILE), is_encoded_N=is_encoded_N, adapter=adapter, **told)


def propose(registry: Registry, log: EventLog, recipe: Recipe, cache: Path | None) -> Proposal:
    """Tune the promoted version's encoder on all interactions so far, and judge it on the latest.

    Raises `DataError` where there is nothing to learn from, `ConfigError` where the encoder cannot be tuned so.
    """
    config, finetune = recipe.section(AdapterConfig), recipe.section(FinetuneConfig)
    started_s = time.monotonic()
    state = read_version(registry, registry.current())
    if state.recipe.section(ModelConfig).media:
        raise ConfigError(f"{state.ref}: has model.media, whose projection is refitted for no other encoder of texts")
    present = TextEncoder(state.recipe.section(EncoderConfig), cache, state.adapter)
    tuned_seq = log.head_seq()
    events = read_interactions(registry, log, state)
    users = events["user_id"].unique().to_pylist()
    history = build_history(events, Vocabulary(state.item_ids, len(state.item_ids)), Vocabulary(users, len(users)))
    inputs = split_cold(state.item_texts, history, finetune, where="the log")
    later, earlier = inputs.validation[inputs.is_later], inputs.validation[~inputs.is_later]
    metrics: dict[str, object] = {"events": len(events), "targets": len(later), "base": present.fingerprint}
    metrics[TUNED_SEQ] = tuned_seq

    def refuse(reason: str) -> Proposal:
        return _proposal(state, present, None, np.empty((0, 0), np.float32), np.zeros(0, bool), reason, metrics)

    if min(len(later), len(earlier)) < config.min_targets:
        return refuse(
            f"{len(later)} later choices of items held out and {len(earlier)} before, fewer than {config.min_targets}"
        )
    judged, users_N = lay_out(inputs.full, later, finetune.max_history), inputs.full.user_row[later]
    inputs = replace(inputs, validation=earlier, is_later=inputs.is_later[~inputs.is_later])
    text_IE = present.encode(state.item_texts)
    before, tuned, best = _tune(present, inputs, finetune, text_IE)
    gains = [ndcg_at_k(choice_ranks(one.head, one.memory_IE, judged), 10) for one in (before, tuned)]
    gain = difference_interval(gains[1], gains[0], seed=finetune.seed, groups_N=users_N)
    metrics |= {"ndcg_at_10": float(gains[1].mean()), "ndcg_at_10_before": float(gains[0].mean())}
    metrics |= {"gain": asdict(gain), "epochs": best.best_epoch, "trained": tuned.tuned.trained}
    adapter = tuned.tuned.adapter()
    if adapter is None or gain.low <= config.min_gain:
        metrics["took_s"] = time.monotonic() - started_s
        return refuse(f"gains {gain.mean:.4f} [{gain.low:.4f}, {gain.high:.4f}] NDCG@10 on later choices")
    encoder = TextEncoder(present.config, cache, adapter)
    is_encoded_N = hottest(history, state, config.encode_items)
    new_IE = np.zeros_like(text_IE)
    new_IE[is_encoded_N] = encoder.encode([state.item_texts[row] for row in np.flatnonzero(is_encoded_N)])
    bridged = bridge(text_IE, new_IE, is_encoded_N)
    metrics |= {"coverage": bridged.coverage, "bridge_recall_at_10": bridged.recall}
    metrics["took_s"] = time.monotonic() - started_s
    return _proposal(state, present, encoder, bridged.vector_NE, is_encoded_N, None, metrics)


def _tune(
    encoder: TextEncoder, inputs: FinetuneInputs, config: FinetuneConfig, text_IE: np.ndarray
) -> tuple[EncoderLearner, EncoderLearner, Progress]:
    """Return a head on the encoder as it is, and encoder and head tuned on from there."""
    frozen = replace(config, tuned="frozen")
    before = EncoderLearner(TunedEncoder(encoder, frozen, inputs.texts), inputs, frozen, text_IE)
    figures = before.run().best
    after = EncoderLearner(TunedEncoder(encoder, config, inputs.texts), inputs, config, text_IE)
    start = after.tensors() | before.best
    after.resume(start, start, Progress(phase=TUNE, best_epoch=0, best=dict(figures), frozen=dict(figures)))
    return before, after, after.run()


def _proposal(
    state: VersionState,
    present: TextEncoder,
    encoder: TextEncoder | None,
    vector_NE: np.ndarray,
    is_encoded_N: np.ndarray,
    refused: str | None,
    metrics: dict[str, object],
) -> Proposal:
    is_refused = encoder is None
    return Proposal(
        before=present.fingerprint,
        fingerprint=present.fingerprint if is_refused else encoder.fingerprint,
        item_ids=[] if is_refused else state.item_ids,
        item_texts=[] if is_refused else state.item_texts,
        vector_NE=vector_NE,
        is_encoded_N=is_encoded_N,
        adapter=None if is_refused else encoder.adapter,
        refused=refused,
        metrics=metrics,
    )


def read_interactions(registry: Registry, log: EventLog, state: VersionState) -> pa.Table:
    """Return what the version was trained on and what was logged since, of items that it holds, in order of time.

    What the version leaves out, and what is held in quarantine, is left out.
    """
    left_out = Exclusions.read(registry.manifest(VersionRef(state.ref.version)).metrics)
    for delta in registry.deltas(state.ref.version):
        if (span := find_set_aside(delta)) is not None:
            left_out = left_out.joined(Exclusions(ranges=frozenset({(span.start, span.stop - 1)})))
    quarantine = Quarantine(log.path)
    held = {entry.seq for entry in quarantine.find(states=("held", "dropped"))}
    quarantine.close()
    tables, after = [registry.open_version(state.ref.version).table("history")], 0
    while logged := log.read(after, READ_EVENTS):
        after = logged[-1].seq
        kept = [
            entry.event
            for entry in logged
            if entry.event.kind in INTERACTION_KINDS
            and entry.seq not in held
            and not left_out.covers(entry.seq, entry.event.user_id)
        ]
        tables.append(events_table(kept))
    events = pa.concat_tables([table.cast(tables[0].schema) for table in tables])
    events = events.filter(pc.is_in(events["item_id"], pa.array(state.item_ids, pa.string())))
    return events.take(pc.sort_indices(events["ts_us"]))


def hottest(history: History, state: VersionState, wanted: int) -> np.ndarray:
    """Return which items are encoded first: those met most in the newest tenth of interactions, then most of all."""
    items = len(state.item_ids)
    if not wanted or wanted >= items:
        return np.ones(items, bool)
    item_row_N = history.item_row[np.argsort(history.order)]  # in order of time; a history is sorted by user
    recent = np.bincount(item_row_N[-max(len(item_row_N) // 10, 1) :], minlength=items)
    order = np.lexsort((-state.rows[COUNT_ROWS].numpy(), -recent))
    chosen = np.zeros(items, bool)
    chosen[order[:wanted]] = True
    return chosen


def write_bridged(draft: Draft, rows: Sequence[int]) -> None:
    """State in a version which items' vectors are a bridge's."""
    if rows:
        draft.add_tensors(BRIDGED, {"row": torch.tensor(rows)})


def read_bridged(registry: Registry, ref: VersionRef) -> list[int]:
    """Return which items' vectors are still a bridge's, hottest first: less those that deltas have told anew."""
    reader = registry.open_version(ref.version)
    if f"{BRIDGED}.safetensors" not in reader.manifest.files:
        return []
    told: set[int] = set()
    for number in range(1, ref.delta + 1):
        told.update(registry.open_delta(ref.version, number).tensors("rows")[f"{TEXT_ROWS}.index"].tolist())
    return [row for row in reader.tensors(BRIDGED)["row"].tolist() if row not in told]


def end_with_parent() -> None:
    """Have this process end when the one that started it does; it stands back behind requests and learning."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is what a child process runs first"

    def wait() -> None:
        parent.join()
        os._exit(1)

    os.nice(NICENESS)
    torch.set_num_threads(1)
    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def propose_into(folder: Path, recipe_toml: str, home: Home) -> str | None:
    """Write a proposal into a new folder; return why it is refused, if it is."""
    recipe = Recipe.from_toml(recipe_toml)
    log = open_log(recipe.section(EngineConfig), recipe.section(LogConfig), home.log)
    try:
        proposal = propose(open_registry(recipe, home), log, recipe, home.cache)
    finally:
        log.close()
    proposal.save(folder)
    return proposal.refused
