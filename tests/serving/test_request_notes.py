"""Ids of requests, and what is logged of each."""

import asyncio
import io
import json
import time

import httpx
import pytest
from fastapi import FastAPI

from cluster.keys import KeyFile
from serving.problems import add_problem_handlers
from serving.request_notes import RequestIds, RequestLog


def send(app, *requests: httpx.Request) -> list[httpx.Response]:
    async def send_all():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return [await client.request(request.method, request.url, headers=request.headers) for request in requests]

    return asyncio.run(send_all())


def build_app(stream: io.StringIO, *, log_all: bool) -> FastAPI:
    api = FastAPI()
    add_problem_handlers(api)
    api.add_middleware(RequestIds, log=RequestLog(stream), log_all=log_all)

    @api.get("/v1/users/{user_id}")
    async def show(user_id: str) -> dict[str, str]:
        if user_id == "broken":
            raise KeyError(user_id)
        return {}

    return api


def lines(stream: io.StringIO, number: int) -> list[dict]:
    until_s = time.monotonic() + 5
    while stream.getvalue().count("\n") < number and time.monotonic() < until_s:
        time.sleep(0.01)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("path", ["/healthz", "/v1/versions", "/not/there", "/v1/users/anybody"])
def test_every_answer_bears_an_id_of_its_own(alone, path):
    ids = {alone.request("GET", path).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_a_problem_names_its_request(alone):
    answer = alone.request("GET", "/v1/items/nowhere")
    assert answer.body["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("stated", "is_taken"), [("order-7.a_B", True), ("x" * 65, False), ("a b", False), ("", False)]
)
def test_a_client_s_id_is_taken_where_it_is_short_and_plain(stated, is_taken):
    stream = io.StringIO()
    request = httpx.Request("GET", "http://here/v1/users/u1", headers={"X-Request-Id": stated})
    (answer,) = send(build_app(stream, log_all=True), request)
    assert (answer.headers["x-request-id"] == stated) == is_taken
    assert lines(stream, 1)[0]["request_id"] == answer.headers["x-request-id"]


def test_a_line_tells_of_the_route_and_never_of_the_user():
    stream = io.StringIO()
    send(build_app(stream, log_all=True), httpx.Request("GET", "http://here/v1/users/somebody"))
    (line,) = lines(stream, 1)
    assert (line["route"], line["method"], line["status"]) == ("/v1/users/{user_id}", "GET", 200)
    assert line["ms"] >= 0
    assert "somebody" not in stream.getvalue()


def test_a_defect_is_logged_whatever_is_set_and_its_answer_bears_the_id():
    stream = io.StringIO()
    app = build_app(stream, log_all=False)
    fine, broken = send(app, *(httpx.Request("GET", f"http://here/v1/users/{user}") for user in ("u1", "broken")))
    assert (fine.status_code, broken.status_code) == (200, 500)
    (line,) = lines(stream, 1)
    assert (line["status"], line["error"]) == (500, "KeyError")
    assert line["request_id"] == broken.headers["x-request-id"] == broken.json()["request_id"]


def test_a_recommendation_s_line_tells_what_answered_and_by_which_key(run_alone, home, capfd, monkeypatch):
    from tests.serving import conftest

    monkeypatch.setattr(conftest, "RECIPE", conftest.RECIPE + "log_requests = true\n")
    _, presented = KeyFile(home.keys).add("shop", "read")
    with run_alone(home) as served:
        answer = served.request("POST", "/v1/recommend", {"user_id": "somebody"}, key=presented)
        assert answer.status == 200
        time.sleep(0.2)
    told = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"/v1/recommend"' in line]
    assert [(line["version"], line["arm"], line["status"]) for line in told] == [("1.0", "live", 200)]
    assert told[0]["key_id"] in presented
    assert told[0]["request_id"] == answer.headers["x-request-id"]
    assert presented not in str(told)
    assert "somebody" not in str(told)
