"""Sounds become vectors; the model is the packaged one, the sounds are made here."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from cluster.errors import ConfigError, DataError
from embeddings.encoders.audio import (
    MEL_BANDS,
    PIECE_FRAMES,
    RATE_HZ,
    AudioEncoder,
    cut_pieces,
    log_mel,
    read_samples,
)


@pytest.fixture(scope="module")
def encoder() -> AudioEncoder:
    try:
        return AudioEncoder()
    except ConfigError as error:
        pytest.skip(f"optional: {error}")


def _wav(samples: np.ndarray, rate_hz: int = RATE_HZ) -> bytes:
    wavfile.write(buffer := io.BytesIO(), rate_hz, samples)
    return buffer.getvalue()


def _seconds(count: float, rate_hz: int = RATE_HZ) -> np.ndarray:
    return np.arange(int(count * rate_hz), dtype=np.float32) / rate_hz


def _chord(seconds: float, *tones_hz: float, rate_hz: int = RATE_HZ) -> np.ndarray:
    at_s = _seconds(seconds, rate_hz)
    return (0.2 * sum(np.sin(2 * np.pi * hz * at_s) for hz in tones_hz)).astype(np.float32)


def _beat(seconds: float) -> np.ndarray:
    """A bass drum and a hat, two a second."""
    at_s = _seconds(seconds)
    since_s = at_s % 0.5
    hat = np.random.default_rng(0).standard_normal(len(at_s)) * np.exp(-60 * ((at_s + 0.25) % 0.5))
    return (0.7 * np.sin(2 * np.pi * 60 * since_s) * np.exp(-12 * since_s) + 0.2 * hat).astype(np.float32)


@pytest.mark.slow
def test_the_network_tags_a_still_chord_as_ambient_and_a_beat_as_electronic_or_dance(encoder: AudioEncoder) -> None:
    from musicnn.configuration import MSD_LABELS

    def best(samples: np.ndarray) -> list[str]:
        with torch.inference_mode():
            mean = encoder.tags(cut_pieces(log_mel(torch.from_numpy(samples)))).mean(0)
        return [MSD_LABELS[n] for n in mean.argsort(descending=True)[:3]]

    assert "ambient" in best(_chord(6, 220, 277.2, 329.6))
    assert {"electronic", "dance"} & set(best(_beat(6)))


def test_sounds_alike_are_nearer_than_sounds_unlike(encoder: AudioEncoder) -> None:
    chord, higher, beat = encoder.encode(
        [_wav(_chord(4, 220, 277.2, 329.6)), _wav(_chord(4, 233.1, 293.7, 349.2)), _wav(_beat(4))]
    )
    assert chord.shape == (encoder.dim,) == (256,)
    assert chord @ higher > chord @ beat + 0.1
    assert np.linalg.norm(chord) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_every_kind_of_samples_is_read_alike(dtype: type) -> None:
    tone = _chord(0.1, 440)
    if dtype is np.uint8:
        stored = (128 + 127 * tone).round().astype(np.uint8)
    else:
        stored = (tone * np.iinfo(dtype).max).astype(dtype) if np.issubdtype(dtype, np.integer) else tone
    np.testing.assert_allclose(read_samples(_wav(stored), "tone"), tone, atol=0.01)


def test_two_channels_at_another_rate_are_one_at_ours() -> None:
    tone = _chord(1, 440, rate_hz=44_100)
    read = read_samples(_wav(np.stack([tone, np.zeros_like(tone)], 1), 44_100), "stereo")
    assert len(read) == RATE_HZ
    np.testing.assert_allclose(read[800:-800], _chord(1, 440)[800:-800] / 2, atol=0.002)


def test_a_tone_is_loudest_in_the_band_that_holds_it() -> None:
    spectra_TM = log_mel(torch.from_numpy(_chord(1, 1_000)))
    assert spectra_TM.shape == (1 + RATE_HZ // 256, MEL_BANDS)
    # Slaney's scale is linear up to 1 kHz, at 15; 8 kHz is at 15 + 27 · ln 8 / ln 6.4 = 45.2; band n is about n + 1.
    assert int(spectra_TM.mean(0).argmax()) == round(15 / (15 + 27 * np.log(8) / np.log(6.4)) * (MEL_BANDS + 1)) - 1


def test_a_short_sound_is_repeated_and_a_long_one_is_cut() -> None:
    ramp_TM = torch.arange(100.0).unsqueeze(1).expand(100, MEL_BANDS)
    (piece_TM,) = cut_pieces(ramp_TM)
    assert piece_TM[:, 0].tolist() == [float(t % 100) for t in range(PIECE_FRAMES)]
    assert cut_pieces(torch.zeros(3 * PIECE_FRAMES - 1, MEL_BANDS)).shape == (2, PIECE_FRAMES, MEL_BANDS)
    assert len(cut_pieces(torch.zeros(250 * PIECE_FRAMES, MEL_BANDS))) == 84


@pytest.mark.parametrize("samples", [1, 100, 257, 16_000])
def test_a_sound_of_any_length_and_silence_too_has_a_finite_vector(encoder: AudioEncoder, samples: int) -> None:
    loud, silent = encoder.encode([_wav(np.ones(samples, np.float32)), _wav(np.zeros(samples, np.float32))])
    assert np.isfinite(loud).all()
    assert np.isfinite(silent).all()


def test_no_sound_is_the_zero_vector_and_what_is_none_is_named(encoder: AudioEncoder, tmp_path: Path) -> None:
    assert not encoder.encode([b"", ""]).any()
    (tmp_path / "song.mp3").write_bytes(b"ID3 no wav")
    (tmp_path / "cut.wav").write_bytes(_wav(_chord(1, 440))[:20])
    (tmp_path / "empty.wav").write_bytes(_wav(np.zeros(0, np.float32)))
    (tmp_path / "odd.wav").write_bytes(_wav(np.array([0, np.nan], np.float32)))
    said = {"song.mp3": "convert it to WAV", "cut.wav": "is no WAV", "empty.wav": "no sound", "odd.wav": "no numbers"}
    for name, reason in said.items():
        with pytest.raises(DataError, match=rf"{name}: .*{reason}"):
            encoder.encode([tmp_path / name])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "musicnn", None)
    with pytest.raises(ConfigError, match=r"audio encoder's package.*pip install --no-deps musicnn"):
        AudioEncoder()
