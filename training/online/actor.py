"""The process that learns online: one Ray actor that reads the log, learns, publishes, for as long as it lives.

In:  a registry, an event log and the encoder's settings.  Out: deltas; `status` for whoever asks.
Knows nothing of how learning works (training/online/learner.py). Crash-only: on any error the process ends, Ray starts
it again and it goes on after the last published delta. While the promoted version is of a classical system, which has
nothing to learn, it waits for the next (idle.py).

With `online.workers` above 1 this actor leads: it alone has the log and the registry, and starts the others, actors of
its own that hold their part of the model and do as they hear (training/online/workers.py). They live and die together:
a worker that ends ends the leader, and Ray ends what an actor that is gone has started.
"""

import contextlib
import datetime
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.exceptions import RayError

from cluster.config import EngineConfig, Recipe
from cluster.engine import open_log, open_registry
from cluster.errors import EngineError, NothingToLearnError, RecloopError
from cluster.home import Home
from cluster.log.retention import LogConfig
from embeddings.tables import device_type
from training.interface import name_interface
from training.online.adapter import AdapterConfig, Proposal, end_with_parent, propose_into
from training.online.canary import CanaryConfig, CanaryWatch
from training.online.idle import Idle
from training.online.learner import CONSUMER, OnlineConfig, OnlineLearner
from training.online.part import follow
from training.online.workers import Workers, open_store

logger = logging.getLogger(__name__)

RESTART_PAUSE_S = 1.0
START_PATIENCE_S = 60.0
JOIN_PATIENCE = datetime.timedelta(seconds=60)
"""How long workers wait for each other as they start."""
ENCODE_AT_ONCE = 8
"""Items encoded between two steps, where a bridge has stood in for the new encoder."""
ENCODE_PAUSE_S = 60.0
"""How long none of these is encoded after one could not be."""
CANARY_LOOK_S = 2.0
"""How often a version on trial is judged."""


class OnlineFollower:
    """One of several workers, but not the first."""

    def follow(self, address: tuple[str, int], rank: int, config: OnlineConfig) -> None:
        """Do what the leader says to the end. Ends the process on any error."""
        try:
            torch.set_num_threads(1)
            os.nice(config.niceness)
            name_interface()
            store = dist.TCPStore(*address, is_master=False, timeout=JOIN_PATIENCE)
            device = device_type()
            follow(Workers.join(store, rank, config.workers, device), torch.device(device))
        except BaseException:
            logger.exception("worker %d of online training failed", rank)
            os._exit(1)


class OnlineTrainer:
    """Runs an `OnlineLearner` on a thread; methods answer meanwhile."""

    def __init__(self, recipe_toml: str, home: Home) -> None:
        """Start learning. Ends the process when the promoted version cannot be taken up."""
        recipe = Recipe.from_toml(recipe_toml)
        torch.set_num_threads(1)
        self._recipe, self._config = recipe, recipe.section(OnlineConfig)
        os.nice(self._config.niceness)  # before its threads start, which take it on
        self._registry = open_registry(recipe, home)
        self._log = open_log(recipe.section(EngineConfig), recipe.section(LogConfig), home.log)
        self._cache_folder = home.cache
        self._canary = CanaryWatch(self._registry, self._log, recipe.section(CanaryConfig))
        self._stopping = threading.Event()
        self._adapters = AdapterSchedule(recipe, home)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="online-trainer")
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Return whether the promoted version was taken up within the time."""
        return self._ready.wait(timeout_s)

    def status(self) -> dict[str, Any]:  # Any: JSON
        """Return what is published and learned."""
        if not self._ready.is_set():
            return {"ready": False}
        learner = self._learner
        if isinstance(learner, Idle):
            return learner.status()
        return {
            "ready": True,
            "learns": True,
            "workers": learner.workers.count,
            "version": str(learner.ref),
            "applied_seq": learner.applied_seq,
            "lag_events": self._log.head_seq() - learner.applied_seq,
            "validation": learner.guard.metrics(),
        }

    def stop(self) -> None:
        """Publish what was learned and end the thread."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._workers = self._gather_workers()
            self._learner = self._take_up()
            self._ready.set()
            self._follow_log()
            self._workers.end()
        except BaseException:
            logger.exception("online training failed; starting again after the last delta")
            time.sleep(RESTART_PAUSE_S)
            os._exit(1)

    def _take_up(self) -> OnlineLearner | Idle:
        """Return who learns on from the promoted version, or who waits while that has nothing to learn."""
        device = torch.device(device_type())
        try:
            return OnlineLearner(self._registry, self._log, self._recipe, self._cache_folder, device, self._workers)
        except NothingToLearnError:
            return Idle(self._registry, self._log, CONSUMER)

    def _publish(self) -> None:
        if isinstance(self._learner, Idle) and self._learner.is_over():
            self._learner = self._take_up()
        try:
            self._learner.publish()
        except NothingToLearnError:
            self._learner = Idle(self._registry, self._log, CONSUMER)

    def _gather_workers(self) -> Workers:
        """Start the other workers and join them."""
        if self._config.workers == 1:
            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
            return Workers()
        name_interface()
        host = ray.util.get_node_ip_address()
        store, port = open_store(host, JOIN_PATIENCE)
        actor_class: Any = ray.remote(OnlineFollower)  # Any: Ray's types do not say what a decorated class offers
        spread = actor_class.options(num_cpus=0, **gpu_options(self._config), scheduling_strategy="SPREAD")
        self._followers = [spread.remote() for _ in range(1, self._config.workers)]  # one not referred to is ended
        ends = [
            follower.follow.remote((host, port), rank, self._config) for rank, follower in enumerate(self._followers, 1)
        ]
        threading.Thread(target=self._watch, args=(ends,), name="online-workers", daemon=True).start()
        return Workers.join(store, 0, self._config.workers, device_type())

    def _watch(self, ends: list[ray.ObjectRef[None]]) -> None:
        """End the process when another worker has ended, though nothing be asked of it."""
        ray.wait(ends, num_returns=1)
        if not self._stopping.is_set():
            logger.error("a worker of online training has ended; starting all again after the last delta")
            time.sleep(RESTART_PAUSE_S)
            os._exit(1)

    def _follow_log(self) -> None:
        published_s = looked_s = time.monotonic()
        while not self._stopping.is_set():
            events = self._learner.read()
            if events:
                self._learner.learn(events)
            if time.monotonic() - published_s >= self._config.publish_interval_ms / 1_000:
                self._publish()
                published_s = time.monotonic()
            if time.monotonic() - looked_s >= CANARY_LOOK_S:
                self._canary.look(time.time_ns() // 1_000)
                looked_s = time.monotonic()
            if isinstance(self._learner, OnlineLearner):
                self._adapters.look(self._learner)
            if not events:
                self._workers.beat()
                self._stopping.wait(self._config.poll_interval_ms / 1_000)
        self._publish()


class AdapterSchedule:
    """Has an encoder proposed when it is time, in a process of its own, and lets the learner adopt it."""

    def __init__(self, recipe: Recipe, home: Home) -> None:
        self._recipe, self._home, self._config = recipe, home, recipe.section(AdapterConfig)
        self._asked: Future[str | None] | None = None
        self._folder = home.path / "adapters"
        self._last_s, self._last_events = time.monotonic(), -1
        self._encode_at_once, self._encode_from_s = ENCODE_AT_ONCE, 0.0

    def look(self, learner: OnlineLearner) -> None:
        """Ask for a proposal where one is due; adopt the one that has come. What goes wrong there is logged alone."""
        if self._last_events < 0:
            self._last_events = learner.events_total
        if self._asked is not None:
            self._take(learner)
        elif self._config.is_due(time.monotonic() - self._last_s, learner.events_total - self._last_events):
            self._last_s, self._last_events = time.monotonic(), learner.events_total
            self._folder_asked = self._folder / f"{time.time_ns()}"
            self._process = ProcessPoolExecutor(1, get_context("spawn"), end_with_parent)
            self._asked = self._process.submit(propose_into, self._folder_asked, self._recipe.to_toml(), self._home)
        if time.monotonic() >= self._encode_from_s:
            self._encode_bridged(learner)

    def _encode_bridged(self, learner: OnlineLearner) -> None:
        try:
            learner.encode_bridged(self._encode_at_once)
        except (RecloopError, OSError) as error:
            logger.error("items stay bridged for now: %s", error)
            self._encode_at_once = 1  # so that the text at fault holds up no others
            self._encode_from_s = time.monotonic() + ENCODE_PAUSE_S

    def _take(self, learner: OnlineLearner) -> None:
        assert self._asked is not None
        if not self._asked.done():
            return
        asked, self._asked = self._asked, None
        try:
            if (error := asked.exception()) is not None:
                logger.error("no encoder is proposed: %r", error)
            elif refused := asked.result():
                logger.info("the encoder stays: %s", refused)
            else:
                learner.adopt(Proposal.load(self._folder_asked))
        except (RecloopError, OSError) as error:
            logger.error("the encoder that is proposed is not adopted: %s", error)
        finally:
            self._process.shutdown(wait=False)  # with the memory that it took
            shutil.rmtree(self._folder_asked, ignore_errors=True)


@contextlib.contextmanager
def running_trainer(recipe: Recipe, home: Home) -> Iterator[ActorHandle[OnlineTrainer] | None]:
    """Learn from the log while the block lasts; yields none where the recipe turns online training off.

    Call it inside a Ray session, with a version promoted. Raises `EngineError` when the trainer does not take it up.
    """
    config = recipe.section(OnlineConfig)
    if not config.enabled:
        yield None
        return
    actor_class: Any = ray.remote(OnlineTrainer)  # Any: Ray's types do not say what a decorated class offers
    options = actor_class.options(num_cpus=0, **gpu_options(config), max_restarts=-1, max_concurrency=4)
    trainer = options.remote(recipe.to_toml(), home)
    try:
        # The others of several workers start after the leader.
        _wait_until_ready(trainer, START_PATIENCE_S * min(config.workers, 2))
        yield trainer
        ray.get(trainer.stop.remote())
    finally:
        ray.kill(trainer)


def gpu_options(config: OnlineConfig) -> dict[str, int]:
    """Return what an actor asks of Ray's GPUs: of several workers each has one to itself, where there are any."""
    return {"num_gpus": 1} if config.workers > 1 and device_type() == "cuda" else {}


def _wait_until_ready(trainer: ActorHandle[OnlineTrainer], patience_s: float) -> None:
    try:
        ready = ray.get(trainer.wait_ready.remote(patience_s))
    except RayError as error:
        raise EngineError("online training cannot take up the promoted version; --verbose says why") from error
    if not ready:
        raise EngineError(f"online training has not taken up the promoted version within {patience_s:.0f} s")
