"""Workers of a real Ray encode a catalogue; a run that is killed goes on where it was."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cluster.errors import EngineError
from cluster.ray_session import RaySession
from embeddings.encoders.on_ray import PART_TEXTS, pool_size
from embeddings.text_encoder import EncoderConfig, TextEncoder

pytestmark = pytest.mark.slow
WORDS = ["[UNK]", *(f"w{n}" for n in range(50))]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder of random weights: what is tested is who encodes."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


def _texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS[1:], rng.integers(3, 20))) + f" w{n}" for n in range(count)]


def test_workers_give_the_vectors_that_one_process_gives(ray_cluster: RaySession, small: Path, tmp_path: Path) -> None:
    texts = [*_texts(5 * PART_TEXTS + 7), "", "w1 w2"]
    alone = TextEncoder(EncoderConfig(model=str(small))).encode(texts)
    spread = TextEncoder(EncoderConfig(model=str(small), workers=2), tmp_path)
    done: list[int] = []
    np.testing.assert_allclose(spread.encode(texts, on_progress=done.append), alone, atol=1e-5)
    assert sum(done) == len(texts)
    assert "_model" not in vars(spread)  # the workers loaded it, the driver did not
    assert spread.fingerprint == TextEncoder(EncoderConfig(model=str(small))).fingerprint


def test_a_run_that_is_stopped_keeps_what_was_encoded(ray_cluster: RaySession, small: Path, tmp_path: Path) -> None:
    texts = _texts(6 * PART_TEXTS)

    def stop(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TextEncoder(EncoderConfig(model=str(small), workers=2), tmp_path).encode(texts, on_progress=stop)
    again: list[int] = []
    TextEncoder(EncoderConfig(model=str(small), workers=2), tmp_path).encode(texts, on_progress=again.append)
    assert again[0] >= PART_TEXTS
    assert sum(again) == len(texts)


def test_a_worker_that_is_killed_is_started_again(ray_cluster: RaySession, small: Path) -> None:
    import psutil

    texts = _texts(8 * PART_TEXTS)
    killed: list[int] = []

    def kill_one(done: int) -> None:
        if done and not killed:
            found = [
                p for p in psutil.process_iter(["cmdline"]) if "EncodingWorker" in " ".join(p.info["cmdline"] or [])
            ]
            ours = [p for p in found if p.ppid() in {c.pid for c in psutil.Process().children(recursive=True)}]
            killed.extend(p.pid for p in ours[:1])
            os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.1)

    vectors = TextEncoder(EncoderConfig(model=str(small), workers=2)).encode(texts, on_progress=kill_one)
    assert killed
    np.testing.assert_allclose(vectors, TextEncoder(EncoderConfig(model=str(small))).encode(texts), atol=1e-5)


def test_a_model_that_workers_cannot_load_is_one_clear_error(
    ray_cluster: RaySession, small: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((small / name).read_bytes())
    with pytest.raises(EngineError, match=r"encoder\.model=.* cannot be loaded"):
        TextEncoder(EncoderConfig(model=str(tmp_path), workers=2)).encode(_texts(2 * PART_TEXTS))


@pytest.mark.parametrize(
    ("wanted", "threads", "cpus", "texts", "expected"),
    [(4, 1, 16, 10_000, 4), (64, 4, 16, 10_000, 4), (8, 1, 16, 2 * PART_TEXTS, 2), (8, 2, 1, 10_000, 1)],
)
def test_the_pool_fits_the_recipe_the_cluster_and_the_work(
    wanted: int, threads: int, cpus: float, texts: int, expected: int
) -> None:
    assert pool_size(wanted, threads, cpus, texts) == expected
