"""What is answered when the answer is not ready by a request's deadline: the user's last slate, else what is popular.

In:  queries that are late.  Out: a `Recommendation` and the fallback's name.
Knows nothing of deadlines. Only answers to requests that have one are remembered, the newest of them, and never again
shown what the late request excludes; what the user has got since may be among them. Slates that were narrowed are not
remembered, and a late request that is narrowed has the user's last slate only where enough of that is left.
"""

import uuid
from collections import OrderedDict
from dataclasses import replace
from typing import Literal

from serving.experiments import ARMS
from serving.recommender import Query, Recommendation, find_within, leave_out
from serving.refresh import Residents
from training.policies import Slate

KEPT = 10_000
"""Slates that are remembered, by user and arm."""
KEPT_ITEMS = 100
"""Of each, from its top; also the most that stand in for a longer one."""

FallbackName = Literal["cached", "popular"]


class Fallbacks:
    """The last slates of one replica; for its event loop's thread alone."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[str, str], Recommendation] = OrderedDict()

    def remember(self, query: Query, found: Recommendation) -> None:
        """Keep the top of what a user was shown."""
        if query.only is None and not query.categories and query.domain is None:
            slate = Slate(
                item_ids=found.slate.item_ids[:KEPT_ITEMS],
                scores=found.slate.scores[:KEPT_ITEMS],
                propensities=found.slate.propensities[:KEPT_ITEMS],
            )
            kept = replace(found, slate=slate, texts=found.texts[:KEPT_ITEMS], stated=None)
            self._last[query.user_id, query.arm] = kept
            self._last.move_to_end((query.user_id, query.arm))
            if len(self._last) > KEPT:
                self._last.popitem(last=False)

    def find(self, query: Query, residents: Residents) -> tuple[Recommendation, FallbackName]:
        """Return what stands in for an answer, from memory alone."""
        last = self._last.get((query.user_id, query.arm)) if query.only is None else None
        if last is not None:
            model = residents.model_of(ARMS[query.arm], query.user_id)
            barred, within_I = query.exclude | residents.unavailable, find_within(model, query, residents)
            kept = [
                place
                for place, item_id in enumerate(last.slate.item_ids)
                if item_id not in barred
                and (within_I is None or (model.knows(item_id) and within_I[model.index_of[item_id]]))
            ][: query.k]
            if kept and (within_I is None or len(kept) == query.k):
                slate = Slate(
                    item_ids=[last.slate.item_ids[place] for place in kept],
                    scores=[last.slate.scores[place] for place in kept],
                    propensities=[1.0] * len(kept),
                )
                texts = [last.texts[place] for place in kept]
                return replace(last, request_id=f"{query.arm}-{uuid.uuid4().hex}", slate=slate, texts=texts), "cached"
        return _popular(query, residents), "popular"


def _popular(query: Query, residents: Residents) -> Recommendation:
    model = residents.model_of(ARMS[query.arm], query.user_id)
    unranked: list[tuple[str, str]] = []
    if query.only is not None:
        unranked = leave_out(model, query, residents.unavailable)
        left = {item_id for item_id, _ in unranked}
        found = model.rank("", (), [item_id for item_id in query.only if item_id not in left])
    else:
        barred, within_I = query.exclude | residents.unavailable, find_within(model, query, residents)
        found = model.recommend("", (), query.k, barred, None, within_I)
    slate = Slate(item_ids=found.item_ids, scores=found.scores.tolist(), propensities=[1.0] * len(found.item_ids))
    return Recommendation(
        request_id=f"{query.arm}-{uuid.uuid4().hex}",
        version=model.name,
        learned_seq=model.learned_seq,
        state_seq=0,
        state_fallback=False,
        reflects_min_seq=None if query.min_seq is None else False,
        cold_start=True,
        slate=slate,
        texts=[model.text_of(item_id) for item_id in slate.item_ids],
        stated=None,
        unranked=tuple(unranked),
    )
