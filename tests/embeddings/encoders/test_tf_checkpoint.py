"""A TensorFlow 1 checkpoint is read without TensorFlow; the one here comes with musicnn."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ConfigError, EngineError
from embeddings.encoders.media import locate_package
from embeddings.encoders.tf_checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return locate_package("musicnn", "musicnn", "audio") / "MSD_vgg"
    except ConfigError as error:
        pytest.skip(f"optional: {error}")


def test_every_variable_has_its_shape_and_numbers_that_can_be_weights(folder: Path) -> None:
    variables = {name: array for name, array in read_checkpoint(folder).items() if "Adam" not in name}
    assert variables["1CNN/kernel"].shape == (3, 3, 1, 128)
    assert variables["5CNN/kernel"].shape == (3, 3, 128, 128)
    assert variables["dense/kernel"].shape == (256, 50)
    learned = [array for name, array in variables.items() if "moving" not in name and "power" not in name]
    assert sum(array.size for array in learned) == pytest.approx(607_000, rel=0.01)
    assert all(np.isfinite(array).all() for array in variables.values())
    assert all((array > 0).all() for name, array in variables.items() if name.endswith("moving_variance"))


def test_a_damaged_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in (".index", ".data-00000-of-00001"):
        shutil.copy(folder / name, tmp_path)
    with (tmp_path / ".data-00000-of-00001").open("r+b") as data:
        data.truncate(1_000)
    with pytest.raises(EngineError, match="is cut off"):
        read_checkpoint(tmp_path)
    (tmp_path / ".index").write_bytes(b"nothing of the kind")
    with pytest.raises(EngineError, match="is no TensorFlow checkpoint"):
        read_checkpoint(tmp_path)
