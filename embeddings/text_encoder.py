"""Item text to vectors with a pre-trained language model.

In:  texts.  Out: unit-length float32 vectors, the same for the same text and encoder.
Knows nothing of items. Any Hugging Face `AutoModel` by name or folder: BERT, GPT and E5 families.
The cache is keyed by the text's SHA-256 under the encoder's fingerprint, so a second run encodes nothing.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from cluster.errors import ConfigError, EngineError
from embeddings.adapter import Adapter
from embeddings.encoders.pretrained import (
    Traits,
    check_installed,
    load_model,
    load_tokenizer,
    locate_model,
    read_traits,
)
from embeddings.encoders.tokens import Reader, Tokens
from embeddings.encoders.vector_cache import VectorCache

if TYPE_CHECKING:
    from torch import nn

WINDOW_TEXTS = 16_384
"""Texts that are tokenised, and sorted by length, together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Which language model reads item text, and how."""

    model: str = "all-MiniLM-L6-v2"
    """A packaged model (all-MiniLM-L6-v2, multilingual-e5-small, SmolLM2-135M), a folder, or a Hugging Face name."""
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """A text's vector: the mean over its tokens, the first one's, the last's; auto is as the model was made."""
    query_prefix: str | None = None
    """What a query starts with; none is what the model was trained with: "query: " for E5, nothing for most."""
    item_prefix: str | None = None
    """What an item starts with; none is what the model was trained with: "passage: " for E5, nothing for most."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Number format of products; auto is float32. bfloat16 needs AMX to be fast; int8 moves vectors by .5%."""
    layers: int | None = None
    """Layers to keep, evenly spaced; none keeps all."""
    neurons: float | None = None
    """Share of each layer's feed-forward neurons to keep, those of largest weights; none keeps all."""
    max_tokens: int = 128
    """Tokens read of each text; the rest is cut off."""
    batch_tokens: int = 2048
    """Tokens encoded together, padding included."""
    batch_texts: int = 256
    """Texts encoded together at most, of similar length."""
    threads: int | None = None
    """Threads that encode; none leaves it to torch."""
    workers: int = 1
    """Ray workers that encode a catalogue, of `threads` CPUs each; 1 is this process."""
    adapter: str | None = None
    """Folder of a run of `recloop finetune`: the model as fine-tuned there; a version holds its own copy."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_tokens", "batch_texts", "threads", "layers", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"encoder.{name}={value}: must be at least 1")
        if self.neurons is not None and not 0 < self.neurons <= 1:
            raise ConfigError(f"encoder.neurons={self.neurons}: must be above 0 and at most 1")


class _Loaded(NamedTuple):
    model: "nn.Module"
    reader: Reader


class TextEncoder:
    """A language model and its cache; loads the model only when a text is not cached."""

    def __init__(self, config: EncoderConfig, cache_folder: Path | None = None, adapter: Adapter | None = None) -> None:
        """Read text as fine-tuned by the adapter given, or by the one that the config names.

        Raises `ConfigError` when the model's package is missing, naming it, or the adapter is of another model.
        """
        check_installed(config.model)
        self.config = config
        self.cache_folder = cache_folder
        self.adapter = Adapter.load(Path(config.adapter)) if adapter is None and config.adapter else adapter
        if self.adapter is not None:
            self.adapter.check_base(self.base_fingerprint, config.model)

    @cached_property
    def location(self) -> str:
        """The model's folder, or its hub name; a packaged model is converted on first use where it needs to be."""
        return locate_model(self.config.model, self.cache_folder)

    @cached_property
    def traits(self) -> Traits:
        """How texts are asked for: the recipe's word, else the model's own."""
        with self._loading():
            own = read_traits(self.config.model, self.location)
        chosen = self.config
        return Traits(
            pooling=own.pooling if chosen.pooling == "auto" else chosen.pooling,
            query_prefix=own.query_prefix if chosen.query_prefix is None else chosen.query_prefix,
            item_prefix=own.item_prefix if chosen.item_prefix is None else chosen.item_prefix,
        )

    @cached_property
    def dtype(self) -> str:
        """Number format of the products. Automatic is exact: nobody's vectors change because a processor did."""
        return "float32" if self.config.dtype == "auto" else self.config.dtype

    @cached_property
    def cache_path(self) -> Path | None:
        """File of the cache; named by the fingerprint, for which the model's files are read."""
        return self.cache_folder / f"text-{self.fingerprint}.db" if self.cache_folder else None

    @cached_property
    def fingerprint(self) -> str:
        """Identify model, settings and adapter: vectors of different fingerprints never mix."""
        if self.adapter is None:
            return self.base_fingerprint
        return hashlib.sha256(f"{self.base_fingerprint} {self.adapter.digest}".encode()).hexdigest()[:16]

    @cached_property
    def base_fingerprint(self) -> str:
        """Identify model and settings, as they are without an adapter."""
        # What is at its first default is left out: fingerprints of versions made before there was a choice stay.
        chosen = [str(self.config.max_tokens), self.traits.pooling, "unit"]
        if self.dtype != "float32":
            chosen.append(self.dtype)
        if self.config.layers is not None:
            chosen.append(f"layers={self.config.layers}")
        if self.config.neurons is not None:
            chosen.append(f"neurons={self.config.neurons}")
        if self.traits.query_prefix or self.traits.item_prefix:
            chosen.append(repr((self.traits.query_prefix, self.traits.item_prefix)))
        digest = hashlib.sha256(" ".join(chosen).encode())
        folder = Path(self.location)
        if folder.is_dir():
            for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
                with file.open("rb") as opened:
                    digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
        else:
            digest.update(self.location.encode())
        return digest.hexdigest()[:16]

    @cached_property
    def dim(self) -> int:
        """Length of a vector. Raises `EngineError` when the model cannot be loaded."""
        from transformers import AutoConfig

        with self._loading():
            return int(AutoConfig.from_pretrained(self.location).hidden_size)

    def encode(self, texts: Sequence[str], on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        """Return one vector an item's text, float32 [n, E]; an empty text has the zero vector.

        `on_progress` is called with the number of texts done since the last call. Raises `EngineError` when the
        model cannot be loaded or gives numbers that are none.
        """
        return self._encode(texts, self.traits.item_prefix, on_progress)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector a query, float32 [n, E], to compare with those of items."""
        return self._encode(texts, self.traits.query_prefix, None)

    def _encode(self, texts: Sequence[str], prefix: str, on_progress: Callable[[int], object] | None) -> np.ndarray:
        row_of: dict[bytes, int] = {}
        distinct: list[str] = []
        row_N = np.empty(len(texts), np.int64)
        for n, text in enumerate(texts):
            asked = prefix + text if text else ""
            row_N[n] = row_of.setdefault(key_of(asked), len(distinct))
            if row_N[n] == len(distinct):
                distinct.append(asked)
        vectors_UE = np.zeros((len(distinct), self.dim), np.float32)
        with VectorCache(self.cache_path, self.dim) as cache:
            missing = {key: row for key, row in row_of.items() if distinct[row]}
            for key, vector in cache.read(list(missing)):
                vectors_UE[missing.pop(key)] = vector
            if on_progress:
                on_progress(len(texts) - len(missing))
            keys = list(missing)
            for indices, vectors in self._forward_anywhere([distinct[row] for row in missing.values()]):
                done = [keys[i] for i in indices]
                vectors_UE[[missing[key] for key in done]] = vectors
                cache.write(done, vectors)
                if on_progress:
                    on_progress(len(done))
        return vectors_UE[row_N]

    def unloaded(self, config: EncoderConfig) -> "TextEncoder":
        """Return the same encoder under other settings, with nothing loaded: to be sent to where it is to run."""
        return TextEncoder(config, self.cache_folder, self.adapter)

    def _forward_anywhere(self, texts: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        from embeddings.encoders.on_ray import forward_on_ray, pays_on_ray

        return forward_on_ray(self, texts) if pays_on_ray(self, len(texts)) else self.forward(texts)

    def forward(self, texts: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the vectors of texts as they are, none of them empty, past the cache: indices and float32 [b, E]."""
        from embeddings.encoders.batching import batches_by_length

        for first in range(0, len(texts), WINDOW_TEXTS):
            read = self.tokenize(texts[first : first + WINDOW_TEXTS])
            batches = batches_by_length(
                [len(tokens.ids) for tokens in read],
                max_tokens=self.config.batch_tokens,
                max_texts=self.config.batch_texts,
            )
            for batch in batches:
                yield [first + i for i in batch], self.encode_tokens([read[i] for i in batch])

    def tokenize(self, inputs: Sequence[str | Sequence[int]]) -> list[Tokens]:
        """Return what the model reads of each text, or of token ids of its own without the special ones.

        Raises `ValueError` for an id that the model does not have, `EngineError` when the model cannot be loaded.
        """
        return self._loaded.reader.read(inputs)

    def encode_tokens(self, tokens: Sequence[Tokens]) -> np.ndarray:
        """Return one vector an entry, float32 [n, E], computed together and kept nowhere; zeros where nothing is read.

        Raises `EngineError` where a vector is no number.
        """
        import torch

        from embeddings.encoders.batching import pad, pool

        ids = [entry.ids for entry in tokens]
        if not any(ids):  # nothing but what the tokenizer passes over
            return np.zeros((len(ids), self.dim), np.float32)
        model, reader = self._loaded
        with torch.inference_mode(), use_threads(self.config.threads):
            ids_BL, mask_BL = pad([one or [reader.pad_id] for one in ids], reader.pad_id)
            hidden_BLE = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
            vectors = pool(hidden_BLE, mask_BL, self.traits.pooling).numpy()
        vectors[[not one for one in ids]] = 0
        if not np.isfinite(vectors).all():
            worst = reader.text_of(ids[int((~np.isfinite(vectors)).any(1).argmax())])
            raise EngineError(
                f"encoder.model={self.config.model!r}: its vector of {worst[:60]!r} is no number; its weights "
                f"are damaged, or encoder.dtype={self.dtype!r} is too narrow for it; try float32"
            )
        return vectors

    @property
    def query_prefix(self) -> str:
        """What a query starts with, as the model was trained."""
        return self.traits.query_prefix

    def load(self) -> None:
        """Load the model now. Raises `EngineError` when that is not possible."""
        _ = self._loaded

    @cached_property
    def _loaded(self) -> _Loaded:
        from embeddings.encoders.precision import convert_model

        with self._loading():
            tokenizer = load_tokenizer(self.config.model, self.location)
            model = load_model(self.location, self.config.layers, self.config.neurons)
        if self.adapter is not None:
            self.adapter.apply(model)
        return _Loaded(convert_model(model, self.dtype), Reader(tokenizer, self.config.max_tokens))

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise EngineError(f"encoder.model={self.config.model!r} cannot be loaded: {error}") from error


def key_of(text: str) -> bytes:
    """Return what a text's vector is kept under, whatever characters it is of."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@contextlib.contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Let torch use as many threads while the block runs; none leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)
