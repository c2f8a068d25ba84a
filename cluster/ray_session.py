"""Start Ray for one command, and leave nothing behind when it ends.

In:  an address; `local` means a private Ray: its own folder, ports, token and HAProxy.  Out: a running session.
Knows nothing of what runs on it.

A private Ray starts with token authentication, so that its ports, which Ray binds on every interface, answer nobody
else. Serve's HTTP listens only where `serve_http` says; HAProxy's two statistics ports are free ones of this session.
However the `with` block ends (return, exception, Ctrl-C, SIGTERM), every process that Ray started has ended when it is
left, and the folder is gone.
"""

import contextlib
import errno
import fcntl
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from cluster.errors import EngineError, PortTakenError
from cluster.haproxy import CONFIG_FILE, build_settings

NAMESPACE = "recloop"
SIGTERM_EXIT_CODE = 128 + signal.SIGTERM

OBJECT_STORE_BYTES = 512 * 1024**2
MIN_LOGICAL_CPUS = 4
"""Enough for two train workers beside their coordinator on any machine; they share the real cores."""

FOLDER_PREFIX = "recloop-"
OWNER_FILE = "owner"
"""Locked by the process whose session the folder is."""
DAEMONS = ("gcs_server", "raylet")
"""Of a private Ray."""
_MAX_TEMP_ROOT_CHARS = 20
"""Unix socket paths hold 107 bytes and Ray's and HAProxy's take some 80 of them below the session's folder."""
_DAEMON_WATCH_S = 0.2
_EXIT_PATIENCE_S = 5.0
"""How long a process may take to end by itself once Ray has shut down, and again after SIGTERM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySession:
    """A Ray that this process is connected to."""

    address: str
    """The head's address, as other drivers name it."""
    folder: Path | None
    """The private Ray's folder with its logs; none on a cluster."""


def kill_started(variable: str, value: str) -> None:
    """Kill every process but this one that has this variable in its environment, as all that a session starts have.

    For a session that is lost: ending it in order would wait for daemons that are not there, and children of a process
    that was killed are nobody's.
    """
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(variable) == value and process.pid != os.getpid():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def abandon_session() -> None:
    """Kill whatever this process's private Ray consists of, and remove its folder."""
    config = os.environ.get(CONFIG_FILE)
    if config is not None:
        kill_started(CONFIG_FILE, config)
        shutil.rmtree(Path(config).parent.parent, ignore_errors=True)


@contextlib.contextmanager
def ray_session(
    address: str = "local",
    *,
    logical_cpus: int | None = None,
    verbose: bool = False,
    on_lost: Callable[[str], object] = lambda name: None,
) -> Iterator[RaySession]:
    """Connect to a cluster, or run a private Ray while the block lasts.

    `on_lost` is called on a thread with the name of a private Ray's daemon that has ended, be it while Ray starts: it
    comes back by starting anew only, and whatever is asked of Ray may then wait for ever.

    Environment and signal handlers are as before afterwards. SIGTERM raises `SystemExit(143)` in the block. Raises
    `EngineError` where Ray does not start or a session is already open in this process.
    """
    import ray  # half a second: commands that need no Ray do not wait for it

    if ray.is_initialized():
        raise EngineError("this process is already connected to Ray; close that session first")
    if address != "local":
        with raise_on_sigterm():
            _connect(address, logical_cpus=None, folder=None, verbose=verbose)
            try:
                yield RaySession(address=ray.get_runtime_context().gcs_address, folder=None)
            finally:
                ray.shutdown()
        return

    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=_short_temp_root()))
    with _owning(folder), _environment(_private_environment(folder)), raise_on_sigterm():
        try:
            with _watching_daemons(on_lost):
                _connect("local", logical_cpus=logical_cpus, folder=folder, verbose=verbose)
                yield RaySession(address=ray.get_runtime_context().gcs_address, folder=folder)
        finally:
            with _ignore_signals():
                _shut_down(folder)


def serve_http(host: str, port: int, *, shared: bool = False) -> None:
    """Start Ray Serve's HTTP ingress on the session's head, on a port that may be shared with processes that allow it.

    Raises `PortTakenError`.
    """
    from ray import serve

    assert_port_free(host, port, shared=shared)
    logging.getLogger("ray.serve").setLevel(logging.getLogger("ray").level)  # its import has made it talkative
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})


def assert_port_free(host: str, port: int, *, shared: bool = False) -> None:
    """Raise `PortTakenError` if something listens on the address, `EngineError` if the host is not this machine's.

    With `shared`, other listeners of this user that share it too are fine.
    """
    if not 0 < port < 2**16:
        raise EngineError(f"{host}:{port}: the port must be from 1 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection's wait is not a listener
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
            probe.bind(address)
    except PermissionError as error:
        raise EngineError(f"{host}:{port}: not permitted; try a port from 1024") from error
    except UnicodeError as error:
        raise EngineError(f"{host}: is not a host name; try 127.0.0.1") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(f"{host}:{port}: another process listens there; stop it or pass --port") from error
        raise EngineError(f"{host}:{port}: cannot be listened on ({error})") from error


def find_free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nothing listens on, below the range from which the kernel hands out ports by itself."""
    for port in random.sample(range(20_000, 30_000), 100):
        with contextlib.suppress(PortTakenError):
            assert_port_free(host, port)
            return port
    raise EngineError(f"{host}: a hundred ports between 20000 and 30000 are all taken")


def _connect(address: str, *, logical_cpus: int | None, folder: Path | None, verbose: bool) -> None:
    import ray
    from ray.exceptions import RayError

    private = (
        {
            "num_cpus": logical_cpus or max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_temp_dir": str(folder),
        }
        if folder
        else {}
    )
    if folder:
        _reread_authentication()
    level = logging.INFO if verbose else logging.ERROR
    logging.getLogger("ray.serve").setLevel(level)
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=verbose, logging_level=level, **private)
    except (RuntimeError, ConnectionError, RayError) as error:
        raise EngineError(f"Ray at {address!r} does not answer: {error}") from error
    _handle_sigterm()  # ray.init has put its own handler in place


def _reread_authentication() -> None:
    """Have Ray see this session's mode and token: it reads them once, at its import or in an earlier session.

    No public call reads them again (Ray 2.60); without this the driver is refused by its own cluster.
    """
    from ray import _raylet  # compiled, without type stubs

    _raylet.Config.initialize("")  # pyright: ignore[reportAttributeAccessIssue]
    _raylet.AuthenticationTokenLoader.instance().reset_cache()  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def _owning(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for the block, after removing folders whose owners were killed."""
    for path in folder.parent.glob(f"{FOLDER_PREFIX}*/{OWNER_FILE}"):
        with contextlib.suppress(OSError), path.open("a") as lock:  # another user's, or somebody has it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
    with (folder / OWNER_FILE).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _watching_daemons(on_lost: Callable[[str], object]) -> Iterator[None]:
    ended, seen = threading.Event(), dict[str, psutil.Process]()

    def look() -> None:
        while not ended.wait(_DAEMON_WATCH_S):
            if len(seen) < len(DAEMONS):
                children = psutil.Process().children(recursive=True)
                seen.update((name, child) for child in children if (name := _name(child)) in DAEMONS)
            if lost := [name for name, process in seen.items() if not _is_running(process)]:
                on_lost(", ".join(lost))
                return

    watch = threading.Thread(target=look, name="daemon-watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _shut_down(folder: Path) -> None:
    """End everything below this process: applications in order, then Ray, then by process id whatever is left."""
    import ray

    started = psutil.Process().children(recursive=True)
    patience_s = _EXIT_PATIENCE_S if ray.is_initialized() else 0.0  # one interrupted at its start never ends by itself
    try:
        if ray.is_initialized():
            _delete_applications()
        ray.shutdown()
    finally:
        _, alive = psutil.wait_procs(started, timeout=patience_s)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(alive, timeout=_EXIT_PATIENCE_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_EXIT_PATIENCE_S)
        shutil.rmtree(folder, ignore_errors=True)


def _delete_applications() -> None:
    """Let Serve's replicas finish their requests; its system actors then end with Ray.

    `serve.shutdown()` would do both, but prints an error of its own on stdout each time: it kills the controller
    while the controller's answer is awaited (seen in Ray 2.60).
    """
    if "ray.serve" not in sys.modules:
        return
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        for application in serve.status().applications:
            serve.delete(application)
    except (RayServeException, RayError, TimeoutError) as error:
        logging.getLogger(__name__).warning("Serve did not end in order, its processes are stopped: %s", error)


def _private_environment(folder: Path) -> dict[str, str]:
    """Return the settings that Ray's processes take from the environment, which they inherit from this one."""
    return build_settings(folder, find_free_port) | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        # Ray has its workers, HAProxy below them too, stand back behind whatever else runs (niceness 15): a request is
        # then answered only when nobody wants the core. Who should stand back here, training beside serving, says so.
        "RAY_worker_niceness": "0",
        # The app never blocks the event loop, so it may share Serve's: a request crosses no threads but the app's own.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
        # A worker's report is taken up at the controller's next look; its default of 2 s would be most of an epoch.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        # One machine, so nothing routes to a replica that is leaving: do not hold it for half a minute.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Set variables for the block, and put back what was there."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Have SIGTERM raise `SystemExit(143)` in the block."""
    before = signal.getsignal(signal.SIGTERM)
    _handle_sigterm()
    try:
        yield
    finally:
        _set_handler(signal.SIGTERM, before)


def _handle_sigterm() -> None:
    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(SIGTERM_EXIT_CODE)

    _set_handler(signal.SIGTERM, leave)


@contextlib.contextmanager
def _ignore_signals() -> Iterator[None]:
    """Finish a bounded clean-up even if Ctrl-C is pressed again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        _set_handler(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            _set_handler(number, handler)


def _set_handler(number: signal.Signals, handler: "signal._HANDLER") -> None:
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        signal.signal(number, handler)


def _short_temp_root() -> str | None:
    return None if len(tempfile.gettempdir()) <= _MAX_TEMP_ROOT_CHARS else "/tmp"
