"""Requests that would wait too long are refused at once, and admitted again as soon as answers are quick."""

import asyncio
import json

import pytest

from serving.admission import LEAST, Admission

PATH = "/v1/recommend"


class Slow:
    """An app that answers one request after the other, each after so long."""

    def __init__(self, each_s):
        self.each_s = each_s
        self.turn = asyncio.Lock()

    async def __call__(self, scope, receive, send):
        async with self.turn:
            await asyncio.sleep(self.each_s)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def ask(app, path=PATH):
    sent = []

    async def send(message):
        sent.append(message)

    await app({"type": "http", "path": path, "method": "POST", "headers": []}, None, send)
    return sent


async def ask_at_once(app, number, path=PATH):
    answers = await asyncio.gather(*(ask(app, path) for _ in range(number)))
    return [sent[0]["status"] for sent in answers]


async def learn(app):
    for _ in range(8):
        await ask_at_once(app, LEAST)


def test_so_many_wait_as_are_answered_in_time_and_the_others_are_refused():
    async def run():
        app = Admission(Slow(0.005), max_wait_s=0.15)
        await learn(app)
        return await ask_at_once(app, 100)

    statuses = asyncio.run(run())
    assert set(statuses) == {200, 429}
    assert 0.15 / 0.005 / 2 <= statuses.count(200) <= 0.15 / 0.005 + 2  # a sleep may take longer, never less


def test_a_refusal_is_a_problem_with_retry_after():
    async def run():
        app = Admission(Slow(0.02), max_wait_s=0.01)
        await learn(app)
        waiting = asyncio.gather(*(ask(app) for _ in range(LEAST)))
        await asyncio.sleep(0)
        refused = await ask(app)
        await waiting
        return refused

    start, body = asyncio.run(run())
    headers = dict(start["headers"])
    assert (start["status"], headers[b"retry-after"]) == (429, b"1")
    assert headers[b"content-type"] == b"application/problem+json"
    assert "under way" in json.loads(body["body"])["detail"]


def test_once_answers_are_quick_again_all_are_admitted():
    async def run():
        slow = Slow(0.02)
        app = Admission(slow, max_wait_s=0.05)
        await learn(app)
        refused = await ask_at_once(app, 40)
        slow.each_s = 0
        await learn(app)
        return refused, await ask_at_once(app, 40)

    refused, after = asyncio.run(run())
    assert 429 in refused
    assert set(after) == {200}


@pytest.mark.parametrize("path", ["/v1/feedback", "/healthz", "/v1/items"])
def test_feedback_and_what_looks_after_the_process_are_never_refused(path):
    async def run():
        app = Admission(Slow(0.005), max_wait_s=0.001)
        await learn(app)
        return await ask_at_once(app, 40, path)

    assert set(asyncio.run(run())) == {200}
