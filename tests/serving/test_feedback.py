"""What is durable reaches the requests that wait for it, with one wake-up of the event loop a commit."""

import asyncio
from concurrent.futures import Future
from threading import Thread

import pytest

from cluster.errors import EngineError
from cluster.log import Appended, EventLog
from serving.feedback import Acks, Intake


def click(event_id: str) -> dict[str, str]:
    return {"event_id": event_id, "user_id": "u", "item_id": "m", "kind": "click"}


def test_each_request_hears_of_its_own_events(tmp_path):
    async def post(intake, clients):
        posts = [[click(f"{client}-{n}") for n in range(2)] for client in range(clients)]
        return await asyncio.gather(*map(intake.take, posts))

    with EventLog(tmp_path / "log.db") as log:
        intake = Intake(log)
        receipts = asyncio.run(post(intake, 300))
        assert [receipt.accepted for receipt in receipts] == [2] * 300
        logged = {entry.event.event_id: entry.seq for entry in log.read(0, 1_000)}
        assert logged == {entry.event_id: entry.seq for receipt in receipts for entry in receipt.appended}
        assert asyncio.run(post(intake, 1))[0].duplicates == 2  # from another event loop


def test_events_of_a_closed_log_are_refused(tmp_path):
    log = EventLog(tmp_path / "log.db")
    log.close()
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(Intake(log).take([click("a")]))


class CountingLoop(asyncio.SelectorEventLoop):
    wakes = 0

    def call_soon_threadsafe(self, callback, *args, context=None):
        self.wakes += 1
        return super().call_soon_threadsafe(callback, *args, context=context)


def test_what_is_durable_together_wakes_the_loop_once():
    async def run():
        acks, written = Acks(loop), [Future() for _ in range(4)]
        waiting = [acks.wait(future) for future in written]
        waiting[1].cancel()

        def commit():
            for n, future in enumerate(written[:3]):
                future.set_result([Appended("e", n, False)])
            written[3].set_exception(EngineError("the disk is full"))

        writer = Thread(target=commit)
        writer.start()
        writer.join()  # the loop has had no turn yet
        first, called_off, third, failed = await asyncio.gather(*waiting, return_exceptions=True)
        assert [first, third] == [[Appended("e", 0, False)], [Appended("e", 2, False)]]
        assert isinstance(called_off, asyncio.CancelledError)
        assert str(failed) == "the disk is full"
        assert loop.wakes == 1

    loop = CountingLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(run())
