"""Vectors of texts for whoever asks: the routes that unmodified clients of OpenAI's API use.

In:  requests to /v1/embeddings and /v1/models.  Out: the encoder's vectors; errors in OpenAI's form.
Knows nothing of items, users or versions.

A text longer than the model reads is cut off, as items' texts are, and the entry says so. An empty text is refused, as
OpenAI does. Token ids are the model's own, without its special ones.
"""

import asyncio
import base64
from collections.abc import Callable, Sequence
from functools import wraps
from http import HTTPStatus
from pathlib import PurePath
from typing import Any, Concatenate, ParamSpec

import numpy as np
import orjson
from fastapi import Request, Response
from pydantic import ValidationError

from cluster.errors import EngineError
from embeddings.text_encoder import EncoderConfig
from serving.batching import Embedded, Embedder, Text, UnreadableTextError
from serving.bodies import parse_json, read_body
from serving.config import ServeConfig
from serving.problems import RETRY_AFTER_S, ProblemError, openai_response
from serving.schemas import TOKENS, EmbeddingsRequest

P = ParamSpec("P")
Json = dict[str, Any]  # Any: whatever JSON holds

INPUTS = "must be a text, a list of texts, a list of token ids, or a list of such lists"
WRITTEN_ON_LOOP = 64
"""Vectors that are written as JSON at once; more of them go to a thread."""


class OpenAIError(Exception):
    """A request that is refused, as OpenAI would."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = HTTPStatus.BAD_REQUEST
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def _with_openai_errors(
    answer: Callable[Concatenate["EmbeddingsApi", P], Any],
) -> Callable[..., Any]:  # Any: awaitables
    @wraps(answer)
    async def answered(self: "EmbeddingsApi", *args: P.args, **kwargs: P.kwargs) -> Response:
        try:
            return await answer(self, *args, **kwargs)
        except OpenAIError as error:
            return openai_response(error.status, str(error), param=error.param, code=error.code)
        except ProblemError as error:
            return openai_response(error.status, error.detail)
        except EngineError as error:
            retry = {"Retry-After": str(RETRY_AFTER_S)}
            return openai_response(HTTPStatus.SERVICE_UNAVAILABLE, str(error), code="overloaded", headers=retry)

    return answered


class EmbeddingsApi:
    """Answers from one encoder."""

    def __init__(
        self, config: ServeConfig, encoder: Embedder, encoder_config: EncoderConfig, dim: Callable[[], int]
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._model = public_name(encoder_config.model)
        self._max_tokens = encoder_config.max_tokens
        self._dim = dim

    @_with_openai_errors
    async def embed(self, request: Request) -> Response:
        """Return one vector a text, each of length 1."""
        asked = _parse(await read_body(request, self._config.max_body_bytes))
        self._check_model(asked.model, HTTPStatus.NOT_FOUND)
        texts = self._texts(asked)
        dim = self._dim()
        if asked.dimensions is not None and asked.dimensions > dim:
            raise OpenAIError(f"dimensions={asked.dimensions}: {self._model} has {dim}", param="dimensions")
        try:
            found = await self._encoder.embed(texts, first=False, timeout_s=self._config.encoder_timeout_s)
        except UnreadableTextError as error:
            raise OpenAIError(f"input: {error}", param="input") from error
        if len(texts) <= WRITTEN_ON_LOOP:
            body = _write(found, asked, self._model)
        else:
            body = await asyncio.get_running_loop().run_in_executor(None, _write, found, asked, self._model)
        return Response(body, media_type="application/json")

    @_with_openai_errors
    async def list_models(self) -> Response:
        """List the model that makes vectors."""
        return Response(orjson.dumps({"object": "list", "data": [self._describe()]}), media_type="application/json")

    @_with_openai_errors
    async def show_model(self, model: str) -> Response:
        """Describe the model."""
        self._check_model(model, HTTPStatus.NOT_FOUND)
        return Response(orjson.dumps(self._describe()), media_type="application/json")

    def _describe(self) -> Json:
        about = {"id": self._model, "object": "model", "created": 0, "owned_by": "recloop"}
        return {**about, "dimensions": self._dim(), "max_tokens": self._max_tokens}

    def _check_model(self, model: str, status: int) -> None:
        if model != self._model:
            message = f"the model {model!r:.200} does not exist; there is {self._model!r}"
            raise OpenAIError(message, param="model", code="model_not_found", status=status)

    def _texts(self, asked: EmbeddingsRequest) -> Sequence[Text]:
        texts = _listed(asked.input)
        most, chars = self._config.max_batch_texts, self._config.max_text_chars
        if not texts:
            raise OpenAIError(f"input: {INPUTS}; it is empty", param="input")
        if len(texts) > most:
            raise OpenAIError(f"input: {len(texts):,} entries; at most {most:,} at a time", param="input")
        for index, text in enumerate(texts):
            if type(text) is not type(texts[0]):
                raise OpenAIError(f"input[{index}]: {INPUTS}, not of several kinds", param="input")
            if not text:
                raise OpenAIError(f"input[{index}]: is empty; every entry must say something", param="input")
            if len(text) > chars:
                unit = "characters" if isinstance(text, str) else "tokens"
                reason = f"input[{index}]: has {len(text):,} {unit}; at most {chars:,}"
                raise OpenAIError(reason, param="input", code="string_above_max_length")
            if not isinstance(text, str) and not _are_tokens(text):
                raise OpenAIError(f"input[{index}]: {INPUTS}; a token id is from 0 to {TOKENS - 1}", param="input")
        return texts


def public_name(model: str) -> str:
    """Return the name by which clients ask for a model: of a folder, its last part alone."""
    return PurePath(model).name if PurePath(model).is_absolute() else model


def _listed(stated: object) -> list[Any]:  # Any: JSON; texts or lists by their first entry, the others may be anything
    if isinstance(stated, str):
        return [stated]
    if not isinstance(stated, list) or (stated and type(stated[0]) not in (str, int, list)):
        raise OpenAIError(f"input: {INPUTS}", param="input")
    return [stated] if stated and type(stated[0]) is int else stated


def _are_tokens(ids: list[Any]) -> bool:  # Any: JSON
    return set(map(type, ids)) == {int} and 0 <= min(ids) <= max(ids) < TOKENS


def _parse(body: bytes) -> EmbeddingsRequest:
    """Return the request, but for its input checked: see `_texts`."""
    try:
        stated = parse_json(body)
    except ValueError as error:
        raise OpenAIError(f"the body is not JSON: {error}") from error
    if not isinstance(stated, dict):
        raise OpenAIError("body: must be an object")
    for name in stated:
        if name not in EmbeddingsRequest.model_fields:  # the first will do: there may be a million
            raise OpenAIError(f"{name:.200}: there is no such parameter", param=name[:200])
    try:
        return EmbeddingsRequest.model_validate(stated)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
    param = str(found["loc"][0])
    raise OpenAIError(f"{param}: {found['msg']}", param=param)


def _write(found: Embedded, asked: EmbeddingsRequest, model: str) -> bytes:
    vectors_ND = found.vectors_NE
    if asked.dimensions is not None and asked.dimensions < vectors_ND.shape[1]:
        vectors_ND = vectors_ND[:, : asked.dimensions]
        length_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        vectors_ND = vectors_ND / np.where(length_N1 > 0, length_N1, 1)
    vectors_ND = np.ascontiguousarray(vectors_ND, "<f4")
    as_base64 = asked.encoding_format == "base64"
    written: list[Json] = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector_D.tobytes()).decode() if as_base64 else vector_D,
            **({"truncated": True} if cut else {}),
        }
        for index, (vector_D, cut) in enumerate(zip(vectors_ND, found.cut, strict=True))
    ]
    usage = {"prompt_tokens": sum(found.tokens), "total_tokens": sum(found.tokens)}
    answer = {"object": "list", "data": written, "model": model, "usage": usage, "encoder": found.encoder}
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
