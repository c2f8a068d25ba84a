"""Sounds to vectors with MusiCNN's VGG, as it comes in a package.

In:  paths or bytes of WAV files.  Out: unit-length float32 vectors of 256 numbers.
Knows nothing of items.
Weights: musicnn's MSD_vgg, trained to tag the Million Song Dataset (Pons & Serra, ISMIR 2019 late-breaking). A sound is
what it was trained on: 16 kHz, one channel, log-mel spectra in pieces of three seconds, whose vectors are averaged; a
sound of less is repeated.

Shapes: N samples, T frames, M mel bands, P pieces, E encoder dimension.
"""

import io
import math
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from cluster.errors import DataError
from embeddings.encoders.media import MediaEncoder, locate_package
from embeddings.encoders.tf_checkpoint import read_checkpoint

RATE_HZ = 16_000
FFT_SAMPLES, HOP_SAMPLES, MEL_BANDS = 512, 256, 96
PIECE_FRAMES = 187
MOST_PIECES = 100
"""Five minutes; of a longer sound, pieces evenly spaced."""
EPSILON = 1e-3
_POOLS = (((4, 1), (2, 2)), ((2, 2), (2, 2)), ((2, 2), (2, 2)), ((2, 2), (2, 2)), ((4, 4), (4, 4)))
"""Size and stride after each convolution."""


class AudioEncoder(MediaEncoder):
    """MusiCNN's VGG without its tags."""

    kind = "audio"
    dim = 256

    def locate_weights(self) -> Path:
        """Return the file of weights. Raises `ConfigError` when the package is missing."""
        return locate_package("musicnn", "musicnn", self.kind) / "MSD_vgg" / ".data-00000-of-00001"

    def forward(self, contents: Sequence[bytes], names: Sequence[str]) -> np.ndarray:
        """Return the features before the tags, averaged over a sound's pieces, float32 [n, E]."""
        vectors = []
        with torch.inference_mode():
            for content, name in zip(contents, names, strict=True):
                pieces_PTM = cut_pieces(log_mel(torch.from_numpy(read_samples(content, name))))
                vectors.append(self.features(pieces_PTM).mean(0).numpy())
        return np.stack(vectors)

    def features(self, pieces_PTM: torch.Tensor) -> torch.Tensor:
        """Return a vector a piece, [P, E]."""
        state = self._normalize(pieces_PTM.unsqueeze(1), "batch_normalization")
        for n, (size, stride) in enumerate(_POOLS, start=1):
            kernel = self.variables[f"{n}CNN/kernel"].permute(3, 2, 0, 1)
            convolved = functional.conv2d(state, kernel, self.variables[f"{n}CNN/bias"], padding=1).relu()
            state = functional.max_pool2d(self._normalize(convolved, f"batch_normalization_{n}"), size, stride)
        return state.permute(0, 2, 3, 1).flatten(1)

    def tags(self, pieces_PTM: torch.Tensor) -> torch.Tensor:
        """Return the probability of each of the package's 50 tags, [P, 50]."""
        logits = self.features(pieces_PTM) @ self.variables["dense/kernel"] + self.variables["dense/bias"]
        return logits.sigmoid()

    @cached_property
    def variables(self) -> dict[str, torch.Tensor]:
        """The checkpoint's, without those of its training."""
        read = read_checkpoint(self._weights.parent)
        return {name: torch.from_numpy(array.copy()) for name, array in read.items() if "Adam" not in name}

    def _normalize(self, state: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance, gamma, beta = (
            self.variables[f"{name}/{key}"] for key in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        return functional.batch_norm(state, mean, variance, gamma, beta, eps=EPSILON)


def read_samples(content: bytes, name: str) -> np.ndarray:
    """Return a WAV file as one channel at 16 kHz, float32 [N]. Raises `DataError` where it is none."""
    import warnings

    from scipy.io import wavfile
    from scipy.signal import resample_poly

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of notes in the file, which are nothing to us
            rate_hz, samples = wavfile.read(io.BytesIO(content))
    except (ValueError, EOFError, OSError, KeyError, ZeroDivisionError, struct.error) as error:
        raise DataError(f"{name}: is no WAV file that can be read ({error}); convert it to WAV") from error
    if samples.size == 0 or rate_hz < 1:
        raise DataError(f"{name}: holds no sound")
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif np.issubdtype(samples.dtype, np.integer):
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    mono = samples.astype(np.float32).reshape(len(samples), -1).mean(1)
    if not np.isfinite(mono).all():
        raise DataError(f"{name}: holds samples that are no numbers")
    common = math.gcd(RATE_HZ, rate_hz)
    return mono if rate_hz == RATE_HZ else resample_poly(mono, RATE_HZ // common, rate_hz // common).astype(np.float32)


def log_mel(samples_N: torch.Tensor) -> torch.Tensor:
    """Return log₁₀(10,000·S + 1) of mel power spectra, float32 [T, M], as librosa's defaults have them."""
    if len(samples_N) <= FFT_SAMPLES // 2:  # too short to be mirrored at its ends
        samples_N = functional.pad(samples_N, (0, FFT_SAMPLES - len(samples_N)))
    spectrum_FT = torch.stft(
        samples_N, FFT_SAMPLES, HOP_SAMPLES, window=torch.hann_window(FFT_SAMPLES), return_complex=True
    ).abs()
    return torch.log10(10_000 * (spectrum_FT**2).T @ _mel_filters() + 1)


def cut_pieces(spectra_TM: torch.Tensor) -> torch.Tensor:
    """Return pieces of three seconds, [P, T, M]; what is left over at the end counts only where it is all there is."""
    if len(spectra_TM) < PIECE_FRAMES:
        spectra_TM = spectra_TM.repeat(math.ceil(PIECE_FRAMES / len(spectra_TM)), 1)
    pieces_PTM = spectra_TM[: len(spectra_TM) // PIECE_FRAMES * PIECE_FRAMES].reshape(-1, PIECE_FRAMES, MEL_BANDS)
    step = math.ceil(len(pieces_PTM) / MOST_PIECES)
    return pieces_PTM[::step]


def _mel_filters() -> torch.Tensor:
    from transformers.audio_utils import mel_filter_bank

    filters_FM = mel_filter_bank(
        num_frequency_bins=FFT_SAMPLES // 2 + 1,
        num_mel_filters=MEL_BANDS,
        min_frequency=0.0,
        max_frequency=RATE_HZ / 2,
        sampling_rate=RATE_HZ,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters_FM.astype(np.float32))
