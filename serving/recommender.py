"""The hot path: state → retrieve → rank → policy → slate, in one process.

In:  a `Query`.  Out: a `Recommendation` that names the one version it came from.
Knows nothing of HTTP or of how versions arrive. Blocks on the log and on torch: call it off the event loop.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cluster.log import EventLog, Interaction, UserState
from embeddings.text_encoder import EncoderConfig
from serving.experiments import ARMS
from serving.interests import Stated
from serving.kept import Basis, KeptCandidates
from serving.metrics import Metrics
from serving.refresh import Residents
from training.models.interests import Interests
from training.models.resident import Candidates, Resident
from training.policies import PolicyConfig, Slate, build_policy

FIRST_LIVE_SEQ = 1
"""Sequence number of the log's first event; training's history lies before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What to recommend to whom."""

    user_id: str
    k: int
    arm: str
    min_seq: int | None = None
    """An event the answer should reflect."""
    exclude: frozenset[str] = frozenset()
    stated: Stated | None = None
    """The interests that the request states."""
    boost: frozenset[str] = frozenset()
    """Items that stand before all others."""
    bury: frozenset[str] = frozenset()
    """Items that stand behind all others."""
    categories: tuple[str, ...] = ()
    """Only items of any of these, where some are given."""
    domain: str | None = None
    """Only items of it."""
    only: tuple[str, ...] | None = None
    """The caller's candidates, each once; none means the catalogue, less what the user has unless the version
    repeats."""

    @property
    def is_plain(self) -> bool:
        """Whether everyone's request is like it: nothing but the user decides which candidates there are."""
        narrowed = self.categories or self.domain is not None or self.only is not None
        return not (narrowed or self.exclude or self.boost or self.stated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """A slate, and what it was made from."""

    request_id: str
    version: str
    learned_seq: int
    """Last event that the weights have learned from."""
    state_seq: int
    """The user's newest event in the state used; 0 where there is none."""
    state_fallback: bool
    """Whether the state is what this node's own file says because the shared one did not answer."""
    reflects_min_seq: bool | None
    """Whether the state holds everything up to the query's `min_seq`; none where none was given."""
    cold_start: bool
    slate: Slate
    texts: list[str | None]
    """Text of each item of the slate."""
    stated: Stated | None = None
    """The query's interests, with the reason where they were not used."""
    uses_history: bool = True
    """Whether the user's history has a part in it."""
    unranked: tuple[tuple[str, str], ...] = ()
    """Of the caller's candidates those left out, each with the reason."""


class Recommender:
    """Answers queries from the log's user state and the resident models."""

    def __init__(
        self,
        log: EventLog,
        residents: Callable[[], Residents],
        policy: PolicyConfig,
        *,
        seed: int,
        candidates: int,
        kept_users: int = 0,
        metrics: Metrics | None = None,
    ) -> None:
        self._log = log
        self._residents = residents
        self._policy = build_policy(policy, seed)
        self._candidates = candidates
        self._kept = KeptCandidates(kept_users)
        self._metrics = metrics or Metrics()

    def recommend(self, query: Query) -> Recommendation:
        """Return up to k items that the user lacks, unless the version repeats; a stranger gets what suits one."""
        arm = ARMS[query.arm]
        residents = self._residents()  # one reference for the whole request: a swap meanwhile changes nothing here
        model = residents.model_of(arm, query.user_id)

        # The head is read before the state, so the state holds at least what is claimed of it.
        head_seq = self._log.head_seq() if query.min_seq is not None and arm.sees_live_state else 0
        bound = None if arm.sees_live_state else FIRST_LIVE_SEQ
        stated = query.stated and _usable(model, query.stated)
        unranked: list[tuple[str, str]] = []
        basis = candidates = None
        state, since_s = UserState(history=(), seq=0), time.perf_counter()
        if query.is_plain and query.k <= self._candidates and arm.sees_live_state:
            state = self._log.user_state(query.user_id, 0)
            basis = Basis(residents, state.seq, state.fallback)
            candidates = self._kept.find(query.user_id, query.arm, basis)
            self._metrics.count_kept(hit=candidates is not None)
        if candidates is None:
            state = self._log.user_state(query.user_id, model.max_history, before_seq=bound)
            since_s = self._lap("state", since_s)
            interests = stated.interests if stated is not None else None
            candidates, unranked = self._find(query, model, residents, state.history, interests)
            if basis is not None:
                self._kept.keep(query.user_id, query.arm, basis, candidates)
            since_s = self._lap("candidates", since_s)
        else:
            since_s = self._lap("state", since_s)
        if query.boost or query.bury:
            candidates = _apply_rules(candidates, query)
        slate = self._policy.slate(candidates.item_ids, candidates.scores, query.k)
        self._lap("policy", since_s)
        return Recommendation(
            request_id=f"{query.arm}-{uuid.uuid4().hex}",
            version=model.name,
            learned_seq=model.learned_seq,
            state_seq=state.seq,
            state_fallback=state.fallback,
            reflects_min_seq=None
            if query.min_seq is None
            else query.min_seq <= max(head_seq, state.seq, state.up_to_seq),
            cold_start=candidates.cold_start,
            slate=slate,
            texts=[model.text_of(item_id) for item_id in slate.item_ids],
            stated=stated,
            unranked=tuple(unranked),
            uses_history=query.stated is None or any(model.knows(entry.item_id) for entry in state.history),
        )

    def _lap(self, stage: str, since_s: float) -> float:
        """Count how long a stage has taken, and return when the next begins."""
        now_s = time.perf_counter()
        self._metrics.observe_stage(stage, now_s - since_s)
        return now_s

    def _find(
        self,
        query: Query,
        model: Resident,
        residents: Residents,
        history: Sequence[Interaction],
        interests: Interests | None,
    ) -> tuple[Candidates, list[tuple[str, str]]]:
        """Return the candidates, best first, and those of the caller's that are none, each with the reason."""
        unranked: list[tuple[str, str]] = []
        if query.only is not None:
            unranked = leave_out(model, query, residents.unavailable)
            left = {item_id for item_id, _ in unranked}
            ranked = [item_id for item_id in query.only if item_id not in left]
            candidates = model.rank(query.user_id, history, ranked, interests)
        else:
            exclude = query.exclude | residents.unavailable
            if not model.repeats:
                exclude |= self._log.seen_items(query.user_id)  # all that the user has, whatever the arm
            within_I = find_within(model, query, residents)
            wanted = max(query.k, self._candidates)
            candidates = model.recommend(query.user_id, history, wanted, exclude, interests, within_I)
            if query.boost:
                candidates = _with_boosted(model, query, history, candidates, exclude, within_I)
        return (candidates if interests is None else model.bury(candidates, interests)), unranked


def find_within(model: Resident, query: Query, residents: Residents) -> npt.NDArray[np.bool_] | None:
    """Return which of the model's items the query is narrowed to; none where to all."""
    if not query.categories and query.domain is None:
        return None
    return model.within(query.categories, query.domain, residents.tags)


def leave_out(model: Resident, query: Query, unavailable: frozenset[str]) -> list[tuple[str, str]]:
    """Return the caller's candidates that are not ranked, each with the reason."""
    left: list[tuple[str, str]] = []
    for item_id in query.only or ():
        if item_id in query.exclude:
            left.append((item_id, "excluded"))
        elif item_id in unavailable:
            left.append((item_id, "unavailable"))
        elif not model.can_rank(item_id):
            left.append((item_id, "unknown"))
    return left


def _with_boosted(
    model: Resident,
    query: Query,
    history: Sequence[Interaction],
    candidates: Candidates,
    exclude: frozenset[str],
    within_I: npt.NDArray[np.bool_] | None,
) -> Candidates:
    """Return the candidates and, after them, what is boosted and was not found among so many."""
    more = query.boost - exclude - set(candidates.item_ids)
    if within_I is not None:
        more = {item_id for item_id in more if model.knows(item_id) and within_I[model.index_of[item_id]]}
    ranked = model.rank(query.user_id, history, sorted(item_id for item_id in more if model.can_rank(item_id)))
    return replace(
        candidates,
        item_ids=[*candidates.item_ids, *ranked.item_ids],
        scores=np.concatenate([candidates.scores, ranked.scores]),
    )


def _apply_rules(candidates: Candidates, query: Query) -> Candidates:
    """Return the candidates with what is boosted before the others and what is buried behind, else in their order."""
    places = [(item_id in query.bury) - (item_id in query.boost) for item_id in candidates.item_ids]
    order = np.argsort(places, kind="stable")
    item_ids = [candidates.item_ids[place] for place in order]
    return replace(candidates, item_ids=item_ids, scores=candidates.scores[order])


def _usable(model: Resident, stated: Stated) -> Stated:
    """Return the interests as far as the model can use them."""
    if stated.interests is None:
        return stated
    made_by = model.state.encoder  # of a version that does not state it, the recipe must do
    if stated.encoder != made_by if made_by else model.state.recipe.section(EncoderConfig) != stated.config:
        return replace(stated, interests=None, fallback="encoder_mismatch")
    return stated if model.has_texts else replace(stated, interests=None, fallback="no_text")
