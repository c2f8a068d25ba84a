"""What a person says they like, in their own words, becomes `Interests`; or a reason why not, by name.

In:  a text of a request.  Out: vectors of what is liked and of each thing that is not, and which encoder made them.
Knows nothing of models. Waits for the encoder at most as long as the request allows; what was said before is known.

A language model reads "no gore" as a text about gore. So clauses that begin with a word of `NEGATIONS` are taken out
and count as disliked, each by itself up to `MOST_DISLIKED`, what is left over as one. That is all that is understood of
negation: English, the beginning of a clause, no irony, no "less of".
"""

import re
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.errors import EngineError
from embeddings.text_encoder import EncoderConfig
from serving.batching import Embedder, UnreadableTextError
from training.models.interests import Interests

NEGATIONS = (
    r"no|not|without|never|nothing|except|avoid(?:ing)?|nor|neither|anything but|"
    r"(?:i |we )?(?:don'?t|do not|can'?t|cannot)(?: really)? (?:like|love|want|enjoy|care for|stand)|"
    r"(?:i |we )?(?:hate|dislike)"
)
_CLAUSE_ENDS = re.compile(
    rf"[,;.!?\n]+|\bbut\b|\band(?= (?:{NEGATIONS})\b)|(?<=\w)(?= (?:without|except)\b)", re.IGNORECASE
)
_NEGATED = re.compile(rf"^(?:and |or )?(?:{NEGATIONS})\b[\s:]*", re.IGNORECASE)
MOST_DISLIKED = 8
"""Things disliked that are scored for the whole catalogue; the last is all that is left over, as one text."""
KEPT_BYTES = 32 * 1024**2
"""Texts and vectors of stated interests that are kept in this process."""

Fallback = Literal["encoder_timeout", "encoder_mismatch", "unreadable", "no_text"]
"""Why a request's interests were not used: the encoder did not answer in time; the version's items were read by another
encoder; the text says nothing that the encoder can read; the version's items have no text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """A request's interests."""

    interests: Interests | None
    liked: str
    disliked: tuple[str, ...]
    config: EncoderConfig
    """Of the encoder that was asked."""
    encoder: str | None = None
    """Its fingerprint, once it has answered."""
    fallback: Fallback | None = None
    """Why there are none."""


class InterestReader:
    """Reads interests with one encoder."""

    def __init__(self, encoder: Embedder, config: EncoderConfig) -> None:
        self._config = config
        self._encoder = encoder
        self._known: OrderedDict[tuple[str, str], tuple[Stated, int]] = OrderedDict()
        """With their sizes in bytes."""
        self._kept_bytes = 0

    async def read(self, text: str, timeout_s: float, version: int | None = None, encoder: str = "") -> Stated:
        """Return what is said; without vectors, and with the reason, where the encoder does not answer in time.

        It is read by the version's encoder, whose fingerprint `encoder` is: what was said is known by both.
        """
        key = (text, encoder)
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known[0]
        liked, disliked = split_clauses(text)
        said = [*([liked] if liked else []), *disliked]
        if not said:
            return self._unused(liked, disliked, "unreadable")
        try:
            found = await self._encoder.embed(said, first=True, timeout_s=timeout_s, version=version)
        except UnreadableTextError:
            return self._unused(liked, disliked, "unreadable")
        except EngineError:
            return self._unused(liked, disliked, "encoder_timeout")
        vectors_NE = np.array(found.vectors_NE)  # a copy: what Ray hands out is shared memory
        liked_E, disliked_NE = (vectors_NE[0], vectors_NE[1:]) if liked else (None, vectors_NE)
        interests = Interests(liked_E=liked_E, disliked_NE=disliked_NE)
        stated = Stated(interests=interests, liked=liked, disliked=disliked, config=self._config, encoder=found.encoder)
        self._keep(key, stated, vectors_NE.nbytes + 2 * sys.getsizeof(text))  # the text, and the same in parts
        return stated

    def _keep(self, key: tuple[str, str], stated: Stated, size_bytes: int) -> None:
        if key in self._known:  # two requests said it at once
            return
        self._known[key] = stated, size_bytes
        self._kept_bytes += size_bytes
        while self._kept_bytes > KEPT_BYTES:
            _, (_, freed_bytes) = self._known.popitem(last=False)
            self._kept_bytes -= freed_bytes

    def _unused(self, liked: str, disliked: tuple[str, ...], fallback: Fallback) -> Stated:
        return Stated(interests=None, liked=liked, disliked=disliked, config=self._config, fallback=fallback)


def split_clauses(text: str) -> tuple[str, tuple[str, ...]]:
    """Return what is liked, as one text, and each thing that is not, once and without its negation."""
    liked: list[str] = []
    disliked: list[str] = []
    for clause in (part.strip() for part in _CLAUSE_ENDS.split(text)):
        thing, negations = _NEGATED.subn("", clause)
        if thing.strip():
            (disliked if negations else liked).append(thing.strip())
    things = list(dict.fromkeys(disliked))
    if len(things) > MOST_DISLIKED:
        things[MOST_DISLIKED - 1 :] = [", ".join(things[MOST_DISLIKED - 1 :])]
    return ", ".join(liked), tuple(things)
