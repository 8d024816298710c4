"""Recording a run and replaying it on another runner."""

from __future__ import annotations

import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from common.config import EngineConfig
from common.engine import Engine
from common.interface import Result
from common.request import Request, SamplingParams
from common.schedule.trace import FRAME, MAGIC, MAX_PAYLOAD, Kind, Recorder, TraceError, pack_arrays, read_frames, unpack_arrays
from tests.history_runner import HistoryRunner
from tests.replays import replay

PAGES = 12


def make_runner(depth: int = 0) -> HistoryRunner:
    return HistoryRunner(num_pages=PAGES, block_size=4, max_seqs=4, depth=depth)


def recorded_run(path: Path, depth: int = 0) -> HistoryRunner:
    """Eight requests with sampling, logprobs, preemption and one step that raises, recorded."""
    runner = make_runner(depth)
    runner.batches = []
    recorder = Recorder(runner, path)
    recorder.allocate([PAGES])
    config = EngineConfig(block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=40)
    engine = Engine(recorder, config, num_pages=PAGES)
    for i in range(8):
        params = SamplingParams(max_tokens=15, temperature=i % 2, logprobs=i % 3 or None)
        engine.add(Request(request_id=str(i), prompt_token_ids=range(i, i + 9), params=params))
    for _ in range(5):
        engine.step()
    runner.fail_result = RuntimeError("injected")
    engine.run([])
    assert engine.stats()["num_preemptions"] > 0 and engine.stats()["num_resets"] == 1
    engine.close()
    return runner


def same(one: Result, other: Result) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in Result.__dataclass_fields__]
    return all((a is None and b is None) or (np.array_equal(a, b) and a.dtype == b.dtype) for a, b in pairs)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_trace_replays_step_by_step_on_a_fresh_runner(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "trace"
    original = recorded_run(path, depth)
    fresh = HistoryRunner(num_pages=1, block_size=4, max_seqs=4)  # the trace allocates its pages
    fresh.batches = []
    steps = list(replay(path, fresh))
    assert len(steps) > 30 and all(same(recorded, new) for _, _, recorded, new in steps)
    assert [batch.buffer.tobytes() for batch in fresh.batches] == [batch.buffer.tobytes() for batch in original.batches or []]
    assert fresh.num_pages == PAGES and not fresh.violations
    assert len(steps) == len(fresh.batches) - 1 - depth  # the step that raised, and those in flight then, have no result


def test_a_runner_that_computes_something_else_is_found_at_the_step_where_it_first_does(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    recorded_run(path)

    class Defect(HistoryRunner):
        def submit(self, batch, *more):  # type: ignore[no-untyped-def]
            if len(self.batches or []) == 10:
                self.poison([batch.page_table[0, 0, 0]])
            return super().submit(batch, *more)

    runner = Defect(num_pages=1, block_size=4, max_seqs=4)
    runner.batches = []
    differing = [step for step, _, recorded, new in replay(path, runner) if not same(recorded, new)]
    assert differing[0] == 10


def test_written_pages_are_part_of_a_trace(tmp_path: Path) -> None:
    source, path = make_runner(), tmp_path / "trace"
    source.chain[:] = np.arange(len(source.chain))
    arrays = source.read_pages(0, [3, 5])
    recorder = Recorder(make_runner(), path)
    recorder.write_pages(0, [2, 1], arrays)
    recorder.close()
    fresh = make_runner()
    assert list(replay(path, fresh)) == []
    assert (fresh.read_pages(0, [2, 1])["k"] == arrays["k"]).all()


def test_a_trace_is_never_written_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"precious")
    with pytest.raises(TraceError, match="never written over"):
        Recorder(make_runner(), path)
    assert path.read_bytes() == b"precious"


def test_arrays_of_every_kind_survive_a_trip_through_bytes() -> None:
    arrays = {
        "k": np.arange(24, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3, 4),
        "flags": np.array([True, False]),
        "none": np.empty((0, 3), np.int32),
        "one": np.array(2.5),
    }
    copies = unpack_arrays(pack_arrays(arrays))
    assert list(copies) == list(arrays)
    for name, array in arrays.items():
        assert copies[name].dtype == array.dtype and np.array_equal(copies[name], array)


def test_a_truncated_trace_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path, cut = tmp_path / "trace", tmp_path / "cut"
    recorded_run(path)
    data = path.read_bytes()
    ends, at = set(), len(MAGIC)
    while at < len(data):  # a trace that ends between two frames is a shorter trace
        ends.add(at)
        at += FRAME.size + FRAME.unpack(data[at : at + FRAME.size])[2]
    for length in [*range(0, 300), *range(300, len(data), 997)]:
        if length not in ends:
            cut.write_bytes(data[:length])
            with pytest.raises(TraceError):
                list(read_frames(cut))


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    path, damaged = tmp_path / "trace", tmp_path / "damaged"
    recorded_run(path)
    data = path.read_bytes()
    unseen = {*range(len(MAGIC) + 1, len(MAGIC) + 9)}  # the step number of an allocation, which has none
    for at in [at for at in range(0, 120) if at not in unseen]:
        flipped = bytearray(data[:2000])
        flipped[at] ^= 0xFF
        damaged.write_bytes(flipped)
        with pytest.raises(TraceError):
            list(replay(damaged, make_runner()))


def frame(kind: int, payload: bytes, step: int = 0, length: int | None = None) -> bytes:
    return MAGIC + FRAME.pack(kind, step, len(payload) if length is None else length, zlib.crc32(payload)) + payload


def header(text: str) -> bytes:
    return len(text).to_bytes(4, "little") + text.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not begin like a trace"),
        (b"PK\x03\x04 a zip file", "does not begin like a trace"),
        (frame(99, b""), "no frame has kind 99"),
        (frame(Kind.SUBMIT, b"", length=MAX_PAYLOAD + 1), "length 2147483649"),
        (frame(Kind.RESULT, pack_arrays({"tokens": np.zeros(1)}), step=5), "no such step"),
        (frame(Kind.ALLOCATE, header("[1, 2,")), "no JSON"),
        (frame(Kind.ALLOCATE, header("[1, 2]")), "is list, not an object"),
        (frame(Kind.ALLOCATE, header("[" * 100_000)), "no JSON"),
        (frame(Kind.ALLOCATE, pack_arrays({"pages": np.zeros(2)})), "lacks its list of pages"),
        (frame(Kind.WRITE_PAGES, b"\xff\xff\xff\xff"), "does not fit"),
        (frame(Kind.WRITE_PAGES, header('{"k": ["evil"]}')), "known dtype"),
        (frame(Kind.WRITE_PAGES, header('{"k": [["int8"], 3]}')), "known dtype"),
        (frame(Kind.WRITE_PAGES, header(f'{{"k": ["int8", 0, {2**63}]}}')), "known dtype"),
        (frame(Kind.WRITE_PAGES, header('{"k": ["int8", 9]}')), "lacks 9 bytes"),
        (frame(Kind.WRITE_PAGES, pack_arrays({"k": np.zeros(3)}) + b"x"), "1 bytes too many"),
        (frame(Kind.WRITE_PAGES, pack_arrays({"k": np.zeros(3)})), "lacks its list of pages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_trace_is_refused_with_the_reason(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "no-trace"
    path.write_bytes(data)
    with pytest.raises(TraceError, match=message):
        list(replay(path, make_runner()))
