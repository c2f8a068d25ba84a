"""What is told of items, as one vector each: their text, and their pictures and sounds where a model wants them.

In:  texts, files by kind, encoders.  Out: vectors side by side, in the order that the model names.
Knows nothing of datasets or models.

    [ text E │ image 1,280 │ audio 256 ]      zeros for what an item does not have

Shapes: N items, W all widths.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cluster.errors import ConfigError
from cluster.progress import progress
from embeddings.encoders.audio import AudioEncoder
from embeddings.encoders.image import ImageEncoder
from embeddings.encoders.media import MediaEncoder

FILES = 256
"""Files in memory together."""
ENCODERS: Mapping[str, type[MediaEncoder]] = {"image": ImageEncoder, "audio": AudioEncoder}


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise `ConfigError` for a kind that no encoder reads, and for one named twice."""
    if unknown := [kind for kind in kinds if kind not in ENCODERS]:
        raise ConfigError(f"model.media: {unknown[0]!r} is none of {', '.join(ENCODERS)}")
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"model.media={list(kinds)}: names a kind twice")


def media_widths(kinds: Sequence[str]) -> list[int]:
    """Return how many numbers each kind of file becomes."""
    return [ENCODERS[kind].dim for kind in kinds]


def encode_media(kind: str, files: Sequence[str], cache: Path | None) -> np.ndarray:
    """Return one vector a file, float32 [N, E]; zeros where there is none.

    Raises `ConfigError` naming a package that is not installed, `DataError` naming a file that cannot be read.
    """
    encoder = ENCODERS[kind](cache)
    with progress(len(files), f"encoding {kind} files", unit="file") as bar:
        parts = [np.empty((0, encoder.dim), np.float32)]
        for first in range(0, len(files), FILES):
            parts.append(encoder.encode(files[first : first + FILES]))
            bar.update(len(parts[-1]))
    return np.concatenate(parts)
