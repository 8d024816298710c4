"""One tensor of a checkpoint: where it lies, how it is encoded, and how to read all or part of it.

Opening costs nothing but the header. Bytes are read when `raw`, `dense` or `slice` asks for them, through a memory map.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from common.errors import CheckpointError

PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Encodings with one element per weight."""
LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
"""Of bfloat16, to which weights may be rounded: the greatest float32s become infinite there."""


def _is_decoded(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


BLOCKS = tuple(kind.name for kind in GGMLQuantizationType if kind.name not in PLAIN and _is_decoded(kind))
"""Encodings of GGML that pack 32 to 256 neighbours of a row with their scales: all that the `gguf` library decodes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Entry:
    """A lazy tensor. What the file stores differently from the canonical form is described here and undone in `dense`."""

    name: str
    """Canonical, as Hugging Face calls it."""
    shape: tuple[int, ...]
    """Logical, as Hugging Face has it: [out, in] for a projection."""
    encoding: str
    stored: np.ndarray
    """The memory-mapped tensor as it lies in the file: see `raw`."""
    source: Path
    row_order: np.ndarray | None = None
    """int[shape[0]]: canonical row i is stored row `row_order[i]`; None where the order is the same.

    GGUF permutes q and k of the llama architecture.
    """
    addend: float = 0.0
    """Added to every decoded value to make it canonical (-1 for Gemma's norms, which GGUF stores as w + 1)."""

    def raw(self) -> np.ndarray:
        """The tensor as stored, memory-mapped and read-only: [*shape] float32, float16 or bfloat16 for plain encodings,
        uint8 [*shape[:-1], bytes a row] for blocks. Neither `row_order` nor `addend` is applied: a reader that keeps
        blocks takes `raw()[row_order]`, since a block never crosses a row."""
        return self.stored

    def dense(self) -> np.ndarray:
        """The canonical tensor, float32 [*shape], C-contiguous, owned by the caller.

        Raises CheckpointError if a value is NaN, infinite, or too large for bfloat16, whatever the engine computes in."""
        return self.slice(0, 0, self.shape[0])

    def slice(self, axis: int, start: int, stop: int) -> np.ndarray:
        """`dense()` with only the indices [start, stop) of `axis`, reading and decoding no more than that.

        Along the last axis of a block encoding whole blocks are decoded and trimmed."""
        axis = self._checked_axis(axis, start, stop)
        stored, trim = self.stored, slice(None)
        if axis == 0 and self.row_order is not None:
            stored = stored[self.row_order[start:stop]]
        elif axis == len(self.shape) - 1 and self.encoding in BLOCKS:
            values, size = block_layout(self.encoding)
            first, last = start // values, -(-stop // values)
            stored = stored[..., first * size : last * size]
            trim = slice(start - first * values, stop - first * values)
        else:
            stored = stored[(slice(None),) * axis + (slice(start, stop),)]
        if axis > 0 and self.row_order is not None:
            stored = stored[self.row_order]
        part = np.ascontiguousarray(_decoded(stored, self.encoding)[..., trim])
        if self.addend:
            part += np.float32(self.addend)
        if not (part.max(initial=0) <= LARGEST and part.min(initial=0) >= -LARGEST):  # NaN is neither
            bad = int(part.size - (np.abs(part) <= LARGEST).sum())
            raise CheckpointError(
                f"{self.source}: tensor {self.name} holds {bad} values that are NaN, infinite or beyond ±{LARGEST:.3g}. "
                "The file is damaged, or was saved from a model that had diverged: get it again."
            )
        return part

    def _checked_axis(self, axis: int, start: int, stop: int) -> int:
        """`axis`, counted from the front. Raises `IndexError` if it has no indices [start, stop)."""
        axis = axis % len(self.shape)
        if not 0 <= start <= stop <= self.shape[axis]:
            raise IndexError(f"{self.name}: [{start}, {stop}) is outside axis {axis} of shape {self.shape}.")
        return axis


def block_layout(encoding: str) -> tuple[int, int]:
    """(weights, bytes) of one block; a plain element is a block of one."""
    if encoding in PLAIN:
        return 1, PLAIN[encoding].itemsize
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    return int(values), int(size)


def map_tensor(file: mmap.mmap, offset: int, shape: tuple[int, ...], encoding: str) -> np.ndarray:
    """A read-only view of a tensor inside a mapped file, in the form that `Entry.raw` documents."""
    dtype = PLAIN.get(encoding, np.dtype(np.uint8))
    if encoding in BLOCKS:
        values, size = block_layout(encoding)
        shape = (*shape[:-1], shape[-1] // values * size)
    return np.ndarray(shape, dtype, buffer=file, offset=offset)


def _decoded(stored: np.ndarray, encoding: str) -> np.ndarray:
    """The values of a stored tensor, or of a part of it that is whole in blocks: a fresh float32 array."""
    if encoding in PLAIN:
        return stored.astype(np.float32, order="C")
    values, size = block_layout(encoding)
    shape = (*stored.shape[:-1], stored.shape[-1] // size * values)
    if stored.size == 0:
        return np.empty(shape, np.float32)
    rows = math.prod(stored.shape[:-1])
    fold = math.gcd(rows, 16)  # the library loops over 16 rows at a time: longer rows make that loop several times shorter
    folded = np.ascontiguousarray(stored).reshape(rows // fold, -1)
    decoded: np.ndarray = dequantize(folded, GGMLQuantizationType[encoding])
    return decoded.reshape(shape)
