"""Models that are told of items' pictures and sounds beside their text: trained, published, served, learning online."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.catalogue import Item
from cluster.dataset import MEDIA_SCHEMA, Dataset, write_dataset
from cluster.errors import ConfigError, DataError
from cluster.events import Event, events_table
from cluster.log import EventLog, Interaction
from cluster.manifest import VersionRef
from embeddings.content import ENCODERS, media_widths
from embeddings.encoders.media import MediaEncoder
from embeddings.fusion import GatedFusion
from embeddings.text_encoder import EncoderConfig, TextEncoder
from tests.cluster.test_dataset import items as items_table
from tests.cluster.test_dataset import users as users_table
from training.inputs import encode_items
from training.models.interests import Interests
from training.models.served import ServedModel
from training.models.two_stage import ModelConfig
from training.models.version import TEXT_ROWS, read_version
from training.online.adapter import propose
from training.online.learner import OnlineLearner

KINDS, TEXT_DIM = ("image", "audio"), 384
WIDTH = TEXT_DIM + 1280 + 256


@pytest.fixture
def tiny(build_home):
    return build_home('model.media=["image","audio"]')


@pytest.fixture
def model(tiny) -> ServedModel:
    return ServedModel.load(tiny.registry, VersionRef(1))


def vector() -> np.ndarray:
    return np.full(TEXT_DIM, TEXT_DIM**-0.5, np.float32)


def history(*item_ids: str) -> list[Interaction]:
    return [Interaction(item_id, "click", None, 1_000_000 * at, seq=-1) for at, item_id in enumerate(item_ids)]


def test_a_version_has_its_gate_and_tells_how_long_texts_are(model: ServedModel) -> None:
    assert isinstance(model.dense.project, GatedFusion)
    assert model.dense.project.widths == [TEXT_DIM, *media_widths(KINDS)]
    assert model.text_IE.shape[1] == WIDTH
    assert model.state.text_dim == TEXT_DIM


def test_an_item_whose_text_is_put_keeps_its_picture_and_a_new_one_has_none(model: ServedModel) -> None:
    told = model.with_items([("i3", "another text"), ("new", "a text")], np.stack([vector(), vector()]))
    row, new = told.index_of["i3"], told.index_of["new"]
    for place in (row, new):
        np.testing.assert_array_equal(told.text_IE[place, :TEXT_DIM].numpy(), vector())
    assert torch.equal(told.text_IE[row, TEXT_DIM:], model.text_IE[row, TEXT_DIM:])
    assert not told.text_IE[new, TEXT_DIM:].any()
    assert (told.item_ID[row] != model.item_ID[row]).any()
    assert "new" in told.recommend("u1", history("i1"), 31).item_ids


def test_interests_are_compared_to_texts_alone(model: ServedModel) -> None:
    wanted = Interests(liked_E=None, disliked_NE=model.text_IE[7, :TEXT_DIM].numpy()[None])
    found = model.recommend("u1", history("i1", "i2"), 30)
    buried = model.bury(found, wanted)
    assert sorted(buried.item_ids) == sorted(found.item_ids)
    assert "i7" in buried.item_ids[-3:]
    liked = Interests(liked_E=vector(), disliked_NE=np.empty((0, TEXT_DIM), np.float32))
    stranger = model.recommend("stranger", [], 30, interests=liked)
    assert not stranger.cold_start
    assert stranger.item_ids != model.recommend("stranger", [], 30).item_ids


@pytest.mark.usefixtures("process_group")
def test_online_learning_moves_the_gate_and_a_put_item_keeps_its_picture(tiny) -> None:
    before = read_version(tiny.registry, VersionRef(1))
    with contextlib.closing(EventLog(tiny.home.log)) as log:
        log.seed_history("training-history", tiny.registry.open_version(1).table("history"))
        learner = OnlineLearner(tiny.registry, log, tiny.recipe, tiny.home.cache, torch.device("cpu"))
        log.put_items([Item(item_id="i3", domain="films", text="a ghost story", categories=())])
        log.append(tiny.live_events(60))
        while fresh := learner.read():
            learner.learn(fresh)
            learner.publish()
    after = read_version(tiny.registry, tiny.registry.current())
    assert (after.dense["project.gate.weight"] != before.dense["project.gate.weight"]).any()
    text, told = (state.rows[TEXT_ROWS][3] for state in (before, after))
    assert (told[:TEXT_DIM] != text[:TEXT_DIM]).any()
    torch.testing.assert_close(told[TEXT_DIM:], text[TEXT_DIM:])
    served = ServedModel.load(tiny.registry, tiny.registry.current())
    assert len(served.recommend("u1", history("i3"), 5).item_ids) == 5


def test_no_adapter_is_proposed_for_it(tiny) -> None:
    with (
        contextlib.closing(EventLog(tiny.home.log)) as log,
        pytest.raises(ConfigError, match=r"has model\.media, whose projection"),
    ):
        propose(tiny.registry, log, tiny.recipe, tiny.home.cache)


def test_a_classical_version_is_told_of_texts_alone(tiny) -> None:
    state = read_version(tiny.registry, VersionRef(1))
    system = {"system": {"name": "ease"}}
    classical = replace(state, recipe=replace(state.recipe, values={**state.recipe.values, **system}))
    assert classical.text_dim == state.rows[TEXT_ROWS].shape[1]


@pytest.mark.parametrize(
    ("media", "message"), [(("video",), "'video' is none of image, audio"), (("image",) * 2, "twice")]
)
def test_kinds_that_cannot_be_are_refused(media: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(media=media)


class Colour(MediaEncoder):
    """The mean colour of a picture; its file is a text of three numbers."""

    kind, dim = "image", 1280

    def locate_weights(self) -> Path:
        return Path(__file__)

    def forward(self, contents: Sequence[bytes], names: Sequence[str]) -> np.ndarray:
        try:
            rgb_N3 = np.array([[float(part) for part in content.split()] for content in contents], np.float32)
        except ValueError as error:
            raise DataError(f"{names[0]}: is no picture ({error})") from error
        return np.pad(rgb_N3, ((0, 0), (0, self.dim - 3)))


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(ENCODERS, "image", Colour)  # pyright: ignore[reportArgumentType]
    (tmp_path / "red").write_text("1 0 0")
    (tmp_path / "blue").write_text("0 0 1")
    (tmp_path / "torn").write_text("no colour")
    return tmp_path


def _dataset(folder: Path, **files: str) -> Dataset:
    rows = [{"item_id": item_id, "kind": "image", "path": str(folder / name)} for item_id, name in files.items()]
    return write_dataset(
        folder / "data",
        name="tiny",
        label="clicks",
        sources=[],
        rejected={},
        events=events_table([Event(event_id="e", user_id="u1", item_id="i1", kind="click", ts_us=1)]),
        items=items_table("i1", "i2", "i3"),
        users=users_table("u1"),
        media=pa.Table.from_pylist(rows, MEDIA_SCHEMA),
    )


def test_pictures_stand_after_the_texts_and_zeros_for_those_that_are_missing(pictures: Path, tiny_model: Path) -> None:
    encoder = TextEncoder(EncoderConfig(model=str(tiny_model)), pictures / "cache")
    told = encode_items(encoder, _dataset(pictures, i1="red", i3="blue"), ["image"])
    assert told.shape == (3, encoder.dim + 1280)
    np.testing.assert_array_equal(told[:, : encoder.dim], encoder.encode(["t"] * 3))
    np.testing.assert_array_equal(told[:, encoder.dim : encoder.dim + 3], [[1, 0, 0], [0, 0, 0], [0, 0, 1]])


def test_a_file_that_is_no_picture_and_a_dataset_without_any_are_named(pictures: Path, tiny_model: Path) -> None:
    encoder = TextEncoder(EncoderConfig(model=str(tiny_model)))
    with pytest.raises(DataError, match="torn: is no picture"):
        encode_items(encoder, _dataset(pictures, i1="torn"), ["image"])
    with pytest.raises(DataError, match=r"no item has a file of model\.media 'image'"):
        encode_items(encoder, _dataset(pictures), ["image"])
