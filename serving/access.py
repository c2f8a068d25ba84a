"""Who may ask for what, and how often: API keys before anything else of a request is read.

In:  requests.  Out: those that may go on; 401, 403 or 429 for the others.
Knows nothing of what routes do. What is not listed here needs a key: GETs of role read, everything else of role write.

Without keys in the home, nobody needs one. A key comes as `Authorization: Bearer KEY` or `X-Api-Key: KEY`, and is never
logged. Each replica counts by itself: a key's rate is shared out evenly among them.
"""

import math
import time
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.keys import Key, KeyRing
from serving.pages import FILES, FOLDER
from serving.problems import openai_response, problem_response
from serving.request_notes import NOTES
from serving.schemas import OPENAI

PAGES = frozenset(("/", *(FOLDER + name for name in FILES[1:])))
"""Paths of the dashboard, which holds no data: what it shows it asks for, with a key."""
OPEN = frozenset(("/healthz", "/readyz")) | PAGES
"""Paths for whoever looks after the process, and of the page."""
READS = frozenset(("/v1/recommend", "/v1/rank", "/v1/embeddings"))
"""Paths of questions that are asked with POST."""
ADMIN = frozenset(("/metrics", "/v1/versions", "/v1/versions/promote", "/v1/versions/rollback", "/v1/stats"))
"""Paths that tell of the system or change it, not of items."""
PERSONAL = ("/v1/users/", "/v1/explain")
"""Begin the paths that tell what somebody did."""
SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))


def needed_role(method: str, path: str) -> str | None:
    """Return the role that a request needs; none where it needs no key."""
    if path in OPEN:
        return None
    if path in ADMIN or path.startswith(PERSONAL):
        return "admin"
    return "read" if method in SAFE_METHODS or path in READS else "write"


class TokenBucket:
    """Requests that a key has left."""

    def __init__(self, rate_per_s: float, burst: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._left = burst
        self._at_s = time.monotonic()

    def take(self) -> float:
        """Take one; return 0, or after how many seconds there will be one."""
        now_s = time.monotonic()
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s
        if self._left < 1:
            return (1 - self._left) / self._rate_per_s
        self._left -= 1
        return 0.0


class AccessControl:
    """ASGI middleware that lets nobody through without the key it takes."""

    def __init__(self, app: ASGIApp, keys: KeyRing, *, rate_per_s: float, burst_s: float, replicas: int) -> None:
        self._app = app
        self._keys = keys
        self._rate_per_s = rate_per_s
        self._burst_s = burst_s
        self._replicas = replicas
        self._buckets: dict[tuple[str, float], TokenBucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http":
            self._keys.look()
            if self._keys.is_required and (refusal := self._refuse(scope)) is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refuse(self, scope: Scope) -> Response | None:
        role = needed_role(scope["method"], scope["path"])
        if role is None:
            return None
        presented = _presented(Headers(scope=scope))
        key = self._keys.find(presented) if presented is not None else None
        if key is None:
            reason = "a key is needed: Authorization: Bearer KEY" if presented is None else "the key is not valid"
            headers = {"WWW-Authenticate": "Bearer"}
            return _response(scope, HTTPStatus.UNAUTHORIZED, reason, "invalid_api_key", headers)
        if not key.allows(role):
            reason = f"key {key.key_id} has role {key.role}; this needs {role}"
            return _response(scope, HTTPStatus.FORBIDDEN, reason, "insufficient_role", {})
        if (notes := NOTES.get()) is not None:
            notes.key_id = key.key_id
        if wait_s := self._bucket(key).take():
            headers = {"Retry-After": str(math.ceil(wait_s))}
            reason = f"key {key.key_id} has asked too often; wait {wait_s:.1f} s"
            return _response(scope, HTTPStatus.TOO_MANY_REQUESTS, reason, "rate_limit_exceeded", headers)
        return None

    def _bucket(self, key: Key) -> TokenBucket:
        rate_per_s = (key.rate_per_s or self._rate_per_s) / self._replicas
        found = self._buckets.get((key.key_id, rate_per_s))
        if found is None:
            found = TokenBucket(rate_per_s, max(1.0, rate_per_s * self._burst_s))
            self._buckets[key.key_id, rate_per_s] = found
        return found


def _presented(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key.strip()
    return headers.get("x-api-key")


def _response(scope: Scope, status: HTTPStatus, reason: str, code: str, headers: dict[str, str]) -> Response:
    if scope["path"].startswith(OPENAI):
        return openai_response(status, reason, code=code, headers=headers)
    return problem_response(status, reason, headers=headers)
