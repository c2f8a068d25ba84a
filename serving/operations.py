"""What operators ask of a running server: what becomes of slates, why an item is shown, which version is to answer.

In:  requests of keys of role admin.  Out: JSON; the registry's pointer moved.
Knows nothing of routes' protection (access.py). Everything that reads the log, the registry or a model runs in a pool.
"""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import pydantic_core
from fastapi import Request, Response

from cluster.errors import CorruptVersionError, RegistryError
from cluster.log import EventLog
from cluster.manifest import VersionRef
from cluster.pointer import DELTA_MOVE
from cluster.registry import Registry
from serving import schemas
from serving.bodies import read_body
from serving.config import ServeConfig
from serving.experiments import ARMS
from serving.explanations import explain
from serving.metrics import Metrics
from serving.preflight import check_chain
from serving.problems import ProblemError, refuse_field
from serving.recommender import FIRST_LIVE_SEQ
from serving.refresh import Refresher
from serving.stats import FeedbackStats

DELTAS_SHOWN = 100
"""Newest deltas whose figures are shown."""
VERSIONS_SHOWN = 20
"""Newest versions, and newest moves between them."""
VALIDATED = ("log_loss", "base_log_loss", "ndcg_at_10", "base_ndcg_at_10")
"""Figures of progressive validation that are shown."""
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
        self._learning: dict[VersionRef, Json] = {}
        """Figures of the newest deltas, which never change."""
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
        return _json(await self._in_pool(self._explain, asked, arm))

    async def promote(self, request: Request) -> Response:
        """Have a version answer, such as 3 or 3.12; every replica follows within moments."""
        body = await read_body(request, self._config.max_body_bytes)
        asked = schemas.PromoteRequest.model_validate_json(body)
        return _json(await self._in_pool(self._move, lambda: _parse(asked.version), asked.reason))

    async def roll_back(self, request: Request) -> Response:
        """Have the version before answer again, as `recloop versions rollback` does."""
        body = await read_body(request, self._config.max_body_bytes)
        asked = schemas.RollBackRequest.model_validate_json(body or b"{}")
        return _json(await self._in_pool(self._move, self._registry.previous, asked.reason or "rollback"))

    def _describe_stats(self) -> Json:
        return {
            "feedback": self._feedback.describe(),
            "learning": self._describe_learning(),
            "versions": self._describe_versions(),
            "moves": [
                {"at_us": move.at_us, "version": str(move.ref), "reason": move.reason}
                for move in self._registry.history()
                if move.reason != DELTA_MOVE
            ][-VERSIONS_SHOWN:],
            "replica": self._metrics.describe_traffic(),
        }

    def _describe_learning(self) -> list[Json]:
        """Return how well events were foreseen before they were learned from, and by what had not learned at all."""
        served = VersionRef.parse(self._refresher.residents.live.name)
        newest = range(max(served.delta - DELTAS_SHOWN, 0) + 1, served.delta + 1)
        refs = [VersionRef(served.version, number) for number in newest]
        with contextlib.suppress(RegistryError):  # a delta that has been damaged since: what is wrong is told elsewhere
            self._learning = {ref: self._learning.get(ref) or self._read_learning(ref) for ref in refs}
        return [figures for figures in self._learning.values() if "log_loss" in figures]

    def _read_learning(self, ref: VersionRef) -> Json:
        manifest = self._registry.manifest(ref)
        told = manifest.metrics.get("validation") or {}
        return {
            "version": str(ref),
            "seq": manifest.last_seq,
            **{name: told[name] for name in VALIDATED if name in told},
        }

    def _describe_versions(self) -> list[Json]:
        """Return the newest versions as they were published, without deltas, newest first."""
        current, found = self._registry.readable_current(), []
        for number in reversed(self._registry.numbers()[-VERSIONS_SHOWN:]):
            with contextlib.suppress(RegistryError):  # damaged, or dropped meanwhile: nothing to promote
                manifest = self._registry.manifest(VersionRef(number))
                about = {"version": str(number), "created_us": manifest.created_us, "learned_seq": manifest.last_seq}
                promoted = str(current) if current and current.version == number else None
                found.append({**about, "system": manifest.system, "promoted": promoted})
        return found

    def _explain(self, asked: schemas.ExplainRequest, arm: str) -> Json:
        model = self._refresher.residents.model_of(ARMS[arm], asked.user_id)
        if not model.can_rank(asked.item_id):
            detail = f"item {asked.item_id!r:.200} is unknown to version {model.name}"
            raise ProblemError(HTTPStatus.NOT_FOUND, detail)
        bound = None if ARMS[arm].sees_live_state else FIRST_LIVE_SEQ
        state = self._log.user_state(asked.user_id, model.max_history, before_seq=bound)
        about = {"user_id": asked.user_id, "item_id": asked.item_id, "arm": arm, "version": model.name}
        rule = "buried" if asked.item_id in asked.bury else "boosted" if asked.item_id in asked.boost else None
        return about | explain(model, asked.user_id, state.history, asked.item_id) | {"rule": rule}

    def _move(self, find: Callable[[], VersionRef], reason: str) -> Json:
        try:
            ref = find()
            check_chain(self._registry, ref)
            before = self._registry.readable_current()
            self._registry.promote(ref, reason)
        except CorruptVersionError as error:
            raise ProblemError(HTTPStatus.CONFLICT, str(error)) from error
        except RegistryError as error:
            raise ProblemError(HTTPStatus.NOT_FOUND, str(error)) from error
        return {"promoted": str(ref), "before": str(before) if before else None, "reason": reason}

    async def _in_pool(self, work: Callable[..., Json], *args: object) -> Json:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


def _parse(version: str | int) -> VersionRef:
    try:
        return VersionRef.parse(str(version))
    except (ValueError, RegistryError) as error:  # more digits than Python reads, or none
        raise refuse_field("version", f"{version!r:.100} is no version; try 3 or 3.12") from error


def _json(value: Json) -> Response:
    return Response(pydantic_core.to_json(value), media_type="application/json")
