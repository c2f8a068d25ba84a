"""Clients that ask, click what they are shown, and repeat a click until it is acknowledged.

In:  a URL and a number of clients.  Out: every answer with its times; the sequence number of every acknowledged event.
Knows nothing of faults. An event's id is minted by the client and is the same in each repetition.
"""

import asyncio
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

TIMEOUT_S = 3.0
PAUSE_S = 0.02
RETRY_S = 0.05


@dataclass(slots=True)
class Traffic:
    """What clients saw, while the block lasts; appended to by their thread alone."""

    url: str
    clients: int
    acked: dict[str, int] = field(default_factory=dict)
    """Event id to the sequence number that was acknowledged."""
    answers: list[tuple[float, float, bool]] = field(default_factory=list)
    """When something was asked, when that ended, and whether an answer came; on the monotonic clock."""
    versions: set[str] = field(default_factory=set)
    errors: list[tuple[float, str]] = field(default_factory=list)
    """When a request of whatever kind failed, and how."""
    contradictions: list[str] = field(default_factory=list)
    """Promises that were broken before the client's eyes."""
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="traffic")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        assert self._thread is not None, "entered"
        self._thread.join()

    def streak_since(self, began_s: float) -> list[float]:
        """Return when the newest requests, asked after that time, were asked, back to one that failed."""
        streak: list[float] = []
        for asked_s, _, answered in reversed(self.answers):
            if not answered or asked_s < began_s:
                break
            streak.append(asked_s)
        return streak

    def recovery_s(self, fault_s: float, until_s: float) -> float:
        """Return the seconds from a fault until answers came again, without a failure up to `until_s`."""
        within = [answer for answer in self.answers if answer[1] >= fault_s and answer[0] <= until_s]
        failed = [ended_s for _, ended_s, answered in within if not answered]
        if not failed:
            return 0.0
        later = [ended_s for asked_s, ended_s, answered in within if answered and ended_s > max(failed)]
        return (min(later) if later else until_s) - fault_s

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(self._be_client(session, number) for number in range(self.clients)))

    async def _be_client(self, session: aiohttp.ClientSession, number: int) -> None:
        turn = 0
        while not self._stopping.is_set():
            turn += 1
            user_id = f"chaos-{number}-{turn % 50}"
            slate = await self._ask(session, user_id)
            if slate is None:
                await asyncio.sleep(RETRY_S)
                continue
            await self._click(session, user_id, slate[turn % len(slate)])
            await asyncio.sleep(PAUSE_S)

    async def _ask(self, session: aiohttp.ClientSession, user_id: str) -> list[str] | None:
        answer = await self._post(session, "/v1/recommend", {"user_id": user_id, "k": 5})
        if answer is None:
            return None
        self.versions.add(answer["version"])
        return [item["item_id"] for item in answer["items"]]

    async def _click(self, session: aiohttp.ClientSession, user_id: str, item_id: str) -> None:
        event = {"event_id": uuid.uuid4().hex, "user_id": user_id, "item_id": item_id, "kind": "click"}
        while not self._stopping.is_set():
            receipt = await self._post(session, "/v1/feedback", event)
            if receipt is not None:
                seq = receipt["results"][0]["seq"]
                self.acked[event["event_id"]] = seq
                break
            await asyncio.sleep(RETRY_S)
        else:
            return
        body = {"user_id": user_id, "k": 1, "min_seq": seq}
        after = await self._post(session, "/v1/recommend", body)
        if after is not None and not after["reflects_min_seq"]:
            self.contradictions.append(f"event {seq} of {user_id} was acknowledged and is not reflected")

    async def _post(self, session: aiohttp.ClientSession, path: str, body: object) -> dict[str, Any] | None:
        """Return the answer, or none where it is an error or does not come."""
        asked_s = time.monotonic()
        try:
            async with session.post(self.url + path, json=body) as response:
                if response.status == 200:
                    answer = await response.json()
                    self.answers.append((asked_s, time.monotonic(), True))
                    return answer
                failure = f"{path} {response.status} {(await response.text())[:240]}"
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            failure = f"{path} {error!r:.60}"
        self.answers.append((asked_s, time.monotonic(), False))
        self.errors.append((time.monotonic(), failure))
        return None


def longest(values: Iterable[float]) -> float:
    """Return the largest, 0 of none."""
    return max(values, default=0.0)
