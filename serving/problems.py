"""Errors as answers: application/problem+json, after RFC 9457.

In:  exceptions raised while a request is answered.  Out: responses that say what is wrong and what to do.
Knows nothing of routes.
"""

import json
import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from cluster.errors import EngineError, InvalidEventError, NoVersionError, RecloopError
from serving.request_notes import current_request_id
from serving.schemas import OPENAI

RETRY_AFTER_S = 1

log = logging.getLogger(__name__)


class ProblemError(Exception):
    """A request that is refused, with its status and reason."""

    def __init__(self, status: HTTPStatus, detail: str, errors: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors


def refuse_field(field: str, reason: str) -> ProblemError:
    """Return the error of a request with one field that will not do."""
    errors = [{"index": 0, "field": field, "reason": reason}]
    return ProblemError(HTTPStatus.UNPROCESSABLE_ENTITY, f"{field}: {reason}", errors)


def problem_response(
    status: int, detail: str, errors: Sequence[dict[str, Any]] = (), headers: dict[str, str] | None = None
) -> Response:
    """Return one problem; `errors` names single fields."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    if (request_id := current_request_id()) is not None:
        body["request_id"] = request_id
    if errors:
        body["errors"] = list(errors)
    return Response(json.dumps(body), status, headers, media_type="application/problem+json")


def openai_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """Return one error in OpenAI's form."""
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})
    return Response(body, status, headers, media_type="application/json")


def add_problem_handlers(api: FastAPI) -> None:
    """Have the app answer every exception with a problem."""
    api.add_exception_handler(ProblemError, _answer_problem)
    api.add_exception_handler(RecloopError, _answer_recloop_error)
    api.add_exception_handler(ValidationError, _answer_invalid)
    api.add_exception_handler(RequestValidationError, _answer_invalid)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_exception_handler(Exception, _answer_defect)


async def _answer_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return problem_response(error.status, error.detail, error.errors)


async def _answer_recloop_error(request: Request, error: Exception) -> Response:
    if isinstance(error, InvalidEventError):
        errors = [{"index": 0, "field": error.field, "reason": error.reason}]
        return problem_response(HTTPStatus.UNPROCESSABLE_ENTITY, str(error), errors)
    if isinstance(error, NoVersionError | EngineError):
        retry = {"Retry-After": str(RETRY_AFTER_S)}
        return problem_response(HTTPStatus.SERVICE_UNAVAILABLE, str(error), headers=retry)
    return await _answer_defect(request, error)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError | RequestValidationError)
    found = error.errors() if isinstance(error, RequestValidationError) else error.errors(include_url=False)
    if any(entry["type"] == "json_invalid" for entry in found):
        return problem_response(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {found[0]['msg']}")
    errors = [{"index": 0, "field": ".".join(map(str, entry["loc"])), "reason": entry["msg"]} for entry in found]
    detail = "; ".join(f"{entry['field'] or 'body'}: {entry['reason']}" for entry in errors)
    return problem_response(HTTPStatus.UNPROCESSABLE_ENTITY, detail, errors)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if request.url.path.startswith(OPENAI):
        return openai_response(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    return problem_response(error.status_code, str(error.detail), headers=dict(error.headers or {}))


async def _answer_defect(request: Request, error: Exception) -> Response:
    request_id = current_request_id()
    route = getattr(request.scope.get("route"), "path", "other")  # not the path, which may name a user
    log.error("%s %s (request %s): a defect", request.method, route, request_id, exc_info=error)
    answer = openai_response if request.url.path.startswith(OPENAI) else problem_response
    reason = f"a defect of the server ({type(error).__name__}); see its log"
    # Answered outside of all middleware, so the id is put on here.
    named = {"X-Request-Id": request_id} if request_id is not None else {}
    return answer(HTTPStatus.INTERNAL_SERVER_ERROR, reason, headers=named)
