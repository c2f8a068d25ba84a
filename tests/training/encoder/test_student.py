"""A student makes nearly its teacher's vectors, and is an ordinary model folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config import Recipe
from cluster.errors import ConfigError, DataError
from cluster.home import Home
from embeddings.encoders.pretrained import load_model
from embeddings.text_encoder import EncoderConfig, TextEncoder
from tests.conftest import STORY_WORDS
from training.encoder.config import StudentConfig
from training.encoder.student import DistilledRun, distill

TEXTS = [f"{a}, {b}, {c}" for a in STORY_WORDS for b in STORY_WORDS for c in ("w1", "w2")]
RECIPE = """
[encoder]
model = "{model}"
pooling = "cls"
query_prefix = "find "
[student]
layers = 1
neurons = 0.5
epochs = 8
bfloat16 = false
fragments = 1
learning_rate = 0.01
"""


@pytest.fixture(scope="module")
def teacher_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights so large that its layers say something of a text."""
    folder = tmp_path_factory.mktemp("teacher")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    model = load_model(str(tiny_model))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("weight") and "LayerNorm" not in name:
                weight.mul_(15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(teacher_folder: Path) -> Recipe:
    return Recipe.from_toml(RECIPE.format(model=teacher_folder))


@pytest.fixture(scope="module")
def distilled(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> DistilledRun:
    return distill(recipe, TEXTS, Home(tmp_path_factory.mktemp("home")).ensure())


def _untaught(recipe: Recipe) -> TextEncoder:
    own = recipe.section(EncoderConfig)
    return TextEncoder(EncoderConfig(model=own.model, pooling=own.pooling, layers=1, neurons=0.5))


def test_it_is_nearer_to_the_teacher_than_a_model_of_its_size_that_was_not_taught(recipe, distilled) -> None:
    unmet = ["ghost w3 kiss", "paris, castle", "w7 wedding, love, crypt"]
    teacher, student = TextEncoder(recipe.section(EncoderConfig)), TextEncoder(EncoderConfig(model=distilled.model))
    wanted = teacher.encode(unmet)
    found, untaught = ((encoder.encode(unmet) * wanted).sum(1) for encoder in (student, _untaught(recipe)))
    assert 1 - found.mean() < 0.5 * (1 - untaught.mean())
    assert distilled.metrics["cosine"] > 0.8
    assert distilled.metrics["student_parameters"] < distilled.metrics["teacher_parameters"]
    assert distilled.teacher_fingerprint == teacher.fingerprint


def test_its_folder_says_how_it_is_asked(recipe, distilled) -> None:
    student, teacher = TextEncoder(EncoderConfig(model=distilled.model)), TextEncoder(recipe.section(EncoderConfig))
    assert student.traits == teacher.traits
    assert student.fingerprint != teacher.fingerprint
    said = json.loads((Path(distilled.model).parent / "distill.json").read_text())
    assert said["metrics"] == distilled.metrics


def test_the_same_seed_makes_the_same_student(recipe, distilled, tmp_path) -> None:
    again = distill(recipe, TEXTS, Home(tmp_path).ensure())
    one, other = (TextEncoder(EncoderConfig(model=run.model)).encode(TEXTS[:5]) for run in (distilled, again))
    np.testing.assert_array_equal(one, other)


def test_what_cannot_be_learned_from_is_said(recipe, tmp_path) -> None:
    with pytest.raises(DataError, match="2 texts: a student learns from 10 or more"):
        distill(recipe, ["a ghost", "a ghost", "", "love"], Home(tmp_path).ensure())
    with pytest.raises(ConfigError, match=r"encoder\.layers=9: the model has 3"):
        distill(recipe.with_overrides(["student.layers=9"]), TEXTS, Home(tmp_path).ensure())


@pytest.mark.parametrize(
    "wrong", [{"layers": 0}, {"neurons": 0.0}, {"learning_rate": 0.0}, {"fragments": -1}, {"validation_fraction": 1.0}]
)
def test_settings_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match=rf"student\.{next(iter(wrong))}="):
        StudentConfig(**wrong)
