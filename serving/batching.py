"""One text encoder for everyone who asks a process: what waits is encoded together, whoever asked.

In:  texts or token ids, from any thread.  Out: futures of vectors.
Knows nothing of HTTP or of Ray: the encoder deployment (encoder.py) and the standby (standby.py) have one each.

One thread runs the model. While it does, others' texts gather, and the next batch is made of them: the one that waits
longest and those nearest to it in length, up to a budget of tokens, padding counted. Stated interests go first;
requests for vectors and new items take turns, so that a thousand new items hold nobody up for more than a batch. What
people ask is kept in memory alone, the newest of it, so that no file grows with what anybody types; new items' vectors
are kept in the encoder's own cache.
"""

import contextlib
import hashlib
import logging
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from cluster.errors import EngineError
from embeddings.encoders.tokens import Tokens
from embeddings.text_encoder import TextEncoder
from serving.config import ServeConfig

Text = str | Sequence[int]
"""A text, or token ids of the model's own without its special ones."""

READ_AT_ONCE = 64
"""Texts among which a batch is chosen."""
ITEMS_AT_ONCE = 16
"""New items encoded between two looks at who else waits."""
KEY_BYTES = 16

log = logging.getLogger(__name__)


class Embedder(Protocol):
    """Asks an encoder, here or in another process."""

    def encode(self, texts: Sequence[str], version: int | None = None) -> np.ndarray:
        """Return one vector an item's text, float32 [n, E], by a version's encoder or the promoted one's; blocks.

        Raises `EngineError`.
        """
        ...

    async def embed(
        self, texts: Sequence[Text], *, first: bool, timeout_s: float, version: int | None = None
    ) -> "Embedded":
        """Return what becomes of texts. Raises `UnreadableTextError`, or `EngineError` when nothing comes in time."""
        ...


class UnreadableTextError(ValueError):
    """What was given cannot be read by the model, however often it is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What became of one request's texts."""

    vectors_NE: np.ndarray
    tokens: Sequence[int]
    """How many the model read of each."""
    cut: Sequence[bool]
    """Whether a text had more."""
    encoder: str
    """The encoder's fingerprint."""


@dataclass(slots=True)
class _Request:
    """Texts that are answered together."""

    texts: Sequence[Text]
    first: bool
    answer: "Future[Embedded]" = field(default_factory=Future)
    tokens: dict[int, Tokens] = field(default_factory=dict)
    """By place in the request."""
    vectors: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(slots=True)
class _Waiting:
    """One text of a request."""

    request: _Request
    place: int
    tokens: Tokens | None = None
    key: bytes = b""


class _Items:
    """New items of one request, encoded in parts: the shortest first, for little padding."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.answer: Future[np.ndarray] = Future()
        self._texts = texts
        self._order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        self._parts: list[np.ndarray] = []
        self._done = 0

    def encode_some(self, encoder: TextEncoder) -> None:
        """Encode the next few; settles the answer with the last."""
        places = self._order[self._done : self._done + ITEMS_AT_ONCE]
        self._parts.append(encoder.encode([self._texts[place] for place in places]))
        self._done += len(places)
        if self._done == len(self._texts):
            sorted_NE = np.concatenate(self._parts)
            vectors_NE = np.empty_like(sorted_NE)
            vectors_NE[self._order] = sorted_NE
            _settle(self.answer, vectors_NE)


class VectorCache:
    """The newest vectors, by what they were made of."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._vectors: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def get(self, key: bytes) -> np.ndarray | None:
        """Return the vector, which is among the newest again."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: bytes, vector: np.ndarray) -> None:
        """Keep a vector; the oldest gives way."""
        if self._size:
            self._vectors[key] = vector
            if len(self._vectors) > self._size:
                self._vectors.popitem(last=False)

    def __len__(self) -> int:
        return len(self._vectors)


class BatchingEncoder:
    """A text encoder, its thread and those who wait."""

    def __init__(
        self, encoder: TextEncoder, *, batch_tokens: int, gather_s: float, cached: int, warm: bool = False
    ) -> None:
        """With `warm`, the model is loaded at once, in the thread; else when the first text comes."""
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._gather_s = gather_s
        self._cache = VectorCache(cached)
        self._first, self._others = deque[_Waiting](), deque[_Waiting]()
        self._items = deque[_Items]()
        self._items_turn = False
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(warm,), name="encoder", daemon=True)
        self._thread.start()

    def embed(self, texts: Sequence[Text], *, first: bool = False) -> "Future[Embedded]":
        """Have texts encoded; those that go `first`, before all others and as queries.

        The future may raise `UnreadableTextError` or `EngineError`; calling it off gives up what is still waiting.
        """
        request = _Request(texts, first)
        if not texts:
            request.answer.set_exception(UnreadableTextError("no text is given"))
        with self._changed:
            if self._stopped:
                _settle(request.answer, error=EngineError("the text encoder has ended"))
                return request.answer
            (self._first if first else self._others).extend(_Waiting(request, place) for place in range(len(texts)))
            self._changed.notify()
        return request.answer

    def encode_items(self, texts: Sequence[str]) -> "Future[np.ndarray]":
        """Have new items' texts encoded, float32 [n, E], and kept on disk; the future may raise `EngineError`."""
        items = _Items(texts)
        with self._changed:
            if self._stopped:
                _settle(items.answer, error=EngineError("the text encoder has ended"))
                return items.answer
            self._items.append(items)
            self._changed.notify()
        return items.answer

    def stop(self) -> None:
        """End the thread; who still waits hears so."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self, warm: bool) -> None:
        if warm:
            try:
                self._encoder.load()
            except Exception as error:  # whoever asks for a vector hears of it
                log.error("the text encoder is not loaded: %s", error)
        while self._wait():
            try:
                self._turn()
            except Exception as error:  # the thread goes on whatever was given to it; whoever asked times out
                log.error("a batch of texts is lost", exc_info=error)
        ended = EngineError("the text encoder ends")
        for waiting in (*self._first, *self._others):
            _settle(waiting.request.answer, error=ended)
        for items in self._items:
            _settle(items.answer, error=ended)

    def _wait(self) -> bool:
        """Return once somebody waits, a moment later if nobody did before; false when it is over."""
        with self._changed:
            if not self._anyone():
                self._changed.wait_for(lambda: self._stopped or self._anyone())
                if not self._first:  # one person waits for an answer; of others, more may come at the same moment
                    self._changed.wait_for(lambda: self._stopped, self._gather_s)
            return not self._stopped

    def _anyone(self) -> bool:
        return bool(self._first or self._others or self._items)

    def _turn(self) -> None:
        """Run one batch: of those who go first, else of the others and of new items by turns."""
        if self._items and not self._first and (self._items_turn or not self._others):
            self._items_turn = False
            self._encode_some_items()
        else:
            self._items_turn = True
            self._encode_batch(self._first or self._others)

    def _encode_some_items(self) -> None:
        """Encode some of the items that have waited longest."""
        items = self._items[0]
        try:
            items.encode_some(self._encoder)
        except Exception as error:  # whatever it is, the thread goes on, and who asked hears of it
            _settle(items.answer, error=_told(error))
        if items.answer.done():
            with self._changed:
                self._items.popleft()

    def _encode_batch(self, queue: deque[_Waiting]) -> None:
        """Encode the text that has waited longest in the queue, and of the next those that go well with it."""
        with self._changed:
            seen = [queue.popleft() for _ in range(min(len(queue), READ_AT_ONCE))]
        self._read([waiting for waiting in seen if waiting.tokens is None])
        unknown: dict[bytes, list[_Waiting]] = {}
        for waiting in seen:
            if waiting.request.answer.done():  # nobody waits for it any more, or it has failed
                continue
            vector = self._cache.get(waiting.key)
            if vector is None:
                unknown.setdefault(waiting.key, []).append(waiting)
            else:
                self._deliver(waiting, vector)
        keys = _choose({key: len(_tokens(alike[0]).ids) for key, alike in unknown.items()}, self._batch_tokens)
        with self._changed:
            left = [waiting for key, alike in unknown.items() if key not in keys for waiting in alike]
            queue.extendleft(reversed(left))
        if not keys:
            return
        try:
            vectors = self._encoder.encode_tokens([_tokens(unknown[key][0]) for key in keys])
        except Exception as error:  # as above
            for waiting in (waiting for key in keys for waiting in unknown[key]):
                _settle(waiting.request.answer, error=_told(error))
            return
        for key, vector in zip(keys, vectors, strict=True):
            self._cache.put(key, vector.copy())  # of the batch's vectors, each lives as long as it is asked for
            for waiting in unknown[key]:
                self._deliver(waiting, vector)

    def _read(self, new: Sequence[_Waiting]) -> None:
        """Tokenize texts, together where that is possible; a request with one that is unreadable fails alone."""
        try:
            self._note(new)
        except Exception:
            by_request = {id(waiting.request): waiting.request for waiting in new}
            for request in by_request.values():
                try:
                    self._note([waiting for waiting in new if waiting.request is request])
                except (ValueError, TypeError) as error:  # an id or a character that the tokenizer does not have
                    _settle(request.answer, error=UnreadableTextError(str(error)))
                except Exception as error:  # as above
                    _settle(request.answer, error=_told(error))

    def _note(self, new: Sequence[_Waiting]) -> None:
        tokenized = self._encoder.tokenize([self._asked(waiting) for waiting in new]) if new else []
        for waiting, tokens in zip(new, tokenized, strict=True):
            waiting.tokens = waiting.request.tokens[waiting.place] = tokens
            waiting.key = hashlib.blake2b(array("q", tokens.ids).tobytes(), digest_size=KEY_BYTES).digest()

    def _asked(self, waiting: _Waiting) -> Text:
        text = waiting.request.texts[waiting.place]
        return self._encoder.query_prefix + text if waiting.request.first and isinstance(text, str) else text

    def _deliver(self, waiting: _Waiting, vector: np.ndarray) -> None:
        request = waiting.request
        request.vectors[waiting.place] = vector
        places = range(len(request.texts))
        if len(request.vectors) == len(places):
            done = Embedded(
                vectors_NE=np.stack([request.vectors[place] for place in places]),
                tokens=[len(request.tokens[place].ids) for place in places],
                cut=[request.tokens[place].cut for place in places],
                encoder=self._encoder.fingerprint,
            )
            _settle(request.answer, done)


def build_batching(encoder: TextEncoder, serve: ServeConfig, *, warm: bool = False) -> BatchingEncoder:
    """Return a model's batching encoder as a recipe's `[serve]` says."""
    return BatchingEncoder(
        encoder,
        batch_tokens=serve.encoder_batch_tokens,
        gather_s=serve.encoder_gather_ms / 1e3,
        cached=serve.encoder_cached,
        warm=warm,
    )


def _choose(lengths: dict[bytes, int], batch_tokens: int) -> list[bytes]:
    """Return the first key and those nearest to it in length, as many as come to so many tokens, padding counted."""
    if not lengths:
        return []
    oldest = next(iter(lengths))
    chosen, longest = [oldest], lengths[oldest]
    for key in sorted(lengths, key=lambda key: abs(lengths[key] - lengths[oldest])):
        if key == oldest:
            continue
        longest_then = max(longest, lengths[key])
        if longest_then * (len(chosen) + 1) <= batch_tokens:
            chosen.append(key)
            longest = longest_then
    return chosen


def _tokens(waiting: _Waiting) -> Tokens:
    assert waiting.tokens is not None, "it was read before"
    return waiting.tokens


def _told(error: Exception) -> Exception:
    """Return what whoever asked is told."""
    if isinstance(error, EngineError):
        return error
    log.error("the text encoder failed", exc_info=error)
    return EngineError(f"the text encoder failed ({error!r:.300})")


def _settle(
    answer: "Future[Any]", result: object = None, error: Exception | None = None
) -> None:  # Any: of either kind
    with contextlib.suppress(InvalidStateError):  # called off meanwhile, or settled before
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)
