"""What every encoder can be asked, whatever it reads.

In:  texts, pictures or sounds.  Out: one unit-length vector each.
Knows nothing of models.

Shapes: n inputs, E encoder dimension.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Encoder(Protocol):
    """Content to vectors."""

    @property
    def fingerprint(self) -> str:
        """Identify model and settings: vectors of different fingerprints never mix."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    # Any: a text encoder takes text; image and audio encoders take a path or a file's bytes.
    def encode(self, inputs: Sequence[Any], /) -> np.ndarray:
        """Return one vector an input, float32 [n, E], of length 1; an empty input has the zero vector."""
        ...
