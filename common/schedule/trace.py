"""Record the calls on a `ModelRunner` to a file, and replay them on any other, to compare two backends step by step.

A trace is the ordered calls that change a runner's state. The file is a magic number and frames, little-endian. A frame is
`kind (1 byte) · step (8 bytes) · length (8 bytes) · CRC-32 of the payload (4 bytes) · payload`. A payload is the bytes of a
`Batch` or a set of named arrays. Named arrays are the length of a JSON header, the header, and the arrays' bytes one after the
other. The header has names, dtypes and shapes.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import ml_dtypes
import numpy as np

from common.batch import Batch, Mask, masked
from common.errors import TandemError
from common.interface import Caps, KVGroup, ModelRunner, Progress, Result, StepHandle

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

T = TypeVar("T")

MAGIC = b"TandemT1"
FRAME = struct.Struct("<BQQI")
MAX_PAYLOAD = 2 << 30
MAX_HEADER = 1 << 20
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(name) for name in ("bool", "uint8", "int8", "uint32", "int32", "int64", "float16", "float32", "float64")
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


class TraceError(TandemError, ValueError):
    """A file that is no trace, or a damaged or truncated one."""


class Kind(IntEnum):
    ALLOCATE = 1
    SUBMIT = 2
    RESULT = 3
    WRITE_PAGES = 4
    RESET = 5


def retrace(path: Path | str, runner: ModelRunner, run: Callable[[int, Batch], T]) -> Iterator[tuple[int, Batch, Result, T]]:
    """Repeat a recorded run on a loaded `runner`, each step done by `run(step, batch)`, which may observe it.

    Yields the step, the batch, the recorded result and the value that `run` returned. The trace allocates the runner's pages if
    the recording began before that. A step that raised in the recording is run, and the reset that follows reverts it; it is
    not yielded. Raises `TraceError` on damage.
    """
    running: dict[int, tuple[Batch, T]] = {}
    for kind, step, payload in read_frames(path):
        match kind:
            case Kind.ALLOCATE:
                runner.allocate(_take_pages(unpack_arrays(payload)))
            case Kind.SUBMIT:
                batch = Batch.from_bytes(payload)
                running[step] = batch, run(step, batch)
            case Kind.RESULT:
                if step not in running:
                    raise TraceError(f"{path} has a result of step {step}, but no such step before it.")
                batch, done = running.pop(step)
                yield step, batch, _unpack_result(payload), done
            case Kind.WRITE_PAGES:
                arrays = unpack_arrays(payload)
                runner.write_pages(step, _take_pages(arrays), arrays)
            case Kind.RESET:
                running.clear()
                runner.reset()


def read_frames(path: Path | str) -> Iterator[tuple[Kind, int, bytes]]:
    """The frames of a trace: kind, step (of WRITE_PAGES the page group), payload. Raises `TraceError` on damage."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise TraceError(f"{path} does not begin like a trace of this version; record it anew.")
        while head := file.read(FRAME.size):
            at = file.tell() - len(head)
            if len(head) < FRAME.size:
                raise TraceError(f"{path} is truncated: it ends inside the frame at byte {at}.")
            kind, step, length, checksum = FRAME.unpack(head)
            if kind not in list(Kind) or length > MAX_PAYLOAD:
                raise TraceError(f"{path} is damaged at byte {at}: no frame has kind {kind} and length {length}.")
            payload = file.read(length)
            if len(payload) < length:
                raise TraceError(
                    f"{path} is truncated: the frame at byte {at} lacks {length - len(payload)} of {length} bytes."
                )
            if zlib.crc32(payload) != checksum:
                raise TraceError(f"{path} is damaged: the checksum of the frame at byte {at} is wrong.")
            yield Kind(kind), step, payload


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Named arrays of the dtypes in `DTYPES` as bytes; `unpack_arrays` is the inverse."""
    header = json.dumps({name: [array.dtype.name, *array.shape] for name, array in arrays.items()}).encode()
    return b"".join([struct.pack("<I", len(header)), header, *(array.tobytes() for array in arrays.values())])


def unpack_arrays(payload: bytes) -> dict[str, np.ndarray]:
    """Raises `TraceError` for bytes that `pack_arrays` would not have written."""
    size = int.from_bytes(payload[:4], "little")
    at = 4 + size
    if len(payload) < 4 or size > MAX_HEADER or at > len(payload):
        raise TraceError(f"A set of arrays in a trace has a header of {size} bytes, which does not fit.")
    try:
        described = json.loads(payload[4:at])
    except (ValueError, RecursionError) as error:
        raise TraceError(f"A set of arrays in a trace has a header that is no JSON: {error}.") from error
    if not isinstance(described, dict):
        raise TraceError(f"A set of arrays in a trace has a header that is {type(described).__name__}, not an object.")
    arrays = {}
    for name, kind in described.items():
        dtype, *shape = kind if isinstance(kind, list) and kind else [""]
        described_as = f"Array {name!r} of a trace is described as {kind!r:.80}, not by a known dtype and a shape."
        if not isinstance(dtype, str) or dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise TraceError(described_as)
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        if end > len(payload):
            raise TraceError(f"Array {name!r} of a trace lacks {end - len(payload)} bytes.")
        try:
            arrays[name] = np.frombuffer(payload[at:end], DTYPES[dtype]).reshape(tuple(shape))
        except ValueError as error:  # no array has so many axes, or an axis so long, be it empty
            raise TraceError(described_as) from error
        at = end
    if at != len(payload):
        raise TraceError(f"A set of arrays in a trace has {len(payload) - at} bytes too many.")
    return arrays


def _take_pages(arrays: dict[str, np.ndarray]) -> list[int]:
    pages = arrays.pop("pages", None)
    if pages is None or pages.dtype != np.int32 or pages.ndim != 1:
        raise TraceError("A call in a trace lacks its list of pages.")
    return pages.tolist()


def _unpack_result(payload: bytes) -> Result:
    arrays = unpack_arrays(payload)
    known = [f.name for f in fields(Result)]
    if not {"tokens", "token_starts", "finite"} <= set(arrays) <= set(known):
        raise TraceError(f"A result in a trace has the arrays {', '.join(arrays)}; expected some of {', '.join(known)}.")
    return Result(**arrays)


class Recorder(ModelRunner):
    """Does what `runner` does, and writes every call that changes its state to a new file at `path`. A call is written down
    once it has returned: one that raised never happened, but for its reset. Steps are not observed while they are recorded.
    """

    def __init__(self, runner: ModelRunner, path: Path) -> None:
        self._runner = runner
        try:
            self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by close()
        except FileExistsError as error:
            raise TraceError(f"{path} exists; a trace is never written over another file. Name a new one.") from error
        self._file.write(MAGIC)
        self._steps = 0

    def _write(self, kind: Kind, step: int, payload: bytes) -> None:
        if len(payload) > MAX_PAYLOAD:
            raise TraceError(f"A call of {len(payload)} bytes is too large for a trace; the limit is {MAX_PAYLOAD}.")
        self._file.write(FRAME.pack(kind, step, len(payload), zlib.crc32(payload)) + payload)

    @property
    def caps(self) -> Caps:
        return self._runner.caps

    @property
    def compilations(self) -> int:
        return self._runner.compilations

    def stats(self) -> dict[str, float]:
        return self._runner.stats()

    def load(self, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
        self._runner.load(checkpoint, progress)

    def kv_groups(self) -> tuple[KVGroup, ...]:
        return self._runner.kv_groups()

    def allocate(self, pages_per_group: Sequence[int]) -> None:
        self._runner.allocate(pages_per_group)
        self._write(Kind.ALLOCATE, 0, pack_arrays({"pages": np.array(pages_per_group, np.int32)}))

    def warmup(self, progress: Progress | None = None) -> None:
        self._runner.warmup(progress)

    def submit(self, batch: Batch, mask: Mask = None) -> StepHandle:
        batch = masked(batch, mask)
        pending = self._runner.submit(batch)
        step, self._steps = self._steps, self._steps + 1
        self._write(Kind.SUBMIT, step, batch.buffer.tobytes())
        return _Recorded(pending, lambda result: self._write(Kind.RESULT, step, pack_arrays(_arrays(result))))

    def read_pages(self, group: int, pages: Sequence[int]) -> dict[str, np.ndarray]:
        return self._runner.read_pages(group, pages)

    def write_pages(self, group: int, pages: Sequence[int], arrays: dict[str, np.ndarray]) -> None:
        self._runner.write_pages(group, pages, arrays)
        self._write(Kind.WRITE_PAGES, group, pack_arrays({"pages": np.array(pages, np.int32), **arrays}))

    def reset(self) -> None:
        self._runner.reset()
        self._write(Kind.RESET, 0, b"")

    def stop(self) -> ModelRunner:
        """End the recording; the runner that was recorded goes on without it."""
        self._file.close()
        return self._runner

    def close(self) -> None:
        self.stop().close()


class _Recorded(StepHandle):
    """A step in flight that is written down when its result is first taken."""

    def __init__(self, pending: StepHandle, keep: Callable[[Result], None]) -> None:
        self._pending, self._keep = pending, keep
        self._result: Result | None = None

    def result(self) -> Result:
        if self._result is None:
            self._result = self._pending.result()
            self._keep(self._result)
        return self._result


def _arrays(result: Result) -> dict[str, np.ndarray]:
    arrays = {f.name: getattr(result, f.name) for f in fields(result)}
    return {name: array for name, array in arrays.items() if array is not None}
