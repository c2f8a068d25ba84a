"""Pictures become vectors; the model is the packaged one, the photograph matplotlib's."""

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from cluster.errors import ConfigError, DataError
from embeddings.encoders.image import ImageEncoder, read_pixels

GOWN, UNIFORM, MORTARBOARD = 400, 652, 667
"""Of ImageNet's 1,000 classes: academic gown, military uniform, and the flat cap of graduates."""


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    try:
        return ImageEncoder()
    except ConfigError as error:
        pytest.skip(f"optional: {error}")


@pytest.fixture(scope="module")
def photograph() -> Path:
    """A naval officer before a flag."""
    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def _png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def test_an_officer_in_uniform_is_taken_for_someone_in_formal_dress(encoder: ImageEncoder, photograph: Path) -> None:
    pixels = torch.from_numpy(read_pixels(photograph.read_bytes(), "officer"))[None]
    with torch.inference_mode():
        best = encoder.model(pixels)[0].topk(3).indices.tolist()
    assert sorted(best) == [GOWN, UNIFORM, MORTARBOARD]


def test_a_picture_is_nearer_to_its_mirror_image_than_to_another(encoder: ImageEncoder, photograph: Path) -> None:
    with Image.open(photograph) as opened:
        mirrored = opened.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8))
    original, mirror, other = encoder.encode([photograph, _png(mirrored), _png(noise)])
    assert original.shape == (encoder.dim,) == (1280,)
    assert original @ mirror > 0.8 > original @ other
    assert np.linalg.norm(original) == pytest.approx(1, abs=1e-5)


def test_a_path_and_its_bytes_are_the_same_and_no_picture_is_the_zero_vector(
    encoder: ImageEncoder, photograph: Path
) -> None:
    by_path, by_bytes, of_nothing, of_no_bytes = encoder.encode([photograph, photograph.read_bytes(), "", b""])
    np.testing.assert_array_equal(by_path, by_bytes)
    assert not of_nothing.any()
    assert not of_no_bytes.any()
    assert encoder.encode([]).shape == (0, 1280)


def test_pixels_are_the_middle_of_the_picture_in_the_network_s_range() -> None:
    image = Image.new("RGB", (320, 160), "black")
    image.paste("white", (90, 10, 230, 150))  # the middle 7/8 of 160 is 140 wide
    pixels = read_pixels(_png(image), "a square")
    assert pixels.shape == (3, 224, 224)
    np.testing.assert_allclose(pixels[:, 2:-2, 2:-2], (255 - 127) / 128, atol=0.1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixels_is_read(mode: str) -> None:
    image = Image.new(mode, (30, 20))
    image.save(buffer := io.BytesIO(), "TIFF")
    assert np.isfinite(read_pixels(buffer.getvalue(), mode)).all()


def test_what_is_transparent_is_white() -> None:
    np.testing.assert_allclose(read_pixels(_png(Image.new("RGBA", (9, 9), (0, 0, 0, 0))), "glass"), 1)


def test_what_is_no_picture_is_named(encoder: ImageEncoder, photograph: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "cut.jpg").write_bytes(photograph.read_bytes()[:3_000])
    for name, said in [("notes.txt", "is no picture"), ("cut.jpg", "is no picture"), ("gone.jpg", "cannot be read")]:
        with pytest.raises(DataError, match=rf"{name}: {said}"):
            encoder.encode([photograph, tmp_path / name])
    with pytest.raises(DataError, match=r"image 1: is no picture"):
        encoder.encode([photograph, b"no picture"])


def test_a_picture_of_too_many_pixels_is_refused() -> None:
    with pytest.raises(DataError, match=r"20000 × 10000 pixels; at most|is no picture .*exceeds limit"):
        read_pixels(_png(Image.new("1", (20_000, 10_000))), "wall")


def test_a_cached_picture_needs_no_model(encoder: ImageEncoder, photograph: Path, tmp_path: Path) -> None:
    first = ImageEncoder(tmp_path).encode([photograph])
    again = ImageEncoder(tmp_path)
    np.testing.assert_array_equal(again.encode([photograph]), first)
    assert "model" not in vars(again)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ConfigError, match=r"image encoder's package.*pip install --no-deps efficientnet-lite-pytorch"):
        ImageEncoder()
