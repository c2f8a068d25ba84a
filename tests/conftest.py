"""Fixtures that several test files share: one private Ray, one process group, small homes of random weights."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.config import Recipe, load_recipe
from cluster.events import Event, events_table
from cluster.home import Home
from cluster.manifest import VersionRef
from cluster.ray_session import RaySession, ray_session
from cluster.registry import Registry
from embeddings.tables import TablesConfig
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
        "data.negatives=32",
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
        dense = TwoStage(self.recipe.section(ModelConfig), dim, self.TEXT_DIM)
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
                TEXT_ROWS: torch.nn.functional.normalize(
                    torch.randn(self.ITEMS, self.TEXT_DIM, generator=generator), dim=1
                ),
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


@pytest.fixture
def build_home(tmp_path: Path) -> Callable[..., TinyHome]:
    """Build a home of a test's own; arguments override its recipe."""

    def build(*overrides: str, name: str = "home", seed: int = 0) -> TinyHome:
        return TinyHome(tmp_path / name, *overrides, seed=seed)

    return build
