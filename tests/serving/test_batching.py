"""What waits for one text encoder is encoded together, and nobody waits for what others have given it."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import EngineError
from embeddings.encoders.tokens import Tokens
from embeddings.text_encoder import EncoderConfig, TextEncoder
from serving.batching import BatchingEncoder, UnreadableTextError, VectorCache
from serving.encoders import LocalEncoder

TEXTS = ["a sea captain", "two lovers on a ship that sinks", "tax law", "a quiet village in the far north " * 3]


class SlowEncoder(TextEncoder):
    """The packaged model, which notes its batches and waits for leave before each."""

    def __init__(self, folder: Path) -> None:
        super().__init__(EncoderConfig(), folder)
        self.batches: list[list[int]] = []
        self.leave = threading.Event()
        self.leave.set()

    def encode_tokens(self, tokens: Sequence[Tokens]) -> np.ndarray:
        self.leave.wait(10)
        self.batches.append([len(entry.ids) for entry in tokens])
        return super().encode_tokens(tokens)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SlowEncoder:
    encoder = SlowEncoder(tmp_path_factory.mktemp("cache"))
    encoder.load()
    return encoder


@pytest.fixture
def batching(model: SlowEncoder) -> Iterator[BatchingEncoder]:
    model.batches.clear()
    encoder = BatchingEncoder(model, batch_tokens=256, gather_s=0.05, cached=8)
    yield encoder
    model.leave.set()
    encoder.stop()


def test_a_text_s_vector_is_the_same_as_that_of_an_item_told_so(batching: BatchingEncoder, model: SlowEncoder) -> None:
    found = batching.embed(TEXTS).result(10)
    np.testing.assert_allclose(found.vectors_NE, model.encode(TEXTS), atol=1e-5)
    assert found.encoder == model.fingerprint
    assert (found.tokens, found.cut) == ([5, 9, 4, 23], [False] * 4)


def test_texts_of_several_requests_are_encoded_together(batching: BatchingEncoder, model: SlowEncoder) -> None:
    answers = [batching.embed([f"film number {number}"]) for number in range(6)]
    vectors = [answer.result(10).vectors_NE for answer in answers]
    assert model.batches == [[5] * 6]
    assert len(np.unique(np.concatenate(vectors), axis=0)) == 6


def test_a_batch_holds_texts_of_like_length_and_no_more_tokens_than_its_budget(
    batching: BatchingEncoder, model: SlowEncoder
) -> None:
    short, long = [f"short {number}" for number in range(20)], [f"long {number} " * 30 for number in range(5)]
    mixed = [text for pair in zip(short, long * 4, strict=True) for text in pair]
    found = batching.embed(mixed).result(30)
    assert all(max(batch) * len(batch) <= 256 for batch in model.batches if len(batch) > 1)
    assert all(max(batch) < 2 * min(batch) for batch in model.batches[:-1])
    np.testing.assert_allclose(found.vectors_NE[:2], model.encode(mixed[:2]), atol=1e-5)


def test_what_was_asked_before_is_not_encoded_again_and_no_file_holds_it(
    batching: BatchingEncoder, model: SlowEncoder
) -> None:
    first = batching.embed(["asked twice", "asked twice"]).result(10)
    again = batching.embed(["asked twice"]).result(10)
    assert len(model.batches) == 1
    np.testing.assert_array_equal(first.vectors_NE, np.repeat(again.vectors_NE, 2, axis=0))
    assert model.cache_path is not None
    assert b"asked twice" not in model.cache_path.read_bytes() if model.cache_path.exists() else True


def test_the_cache_keeps_what_was_used_last() -> None:
    cache = VectorCache(2)
    for key in (b"a", b"b"):
        cache.put(key, np.zeros(1))
    assert cache.get(b"a") is not None
    cache.put(b"c", np.zeros(1))
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]
    assert len(cache) == 2


def test_stated_interests_go_before_what_waits_already(batching: BatchingEncoder, model: SlowEncoder) -> None:
    model.leave.clear()
    done: list[str] = []
    many = batching.embed([f"one of many films, number {number}, told at some length" for number in range(60)])
    items = batching.encode_items([f"item {number}" for number in range(20)])
    many.add_done_callback(lambda _: done.append("many"))
    items.add_done_callback(lambda _: done.append("items"))
    urgent = batching.embed(["slow-burn Nordic crime"], first=True)
    urgent.add_done_callback(lambda _: done.append("interests"))
    model.leave.set()
    assert items.result(30).shape == (20, 384)
    many.result(30)
    assert done[0] == "interests"


def test_new_items_do_not_wait_for_all_other_texts(batching: BatchingEncoder, model: SlowEncoder) -> None:
    model.leave.clear()
    many = batching.embed([f"yet another film, number {number}, told at some length" for number in range(100)])
    item = batching.encode_items(["one new item"])
    model.leave.set()
    item.result(30)
    assert not many.done()
    many.result(30)


def test_items_vectors_come_in_the_order_given_and_are_kept_on_disk(
    batching: BatchingEncoder, model: SlowEncoder, tmp_path: Path
) -> None:
    texts = [f"{'long ' * (number % 7)}item {number}" for number in range(40)]
    vectors = batching.encode_items(texts).result(30)
    np.testing.assert_allclose(vectors[::13], model.encode(texts[::13]), atol=1e-5)
    assert batching.encode_items([]).result(10).shape == (0, 384)


@pytest.mark.parametrize("text", [" ", "😀" * 200, "\x00\x01\x1b[31m", "a" * 100_000, "word " * 20_000, "\u202e\ufeff"])
def test_whatever_can_be_read_has_a_vector_of_length_1(batching: BatchingEncoder, text: str) -> None:
    found = batching.embed([text]).result(10)
    np.testing.assert_allclose(np.linalg.norm(found.vectors_NE, axis=1), 1, atol=1e-5)
    assert found.tokens[0] <= 128
    assert found.cut == [text.startswith("word")]


def test_an_unreadable_text_fails_alone(batching: BatchingEncoder, model: SlowEncoder) -> None:
    model.leave.clear()
    blocker = batching.embed(["first of all"])
    unreadable = [batching.embed([[10**9]]), batching.embed([[-1]])]
    sound, odd = batching.embed(["sound"]), batching.embed(["a lone \ud800 surrogate"])
    model.leave.set()
    assert sound.result(10).vectors_NE.shape == (1, 384)
    assert np.linalg.norm(odd.result(10).vectors_NE) == pytest.approx(1, abs=1e-6)  # read with a ? in its place
    for answer in unreadable:
        with pytest.raises(UnreadableTextError):
            answer.result(10)
    blocker.result(10)
    with pytest.raises(UnreadableTextError):
        batching.embed([]).result(10)


def test_token_ids_of_a_text_have_its_vector(batching: BatchingEncoder, model: SlowEncoder) -> None:
    ids = [list(tokens.ids)[1:-1] for tokens in model.tokenize(TEXTS)]  # without [CLS] and [SEP]
    np.testing.assert_allclose(batching.embed(ids).result(10).vectors_NE, model.encode(TEXTS), atol=1e-5)
    assert batching.embed([[2088] * 500]).result(10).cut == [True]


def test_a_model_that_fails_fails_who_asked_and_nobody_after(
    batching: BatchingEncoder, model: SlowEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tokens: list[Tokens]) -> np.ndarray:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_tokens", fail)
        with pytest.raises(EngineError, match="MemoryError"):
            batching.embed(["too much"]).result(10)
    assert batching.embed(["too much"]).result(10).tokens == [4]


def test_what_nobody_waits_for_is_not_encoded(batching: BatchingEncoder, model: SlowEncoder) -> None:
    model.leave.clear()
    blocker = batching.embed(["goes first"])
    given_up = batching.embed(["given up"])
    assert given_up.cancel()
    model.leave.set()
    blocker.result(10)
    batching.embed(["asked after"]).result(10)
    assert [length for batch in model.batches for length in batch] == [4, 4]
    with pytest.raises(CancelledError):
        given_up.result(0)


def test_an_encoder_that_takes_too_long_is_said_in_time(batching: BatchingEncoder, model: SlowEncoder) -> None:
    model.leave.clear()

    class OnlyOne:
        def of(self, version: int | None) -> BatchingEncoder:
            return batching

    local = LocalEncoder(OnlyOne(), timeout_s=0.05)
    with pytest.raises(EngineError, match=r"does not answer within 0\.05 s"):
        asyncio.run(local.embed(["slow"], first=True, timeout_s=0.05))


def test_who_still_waits_at_the_end_hears_so(model: SlowEncoder) -> None:
    encoder = BatchingEncoder(model, batch_tokens=256, gather_s=5, cached=0)
    waiting, items = encoder.embed(["waits"]), encoder.encode_items(["waits too"])
    encoder.stop()
    for answer in (waiting, items):
        with pytest.raises(EngineError, match="ends"):
            answer.result(1)
