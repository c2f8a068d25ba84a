"""The Python client and `recloop ask` against the app, over HTTP."""

import json
import time

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


def test_ask_prints_a_slate(alone, capsys):
    assert main(["ask", "a stranger who asks", "--k", "2", "--url", alone.url, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert ([item["item_id"] for item in answer["items"]], answer["cold_start"]) == (["i0", "i1"], True)
    assert main(["ask", "u0", "--url", f"http://127.0.0.1:{find_free_port()}"]) == EngineError.exit_code
    assert "does not answer" in capsys.readouterr().err
