"""What the fault harness counts as an outage, against a server that refuses clicks alone."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.chaos.traffic import Traffic


class Server(ThreadingHTTPServer):
    """Recommends always; takes feedback while it is `well`."""

    well = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        refused = self.path == "/v1/feedback" and not self.server.well
        self.send_response(503 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        answer = {"version": "1.0", "items": [{"item_id": "i1"}], "reflects_min_seq": True, "results": [{"seq": 1}]}
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_failed_click_counts_towards_recovery_though_no_slate_is_asked_for_meanwhile(server):
    with Traffic(f"http://127.0.0.1:{server.server_port}", clients=1) as traffic:
        time.sleep(0.5)
        fault_s = time.monotonic()
        server.well = False
        time.sleep(1.0)
        server.well = True
        time.sleep(0.5)
    assert 1.0 <= traffic.recovery_s(fault_s, time.monotonic()) < 1.5
    assert len(set(traffic.acked)) > 1
