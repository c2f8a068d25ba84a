"""One served home for all tests of this folder: tiny versions of random weights, made of the real parts."""

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
import torch

from cluster.config import Recipe
from cluster.events import Event, events_table
from cluster.home import Home
from cluster.log import EventLog
from cluster.manifest import VersionRef
from cluster.ray_session import RaySession, find_free_port
from cluster.registry import Registry
from embeddings.quantized import QuantizedRows
from embeddings.tables import TablesConfig
from serving.app import running_app
from serving.past import seed_history
from serving.replica import resolve_settings
from serving.standby import Standby
from training.models.tags import Tags
from training.models.two_stage import ModelConfig, TwoStage
from training.models.version import (
    COUNT_ROWS,
    ITEM_ROWS,
    TEXT_ROWS,
    USER_ROWS,
    Change,
    VersionState,
    read_version,
    write_delta,
    write_version,
)

ITEMS = 30
USERS = 4
TEXT_DIM = 384
"""Of the packaged encoder, which reads the items that the tests put."""
RECIPE = """
[encoder]
[tables]
dim = 8
[model]
max_history = 10
layers = 1
heads = 1
[policy]
[engine]
[serve]
arms = ["live", "state", "frozen"]
poll_interval_ms = 20
max_body_bytes = 100000
max_text_chars = 20000
warm_encoder = false
max_k = 500
"""
SECTIONS = {
    "engine": "cluster.config:EngineConfig",
    "log": "cluster.log.retention:LogConfig",
    "encoder": "embeddings.text_encoder:EncoderConfig",
    "tables": "embeddings.tables:TablesConfig",
    "model": "training.models.two_stage:ModelConfig",
    "policy": "training.policies:PolicyConfig",
    "serve": "serving.config:ServeConfig",
}


def tiny_recipe() -> Recipe:
    return Recipe.from_toml(RECIPE, name="tiny", sections=SECTIONS)


def tags() -> Tags:
    """Return categories, even or odd and a tenth of them, and domains, early and late ones."""
    categories = [[("even", "odd")[row % 2], *(["tenth"] if row % 10 == 0 else [])] for row in range(ITEMS)]
    domains = [("early", "late")[2 * row // ITEMS] for row in range(ITEMS)]
    return Tags(pa.table({"categories": categories, "domain": domains}))


class TinyVersions:
    """A registry of random weights for items i0, i1, … and users u0, u1, …, who have liked i0 and i1."""

    def __init__(self, home: Home) -> None:
        self.registry = Registry(home.registry)
        self.recipe = tiny_recipe()

    @staticmethod
    def likes(items: int) -> pa.Table:
        """Return how every user liked the first items, one after the other."""
        return events_table(
            Event(event_id=f"u{user} i{item}", user_id=f"u{user}", item_id=f"i{item}", kind="like", ts_us=item)
            for item in range(items)
            for user in range(USERS)
        )

    def publish_version(
        self, *, seed: int = 0, history: pa.Table | None = None, promote: bool = True, **metrics: object
    ) -> VersionRef:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        recipe = tiny_recipe()
        dim = recipe.section(TablesConfig).dim
        state = VersionState(
            ref=VersionRef(1),
            recipe=recipe,
            learned_seq=0,
            item_ids=[f"i{row}" for row in range(ITEMS)],
            item_texts=[f"film number {row}" for row in range(ITEMS)],
            user_ids=[f"u{row}" for row in range(USERS)],
            rows={
                ITEM_ROWS: torch.randn(ITEMS, dim, generator=generator),
                USER_ROWS: torch.zeros(USERS, dim),
                TEXT_ROWS: torch.nn.functional.normalize(torch.randn(ITEMS, TEXT_DIM, generator=generator), dim=1),
                COUNT_ROWS: torch.arange(ITEMS, 0, -1),
            },
            tags=tags(),
            dense=TwoStage(recipe.section(ModelConfig), dim, TEXT_DIM).state_dict(),
            optimizer={},
        )
        draft = self.registry.draft_version()
        write_version(draft, state, self.likes(2) if history is None else history)
        return draft.publish(offset=0, metrics=metrics, promote=promote)

    def publish_delta(
        self,
        *,
        seed: int = 0,
        value: float | None = None,
        promote: bool = True,
        last_seq: int | None = None,
        items: Sequence[int] = range(ITEMS),
        **metrics: object,
    ) -> VersionRef:
        """Publish other rows of items, random or all of one value, as if learned from the log up to `last_seq`."""
        version = self.registry.current().version
        before = read_version(self.registry, VersionRef(version))
        rows_ID = torch.randn(before.rows[ITEM_ROWS].shape, generator=torch.Generator().manual_seed(seed))
        rows_ID = rows_ID if value is None else torch.full_like(rows_ID, value)
        index = torch.tensor(items)
        change = Change(
            new_items=[],
            new_users=[],
            rows={ITEM_ROWS: (index, QuantizedRows(rows_ID[index]))},
            optimizer_rows={},
            dense=before.dense,
            optimizer={},
        )
        draft = self.registry.draft_delta(version)
        write_delta(draft, change)
        learned = [self.registry.manifest(VersionRef(version)), *self.registry.deltas(version)][-1].last_seq
        return draft.publish(learned + 1, last_seq or learned + 1, metrics, promote=promote)

    def flip_bit(self, ref: VersionRef, file_name: str) -> None:
        """Damage a published file; doing it again mends it."""
        path = Path(self.registry.uri, ref.folder, file_name)
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; header names are lower case."""

    status: int
    body: dict
    headers: dict[str, str]


@dataclass(frozen=True)
class Served:
    """A running app and what it runs on."""

    url: str
    versions: TinyVersions
    log: EventLog

    @property
    def registry(self) -> Registry:
        return self.versions.registry

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        raw: bytes | None = None,
        key: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Send JSON, or `raw` as it is; None sends no body, or no key."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        payload = raw if body is None else json.dumps(body).encode()
        try:
            sent = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, payload, sent | ({"Authorization": f"Bearer {key}"} if key else {}))
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in response.headers.items()}
        is_json = "json" in found.get("content-type", "")
        return Answer(response.status, json.loads(text) if is_json else {"text": text.decode()}, found)

    def recommend(self, user_id: str, **fields: object) -> dict:
        answer = self.request("POST", "/v1/recommend", {"user_id": user_id, **fields})
        assert answer.status == 200, answer
        return answer.body

    def post(self, user_id: str, item_id: str, kind: str = "like") -> int:
        answer = self.request("POST", "/v1/feedback", {"user_id": user_id, "item_id": item_id, "kind": kind})
        assert answer.status == 200, answer
        return answer.body["last_seq"]

    def publish_delta(self, *, seed: int = 0, value: float | None = None, promote: bool = True) -> VersionRef:
        last_seq = self.post("learned from", "i0", "impression")
        return self.versions.publish_delta(seed=seed, value=value, promote=promote, last_seq=last_seq)

    def wait_until_served(self, ref: VersionRef) -> None:
        self.wait_for(lambda: self.recommend("anybody")["version"] == str(ref))

    def wait_for(self, condition: Callable[[], bool], patience_s: float = 10.0) -> None:
        deadline_s = time.monotonic() + patience_s
        while not condition():
            assert time.monotonic() < deadline_s, self.request("GET", "/v1/versions")
            time.sleep(0.01)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path).ensure()


@pytest.fixture
def versions(home: Home) -> TinyVersions:
    """A registry of its own with one version."""
    tiny = TinyVersions(home)
    tiny.publish_version()
    return tiny


@pytest.fixture(scope="session")
def served(ray_cluster: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The app, once for all tests: each publishes on top of what it finds."""
    home = Home(tmp_path_factory.mktemp("served"))
    tiny = TinyVersions(home)
    tiny.publish_version()
    with (
        running_app(tiny_recipe(), home, "127.0.0.1", find_free_port()) as url,
        EventLog(home.log) as log,
    ):
        yield Served(url, tiny, log)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The app without Ray, once for all tests that ask nothing of Ray: the standby, which has the address to itself."""
    with running_alone(Home(tmp_path_factory.mktemp("alone"))) as served:
        yield served


@pytest.fixture(scope="session")
def run_alone() -> Callable[[Home], contextlib.AbstractContextManager[Served]]:
    """Return how to serve a home without Ray, for tests that need one of their own."""
    return running_alone


@contextlib.contextmanager
def running_alone(home: Home) -> Iterator[Served]:
    """Serve a tiny version from one process's threads while the block lasts."""
    tiny = TinyVersions(home.ensure())
    tiny.publish_version()
    seed_history(tiny.registry, home.log)
    ports = {"stats_port": find_free_port(), "fallback_port": find_free_port()}
    port = find_free_port()
    with Standby(resolve_settings(tiny.recipe, home), "127.0.0.1", port, **ports), EventLog(home.log) as log:
        yield Served(f"http://127.0.0.1:{port}", tiny, log)
