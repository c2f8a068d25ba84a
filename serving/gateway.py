"""The HTTP surface: routes, and what each reads and answers.

In:  requests.  Out: JSON, errors as problems.
Knows nothing of Ray: the app is plain ASGI. Nothing here blocks the event loop; reading state, torch and the encoder
run in two small pools, so that a slow new item does not hold up recommendations.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import pydantic_core
from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel

from cluster.canary import Canary
from cluster.catalogue import Item, parse_item
from cluster.events import MAX_ID_CHARS
from cluster.keys import KeyRing
from cluster.log import EventLog
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.text_encoder import EncoderConfig
from serving import recommender, schemas
from serving.access import AccessControl
from serving.admission import Admission
from serving.batching import Embedder
from serving.bodies import read_body, split_entries
from serving.config import ServeConfig
from serving.embeddings import EmbeddingsApi
from serving.entities import EntitiesApi
from serving.experiments import ARMS
from serving.fallbacks import FallbackName, Fallbacks
from serving.feedback import Intake, Receipt, parse_all
from serving.freshness import time_state
from serving.interests import InterestReader, Stated
from serving.metrics import Metrics, RequestTimer
from serving.operations import Operations
from serving.pages import build_pages
from serving.past import LATER_SEED, count_training_events, trained_version
from serving.problems import add_problem_handlers, problem_response, refuse_field
from serving.refresh import Refresher
from serving.request_notes import NOTES, RequestIds, RequestLog
from training.models.resident import Resident

Result = TypeVar("Result")
Json = dict[str, Any]  # Any: whatever JSON holds

HISTORY_SHOWN = 20
"""Newest moves of the pointer that `GET /v1/versions` lists."""
STATE_LOOK_S = 0.01
"""Least time between two looks whether requests see an event that was taken in."""


class PlainRoute(APIRoute):
    """A route whose answer takes the request alone: described as others are, without FastAPI's work on parameters."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the answer itself."""
        return self.endpoint


class Gateway:
    """Answers HTTP from one replica's parts."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        registry: Registry,
        log: EventLog,
        refresher: Refresher,
        recommender: recommender.Recommender,
        encoder: Embedder,
        encoder_config: EncoderConfig,
        keys: KeyRing,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._registry = registry
        self._log = log
        self._intake = Intake(log)
        self._refresher = refresher
        self._recommender = recommender
        self._encoder = encoder
        self._interests = InterestReader(encoder, encoder_config)
        self._embeddings = EmbeddingsApi(
            config, encoder, encoder_config, lambda: refresher.residents.live.state.text_dim
        )
        self._keys = keys
        self._operations = Operations(config, registry, log, refresher, metrics)
        self._fallbacks = Fallbacks()
        self._metrics = metrics
        self._next_look_s = 0.0
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="request")
        self._item_pool = ThreadPoolExecutor(1, thread_name_prefix="items")
        self._entities = EntitiesApi(config, log, refresher, self._pool, self._item_pool)

    def build_api(self) -> FastAPI:
        """Return the ASGI app."""
        api = FastAPI(title="recloop", description="A recommender that learns while it serves.", redoc_url=None)
        add_problem_handlers(api)
        rates = {"rate_per_s": self._config.key_rate_per_s, "burst_s": self._config.key_burst_s}
        api.add_middleware(Admission, max_wait_s=self._config.max_wait_ms / 1e3)
        api.add_middleware(AccessControl, keys=self._keys, replicas=self._config.replicas, **rates)
        api.add_middleware(RequestTimer, metrics=self._metrics)
        api.add_middleware(RequestIds, log=RequestLog(), log_all=self._config.log_requests)

        def add(path: str, answer: Callable[..., Any], method: str, model: type[BaseModel] | None, body: Json) -> None:
            route_class = PlainRoute if body else APIRoute  # who takes a body reads it from the request
            described = ({200: {"model": model}} if model else {}) | schemas.describe_problems(path, model)
            content = {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}
            extra = content if body else None
            about: Json = {"responses": described, "openapi_extra": extra, "route_class_override": route_class}
            api.router.add_api_route(path, answer, methods=[method], **about)

        recommend_body = schemas.RecommendRequest.model_json_schema()
        embeddings_body = schemas.EmbeddingsRequest.model_json_schema()
        event_body = schemas.one_or_many(schemas.event_schema(), "events")
        user_body = schemas.one_or_many(schemas.user_schema(), "users")
        delete_body = schemas.DeleteRequest.model_json_schema()
        item_body = schemas.one_or_many(schemas.item_schema(), "items")
        add("/v1/recommend", self.recommend, "POST", schemas.RecommendResponse, recommend_body)
        add("/v1/rank", self.rank, "POST", schemas.RankResponse, schemas.RankRequest.model_json_schema())
        add("/v1/feedback", self.take_feedback, "POST", schemas.FeedbackResponse, event_body)
        add("/v1/items", self.put_items, "PUT", schemas.ItemsResponse, item_body)
        add("/v1/items/{item_id:path}/similar", self.list_similar, "GET", schemas.SimilarResponse, {})
        add("/v1/items/delete", self._entities.delete_items, "POST", schemas.DeletedResponse, delete_body)
        add("/v1/items/{item_id:path}", self._entities.show_item, "GET", schemas.ItemResponse, {})
        add("/v1/items/{item_id:path}", self._entities.delete_item, "DELETE", schemas.DeletedResponse, {})
        add("/v1/users", self._entities.put_users, "PUT", schemas.UsersResponse, user_body)
        add("/v1/users/{user_id:path}/similar", self._entities.list_similar, "GET", schemas.SimilarUsersResponse, {})
        add("/v1/users/{user_id:path}", self.show_user, "GET", schemas.UserResponse, {})
        add("/v1/embeddings", self._embeddings.embed, "POST", schemas.EmbeddingsResponse, embeddings_body)
        add("/v1/models", self._embeddings.list_models, "GET", schemas.ModelsResponse, {})
        add("/v1/models/{model:path}", self._embeddings.show_model, "GET", schemas.ModelDescription, {})
        add("/v1/versions", self.list_versions, "GET", None, {})
        operations, promote_body = self._operations, schemas.PromoteRequest.model_json_schema()
        explain_body, roll_back_body = (
            model.model_json_schema() for model in (schemas.ExplainRequest, schemas.RollBackRequest)
        )
        add("/v1/versions/promote", operations.promote, "POST", schemas.MoveResponse, promote_body)
        add("/v1/versions/rollback", operations.roll_back, "POST", schemas.MoveResponse, roll_back_body)
        add("/v1/stats", operations.show_stats, "GET", schemas.StatsResponse, {})
        add("/v1/explain", operations.explain, "POST", schemas.ExplainResponse, explain_body)
        add("/healthz", self.check_health, "GET", None, {})
        add("/readyz", self.check_readiness, "GET", None, {})
        text: dict[int | str, Json] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
        api.add_api_route("/metrics", self.show_metrics, responses=text, response_class=PlainTextResponse)
        api.router.routes.extend(build_pages())
        return api

    async def recommend(self, request: Request) -> Response:
        """Recommend up to k items that the user lacks, or buys again; a user nobody knows gets a cold start."""
        asked = schemas.RecommendRequest.model_validate_json(await read_body(request, self._config.max_body_bytes))
        if asked.k > self._config.max_k:
            raise refuse_field("k", f"{asked.k:,} is more than serve.max_k={self._config.max_k:,}")
        return await self._answer(asked, asked.k, None, tuple(asked.categories), asked.domain)

    async def rank(self, request: Request) -> Response:
        """Put the caller's candidates in order for a user, those that the user has too."""
        asked = schemas.RankRequest.model_validate_json(await read_body(request, self._config.max_body_bytes))
        candidates = tuple(dict.fromkeys(asked.items))
        return await self._answer(asked, len(candidates), candidates)

    async def _answer(
        self,
        asked: schemas.AskRequest,
        k: int,
        candidates: tuple[str, ...] | None,
        categories: tuple[str, ...] = (),
        domain: str | None = None,
    ) -> Response:
        began_s = time.monotonic()
        arm = asked.arm or self._config.arms[0]
        if arm not in self._config.arms:
            raise refuse_field("arm", f"{arm!r:.200} is not switched on; try {', '.join(self._config.arms)}")
        deadline_s = None if asked.deadline_ms is None else began_s + asked.deadline_ms / 1e3
        query = recommender.Query(
            user_id=asked.user_id,
            k=k,
            arm=arm,
            min_seq=asked.min_seq,
            exclude=frozenset(asked.exclude),
            stated=await self._read_interests(asked, arm, deadline_s),
            boost=frozenset(asked.boost),
            bury=frozenset(asked.bury),
            categories=categories,
            domain=domain,
            only=candidates,
        )
        found, fallback = await self._find(query, deadline_s)
        if found.state_fallback:
            self._metrics.count_state_fallback()
        answer = _describe_recommendation(query, found, with_text=asked.with_text)
        if candidates is not None:
            answer["unranked"] = [{"item_id": item_id, "reason": reason} for item_id, reason in found.unranked]
        if fallback is not None:
            self._metrics.count_deadline_fallback(fallback)
            answer["fallback"] = fallback
        if (notes := NOTES.get()) is not None:
            notes.version, notes.arm, notes.fallback = found.version, arm, fallback
        return _json(answer)

    async def _find(
        self, query: recommender.Query, deadline_s: float | None
    ) -> tuple[recommender.Recommendation, FallbackName | None]:
        """Return the answer, or what stands in for it after the deadline, with its name."""
        work = self._in_pool(self._recommend, query, time.perf_counter())
        if deadline_s is None:
            return await work, None
        try:
            found = await asyncio.wait_for(work, max(deadline_s - time.monotonic(), 0))  # what has not begun never will
        except TimeoutError:
            return self._fallbacks.find(query, self._refresher.residents)
        self._fallbacks.remember(query, found)
        return found, None

    def _recommend(self, query: recommender.Query, asked_s: float) -> recommender.Recommendation:
        self._metrics.observe_stage("queue", time.perf_counter() - asked_s)
        return self._recommender.recommend(query)

    async def _read_interests(self, asked: schemas.AskRequest, arm: str, deadline_s: float | None) -> Stated | None:
        """Read interests as the version that answers does, in half of the time there is: the other is for the slate."""
        if asked.interests is None:
            return None
        patience_s = min(self._config.interests_timeout_s, self._config.encoder_timeout_s)
        if deadline_s is not None:
            patience_s = min(patience_s, max(deadline_s - time.monotonic(), 0) / 2)
        state = self._refresher.residents.model_of(ARMS[arm], asked.user_id).state
        return await self._interests.read(asked.interests, patience_s, state.ref.version, state.encoder)

    async def take_feedback(self, request: Request) -> Response:
        """Log one event or many; the answer means that they survive a crash. Known event ids are not logged again."""
        receipt = await self._intake.take(await self._entries(request, "events"))
        self._metrics.count_events("accepted", receipt.accepted)
        self._metrics.count_events("duplicate", receipt.duplicates)
        self._metrics.count_events("rejected", len(receipt.rejected))
        self._time_state(receipt)
        return _json(_describe_receipt(receipt), HTTPStatus.OK if receipt.appended else HTTPStatus.UNPROCESSABLE_ENTITY)

    async def put_items(self, request: Request) -> Response:
        """Add items, or replace those of the same id; they are recommendable by their text at once."""
        items, rejected = parse_all(await self._entries(request, "items"), parse_item)
        if items:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._item_pool, self._store_items, items)
        status = HTTPStatus.OK if items else HTTPStatus.UNPROCESSABLE_ENTITY
        return _json({"accepted": len(items), "rejected": [asdict(entry) for entry in rejected]}, status)

    async def list_similar(self, item_id: str, k: Annotated[int, Query(ge=1, le=1_000)] = 10) -> Response:
        """List the items nearest to an item; its id may hold slashes."""
        residents = self._refresher.residents
        model = residents.live
        if not model.knows(item_id):
            return _unknown("item", item_id, model)
        unavailable = residents.unavailable
        found = await self._in_pool(model.similar, item_id, k + len(unavailable))
        shown = [(near_id, score) for near_id, score in found if near_id not in unavailable][:k]
        neighbours = [{"item_id": near_id, "score": float(score)} for near_id, score in shown]
        found_in = {"version": model.name, "learned_seq": model.learned_seq}
        return _json({"item_id": item_id, **found_in, "items": neighbours})

    async def show_user(
        self, user_id: Annotated[str, Path(max_length=MAX_ID_CHARS)], k: Annotated[int, Query(ge=1, le=1_000)] = 20
    ) -> Response:
        """Say what is known of a user, whose id may hold slashes, and what the next answer is made from."""
        return _json(await self._in_pool(self._describe_user, user_id, k))

    async def list_versions(self) -> Response:
        """Say what answers each arm, what is promoted and what it knew beforehand, and how fresh the weights are."""
        return _json(await self._in_pool(self._describe_versions))

    async def check_health(self) -> Response:
        """Say that the process answers."""
        return _json({"status": "ok"})

    async def check_readiness(self) -> Response:
        """Say whether requests can be answered: a version is loaded and the log can be read."""
        residents = self._refresher.residents
        head_seq = await self._in_pool(self._log.head_seq)
        about = {"version": residents.live.name, "head_seq": head_seq, "problems": self._problems()}
        return _json({"status": "ready", **about})

    async def show_metrics(self) -> Response:
        """Return the answering replica's metrics for Prometheus."""
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _problems(self) -> Json:
        state = self._log.state_problem
        return {**self._refresher.problems, **({"state": state} if state else {})}

    def _store_items(self, items: Sequence[Item]) -> None:
        self._encoder.encode(
            [item.text for item in items]
        )  # first, and cached: an item that cannot be encoded is not stored
        self._log.put_items(items)
        self._refresher.refresh_items()

    def _describe_user(self, user_id: str, k: int) -> Json:
        arm = ARMS[self._config.arms[0]]
        model = self._refresher.residents.model_of(arm, user_id)
        state = self._log.user_state(user_id, k, None if arm.sees_live_state else recommender.FIRST_LIVE_SEQ)
        told = self._log.find_user(user_id)
        about: Json = {
            "user_id": user_id,
            "version": model.name,
            "has_row": user_id in model.user_row,
            "state_seq": state.seq,
            "attributes": dict(told.attributes) if told is not None else {},
            "items": len(self._log.seen_items(user_id)),
            "looked_back_on": model.max_history,
            "history": [{**entry._asdict(), "text": model.text_of(entry.item_id)} for entry in state.history],
        }
        return about | ({"state_fallback": True} if state.fallback else {})

    def _describe_versions(self) -> Json:
        residents = self._refresher.residents
        trained = trained_version(self._registry, VersionRef.parse(residents.live.name))
        return {
            "current": str(self._registry.current()),
            "served": residents.live.name,
            "learns": bool(residents.live.state.dense),
            "learned_seq": residents.live.learned_seq,
            "head_seq": self._log.head_seq(),
            "items": residents.live.item_count,
            "training_events": count_training_events(self._registry, trained),
            "knows_later_events": self._log.count_seeded(LATER_SEED) > 0,
            "arms": {name: residents.model_of(ARMS[name]).name for name in self._config.arms},
            "canary": _describe_trial(residents.trial, residents.canary),
            "previous": residents.previous.name if residents.previous else None,
            "problems": self._problems(),
            "weights_freshness_ms": self._metrics.recent_freshness("weights"),
            "freshness_ms": {
                name: self._metrics.recent_freshness(name) for name in ("state", "row", "dense", "adapter")
            },
            "history": [
                {"at_us": move.at_us, "version": str(move.ref), "reason": move.reason}
                for move in self._registry.history()[-HISTORY_SHOWN:]
            ],
        }

    def _time_state(self, receipt: Receipt) -> None:
        """Have one of a request's new events looked for as the next request would, but not at any rate."""
        new = [entry.seq for entry in receipt.appended if not entry.duplicate]
        if new and time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + STATE_LOOK_S
            self._pool.submit(time_state, self._log, self._metrics, new[-1])

    async def _in_pool(self, work: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    async def _entries(self, request: Request, name: str) -> Sequence[object]:
        body = await read_body(request, self._config.max_body_bytes)
        return split_entries(body, name, self._config.max_batch_events)


def _unknown(kind: str, name: str, model: Resident) -> Response:
    return problem_response(HTTPStatus.NOT_FOUND, f"{kind} {name!r:.200} is unknown to version {model.name}")


def _describe_recommendation(query: recommender.Query, found: recommender.Recommendation, *, with_text: bool) -> Json:
    slate = found.slate
    items: list[Json] = [
        {"item_id": item_id, "position": position, "score": score, "propensity": propensity}
        for position, (item_id, score, propensity) in enumerate(
            zip(slate.item_ids, slate.scores, slate.propensities, strict=True)
        )
    ]
    if with_text:
        items = [{**item, "text": text} for item, text in zip(items, found.texts, strict=True)]
    answer = {
        "request_id": found.request_id,
        "user_id": query.user_id,
        "version": found.version,
        "learned_seq": found.learned_seq,
        "state_seq": found.state_seq,
        "arm": query.arm,
        "cold_start": found.cold_start,
        "items": items,
    }
    if found.stated is not None:
        answer["encoder"] = found.stated.encoder
        answer["interests"] = _describe_interests(found.stated)
        answer["used"] = [
            *(["interests"] if found.stated.interests is not None else []),
            *(["history"] if found.uses_history else []),
        ]
    if found.state_fallback:
        answer["state_fallback"] = True
    return answer if found.reflects_min_seq is None else {**answer, "reflects_min_seq": found.reflects_min_seq}


def _describe_interests(stated: Stated) -> Json:
    about: Json = {"liked": stated.liked, "disliked": stated.disliked}
    return about if stated.fallback is None else {**about, "fallback": stated.fallback}


def _describe_trial(trial: Canary | None, model: Resident | None) -> Json | None:
    if trial is None:
        return None
    return {"version": str(trial.ref), "share": trial.share, "from_seq": trial.from_seq, "served": model is not None}


def _describe_receipt(receipt: Receipt) -> Json:
    return {
        "accepted": receipt.accepted,
        "duplicates": receipt.duplicates,
        "last_seq": max((entry.seq for entry in receipt.appended), default=None),
        "results": [entry._asdict() for entry in receipt.appended],
        "rejected": [asdict(entry) for entry in receipt.rejected],
    }


def _json(value: Json, status: int = HTTPStatus.OK) -> Response:
    return Response(pydantic_core.to_json(value), status, media_type="application/json")
