"""A server's API from Python, with nothing but the standard library.

In:  a URL, perhaps a key.  Out: answers as plain JSON values; `EngineError` where there is none, `RefusedError` for no.
Knows nothing of what answers mean. One connection, kept open: not for several threads at once.

    with Client("http://127.0.0.1:8000") as client:
        slate = client.recommend("u1", k=5, interests="slow-burn Nordic crime, no gore")
        client.feedback([{"user_id": "u1", "item_id": slate["items"][0]["item_id"], "kind": "click"}])
"""

import http.client
import json
import os
import ssl
import time
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

from cluster.errors import ConfigError, EngineError, RefusedError

KEY_VARIABLE = "RECLOOP_API_KEY"
TIMEOUT_S = 60.0
PATIENCE_S = 30.0
"""Longest that a client waits where the server says to come again later, in all."""
RETRIED = (429, 503)
TRIES = 50
"""Most times that one request is sent."""
LEAST_WAIT_S = 0.1
"""Between two of them, also where the server says to come again at once."""
Json = dict[str, Any]  # Any: whatever JSON holds


class Client:
    """Asks one server."""

    def __init__(
        self, url: str, key: str | None = None, *, timeout_s: float = TIMEOUT_S, ca_file: str | None = None
    ) -> None:
        """Take the key given, else the environment's; trust the system's certificates, or those of a file.

        Raises `ConfigError` for what is no URL, no key or no certificate.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r}: must be an address such as http://127.0.0.1:8000")
        self._url = url
        self._root = parts.path.rstrip("/")
        if parts.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.netloc, timeout=timeout_s, context=_trusting(ca_file)
            )
        else:
            self._connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
        key = (key or os.environ.get(KEY_VARIABLE) or "").strip()
        if not (key.isascii() and key.isprintable()):  # a secret: the error does not show it
            raise ConfigError(f"the API key (given, or in {KEY_VARIABLE}): must be printable ASCII, as it was made")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def recommend(self, user_id: str, **fields: object) -> Json:
        """Return a slate; fields are those of POST /v1/recommend, such as k, interests, exclude, deadline_ms."""
        return self.request("POST", "/v1/recommend", {"user_id": user_id, **fields})

    def rank(self, user_id: str, item_ids: Sequence[str], **fields: object) -> Json:
        """Return these items in order for a user."""
        return self.request("POST", "/v1/rank", {"user_id": user_id, "items": list(item_ids), **fields})

    def feedback(self, events: Sequence[Mapping[str, object]]) -> Json:
        """Log events; what is answered is durable. Each gets an id if it has none, so that none is logged twice."""
        entries = [{"event_id": uuid.uuid4().hex, **event} for event in events]
        return self.request("POST", "/v1/feedback", {"events": entries})

    def put_items(self, items: Sequence[Mapping[str, object]]) -> Json:
        """Add or replace items."""
        return self.request("PUT", "/v1/items", {"items": [dict(item) for item in items]})

    def explain(self, user_id: str, item_id: str, **fields: object) -> Json:
        """Return why an item is shown to a user."""
        return self.request("POST", "/v1/explain", {"user_id": user_id, "item_id": item_id, **fields})

    def stats(self) -> Json:
        """Return what became of slates by arm, how learning goes, and how the replica that answers has done."""
        return self.request("GET", "/v1/stats")

    def promote(self, version: str | int, reason: str = "") -> Json:
        """Have a version answer."""
        return self.request("POST", "/v1/versions/promote", {"version": version, "reason": reason})

    def roll_back(self, reason: str = "") -> Json:
        """Have the version before answer again."""
        return self.request("POST", "/v1/versions/rollback", {"reason": reason})

    def item(self, item_id: str) -> Json:
        """Return what is known of an item."""
        return self.request("GET", f"/v1/items/{quote(item_id, safe='')}")

    def delete_items(self, item_ids: Sequence[str]) -> Json:
        """Take items out of every answer; putting them again brings them back."""
        return self.request("POST", "/v1/items/delete", {"items": list(item_ids)})

    def put_users(self, users: Sequence[Mapping[str, object]]) -> Json:
        """Tell of users: each a user_id and attributes, which replace those told before."""
        return self.request("PUT", "/v1/users", {"users": [dict(user) for user in users]})

    def user(self, user_id: str, k: int = 20) -> Json:
        """Return what is known of a user, with the newest k interactions."""
        return self.request("GET", f"/v1/users/{quote(user_id, safe='')}?k={k}")

    def similar_users(self, user_id: str, k: int = 10) -> Json:
        """Return a user's nearest neighbours."""
        return self.request("GET", f"/v1/users/{quote(user_id, safe='')}/similar?k={k}")

    def similar(self, item_id: str, k: int = 10) -> Json:
        """Return an item's nearest neighbours."""
        return self.request("GET", f"/v1/items/{quote(item_id, safe='')}/similar?k={k}")

    def request(self, method: str, path: str, body: object = None) -> Json:
        """Return what is answered, trying again where the server says when, and once where the connection was closed.

        Raises `RefusedError` with the server's reason, `EngineError` without an answer that is a JSON object.
        """
        payload = None if body is None else json.dumps(body)
        until_s = time.monotonic() + PATIENCE_S
        left = TRIES
        while True:
            left -= 1
            status, text, retry_after = self._send(method, path, payload)
            if status < 400:
                return self._read(status, text)
            if status not in RETRIED or not left or time.monotonic() + retry_after > until_s:
                raise RefusedError(status, _reason(text, status))
            time.sleep(retry_after)

    def _read(self, status: int, text: bytes) -> Json:
        try:
            answer = json.loads(text) if status < 300 else None
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(f"{self._url}: is no server of recloop (status {status}: {text[:200]!r})")
        return answer

    def _send(self, method: str, path: str, payload: str | None) -> tuple[int, bytes, float]:
        fresh = self._connection.sock is None
        try:
            self._connection.request(method, self._root + path, payload, self._headers)
            response = self._connection.getresponse()
            return response.status, response.read(), _seconds(response.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            # An idle connection that the server has closed. All requests here may be sent twice: see `feedback`.
            if not fresh and isinstance(error, http.client.RemoteDisconnected | BrokenPipeError | ConnectionResetError):
                return self._send(method, path, payload)
            raise EngineError(f"{self._url}: does not answer ({error})") from error


def _trusting(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{ca_file}: holds no certificates in PEM ({error})") from error


def _seconds(retry_after: str | None) -> float:
    return max(float(retry_after), LEAST_WAIT_S) if retry_after and retry_after.isdecimal() else 1.0


def _reason(text: bytes, status: int) -> str:
    try:
        stated = json.loads(text)
        return str(stated.get("detail") or stated["error"]["message"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"status {status}: {text[:200]!r}"
