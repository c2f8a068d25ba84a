"""Serve from this process alone, without Ray: the same replica, the same API, for one small machine.

In:  a recipe, a home with a published version, an address.  Out: a running server and its URL.
Knows nothing of learning, which has a process of its own (training/online/process.py).
"""

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn

from cluster.config import Recipe
from cluster.dataset import Dataset
from cluster.engine import open_registry
from cluster.errors import EngineError
from cluster.heap import settle_heap
from cluster.home import Home
from cluster.registry import Registry
from serving.encoders import LocalEncoder, VersionEncoders
from serving.past import seed_history
from serving.replica import Replica, resolve_settings

START_PATIENCE_S = 30.0
START_POLL_S = 0.01
LEAVING_S = 5
"""How long requests under way may take once the server ends."""
KEEP_ALIVE_S = 60
BACKLOG = 2_048


@contextlib.contextmanager
def running_locally(
    recipe: Recipe, home: Home, host: str, port: int, dataset: Dataset | None = None, *, keys_required: bool = False
) -> Iterator[str]:
    """Serve the promoted version while the block lasts; yield the base URL. Arguments are those of `running_app`.

    Raises `NoVersionError`, `CorruptVersionError`, or `EngineError` where the address cannot be listened on.
    """
    settings = resolve_settings(recipe, home, keys_required=keys_required)
    seed_history(open_registry(recipe, home), home.ensure().log, dataset)
    encoders = VersionEncoders(settings.cache, settings.serve, Registry(settings.registry_uri))
    replica = Replica(settings, LocalEncoder(encoders, settings.serve.encoder_timeout_s), rank=0)
    try:
        replica.load()
        api = replica.build_api()
        settle_heap()
        with _listening(
            uvicorn.Config(
                api,
                host,
                port,
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=LEAVING_S,
            )
        ):
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        replica.close()
        encoders.stop()


@contextlib.contextmanager
def _listening(config: uvicorn.Config) -> Iterator[None]:
    server = uvicorn.Server(config)
    thread = threading.Thread(target=_run, args=(server,), name="server")
    thread.start()
    try:
        deadline_s = time.monotonic() + START_PATIENCE_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline_s:
                raise EngineError(f"{config.host}:{config.port}: cannot be listened on")
            time.sleep(START_POLL_S)
        yield
    finally:
        server.should_exit = True
        thread.join()


def _run(server: uvicorn.Server) -> None:
    with contextlib.suppress(SystemExit):  # how uvicorn says that it could not listen
        server.run()
