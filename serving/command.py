"""`recloop serve`: serve the promoted version over HTTP until Ctrl-C, learning from feedback.

In:  the command line.  Out: an address on stdout; then a server.
Knows nothing of how requests are answered or how the trainer learns, which it starts by import string.

With `--local` the command answers by itself, without Ray, and learns in a process of its own. Otherwise, with a private
Ray, it is two processes: the standby, which answers from its own replica while Ray does not, and
below it the same command again, which runs Ray and is started anew whenever Ray is lost.
"""

import argparse
import contextlib
import importlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import EngineConfig, Recipe, load_recipe
from cluster.dataset import load_dataset
from cluster.engine import open_registry
from cluster.errors import ConfigError, DataError, EngineError, RegistryError
from cluster.haproxy import GIVEN_PORTS, STATS_PORT, share_ports
from cluster.home import Home
from cluster.keys import KeyFile
from cluster.output import print_result
from cluster.ray_session import (
    abandon_session,
    assert_port_free,
    find_free_port,
    kill_started,
    raise_on_sigterm,
    ray_session,
)

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from serving.standby import Standby

WATCH_S = 0.2
"""How often the command looks whether Ray is still there."""
TRAINER_WATCH_S = 10.0
"""How often it looks whether the online trainer still learns."""
RESTART_PAUSE_S = 0.2
MAX_RESTART_PAUSE_S = 30.0
"""A Ray that does not come up is tried again after twice as long each time, up to this."""
START_PATIENCE_S = 180.0
"""How long Ray and its replicas may take to answer."""
FIRST_TRIES = 3
"""How often Ray may fail to start, without having ever answered, before the command fails too."""
FINAL_EXIT_CODES = (ConfigError.exit_code, DataError.exit_code, RegistryError.exit_code)
"""With these, trying again is of no use."""
LOST_EXIT_CODE = os.EX_TEMPFAIL
"""Of the process that runs Ray behind a standby, once Ray or the standby is gone."""
END_PATIENCE_S = 40.0
"""How long Ray may take to end in order."""
ONLINE_TRAINER = ("training.online.actor", "running_trainer")
LOOPBACK = "127.0.0.1"
LOCAL_TRAINER = ("training.online.process", "running_process")


def run(args: argparse.Namespace) -> None:
    """Check, start, say where, wait."""
    recipe = load_recipe(args.recipe, args.overrides)
    assert_port_free(args.host, args.port, shared=args.behind_standby)
    if not args.without_keys and not args.keys_required:
        assert_reachable_by_keys_only(args.host, args.home)
    # Decided once: replicas that start when the file is gone, or on another node, refuse everybody.
    args.keys_required |= bool(KeyFile(args.home.keys).read())
    from serving.config import ServeConfig  # torch: a wrong flag does not wait for it
    from serving.preflight import check_version, describe_damage

    registry, config = open_registry(recipe, args.home), recipe.section(ServeConfig)
    if args.behind_standby:
        _run_on_ray(args, recipe)
        return
    version = check_version(registry, config.pinned_version)
    if damage := describe_damage(registry, version):
        print(
            f"recloop: {version} is served as far as it is whole, and learned again from there: {damage}",
            file=sys.stderr,
        )
    with _public_address(args):
        _serve(args, recipe)


def _serve(args: argparse.Namespace, recipe: Recipe) -> None:
    from serving.config import ServeConfig

    config = recipe.section(ServeConfig)
    if args.local:
        _run_locally(args, recipe)
    elif config.standby and recipe.section(EngineConfig).ray_address == "local":
        _run_with_standby(args, recipe)
    else:
        _run_on_ray(args, recipe)


@contextlib.contextmanager
def _public_address(args: argparse.Namespace) -> Iterator[None]:
    """Have the address answer HTTPS where a certificate is given, and the server behind it listen for this machine."""
    if (args.tls_certificate is None) != (args.tls_key is None):
        raise ConfigError("--tls-certificate, --tls-key: one needs the other")
    if args.tls_certificate is None:
        yield
        return
    from serving.tls import tls_front

    public = args.host, args.port
    args.public_url = f"https://{args.host}:{args.port}"
    args.host, args.port = LOOPBACK, find_free_port()
    with tls_front(Path(args.tls_certificate), Path(args.tls_key), public, (args.host, args.port)):
        yield


def assert_reachable_by_keys_only(host: str, home: Home) -> None:
    """Raise `ConfigError` where others could ask a server here without a key."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    is_loopback = all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)
    if not is_loopback and not KeyFile(home.keys).read():
        raise ConfigError(
            f"--host {host}: others can reach it, and there are no keys: make one with `recloop keys add NAME`;"
            " --without-keys serves anyone"
        )


def _run_locally(args: argparse.Namespace, recipe: Recipe) -> None:
    """Answer from this process, and have another one learn."""
    from serving.local import running_locally

    dataset = load_dataset(args.data) if args.data else None
    with (
        raise_on_sigterm(),
        running_locally(recipe, args.home, args.host, args.port, dataset, keys_required=args.keys_required) as url,
        _imported(LOCAL_TRAINER)(recipe, args.home),
    ):
        _say_where(args, recipe, url)
        threading.Event().wait()


def _say_where(args: argparse.Namespace, recipe: Recipe, url: str) -> None:
    version, url = open_registry(recipe, args.home).current(), args.public_url or url
    print_result({"url": url, "docs": f"{url}/docs", "version": str(version)}, as_json=args.json)


def _run_with_standby(args: argparse.Namespace, recipe: Recipe) -> None:
    """Answer, start Ray, and stand back while it answers."""
    from serving.past import seed_history
    from serving.replica import resolve_settings
    from serving.standby import Standby

    settings = resolve_settings(recipe, args.home, keys_required=args.keys_required)
    seed_history(
        open_registry(recipe, args.home), args.home.ensure().log, load_dataset(args.data) if args.data else None
    )
    stats_port, fallback_port = find_free_port(args.host), find_free_port(args.host)
    with (
        raise_on_sigterm(),
        Standby(settings, args.host, args.port, stats_port=stats_port, fallback_port=fallback_port) as standby,
    ):
        environment = os.environ | share_ports(stats_port=stats_port, fallback_port=fallback_port)
        pause_s, was_ready, failures = RESTART_PAUSE_S, False, 0
        while True:
            with _ray_process(args, environment, again=was_ready) as process:
                ready = _stand_by(standby, process)
            kill_started(GIVEN_PORTS[STATS_PORT], str(stats_port))  # what a killed Ray has left behind
            standby.look()
            was_ready |= ready
            failures += process.returncode not in (LOST_EXIT_CODE, -signal.SIGKILL)
            if not was_ready and (process.returncode in FINAL_EXIT_CODES or failures >= FIRST_TRIES):
                raise SystemExit(process.returncode)
            pause_s = RESTART_PAUSE_S if ready else min(2 * pause_s, MAX_RESTART_PAUSE_S)
            time.sleep(pause_s)


def _stand_by(standby: "Standby", process: "subprocess.Popen[bytes]") -> bool:
    """Take over and stand back until the process ends; return whether Ray answered at any time."""
    ready, deadline_s = False, time.monotonic() + START_PATIENCE_S
    while process.poll() is None:
        ready |= standby.look()
        if not ready and time.monotonic() > deadline_s:
            print(f"recloop: Ray has not answered within {START_PATIENCE_S:.0f} s", file=sys.stderr)
            process.kill()
        time.sleep(WATCH_S)
    return ready


@contextlib.contextmanager
def _ray_process(
    args: argparse.Namespace, environment: dict[str, str], *, again: bool
) -> "Iterator[subprocess.Popen[bytes]]":
    """Run the command behind the standby while the block lasts; it ends with its standard input, whatever happens."""
    command = [sys.executable, "-m", "cluster", "serve", "--behind-standby", "--home", str(args.home.path)]
    command += ["--recipe", args.recipe, "--host", args.host, "--port", str(args.port)]
    command += [part for override in args.overrides for part in ("--set", override)]
    command += [*(["--data", args.data] if args.data else []), *(["--json"] if args.json else [])]
    command += [*(["--verbose"] if args.verbose else []), *(["--without-keys"] if args.without_keys else [])]
    command += ["--keys-required"] if args.keys_required else []
    command += ["--public-url", args.public_url] if args.public_url else []
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=sys.stderr if again else None,  # where it says the address a second time
        start_new_session=True,  # Ctrl-C is for this process, which passes it on
    )
    try:
        yield process
    except BaseException:
        process.send_signal(signal.SIGTERM)
        raise
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_PATIENCE_S)
        process.kill()
        process.communicate()


def _run_on_ray(args: argparse.Namespace, recipe: Recipe) -> None:
    from serving.app import running_app

    dataset = load_dataset(args.data) if args.data else None
    engine, behind = recipe.section(EngineConfig), args.behind_standby
    anew, code = "start `recloop serve` again", EngineError.exit_code
    if behind:
        _end_with_standby()
        anew, code = "starting it again", LOST_EXIT_CODE
    with (
        ray_session(
            engine.ray_address,
            logical_cpus=engine.logical_cpus,
            verbose=args.verbose,
            on_lost=lambda name: _end(f"{name} has ended, and Ray with it; {anew}", code),
        ),
        running_app(
            recipe, args.home, args.host, args.port, dataset, shared=behind, keys_required=args.keys_required
        ) as url,
        _imported(ONLINE_TRAINER)(recipe, args.home) as trainer,
    ):
        _say_where(args, recipe, url)
        _watch(trainer)


def _watch(trainer: "ActorHandle[Any] | None") -> None:  # Any: an actor of a layer that serving may not name
    """Wait for Ctrl-C; say so when learning stops, which no request would show."""
    while True:
        time.sleep(TRAINER_WATCH_S)
        if trainer is not None:
            _look_after(trainer)


def _end_with_standby() -> None:
    """End this process once the standby is gone, which holds the other end of its standard input."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever sent: it returns at the end of the other side
        _end("the standby has ended", LOST_EXIT_CODE)

    threading.Thread(target=wait, name="standby-watch", daemon=True).start()


def _end(reason: str, exit_code: int) -> None:
    """End this process with all that it started, at once: what it waits for would not come."""
    print(f"recloop: {reason}", file=sys.stderr, flush=True)
    abandon_session()
    os._exit(exit_code)


def _look_after(trainer: "ActorHandle[Any]") -> None:  # Any: as above
    import ray
    from ray.exceptions import RayError

    try:
        status: Any = ray.get(trainer.status.remote(), timeout=TRAINER_WATCH_S)  # Any: JSON
    except RayError as error:
        status = {"ready": False, "error": type(error).__name__}
    if not status["ready"]:
        print(f"recloop: online training does not answer, the weights stand still: {status}", file=sys.stderr)


def _imported(target: tuple[str, str]) -> Callable[[Recipe, Home], AbstractContextManager[Any]]:
    """Return what learns while a block lasts, of a layer that serving may not name."""
    module, function = target
    return getattr(importlib.import_module(module), function)
