"""The Python client and `recloop ask` against the app, over HTTP."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.cli import main
from cluster.client import Client
from cluster.errors import ConfigError, EngineError, RefusedError
from cluster.home import Home
from cluster.keys import KeyFile
from cluster.ray_session import find_free_port


def test_a_client_recommends_ranks_logs_and_adds_items(alone):
    with Client(alone.url) as client:
        assert client.put_items([{"item_id": "from a client/ü", "text": "a lighthouse keeper"}])["accepted"] == 1
        slate = client.recommend("client's user", k=3)
        seq = client.feedback([{"user_id": "client's user", "item_id": "i3", "kind": "click"}])["last_seq"]
        assert client.recommend("client's user", min_seq=seq)["reflects_min_seq"]
        assert len(client.rank("client's user", [item["item_id"] for item in slate["items"]])["items"]) == 3
        assert len(client.similar("from a client/ü", 2)["items"]) == 2


def test_a_refusal_has_the_server_s_reason_and_status(alone):
    with Client(alone.url) as client:
        for ask, status, reason in (
            (lambda: client.recommend(""), 422, "user_id"),
            (lambda: client.similar("nowhere"), 404, "nowhere"),
            (lambda: client.request("POST", "/v1/embeddings", {"model": "?", "input": "x"}), 404, "does not exist"),
        ):
            with pytest.raises(RefusedError, match=reason) as raised:
                ask()
            assert raised.value.status == status


def test_a_connection_that_the_server_closed_is_opened_again(alone):
    with Client(alone.url) as client:
        client.recommend("u0")
        assert client._connection.sock is not None
        client._connection.sock.shutdown(2)
        assert client.recommend("u0")["items"]


def test_a_server_that_is_not_there_is_said_and_so_is_what_is_no_address():
    with pytest.raises(EngineError, match="does not answer"):
        Client(f"http://127.0.0.1:{find_free_port()}").recommend("u0")
    with pytest.raises(ConfigError, match="must be an address"):
        Client("127.0.0.1:8000")


def test_a_client_that_asks_too_often_waits_as_it_is_told(run_alone, tmp_path, monkeypatch):
    home = Home(tmp_path).ensure()
    key = KeyFile(home.keys).add("slow", "read", rate_per_s=2)[1]
    monkeypatch.setenv("RECLOOP_API_KEY", key)
    with run_alone(home) as served, Client(served.url) as client:
        began_s = time.monotonic()
        for _ in range(6):  # four at once, then two a second
            assert client.recommend("u0")["items"]
        assert time.monotonic() - began_s > 0.4
        with pytest.raises(RefusedError, match="needs write"):
            client.feedback([{"user_id": "u0", "item_id": "i1", "kind": "click"}])


class ScriptedServer(http.server.ThreadingHTTPServer):
    """Answers every request alike, and counts them."""

    status, headers, body, asked = 200, {}, b"{}", 0


class ScriptedAnswer(http.server.BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        self.send_response(self.server.status)
        for name, value in {**self.server.headers, "Content-Length": str(len(self.server.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with ScriptedServer(("127.0.0.1", 0), ScriptedAnswer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def ask(scripted) -> Callable[[], dict]:
    def ask() -> dict:
        with Client(f"http://127.0.0.1:{scripted.server_port}") as client:
            return client.recommend("u0")

    return ask


def test_a_server_that_says_to_come_again_at_once_is_not_asked_without_end(scripted, ask, monkeypatch):
    monkeypatch.setattr("cluster.client.PATIENCE_S", 0.5)
    scripted.status, scripted.headers = 503, {"Retry-After": "0"}
    with pytest.raises(RefusedError):
        ask()
    assert 2 <= scripted.asked <= 6
    monkeypatch.setattr("cluster.client.PATIENCE_S", 30)
    monkeypatch.setattr("cluster.client.TRIES", 3)
    scripted.asked = 0
    with pytest.raises(RefusedError):
        ask()
    assert scripted.asked == 3


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>"), (200, b""), (200, b"\xff"), (200, b"[" * 100_000), (200, b"[]"), (302, b"{}"), (304, b"")],
)
def test_what_is_no_answer_of_a_server_like_ours_is_said(scripted, ask, status, body):
    scripted.status, scripted.body = status, body
    with pytest.raises(EngineError, match=f"status {status}"):
        ask()


@pytest.mark.parametrize("key", ["rk_sécret", "rk_sec\nret", "rk_sec\x00ret", "rk_secret\u2028x"])
def test_what_cannot_be_a_key_is_refused_and_not_shown(key, monkeypatch):
    with pytest.raises(ConfigError, match="printable ASCII") as raised:
        Client("http://127.0.0.1:8000", key)
    assert "cret" not in str(raised.value)
    if "\x00" not in key:
        monkeypatch.setenv("RECLOOP_API_KEY", key)
        with pytest.raises(ConfigError, match="RECLOOP_API_KEY"):
            Client("http://127.0.0.1:8000")


def test_the_end_of_a_line_after_a_key_does_not_count():
    assert Client("http://127.0.0.1:8000", " rk_secret\n")._headers["Authorization"] == "Bearer rk_secret"
    assert "Authorization" not in Client("http://127.0.0.1:8000", "\n")._headers


def test_ask_prints_a_slate(alone, capsys):
    assert main(["ask", "a stranger who asks", "--k", "2", "--url", alone.url, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert ([item["item_id"] for item in answer["items"]], answer["cold_start"]) == (["i0", "i1"], True)
    assert main(["ask", "u0", "--url", f"http://127.0.0.1:{find_free_port()}"]) == EngineError.exit_code
    assert "does not answer" in capsys.readouterr().err
