"""Item text becomes vectors, once; the model here is the packaged one."""

from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ConfigError, EngineError
from embeddings import text_encoder
from embeddings.text_encoder import EncoderConfig, TextEncoder, locate_model

TEXTS = ["A romance aboard an ocean liner", "Lovers on a ship that sinks", "Tax law for limited companies"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(EncoderConfig())


@pytest.fixture(scope="module")
def vectors(encoder: TextEncoder) -> np.ndarray:
    return encoder.encode(TEXTS)


def test_vectors_have_length_1_and_texts_of_like_meaning_are_near(encoder: TextEncoder, vectors: np.ndarray) -> None:
    assert vectors.shape == (3, encoder.dim) == (3, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    ship, liner, tax = vectors
    assert ship @ liner > 0.4 > 0.2 > ship @ tax


def test_the_same_texts_have_the_same_vectors(encoder: TextEncoder, vectors: np.ndarray) -> None:
    np.testing.assert_array_equal(encoder.encode(TEXTS), vectors)


def test_a_text_has_one_vector_whatever_stands_beside_it(encoder: TextEncoder, vectors: np.ndarray) -> None:
    repeated = encoder.encode([TEXTS[2], "", TEXTS[0], TEXTS[2]])
    np.testing.assert_allclose(repeated[[0, 2]], vectors[[2, 0]], atol=1e-6)
    np.testing.assert_array_equal(repeated[3], repeated[0])


def test_an_empty_text_is_the_zero_vector_and_no_text_is_no_vector(encoder: TextEncoder) -> None:
    assert encoder.encode([""]).tolist() == [[0.0] * 384]
    assert encoder.encode([]).shape == (0, 384)


def test_what_is_cached_is_not_encoded_again(tmp_path: Path, vectors: np.ndarray) -> None:
    first = TextEncoder(EncoderConfig(), tmp_path).encode(TEXTS)
    second = TextEncoder(EncoderConfig(), tmp_path)
    done: list[int] = []
    np.testing.assert_array_equal(second.encode([*TEXTS, ""], on_progress=done.append)[:3], first)
    assert done == [4]
    assert "_model" not in vars(second)  # a cached property: not there until asked for


def test_progress_adds_up_to_the_texts(encoder: TextEncoder) -> None:
    done: list[int] = []
    encoder.encode([*TEXTS, TEXTS[0], ""], on_progress=done.append)
    assert sum(done) == 5


def test_another_setting_is_another_fingerprint_and_another_cache(tmp_path: Path, encoder: TextEncoder) -> None:
    same, shorter = TextEncoder(EncoderConfig(), tmp_path), TextEncoder(EncoderConfig(max_tokens=8), tmp_path)
    assert same.fingerprint == encoder.fingerprint != shorter.fingerprint
    assert same.cache_path != shorter.cache_path


def test_changed_weights_are_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = TextEncoder(EncoderConfig(model=str(tmp_path))).fingerprint
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert TextEncoder(EncoderConfig(model=str(tmp_path))).fingerprint != before


def test_a_model_that_is_not_installed_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text_encoder.PACKAGED, "tiny", ("a_package_that_is_not_there", "its-distribution", "model"))
    with pytest.raises(ConfigError, match=r"encoder\.model='tiny'.*pip install its-distribution"):
        TextEncoder(EncoderConfig(model="tiny"))


@pytest.mark.parametrize("texts", [["some text"], [""]])
def test_a_folder_without_a_model_is_one_clear_error(tmp_path: Path, texts: list[str]) -> None:
    encoder = TextEncoder(EncoderConfig(model=str(tmp_path)))
    with pytest.raises(EngineError, match=r"encoder\.model=.* cannot be loaded"):
        encoder.encode(texts)


def test_a_folder_with_a_model_is_taken_as_it_is(vectors: np.ndarray) -> None:
    folder = locate_model("all-MiniLM-L6-v2")
    np.testing.assert_array_equal(TextEncoder(EncoderConfig(model=folder)).encode(TEXTS), vectors)


@pytest.mark.parametrize("name", ["max_tokens", "batch_texts"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"encoder\.{name}=0"):
        EncoderConfig(**{name: 0})
