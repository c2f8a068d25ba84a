"""What operators ask of a running server: what becomes of slates, why an item is shown, which version is to answer.

In:  requests of keys of role admin.  Out: JSON; the registry's pointer moved.
Knows nothing of routes' protection (access.py). Everything that reads the log, the registry or a model runs in a pool.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import pydantic_core
from fastapi import Request, Response

from cluster.errors import CorruptVersionError, NoVersionError, RegistryError
from cluster.log import EventLog
from cluster.manifest import VersionRef
from cluster.registry import Registry
from serving import schemas
from serving.bodies import read_body
from serving.config import ServeConfig
from serving.experiments import ARMS
from serving.explanations import explain
from serving.metrics import Metrics
from serving.problems import ProblemError, refuse_field
from serving.recommender import FIRST_LIVE_SEQ
from serving.refresh import Refresher
from serving.stats import FeedbackStats

DELTAS_SHOWN = 100
Json = dict[str, Any]  # Any: whatever JSON holds


class Operations:
    """Answers from one replica's parts."""

    def __init__(
        self, config: ServeConfig, registry: Registry, log: EventLog, refresher: Refresher, metrics: Metrics
    ) -> None:
        self._config = config
        self._registry = registry
        self._log = log
        self._refresher = refresher
        self._metrics = metrics
        self._feedback = FeedbackStats(log)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="operations")

    async def show_stats(self) -> Response:
        """Say what became of slates by arm, minute by minute, and how this replica has answered lately."""
        return _json(await self._in_pool(self._describe_stats))

    async def explain(self, request: Request) -> Response:
        """Say why an item is shown to a user: its score without each of the interactions that it rests on."""
        body = await read_body(request, self._config.max_body_bytes)
        asked = schemas.ExplainRequest.model_validate_json(body)
        if (arm := asked.arm or self._config.arms[0]) not in self._config.arms:
            raise refuse_field("arm", f"{arm!r:.200} is not switched on; try {', '.join(self._config.arms)}")
        return _json(await self._in_pool(self._explain, asked.user_id, asked.item_id, arm))

    async def promote(self, request: Request) -> Response:
        """Have a version answer, such as 3 or 3.12; every replica follows within moments."""
        body = await read_body(request, self._config.max_body_bytes)
        asked = schemas.PromoteRequest.model_validate_json(body)
        return _json(await self._in_pool(self._move, lambda: _parse(asked.version), asked.reason))

    async def roll_back(self, request: Request) -> Response:
        """Have the version before answer again, as `recloop versions rollback` does."""
        body = await read_body(request, self._config.max_body_bytes)
        asked = schemas.RollBackRequest.model_validate_json(body or b"{}")
        return _json(await self._in_pool(self._move, self._registry.previous, asked.reason))

    def _describe_stats(self) -> Json:
        learning = self._describe_learning()
        return {
            "feedback": self._feedback.describe(),
            "learning": learning,
            "replica": self._metrics.describe_traffic(),
        }

    def _describe_learning(self) -> list[Json]:
        """Return the log loss of the newest deltas' events before they were learned, and without what was learned."""
        ref = VersionRef.parse(self._refresher.residents.live.name)
        deltas = self._registry.deltas(ref.version, after=max(ref.delta - DELTAS_SHOWN, 0))
        told = [(delta.last_seq, delta.metrics.get("validation") or {}) for delta in deltas]
        return [
            {"seq": seq, "learned": found["log_loss"], "base": found["base_log_loss"]}
            for seq, found in told
            if "log_loss" in found
        ]

    def _explain(self, user_id: str, item_id: str, arm: str) -> Json:
        model = self._refresher.residents.model_of(ARMS[arm], user_id)
        if not model.can_rank(item_id):
            raise ProblemError(HTTPStatus.NOT_FOUND, f"item {item_id!r:.200} is unknown to version {model.name}")
        bound = None if ARMS[arm].sees_live_state else FIRST_LIVE_SEQ
        state = self._log.user_state(user_id, model.max_history, before_seq=bound)
        found = explain(model, user_id, state.history, item_id)
        return {"user_id": user_id, "item_id": item_id, "arm": arm, "version": model.name, **found}

    def _move(self, find: Callable[[], VersionRef], reason: str) -> Json:
        try:
            before, ref = self._registry.current(), find()
            self._registry.manifest(ref)
            self._registry.promote(ref, reason)
        except CorruptVersionError as error:
            raise ProblemError(HTTPStatus.CONFLICT, str(error)) from error
        except (NoVersionError, RegistryError) as error:
            raise ProblemError(HTTPStatus.NOT_FOUND, str(error)) from error
        return {"promoted": str(ref), "before": str(before)}

    async def _in_pool(self, work: Callable[..., Json], *args: object) -> Json:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


def _parse(version: str) -> VersionRef:
    try:
        return VersionRef.parse(version)
    except (ValueError, RegistryError) as error:
        raise refuse_field("version", f"{version!r:.100} is no version; try 3 or 3.12") from error


def _json(value: Json) -> Response:
    return Response(pydantic_core.to_json(value), media_type="application/json")
