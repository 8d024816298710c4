"""Read the header of a GGUF file: key-value metadata and the place of each tensor.

`gguf.GGUFReader` is not used. It makes NumPy arrays of every token of a vocabulary, which takes ten times as long, and trusts
the lengths that it finds. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from common.errors import CheckpointError
from common.weights.entry import BLOCKS, PLAIN, block_layout
from common.weights.files import MAX_TENSORS, MAX_TOKENIZER

MAX_KEYS = 1 << 12
"""Keys of the metadata. Files in use have some dozens."""
MAX_VALUES = 1 << 22
"""Values in all arrays of the metadata together. The largest vocabularies in use need about 2**20."""
MAX_BYTES = MAX_TOKENIZER
"""Bytes of the header. Nearly all are of the vocabulary."""
_SCALARS = {
    GGUFValueType.UINT8: "u1", GGUFValueType.INT8: "i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4", GGUFValueType.FLOAT64: "<f8", GGUFValueType.BOOL: "?",
}  # fmt: skip
_SCALAR_TYPES = {int(kind): np.dtype(code) for kind, code in _SCALARS.items()}
_ENCODINGS = {int(kind): kind.name for kind in GGMLQuantizationType}


@dataclass(frozen=True)
class StoredTensor:
    """One line of a GGUF header."""

    name: str
    shape: tuple[int, ...]
    """Slowest axis first, as NumPy and Hugging Face have it; the file lists them the other way round."""
    encoding: str
    offset: int
    """From the start of the file, in bytes."""


@dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    tensors: tuple[StoredTensor, ...]


def read_header(path: Path, file: mmap.mmap) -> Header:
    """Everything before the tensor data. Every count, length and offset is checked before it is used, against the file and
    against `MAX_KEYS`, `MAX_TENSORS`, `MAX_VALUES` and `MAX_BYTES`. Raises `CheckpointError`."""
    try:
        return _Reader(file).header()
    except (_Damaged, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable GGUF file: {error}. Download it again.") from error


class _Damaged(Exception):
    """What is wrong with a header, before it is known which file it is."""


class _Reader:
    """A cursor over a mapped GGUF file that cannot leave it."""

    def __init__(self, file: mmap.mmap) -> None:
        self.file, self.at, self.values = file, 0, 0
        self.end = min(len(file), MAX_BYTES)

    def header(self) -> Header:
        if self.bytes(4) != b"GGUF":
            raise _Damaged("it does not begin with the four letters GGUF")
        version = self.u32()
        if version not in (2, 3):
            raise _Damaged(f"version {version} is not supported, only 2 and 3 (little-endian)")
        tensors, pairs = self.u64(), self.u64()
        for count, most, noun in ((pairs, MAX_KEYS, "metadata keys"), (tensors, MAX_TENSORS, "tensors")):
            if count > most:
                raise _Damaged(f"it announces {count} {noun}, at most {most} are accepted")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string()
            if key in metadata:
                raise _Damaged(f"the key {key!r} occurs twice")
            metadata[key] = self.value(self.u32())
        infos = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise _Damaged(f"general.alignment is {alignment!r}")
        return Header(metadata, self.placed(infos, -(-self.at // alignment) * alignment))

    def placed(self, infos: list[StoredTensor], start: int) -> tuple[StoredTensor, ...]:
        """The same tensors with offsets from the start of the file, each checked to lie inside it."""
        if len({info.name for info in infos}) < len(infos):
            raise _Damaged("a tensor name occurs twice")
        placed = []
        for info in infos:
            values, size = block_layout(info.encoding)
            if info.shape[-1] % values:
                raise _Damaged(f"tensor {info.name} of shape {info.shape} does not divide into blocks of {values}")
            end = start + info.offset + math.prod(info.shape) // values * size
            if end > len(self.file):
                raise _Damaged(f"tensor {info.name} ends at byte {end}, but the file has {len(self.file)}: it is truncated")
            placed.append(StoredTensor(info.name, info.shape, info.encoding, start + info.offset))
        return tuple(placed)

    def tensor(self) -> StoredTensor:
        name, dimensions = self.string(), self.u32()
        if not 1 <= dimensions <= 4:
            raise _Damaged(f"tensor {name} has {dimensions} dimensions, expected 1 to 4")
        shape = tuple(self.u64() for _ in range(dimensions))[::-1]
        kind, offset = self.u32(), self.u64()
        if 0 in shape:
            raise _Damaged(f"tensor {name} is empty: {shape}")
        encoding = _ENCODINGS.get(kind, f"type {kind}")
        if encoding not in (*PLAIN, *BLOCKS):
            raise _Damaged(f"tensor {name} is encoded as {encoding}, supported are {', '.join((*PLAIN, *BLOCKS))}")
        return StoredTensor(name, shape, encoding, offset)

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalars(kind, 1)[0]
        element, count = self.u32(), self.u64()
        self.values += count
        if self.values > MAX_VALUES:
            raise _Damaged(f"its arrays announce {self.values} values, at most {MAX_VALUES} are accepted")
        if element == GGUFValueType.STRING:
            return self.strings(count)
        return self.scalars(element, count)

    def scalars(self, kind: int, count: int) -> list[Any]:
        dtype = _SCALAR_TYPES.get(kind)
        if dtype is None:
            raise _Damaged(f"value type {kind} at byte {self.at} is unknown")
        values: list[Any] = np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()
        return values

    def strings(self, count: int) -> list[str]:
        """A vocabulary has 10^5 of them, so this loop keeps its cursor in a local variable."""
        strings, at, file, end, unpack = [], self.at, self.file, self.end, struct.Struct("<Q").unpack_from
        for _ in range(count):
            (length,) = unpack(file, at)
            at += 8 + length
            if at > end:
                raise _Damaged(f"a string of {length} bytes runs past byte {end}, where the header must end")
            strings.append(file[at - length : at].decode())
        self.at = at
        return strings

    def string(self) -> str:
        return self.bytes(self.u64()).decode()

    def u32(self) -> int:
        return int.from_bytes(self.bytes(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.bytes(8), "little")

    def bytes(self, count: int) -> bytes:
        if self.at + count > self.end:
            raise _Damaged(f"its header must end by byte {self.end}, and {count} bytes are due at byte {self.at}")
        self.at += count
        return self.file[self.at - count : self.at]
