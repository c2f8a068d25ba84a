"""Refuse a request for a slate that would wait too long, before it waits.

In:  requests.  Out: those that will be answered soon; 429 with Retry-After for the others.
Knows nothing of keys or of what a slate is made of. The wait ahead is Little's law: requests under way, times the time
from one answer to the next while there is work, whatever it is that bounds the replica.
"""

import time
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.problems import RETRY_AFTER_S, problem_response

SLATES = frozenset(("/v1/recommend", "/v1/rank"))
"""Paths whose requests may be refused."""
LEAST = 16
"""So many at a time are never refused: from their answers the replica learns that it is fast again."""
SMOOTHING = 0.05
"""Weight of the newest answer in the mean."""


class Admission:
    """ASGI middleware that keeps the wait for a slate bounded."""

    def __init__(self, app: ASGIApp, max_wait_s: float) -> None:
        self._app = app
        self._max_wait_s = max_wait_s
        self._under_way = 0
        self._busy_since_s = 0.0
        """When the last answer was given, or work began after there was none."""
        self._each_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] not in SLATES:
            await self._app(scope, receive, send)
            return
        if self._under_way >= LEAST and self._under_way * self._each_s > self._max_wait_s:
            reason = f"{self._under_way} requests are under way here, {1e3 * self._each_s:.1f} ms each; ask again later"
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            await problem_response(HTTPStatus.TOO_MANY_REQUESTS, reason, headers=headers)(scope, receive, send)
            return
        if not self._under_way:
            self._busy_since_s = time.perf_counter()
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1
            now_s = time.perf_counter()
            self._each_s += SMOOTHING * (now_s - self._busy_since_s - self._each_s)
            self._busy_since_s = now_s
