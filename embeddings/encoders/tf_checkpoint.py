"""Tensors of a TensorFlow 1 checkpoint, without TensorFlow.

In:  a folder with `.index` and `.data-00000-of-00001`, named or not.  Out: float32 arrays by variable name.
Knows nothing of models. Reads what `tf.train.Saver` writes: one shard, uncompressed.

    .index    a LevelDB table: blocks of sorted keys, each key without what it shares with the one before
              name → BundleEntryProto: 1 dtype, 2 shape, 4 offset, 5 size
    .data     the tensors' bytes, little endian
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cluster.errors import EngineError

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_FLOAT = 1
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5


def read_checkpoint(folder: Path, name: str = "") -> dict[str, np.ndarray]:
    """Return the float32 variables. Raises `EngineError` where the files are no such checkpoint."""
    index, data = (folder / f"{name}.index").read_bytes(), (folder / f"{name}.data-00000-of-00001").read_bytes()
    footer = index[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or struct.unpack_from("<Q", footer, 40)[0] != _MAGIC:
        raise EngineError(f"{folder}/{name}.index: is no TensorFlow checkpoint; install its package again")
    tensors = {}
    _, position = _read_handle(footer, 0)  # of a block about blocks, which is empty
    blocks, _ = _read_handle(footer, position)
    for _, handle in _read_block(index, *blocks):
        for variable, entry in _read_block(index, *_read_handle(handle, 0)[0]):
            numbers, messages = _read_message(entry)
            if not variable or numbers.get(1) != _FLOAT:
                continue  # the header, or a counter
            shape = [_read_message(dim)[0].get(1, 0) for dim in _read_message(messages.get(2, [b""])[0])[1].get(2, [])]
            offset, size = numbers.get(4, 0), numbers[5]
            if offset + size > len(data) or size != 4 * int(np.prod(shape)):
                raise EngineError(f"{folder}: {variable.decode()} is cut off; install its package again")
            tensors[variable.decode()] = np.frombuffer(data, "<f4", size // 4, offset).reshape(shape)
    return tensors


def _read_block(index: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    block = index[offset : offset + size]
    (restarts,) = struct.unpack_from("<I", block, size - 4)
    end, position, key = size - 4 - 4 * restarts, 0, b""
    while position < end:
        shared, position = _read_varint(block, position)
        added, position = _read_varint(block, position)
        value_bytes, position = _read_varint(block, position)
        key = key[:shared] + block[position : position + added]
        position += added
        yield key, block[position : position + value_bytes]
        position += value_bytes


def _read_handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    offset, position = _read_varint(data, position)
    size, position = _read_varint(data, position)
    return (offset, size), position


def _read_message(data: bytes) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """Return the fields of a protocol buffer by number: numbers, and what may repeat."""
    numbers: dict[int, int] = {}
    messages: dict[int, list[bytes]] = {}
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            numbers[field], position = _read_varint(data, position)
        elif wire == _BYTES:
            size, position = _read_varint(data, position)
            messages.setdefault(field, []).append(data[position : position + size])
            position += size
        else:
            size = {_FIXED_64: 8, _FIXED_32: 4}[wire]
            numbers[field] = int.from_bytes(data[position : position + size], "little")
            position += size
    return numbers, messages


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
