"""Texts, or token ids of the model's own, become what the model reads of them.

In:  texts and lists of token ids.  Out: token ids with the special ones, cut to what the model reads.
Knows nothing of models, vectors or caches. No text is too long or too odd to be read.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARS_PER_TOKEN = 32
"""A text's first characters, this many a token that is read, are as a rule all that is read of it."""


class Tokens(NamedTuple):
    """One text as the model reads it."""

    ids: Sequence[int]
    """With the model's special tokens."""
    cut: bool
    """Whether the text had more."""


class Reader:
    """A tokenizer, and how much of a text is read."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        # Models that were made to write have no padding; any token will do where it is masked.
        self.pad_id = cast("int | None", tokenizer.pad_token_id) or 0

    def read(self, inputs: Sequence[str | Sequence[int]]) -> list[Tokens]:
        """Return what the model reads of each. Raises `ValueError` for a token id that it does not have."""
        limit = self._max_tokens
        # A lone surrogate has no UTF-8, which is what tokenizers read.
        texts = [entry.encode("utf-8", "replace").decode() for entry in inputs if isinstance(entry, str)]
        # Of long texts the beginning, first: the tokenizer reads all it is given, and most of that would be cut off.
        begins = [text[: CHARS_PER_TOKEN * limit] for text in texts]
        begun = iter(zip(texts, begins, self._ids(begins, limit + 1), strict=True))
        read = []
        for entry in inputs:
            if not isinstance(entry, str):
                read.append(self._own(entry))
                continue
            text, begin, ids = next(begun)
            if len(ids) <= limit and len(begin) < len(text):
                begin, ids = text, self._ids([text], limit + 1)[0]
            cut = len(ids) > limit
            read.append(Tokens(self._ids([begin], limit)[0] if cut else ids, cut))
        return read

    def text_of(self, ids: Sequence[int]) -> str:
        """Return about what the ids were read from."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _own(self, ids: Sequence[int]) -> Tokens:
        size = len(self._tokenizer)  # pyright: ignore[reportArgumentType]  (it has a length, which its type hides)
        unknown = [token for token in ids if not 0 <= token < size]
        if unknown:
            raise ValueError(f"token {unknown[0]} is none of the model's {size:,}")
        before, after = self._special_tokens
        room = max(self._max_tokens - len(before) - len(after), 0)
        return Tokens([*before, *ids[:room], *after], cut=len(ids) > room)

    def _ids(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        if not texts:
            return []
        tokens = self._tokenizer(
            list(texts), truncation=True, max_length=limit, return_attention_mask=False, return_token_type_ids=False
        )
        return cast("list[list[int]]", tokens["input_ids"])

    @cached_property
    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Those that the model has before and after a text."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self._ids(["a"], self._max_tokens)[0]
        start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]
