"""`recloop finetune` on two real Ray Train workers, then the encoder in training and in a version."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.config import Recipe
from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, Dataset, write_dataset
from cluster.events import Event, events_table
from cluster.home import Home
from cluster.manifest import VersionRef
from cluster.registry import Registry
from embeddings.adapter import Adapter
from embeddings.text_encoder import EncoderConfig, TextEncoder
from training.encoder.command import FinetunedRun, finetune_on_ray
from training.models.version import TEXT_ROWS, read_version
from training.publish import publish_run
from training.run import METRICS_FILE
from training.trainer import train_on_ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RECIPE = """
[data]
train_fraction = 0.9
batch_sequences = 8
negatives = 10
[encoder]
model = "{model}"
[finetune]
layers = 1
rank = 2
dim = 8
max_history = 4
head_epochs = 2
epochs = 2
batch_items = 4
hard_negatives = 1
validation_fraction = 0.3
[tables]
dim = 8
spare_rows = 4
[model]
max_history = 8
layers = 1
ranker_hidden = 8
[train]
workers = 2
epochs = 1
final_epochs = 0
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, story_texts: list[str]) -> Dataset:
    rng = np.random.default_rng(0)
    events = [
        Event(
            event_id=f"e{n}",
            user_id=f"u{n % 20}",
            item_id=f"i{rng.integers(0, 15) + 15 * (n % 2)}",
            kind="click",
            ts_us=n * 1_000_000,
        )
        for n in range(400)
    ]
    empty = {"domain": "stories", "categories": [], "available_from_us": None, "available_until_us": None}
    items = [{"item_id": f"i{n}", "text": text} | empty for n, text in enumerate(story_texts)]
    return write_dataset(
        tmp_path_factory.mktemp("stories") / "data",
        name="stories",
        events=events_table(events),
        items=pa.Table.from_pylist(items, ITEM_SCHEMA),
        users=pa.Table.from_pylist([{"user_id": f"u{n}", "attributes": []} for n in range(20)], USER_SCHEMA),
        label="click",
        sources=[],
        rejected={},
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home")).ensure()


@pytest.fixture(scope="module")
def tuned(ray_cluster, tiny_model: Path, dataset: Dataset, home: Home) -> FinetunedRun:
    return finetune_on_ray(Recipe.from_toml(RECIPE.format(model=tiny_model)), dataset, home)


def test_a_run_has_the_adapter_and_figures_frozen_and_tuned(tuned: FinetunedRun, tiny_model: Path) -> None:
    folder = Path(tuned.folder)
    adapter = Adapter.load(folder)
    base = TextEncoder(EncoderConfig(model=str(tiny_model)))
    assert adapter.base == tuned.base_fingerprint == base.fingerprint
    assert tuned.encoder_fingerprint == TextEncoder(base.config, adapter=adapter).fingerprint
    assert tuned.metrics["cold_ndcg_at_10"] >= tuned.metrics["frozen_cold_ndcg_at_10"]
    assert tuned.metrics["trained_parameters"] < tuned.metrics["encoder_parameters"]
    phases = [json.loads(line)["phase"] for line in (folder / METRICS_FILE).read_text().splitlines()]
    assert phases == ["head", "head", "tune", "tune"]


def test_training_and_the_version_use_the_tuned_encoder(
    ray_cluster, tuned: FinetunedRun, tiny_model: Path, dataset: Dataset, home: Home
) -> None:
    recipe = Recipe.from_toml(RECIPE.format(model=tiny_model)).with_overrides([f'encoder.adapter="{tuned.folder}"'])
    registry = Registry(home.registry)
    ref = publish_run(train_on_ray(recipe, dataset, home), registry)
    assert ref == VersionRef(1)
    found = read_version(registry, ref)
    assert found.encoder == tuned.encoder_fingerprint == registry.manifest(ref).metrics["encoder"]
    assert found.adapter is not None
    own = TextEncoder(EncoderConfig(model=str(tiny_model)), adapter=found.adapter)
    np.testing.assert_allclose(found.rows[TEXT_ROWS].numpy(), own.encode(found.item_texts), atol=1e-5)
