"""Request bodies: read within a limit, and taken apart into entries.

In:  a request.  Out: bytes; the entries of a body that may hold one or many.
Knows nothing of routes.
"""

import gc
from collections.abc import Mapping, Sequence
from http import HTTPStatus

import pydantic_core
from fastapi import Request

from serving.problems import ProblemError, refuse_field


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """Return the body; one that is too large is read to its end but not kept, so that the client hears why."""
    size_bytes, chunks = 0, []
    async for chunk in request.stream():
        size_bytes += len(chunk)
        if size_bytes <= limit_bytes:
            chunks.append(chunk)
    if size_bytes > limit_bytes:
        detail = f"the body has {size_bytes:,} bytes; at most {limit_bytes:,}"
        raise ProblemError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
    return b"".join(chunks)


def parse_json(body: bytes) -> object:
    """Return what a body says. Raises `ValueError` where it is not JSON."""
    was_enabled = gc.isenabled()
    gc.disable()  # millions of empty lists would start it again and again: 2.9 s for 8 MiB of them, 0.9 without
    try:
        return pydantic_core.from_json(body)
    finally:
        if was_enabled:
            gc.enable()


def split_entries(body: bytes, name: str, most: int) -> Sequence[object]:
    """Return the entries of a body that is one, a list of them, or an object that holds the list under the name."""
    try:
        stated = parse_json(body)
    except ValueError as error:
        raise ProblemError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from error
    if isinstance(stated, Mapping):
        stated = stated[name] if set(stated) == {name} else [stated]
    if not isinstance(stated, list) or not stated:
        raise refuse_field(name, "must be an object, a list of objects, or an object that holds such a list")
    if len(stated) > most:
        raise refuse_field(name, f"{len(stated):,} entries; at most {most:,} at a time")
    return stated
