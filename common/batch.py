"""The packed batch: one step as one owned, read-only, contiguous buffer with named NumPy views.

One buffer means one copy to a device, one broadcast to another process without pickle, and one record of a trace. The bytes
describe themselves: a header lists the views that are present, so `Batch.from_bytes(batch.buffer.tobytes())` is the same batch.

Sequences with one token come first, `num_decodes` of them: both frameworks want two attention paths.
Letters: T packed tokens · S sequences · R logit rows · G page groups · P pages of the longest sequence · C copies · F fills ·
E edits · M masks · W words of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import IntFlag
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np

from common.errors import TandemError

MAGIC = 0x31_42_44_54  # "TDB1", little-endian
ALIGN = 64
MAX_BYTES = 1 << 30


class BatchError(TandemError, ValueError):
    """Bytes that are no batch, or views that contradict each other."""


class Want(IntFlag):
    """What a logit row is for."""

    SAMPLE = 1
    LOGPROBS = 2
    SCORE = 4
    """Not to sample: to report on a given token."""


# name -> (dtype, axes). The place of a name in this table is its code in the bytes: append, never reorder.
VIEWS: dict[str, tuple[str, str]] = {
    "token_ids": ("<i4", "T"),
    "positions": ("<i4", "T"),  # logical: mask, slots and sampling noise go by them
    "query_starts": ("<i4", "S1"),  # S + 1 offsets into T
    "kv_lengths": ("<i4", "S"),  # keys of the sequence once this step has run
    "num_decodes": ("<i4", "1"),
    "rows": ("<i4", "S"),  # permanent row of each sequence's request
    "page_table": ("<i4", "GSP"),  # padded with the null page
    "slots": ("<i4", "GT"),  # page * B + offset, where each token's K and V go
    "copies": ("<i4", "GC2"),  # (from, to) pages, copied before the forward pass
    "fill_at": ("<i4", "F"),  # indices into token_ids that the host does not know yet ...
    "fill_row": ("<i4", "F"),  # ... and the row whose last sampled token goes there
    "logit_rows": ("<i4", "R"),  # indices into T, rising
    "logit_owner": ("<i4", "R"),  # the sequence of each
    "want": ("<u1", "R"),  # Want flags
    "num_top": ("<i4", "R"),  # how many of the likeliest tokens to report; absent when no request asks for logprobs
    "seeds": ("<u4", "S2"),  # absent when every row is greedy, and with it the following
    "temperature": ("<f4", "S"),  # 0 is greedy
    "top_k": ("<i4", "S"),  # 0 keeps all; absent when no request filters
    "top_p": ("<f4", "S"),
    "min_p": ("<f4", "S"),
    "score_ids": ("<i4", "R"),  # the token to report on, or -1 for the sampled one; absent when nothing is scored
    "edit_rows": ("<i4", "E"),  # places in R, rising; absent like the following when no logit is edited
    "edit_ids": ("<i4", "E"),  # tokens; no two edits have the same row and token
    "edits": ("<f4", "E3"),  # bias, repetition factor, penalty; see sampling/logits_processor.py
    "mask_rows": ("<i4", "M"),  # places in R, rising; absent like the following when all ids are allowed
    "masks": ("<u4", "MW"),  # one bit a token, 1 where it is allowed; absent where they come while the step runs
}
REQUIRED = tuple(VIEWS)[: list(VIEWS).index("num_top")]
_CODES = {name: code for code, name in enumerate(VIEWS)}
_ENTRY = 5  # int32s for a header entry: code, three dims, offset


Mask = Callable[[], np.ndarray] | None
"""Gives the masks uint32[M, W] of a batch that has `mask_rows` alone; None for all others."""


class Batch:
    """One step for a `ModelRunner`. Views are attributes; a view that is absent is None. Never written to after `pack`."""

    __slots__ = ("buffer", *VIEWS)

    buffer: np.ndarray
    """uint8[n], read-only: everything."""
    token_ids: np.ndarray
    positions: np.ndarray
    query_starts: np.ndarray
    kv_lengths: np.ndarray
    num_decodes: np.ndarray
    rows: np.ndarray
    page_table: np.ndarray
    slots: np.ndarray
    copies: np.ndarray
    fill_at: np.ndarray
    fill_row: np.ndarray
    logit_rows: np.ndarray
    logit_owner: np.ndarray
    want: np.ndarray
    num_top: np.ndarray | None
    seeds: np.ndarray | None
    temperature: np.ndarray | None
    top_k: np.ndarray | None
    top_p: np.ndarray | None
    min_p: np.ndarray | None
    score_ids: np.ndarray | None
    edit_rows: np.ndarray | None
    edit_ids: np.ndarray | None
    edits: np.ndarray | None
    mask_rows: np.ndarray | None
    masks: np.ndarray | None

    def __init__(self, buffer: np.ndarray, views: dict[str, np.ndarray]) -> None:
        self.buffer = buffer
        for name in VIEWS:
            setattr(self, name, views.get(name))

    @property
    def num_tokens(self) -> int:
        """T"""
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        """S"""
        return len(self.rows)

    @property
    def adjusts(self) -> bool:
        """Whether any logit is edited or masked."""
        return self.edit_rows is not None or self.mask_rows is not None

    @classmethod
    def pack(cls, **arrays: Any) -> Self:
        """Copy arrays of the names in `VIEWS` into one new buffer."""
        present = {name: np.asarray(arrays[name]) for name in VIEWS if arrays.get(name) is not None}
        header, places, size = _layout(tuple((name, array.shape) for name, array in present.items()))
        buffer = np.zeros(size, np.uint8)
        buffer[: len(header)] = header
        views = {}
        for (name, array), (dtype, place) in zip(present.items(), places, strict=True):
            view = views[name] = np.ndarray(array.shape, dtype, buffer, place)
            view[...] = array
            view.flags.writeable = False
        buffer.flags.writeable = False
        return cls(buffer, views)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The batch that `data` holds, in a buffer of its own. Raises `BatchError` for what `pack` would not have written."""
        if not 8 <= len(data) <= MAX_BYTES or len(data) % ALIGN:
            raise BatchError(f"A batch has between 64 and {MAX_BYTES} bytes, a multiple of {ALIGN}; got {len(data)}.")
        buffer = np.frombuffer(bytearray(data), np.uint8)
        header = buffer[: len(data) // 4 * 4].view(np.int32)
        magic, count = int(header[0]), int(header[1])
        if magic != MAGIC or not 0 <= count <= len(VIEWS) or 2 + _ENTRY * count > len(header):
            raise BatchError("These bytes do not start like a batch of this version.")
        names, views = list(VIEWS), {}
        end = -(-(2 + _ENTRY * count) * 4 // ALIGN) * ALIGN
        for i in range(count):
            code, *dims, offset = header[2 + _ENTRY * i : 2 + _ENTRY * (i + 1)].tolist()
            if not 0 <= code < len(names) or names[code] in views:
                raise BatchError(f"Unknown or repeated view {code} in a batch.")
            name = names[code]
            dtype, axes = np.dtype(VIEWS[name][0]), VIEWS[name][1]
            shape = tuple(d for d in dims if d != -1)
            ndim = 1 if axes == "S1" or axes == "1" else len(axes)
            nbytes = math.prod(shape) * dtype.itemsize
            if len(shape) != ndim or any(d < 0 for d in shape) or offset != end or offset + nbytes > len(data):
                raise BatchError(f"View {name!r} of a batch has a shape or place that does not fit: {shape} at {offset}.")
            views[name] = buffer[offset : offset + nbytes].view(dtype).reshape(shape)
            views[name].flags.writeable = False
            end = offset + -(-nbytes // ALIGN) * ALIGN
        missing = [name for name in REQUIRED if name not in views]
        if missing or end != len(data):
            raise BatchError(f"A batch lacks {missing or 'no view but its end is misplaced'}.")
        buffer.flags.writeable = False
        batch = cls(buffer, views)
        batch._check_shapes()
        return batch

    def _check_shapes(self) -> None:
        sizes: dict[str, int] = {"1": 1, "2": 2, "3": 3, "S1": len(self.rows) + 1}
        for name, (_, axes) in VIEWS.items():
            view = getattr(self, name)
            if view is None:
                continue
            for axis, size in zip((axes,) if axes == "S1" else axes, view.shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    raise BatchError(f"View {name!r} of a batch has {size} along {axis}, others have {sizes[axis]}.")


def masked(batch: Batch, mask: Mask) -> Batch:
    """The batch with its masks, whether they are there or come from `mask`."""
    return batch if mask is None else Batch.pack(**{name: getattr(batch, name) for name in VIEWS} | {"masks": mask()})


def without_scores(batch: Batch) -> Batch:
    """Return the batch with only the logit rows that are sampled."""
    sampled = (batch.want & Want.SAMPLE) > 0
    place = sampled.cumsum(dtype=np.int32) - 1
    views = {name: getattr(batch, name) for name in VIEWS} | {"score_ids": None}
    for name in ("logit_rows", "logit_owner", "want", "num_top"):
        views[name] = None if views[name] is None else views[name][sampled]
    for name in ("edit_rows", "mask_rows"):
        views[name] = None if views[name] is None else place[views[name]]
    return Batch.pack(**views)


def null_batch(tokens: int, seqs: int, page_size: int) -> Batch:
    """A step of `seqs` sequences on the null page: all decodes but the last, which takes the rest of `tokens`."""
    counts = np.array([1] * (seqs - 1) + [tokens - seqs + 1], np.int32)
    starts = np.concatenate(([0], np.cumsum(counts)))
    rows = np.arange(seqs)
    return Batch.pack(
        token_ids=np.zeros(tokens),
        positions=np.concatenate([np.arange(count) for count in counts]),
        query_starts=starts,
        kv_lengths=counts,
        num_decodes=[int((counts == 1).sum())],
        rows=rows,
        page_table=np.zeros((1, seqs, -(-int(counts.max()) // page_size))),
        slots=np.zeros((1, tokens)),
        copies=np.zeros((1, 0, 2)),
        fill_at=[],
        fill_row=[],
        logit_rows=starts[1:] - 1,
        logit_owner=rows,
        want=np.ones(seqs),
    )


class KV(NamedTuple):
    """Keys and values of consecutive tokens of a sequence."""

    tokens: int
    """T"""
    groups: tuple[Mapping[str, np.ndarray], ...]
    """Arrays of each page group, by name: [L, T, K, H], or whole pages in their memory layout, uint8[P, rows, bytes]."""
    page: int | None = None
    """Tokens per page, B, where `groups` holds whole pages; None where it holds tokens."""

    def slice(self, start: int, stop: int) -> KV:
        """Return those of the tokens [start, stop). Where `groups` holds pages, `start` must be the first token of a page."""
        if self.page is None:
            cut = tuple({name: x[:, start:stop] for name, x in group.items()} for group in self.groups)
        else:
            span = slice(start // self.page, -(-stop // self.page))
            cut = tuple({name: x[span] for name, x in group.items()} for group in self.groups)
        return KV(min(stop, self.tokens) - start, cut, self.page)

    def fill(self, other: KV) -> None:
        """Copy the arrays of another into these."""
        for mine, theirs in zip(self.groups, other.groups, strict=True):
            for name, x in mine.items():
                np.copyto(x, theirs[name])


@lru_cache(maxsize=128)
def _layout(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[np.ndarray, tuple[tuple[np.dtype, int], ...], int]:
    """The header bytes, the dtype and offset of each view, and the size of a batch; steady decoding asks for the same again."""
    head = 2 + _ENTRY * len(shapes)
    offset = -(-head * 4 // ALIGN) * ALIGN
    header = np.zeros(offset // 4, np.int32)
    header[:2] = MAGIC, len(shapes)
    places = []
    for i, (name, shape) in enumerate(shapes):
        dtype = np.dtype(VIEWS[name][0])
        header[2 + _ENTRY * i : 2 + _ENTRY * (i + 1)] = (_CODES[name], *shape, *(-1,) * (3 - len(shape)), offset)
        places.append((dtype, offset))
        offset += -(-math.prod(shape) * dtype.itemsize // ALIGN) * ALIGN
    return header.view(np.uint8), tuple(places), offset
