"""Items and users one by one and in bulk: what is known of them, what is told, what is deleted, who is like whom.

In:  requests.  Out: JSON, errors as problems.
Knows nothing of how items are put or recommended. A deleted item is one whose availability is over: whatever keeps
unavailable items from answers keeps it from them too, and putting it again brings it back.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any

import pydantic_core
import torch
from fastapi import Path, Query, Request, Response

from cluster.catalogue import Item, parse_user
from cluster.events import MAX_ID_CHARS
from cluster.log import EventLog
from serving.bodies import read_body, split_entries
from serving.config import ServeConfig
from serving.feedback import Rejected, parse_all
from serving.problems import ProblemError
from serving.refresh import Refresher
from training.models.resident import Resident
from training.models.version import USER_ROWS

Json = dict[str, Any]  # Any: whatever JSON holds
ItemId = Annotated[str, Path(max_length=MAX_ID_CHARS)]
UserId = Annotated[str, Path(max_length=MAX_ID_CHARS)]


class EntitiesApi:
    """Answers what is asked of single items and users, from one replica's parts."""

    def __init__(
        self, config: ServeConfig, log: EventLog, refresher: Refresher, pool: Executor, item_pool: Executor
    ) -> None:
        """Read in `pool`; write items in `item_pool`, one after the other."""
        self._config = config
        self._log = log
        self._refresher = refresher
        self._pool = pool
        self._item_pool = item_pool

    async def show_item(self, item_id: ItemId) -> Response:
        """Say what is known of an item, whose id may hold slashes."""
        about = await asyncio.get_running_loop().run_in_executor(self._pool, self._describe_item, item_id)
        return _json(about)

    async def delete_item(self, item_id: ItemId) -> Response:
        """Take an item out of every answer; putting it again brings it back."""
        deleted, rejected = await self._delete([item_id])
        if rejected:
            raise _not_found("item", item_id)
        return _json({"deleted": deleted, "rejected": []})

    async def delete_items(self, request: Request) -> Response:
        """Take items out of every answer; putting them again brings them back."""
        body = await read_body(request, self._config.max_body_bytes)
        deleted, rejected = await self._delete(split_entries(body, "items", self._config.max_batch_events))
        status = HTTPStatus.OK if deleted else HTTPStatus.UNPROCESSABLE_ENTITY
        return _json({"deleted": deleted, "rejected": [asdict(entry) for entry in rejected]}, status)

    async def put_users(self, request: Request) -> Response:
        """Tell of users; attributes replace those told before, and the answer means that they survive a crash."""
        body = await read_body(request, self._config.max_body_bytes)
        users, rejected = parse_all(split_entries(body, "users", self._config.max_batch_events), parse_user)
        if users:
            await asyncio.get_running_loop().run_in_executor(self._item_pool, self._log.put_users, users)
        status = HTTPStatus.OK if users else HTTPStatus.UNPROCESSABLE_ENTITY
        return _json({"accepted": len(users), "rejected": [asdict(entry) for entry in rejected]}, status)

    async def list_similar(self, user_id: UserId, k: Annotated[int, Query(ge=1, le=1_000)] = 10) -> Response:
        """List the users nearest to a user: by the version's rows, or by the items they have where it has none."""
        # Not in the pool of recommendations: without a row, the whole of user history is read.
        found = await asyncio.get_running_loop().run_in_executor(None, self._find_similar, user_id, k)
        return _json(found)

    async def _delete(self, entries: Sequence[object]) -> tuple[int, list[Rejected]]:
        return await asyncio.get_running_loop().run_in_executor(self._item_pool, self._delete_known, entries)

    def _delete_known(self, entries: Sequence[object]) -> tuple[int, list[Rejected]]:
        """Delete what is known, and say how many and why the others were not."""
        model = self._refresher.residents.live
        gone: dict[str, Item] = {}
        rejected: list[Rejected] = []
        for index, item_id in enumerate(entries):
            item = self._find_item(item_id, model) if isinstance(item_id, str) else None
            if item is None:
                reason = "is unknown" if isinstance(item_id, str) else "must be an id"
                rejected.append(Rejected(index=index, field="items", reason=reason))
            else:
                gone[item.item_id] = item.as_deleted()
        if gone:
            self._log.put_items(list(gone.values()))
            self._refresher.refresh_items()
        return len(gone), rejected

    def _find_item(self, item_id: str, model: Resident) -> Item | None:
        """Return an item as it was put last, or else as the version holds it."""
        if "\x00" in item_id:
            return None
        item = self._log.find_item(item_id)
        if item is not None or not model.knows(item_id):
            return item
        tags = model.state.tags
        row = model.index_of[item_id]
        categories, domain = tags.of_row(row) if tags is not None else ([], None)
        text = model.text_of(item_id) or item_id
        return Item(item_id=item_id, text=text, domain=domain or "default", categories=tuple(categories))

    def _describe_item(self, item_id: str) -> Json:
        model = self._refresher.residents.live
        item = self._find_item(item_id, model)
        if item is None:
            raise _not_found("item", item_id)
        return {
            **asdict(item),
            "available": item.is_available(time.time_ns() // 1_000),
            "deleted": item.is_deleted,
            "version": model.name,
            "has_row": item_id in model.item_row,
        }

    def _find_similar(self, user_id: str, k: int) -> Json:
        model = self._refresher.residents.live
        found = nearest_by_row(model, user_id, k)
        by = "history" if found is None else "row"
        if found is None:
            item_ids = self._log.seen_items(user_id)
            if not item_ids:
                raise _not_found("user", user_id)
            sharing = self._log.users_sharing(user_id, item_ids, k)
            found = [(other_id, shared / (len(item_ids) * items) ** 0.5) for other_id, shared, items in sharing]
        users = [{"user_id": other_id, "score": score} for other_id, score in found]
        return {"user_id": user_id, "version": model.name, "by": by, "users": users}


def nearest_by_row(model: Resident, user_id: str, k: int) -> list[tuple[str, float]] | None:
    """Return the nearest users by cosine; none where the version has learned nothing of this one."""
    row, row_UD = model.user_row.get(user_id), model.state.rows.get(USER_ROWS)
    if row is None or row_UD is None or not row_UD[row].any():
        return None
    norm_U = torch.linalg.vector_norm(row_UD.float(), dim=1)
    others_N = torch.nonzero(norm_U).flatten()  # those of whom something is learned
    others_N = others_N[others_N != row]
    cosine_N = (row_UD[others_N].float() @ row_UD[row].float()) / (norm_U[others_N] * norm_U[row])
    best = cosine_N.topk(min(k, len(cosine_N)))
    user_ids = [model.state.user_ids[other] for other in others_N[best.indices].tolist()]
    return list(zip(user_ids, best.values.tolist(), strict=True))


def _not_found(kind: str, entity_id: str) -> ProblemError:
    return ProblemError(HTTPStatus.NOT_FOUND, f"{kind} {entity_id!r:.200} is unknown")


def _json(value: Json, status: int = HTTPStatus.OK) -> Response:
    return Response(pydantic_core.to_json(value), status, media_type="application/json")
