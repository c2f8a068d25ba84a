"""Open-loop load: what is sent when, and what counts as late or failed."""

import contextlib
import socket
import threading
import time

import pytest

from benchmarks.load import FAILED, Target, offer


class Server:
    """Answers each request after so long, one after the other on each connection; breaks every so-manieth."""

    def __init__(self, delay_s=0.0, breaks_every=0, status=200):
        self.delay_s, self.breaks_every, self.status = delay_s, breaks_every, status
        self.seen = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/ask"
        threading.Thread(target=self.accept, daemon=True).start()

    def close(self):
        with contextlib.suppress(OSError):  # closed already
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with connection:
            while data := connection.recv(10_000):
                assert data.startswith(b"POST /ask HTTP/1.1\r\n")
                assert data.endswith(b"\r\n\r\n{}")
                self.seen += 1
                if self.breaks_every and self.seen % self.breaks_every == 0:
                    return
                time.sleep(self.delay_s)
                connection.sendall(b"HTTP/1.1 %d OK\r\nContent-Length: 2\r\n\r\nok" % self.status)


@pytest.fixture
def serve():
    started = []

    def start(**settings):
        started.append(Server(**settings))
        return started[-1]

    yield start
    for server in started:
        server.close()


def test_requests_are_sent_at_their_rate_however_long_answers_take(serve):
    found = offer(Target(serve(delay_s=0.3).url, [b"{}"]), [(100, 0.5)])
    assert found.statuses() == {"200": 50}
    assert 0.49 <= found.seconds < 0.6
    assert 300 <= found.p(50) < 400


def test_phases_follow_each_other(serve):
    found = offer(Target(serve().url, [b"{}"]), [(100, 0.3), (300, 0.3)])
    assert len(found.ms(before_s=0.3)) == 30
    assert 88 <= len(found.ms(after_s=0.3)) <= 91


def test_a_broken_connection_is_one_failed_request_and_refusals_count_apart(serve):
    found = offer(Target(serve(breaks_every=10).url, [b"{}"]), [(200, 0.5)])
    assert found.statuses() == {str(FAILED): 10, "200": 90}
    refused = offer(Target(serve(status=429).url, [b"{}"]), [(100, 0.2)])
    assert (refused.statuses(), refused.share(429), refused.p(99)) == ({"429": 20}, 1.0, float("inf"))


def test_where_nobody_listens_every_request_has_failed(serve):
    server = serve()
    server.close()
    assert offer(Target(server.url, [b"{}"]), [(100, 0.2)]).share(FAILED) == 1.0
