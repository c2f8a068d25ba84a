"""HTTPS before the server: who trusts the certificate is answered, and one that is replaced costs nobody an answer."""

import http.client
import json
import shutil
import signal
import ssl
import subprocess
import threading
import time
from urllib.parse import urlsplit

import psutil
import pytest

from cluster.cli import main
from cluster.client import Client
from cluster.errors import ConfigError, EngineError
from cluster.ray_session import find_free_port
from serving.tls import tls_front
from tests.serving.test_command import running_server

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")


def make_pair(folder, serial=1):
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-set_serial", str(serial)]
    command += ["-keyout", str(folder / "new.key"), "-out", str(folder / "new.crt")]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("key", "crt"):
        (folder / f"new.{name}").replace(folder / f"server.{name}")
    return folder / "server.crt", folder / "server.key"


def serial_at(port, certificate):
    context = ssl.create_default_context(cafile=str(certificate))
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
    connection.connect()
    found = connection.sock.getpeercert()["serialNumber"]
    connection.close()
    return int(found, 16)


def address(url):
    parts = urlsplit(url)
    return parts.hostname, parts.port


def test_who_trusts_the_certificate_is_answered_and_who_does_not_or_speaks_plainly_is_not(alone, tmp_path):
    certificate, key = make_pair(tmp_path)
    port = find_free_port()
    with tls_front(certificate, key, ("127.0.0.1", port), address(alone.url)):
        with Client(f"https://127.0.0.1:{port}", ca_file=str(certificate)) as client:
            assert client.recommend("u1", k=3)["version"] == "1.0"
        with (
            Client(f"https://127.0.0.1:{port}") as client,
            pytest.raises(EngineError, match="certificate verify failed"),
        ):
            client.recommend("u1")
        with Client(f"http://127.0.0.1:{port}") as client, pytest.raises(EngineError):
            client.recommend("u1")


def test_a_certificate_that_is_replaced_is_used_and_no_request_is_lost(alone, tmp_path):
    certificate, key = make_pair(tmp_path)
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(certificate.read_bytes())
    port, stopping, answers = find_free_port(), threading.Event(), []

    def ask():
        while not stopping.is_set():
            with Client(f"https://127.0.0.1:{port}", ca_file=str(trusted)) as client:
                answers.append(client.recommend("u1", k=3)["version"])

    with tls_front(certificate, key, ("127.0.0.1", port), address(alone.url)):
        assert serial_at(port, trusted) == 1
        asking = [threading.Thread(target=ask) for _ in range(2)]
        second = tmp_path / "second"
        second.mkdir()
        renewed, renewed_key = make_pair(second, serial=2)
        trusted.write_bytes(trusted.read_bytes() + renewed.read_bytes())
        for thread in asking:
            thread.start()
        time.sleep(0.3)
        renewed_key.replace(key)
        renewed.replace(certificate)
        deadline_s = time.monotonic() + 20
        while serial_at(port, trusted) != 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        time.sleep(0.5)
        stopping.set()
        for thread in asking:
            thread.join()
    assert len(answers) > 10
    assert set(answers) == {"1.0"}


def test_files_that_are_no_pair_are_named_before_anything_starts(tmp_path):
    certificate, _ = make_pair(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = make_pair(tmp_path / "other")
    for pair, said in (
        ((certificate, other), "own key"),
        ((tmp_path / "none", other), "--tls-certificate .*cannot be read"),
    ):
        with pytest.raises(ConfigError, match=said), tls_front(*pair, ("127.0.0.1", 1), ("127.0.0.1", 2)):
            pass


def test_the_command_answers_https_and_leaves_nothing_behind_even_when_it_is_killed(versions, home, tmp_path):
    certificate, key = make_pair(tmp_path)
    flags = ["--local", "--set", "online.enabled=false", "--tls-certificate", str(certificate), "--tls-key", str(key)]
    with running_server(home, *flags) as (server, url):
        assert url.startswith("https://")
        with Client(url, ca_file=str(certificate)) as client:
            assert client.request("GET", "/readyz")["version"] == "1.0"
        started = psutil.Process(server.pid).children(recursive=True)
        assert [process.name() for process in started] == ["haproxy"]
        server.send_signal(signal.SIGKILL)
        server.wait()
        psutil.wait_procs(started, timeout=10)
    assert [process for process in started if process.is_running()] == []


def test_a_certificate_without_a_key_is_refused(versions, home, capsys):
    code = main(["serve", "--home", str(home.path), "--port", str(find_free_port()), "--tls-certificate", "x"])
    assert code == 2
    assert "one needs the other" in json.dumps(capsys.readouterr().err)
