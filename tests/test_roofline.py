"""`experiments.roofline`, `work`, `limits`, `probes`: what a step needs, against loops and numbers worked out by hand; what
a machine can do; and both together."""

import ctypes
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from common.batch import Batch
from common.config import EngineConfig, ModelConfig
from common.engine import Engine
from common.errors import BackendError
from common.kernels.cpu import build
from common.kernels.cpu.pack import panels
from common.request import Request, SamplingParams
from common.step_log import StepRecord
from common.weights import zoo
from common.weights.checkpoint import expected_shapes, open_checkpoint
from common.weights.parameters import NUMPY_DTYPES
from experiments import bench
from experiments.load.driver import Window, drive
from experiments.load.workload import Item
from experiments.metrics.metrics import INTENSITIES, LIMITED, contaminations, summarize
from experiments.metrics.phases import step_seconds
from experiments.report.limits import limits_said, print_limits, told_limits
from experiments.roofline import __main__ as roofline_command
from experiments.roofline import probes
from experiments.roofline.efficiency import efficiency, no_roofline
from experiments.roofline.limits import READ, Limits, better, limits_of, measure_limits
from experiments.roofline.probes import NATIVE_READS, bandwidth_probe, last_level_cache, native_multiply, native_read, read_ways
from experiments.roofline.work import count, limit_seconds
from tests.history_backend import command, history, last_line
from tests.history_runner import HistoryRunner

__all__ = ["history"]

SMOLLM2 = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    max_position=8192,
    norm_eps=1e-5,
    tie_embeddings=True,
)
TINY = ModelConfig(
    family="gemma3",
    vocab_size=64,
    hidden_size=6,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    intermediate_size=5,
    max_position=128,
    norm_eps=1e-5,
    qkv_bias=True,
    qk_norm=True,
    sandwich_norms=True,
)
WINDOWED = replace(TINY, tie_embeddings=True, layer_window=(5, 0, 5))
BLOCK = 4


def step(*seqs: tuple[int, int], rows: int | None = None, shared: int = 0, begin: float = 0.0, end: float = 1.0) -> StepRecord:
    """A step of sequences (new tokens, keys after it), each with `shared` keys of a later one but the last."""
    counts, ends = np.array(seqs, np.int32).reshape(-1, 2).T
    common = np.array([shared] * (len(seqs) - 1) + [0] * bool(seqs), np.int32)
    return StepRecord(begin, end, len(seqs) if rows is None else rows, counts, ends, common)


def limits(read: float = 1.0, float32: float = 1.0, bfloat16: float = 1.0) -> Limits:
    ways = {READ: {"way": read}, "float32": {"way": float32}, "bfloat16": {"way": bfloat16}}
    return Limits(ways=ways, threads=1, cache_bytes=0, buffer_bytes=0)


# What the steps needed.


def test_a_decode_step_of_smollm2_as_worked_out_by_hand() -> None:
    """A layer has q and o of 576², k and v of 192 · 576, three matrices of 576 · 1536 and two norms of 576."""
    work = count([step((1, 101))], SMOLLM2, "bfloat16")
    keys = 30 * 2 * 3 * 64  # numbers of one key and value, over all layers
    assert work.bytes.tolist() == [2 * (134_515_008 + keys * (100 + 1))]  # 100 are read, one is written
    assert work.flops.tolist() == [2 * 106_168_320 + 2 * 49152 * 576 + 30 * 4 * 9 * 64 * 101]


def test_a_chunk_inside_a_prompt_needs_no_head_and_its_tokens_see_one_key_more_each() -> None:
    work = count([step((3, 13), rows=0)], SMOLLM2, "float32")
    assert work.bytes.tolist() == [4 * (30 * 3_540_096 + 3 * 576 + 30 * 2 * 3 * 64 * (10 + 3))]
    assert work.flops.tolist() == [2 * 106_168_320 * 3 + 30 * 4 * 9 * 64 * (11 + 12 + 13)]


def test_a_head_of_its_own_is_read_beside_the_embedding_rows() -> None:
    tied, untied = (count([step((1, 1))], replace(SMOLLM2, tie_embeddings=tie), "float32").bytes for tie in (True, False))
    assert (untied - tied).tolist() == [4 * 576]


def test_a_window_bounds_what_is_read_and_what_is_seen() -> None:
    model = replace(SMOLLM2, layer_window=(8,) * 30)
    work, short = (count([step((1, keys))], model, "float32") for keys in (1000, 8))
    assert work.bytes == short.bytes and work.flops == short.flops
    chunk, inside = (count([step((4, keys), rows=0)], model, "float32") for keys in (1000, 6))
    kv, per_key = 4 * 30 * 2 * 3 * 64, 30 * 4 * 9 * 64
    assert chunk.bytes - inside.bytes == kv * (7 - 2)  # the first of the four sees seven old keys; of six, two are old
    assert chunk.flops - inside.flops == per_key * (4 * 8 - (3 + 4 + 5 + 6))


def test_steps_are_counted_one_by_one_and_none_is_no_work() -> None:
    steps = [step((1, 9), (1, 30)), step((5, 5)), step((1, 9), (1, 30))]
    work = count(steps, SMOLLM2, "float32")
    assert [count([each], SMOLLM2, "float32").bytes[0] for each in steps] == work.bytes.tolist()
    assert [count([each], SMOLLM2, "float32").flops[0] for each in steps] == work.flops.tolist()
    assert count([], SMOLLM2, "float32").bytes.tolist() == []


def by_loops(batch: Batch, model: ModelConfig) -> tuple[int, int]:
    """Bytes and FLOP of a step in float32, by walking over every matrix, token and key: each address is counted once."""
    matrices = {name: shape for name, shape in expected_shapes(model).items() if len(shape) == 2 and ".layers." in name}
    read, multiplied = set(), 0
    for name, shape in expected_shapes(model).items():
        if ".layers." in name or (name == "model.norm.weight" and len(batch.logit_rows)):
            read |= {(name, i) for i in range(math.prod(shape))}
    head = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    for _ in batch.logit_rows:
        read |= {(head, i) for i in range(model.vocab_size * model.hidden_size)}
        multiplied += model.vocab_size * model.hidden_size
    written = set()
    for s in range(batch.num_seqs):
        for t in range(batch.query_starts[s], batch.query_starts[s + 1]):
            # Which row of the embedding it is matters to the cache alone: the tokens are counted as if all were different.
            read |= {("model.embed_tokens.weight", t * model.hidden_size + i) for i in range(model.hidden_size)}
            multiplied += sum(math.prod(shape) for shape in matrices.values())
            for layer, window in enumerate(model.layer_window):
                written.add((layer, int(batch.slots[0, t])))
                for key in range(int(batch.positions[t]) + 1):
                    if not window or batch.positions[t] - key < window:
                        slot = int(batch.page_table[0, s, key // BLOCK]) * BLOCK + key % BLOCK
                        read.add((layer, slot))
                        multiplied += 2 * model.num_heads * model.head_dim
    keys = {entry for entry in read if isinstance(entry[0], int)} - written
    weights = {entry for entry in read if isinstance(entry[0], str)}
    return 4 * (len(weights) + (len(keys) + len(written)) * 2 * model.num_kv_heads * model.head_dim), 2 * multiplied


def run(prompts: Sequence[Sequence[int]], **options: object) -> tuple[list[StepRecord], list[Batch]]:
    """The log of an engine that served the prompts, and the batches that its runner saw."""
    runner = HistoryRunner(num_pages=60, block_size=BLOCK)
    runner.batches = []
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 12, "max_model_len": 100}
    engine = Engine(runner, EngineConfig.of(block_size=BLOCK, **(sizes | options)), num_pages=60)
    engine.step_log = log = []
    params = SamplingParams(max_tokens=6, temperature=0.0)
    engine.run(Request(request_id=str(i), prompt_token_ids=prompt, params=params) for i, prompt in enumerate(prompts))
    return log, runner.batches


@pytest.mark.parametrize("model", [TINY, WINDOWED], ids=["full", "windowed"])
def test_the_count_is_what_loops_over_every_token_and_key_find(model: ModelConfig) -> None:
    log, batches = run([range(n) for n in (1, 17, 30, 5, 12, 9)], enable_prefix_caching=False)
    work = count(log, model, "float32")
    assert len(log) == len(batches) > 10
    assert list(zip(work.bytes, work.flops, strict=True)) == [by_loops(batch, model) for batch in batches]


def test_keys_that_sequences_share_are_read_once() -> None:
    prefix = list(range(16))
    log, batches = run([[*prefix, *range(20, 20 + i)] for i in range(1, 9)])
    assert sum(int(record.shared.sum()) for record in log) > 100
    work = count(log, TINY, "float32")
    assert list(zip(work.bytes, work.flops, strict=True)) == [by_loops(batch, TINY) for batch in batches]
    # Two windows need not reach equally far into a shared prefix: there the count may be less than what is needed, never more.
    work = count(log, WINDOWED, "float32")
    found = np.array([by_loops(batch, WINDOWED) for batch in batches]).T
    assert (work.bytes <= found[0]).all() and (work.bytes > 0.9 * found[0]).all() and (work.flops == found[1]).all()


# Limit and time.


def test_a_step_takes_at_least_what_the_scarcer_of_bandwidth_and_arithmetic_takes() -> None:
    decode, prefill = step((1, 101)), step((512, 512))
    work = count([decode, prefill], SMOLLM2, "bfloat16")
    seconds = limit_seconds(work, 1e10, 1e12)
    assert seconds.tolist() == [work.bytes[0] / 1e10, work.flops[1] / 1e12]


def test_steps_in_flight_together_share_the_time() -> None:
    log = [step((1, 1), begin=0.0, end=2.0), step((1, 2), begin=1.0, end=5.0), step((1, 3), begin=7.0, end=8.0)]
    assert step_seconds(log).tolist() == [2.0, 3.0, 1.0]
    assert step_seconds([]).tolist() == []


def test_the_figures_are_the_work_over_the_time_of_the_window_and_of_each_phase() -> None:
    decode, prefill = step((1, 101), begin=0.0, end=0.5), step((512, 512), begin=0.5, end=2.5)
    here = limits(read=1e10, bfloat16=1e12)
    work = count([decode, prefill], SMOLLM2, "bfloat16")
    figures = efficiency([Window((), 3.0, steps=(decode,)), Window((), 2.0, steps=(prefill,))], SMOLLM2, "bfloat16", here)
    assert set(figures) == {*LIMITED, *INTENSITIES}
    assert figures["intensity"] == pytest.approx(work.flops.sum() / work.bytes.sum())
    assert figures["mbu"] == pytest.approx(work.bytes.sum() / (5.0 * 1e10))
    assert figures["mfu"] == pytest.approx(work.flops.sum() / (5.0 * 1e12))
    assert figures["roofline"] == pytest.approx((work.bytes[0] / 1e10 + work.flops[1] / 1e12) / 5.0)
    assert figures["decode_roofline"] == figures["decode_mbu"] == pytest.approx(work.bytes[0] / (0.5 * 1e10))
    assert figures["prefill_roofline"] == figures["prefill_mfu"] == pytest.approx(work.flops[1] / (2.0 * 1e12))


def test_each_window_is_held_against_the_bandwidth_beside_it() -> None:
    decode = step((1, 101), begin=0.0, end=0.5)
    windows = [Window((), 1.0, steps=(decode,), bandwidth=bandwidth) for bandwidth in (1e10, 2e10)]
    figures = efficiency(windows, SMOLLM2, "bfloat16", limits(read=5e10, bfloat16=1e12))
    least = count([decode], SMOLLM2, "bfloat16").bytes[0] * (1 / 1e10 + 1 / 2e10)
    assert figures["mbu"] == figures["roofline"] == pytest.approx(least / 2.0)
    assert figures["decode_mbu"] == pytest.approx(least / 1.0)


def test_the_probe_reads_memory_faster_than_a_disk_and_slower_than_a_register() -> None:
    assert 1e8 < bandwidth_probe(0.001)() < 1e13


def test_what_is_not_known_is_none() -> None:
    told, silent = Window((), 1.0, steps=(step((1, 9)),)), Window((), 1.0)
    assert set(efficiency([told, silent], SMOLLM2, "float32", limits()).values()) == {None}
    assert set(efficiency([told], SMOLLM2, "float32", None).values()) == {None}
    figures = efficiency([told], SMOLLM2, "float32", limits())
    assert figures["prefill_mfu"] is None and figures["decode_mbu"] is not None
    assert set(efficiency([Window((), 0.0, steps=())], SMOLLM2, "float32", limits()).values()) == {None}


def test_why_nothing_is_held_against_the_limits_is_told_where_something_could_be() -> None:
    told, silent = Window((), 1.0, steps=(step((1, 9)),)), Window((), 1.0)
    assert no_roofline([told], limits(), 1) is no_roofline([silent], None, 2) is no_roofline([], limits(), 2) is None
    assert no_roofline([told, silent], limits(), 1) == "not measured: it does not tell its steps"
    assert no_roofline([silent], limits(), 3) == "not measured over several engines: the steps of 3 overlap"


def test_the_limits_that_shares_are_of_are_said_with_the_bandwidths_beside_the_windows() -> None:
    both = {"before": limits().summary(), "after": limits().summary()}
    jax = {"limits": both, "mbu": 0.5}
    said = told_limits({"hf": {}, "jax": jax | {"block_read_bytes_per_s": [3e10, None]}, "torch": {"limits": both}})
    assert said.startswith("Limits before and after: memory read ") and said.endswith("beside each window: 30.00 GB/s.")
    said = told_limits({"jax": jax | {"block_read_bytes_per_s": [3e10, 3.5e10]}})
    assert said.endswith("beside each window: 30.00 to 35.00 GB/s.")
    assert told_limits({"jax": {"limits": both}}) == limits_said(both) and told_limits({"jax": {"limits": None}}) == ""


def test_what_shares_are_of_is_not_said_where_no_engine_has_one() -> None:
    both = {"before": limits().summary(), "after": limits().summary()}
    replicas = {"limits": both, "block_read_bytes_per_s": [3e10], "mbu": None, "no_roofline_because": "not measured"}
    assert told_limits({"torch": replicas}) == limits_said(both)


def test_a_run_above_a_limit_is_invalid_and_says_so() -> None:
    clean = summarize([Window((), 1.0)])
    assert contaminations(clean | dict.fromkeys(LIMITED, 1.0), shares_prefixes=False) == []
    assert contaminations(clean | dict.fromkeys(LIMITED), shares_prefixes=False) == []
    for name in LIMITED:
        (reason,) = contaminations(clean | {name: 1.25}, shares_prefixes=False)
        assert "invalid" in reason and f"{name} is 1.25" in reason


# The log travels.


def test_a_window_keeps_its_steps_on_the_way_through_json() -> None:
    engine = Engine(HistoryRunner(num_pages=60), EngineConfig(max_model_len=100), num_pages=60)
    window = drive(engine, [Item(0.0, tuple(range(20)), 3), Item(0.0, (1,), 2)])
    assert window.steps and engine.step_log is None
    again = Window.of(json.loads(json.dumps(asdict(window), default=lambda array: array.tolist())))
    assert again.rows == window.rows and again.duration == window.duration and again.steps
    for one, other in zip(window.steps, again.steps, strict=True):
        assert one[:3] == other[:3] and one[6:] == other[6:]
        assert all(a.dtype == b.dtype and (a == b).all() for a, b in zip(one[3:6], other[3:6], strict=True))
    assert [record.counts.tolist() for record in again.steps] == [[1, 20], [1, 1], [1]]
    assert [record.kv_lengths.tolist() for record in again.steps] == [[1, 20], [2, 21][::-1], [22]]


# What the machine can do.


@pytest.mark.parametrize("name", NATIVE_READS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_kernel_reads_every_byte_once(name: str, threads: int) -> None:
    buffer = np.zeros(512 * 101 + 64, np.uint8)
    buffer = buffer[-buffer.ctypes.data % 64 :][: 512 * 101]
    buffer[:] = np.random.default_rng(0).integers(0, 256, len(buffer), np.uint8)
    seconds, total = native_read(ctypes.CDLL(str(build.build("limits"))), name, buffer, threads)
    assert seconds > 0 and total == int(buffer.view(np.uint64).sum(dtype=np.uint64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(3, 10, 20), (70, 64, 96), (130, 576, 40)])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_native_way_to_multiply_is_a_product(dtype: str, rows: int, inputs: int, outputs: int, threads: int) -> None:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(NUMPY_DTYPES[dtype])

    a, w, out = draw(rows, inputs), draw(outputs, inputs), np.zeros((rows, outputs), NUMPY_DTYPES[dtype])
    packed = np.ascontiguousarray(panels(w))
    native_multiply(ctypes.CDLL(str(build.build("matmul"))), a, packed, out, threads)
    right = a.astype(np.float64) @ w.astype(np.float64).T
    np.testing.assert_allclose(out.astype(np.float64), right, rtol={"float32": 1e-5, "bfloat16": 2**-8}[dtype], atol=1e-4)


def test_without_a_compiler_numpy_reads_and_that_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    ways, notes = read_ways(1 << 16, threads=2)
    assert set(ways) == {"numpy maximum", "numpy add", "numpy bitwise_or"} and all(run() > 0 for run in ways.values())
    assert len(notes) == 1 and "NumPy" in notes[0] and "compiler" in notes[0]


def test_the_last_level_cache_counts_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs of processors, each with 32 MiB between them; a fifth, which this process may not use, has its own."""
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3", "4")):
        caches = [("Data", 1, f"{cpu}", "48K"), ("Instruction", 1, f"{cpu}", "32K"), ("Unified", 3, shared, "32768K")]
        for index, values in enumerate(caches):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in zip(("type", "level", "shared_cpu_list", "size"), values, strict=True):
                (folder / name).write_text(f"{value}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 3})
    assert last_level_cache(tmp_path) == 2 * 32 << 20
    assert last_level_cache(tmp_path / "nowhere") == 0


def test_of_two_measurements_each_way_counts_at_its_better() -> None:
    one = Limits(
        ways={READ: {"a": 3.0, "b": 1.0}, "float32": {"x": 5.0}, "bfloat16": {}}, threads=2, cache_bytes=1, buffer_bytes=8
    )
    other = replace(one, ways={READ: {"a": 2.0, "b": 4.0}, "float32": {"x": 4.0, "y": 6.0}, "bfloat16": {}}, notes=("why",))
    both = better(one, other)
    assert both.ways == {READ: {"a": 3.0, "b": 4.0}, "float32": {"x": 5.0, "y": 6.0}, "bfloat16": {}}
    assert (both.bandwidth, both.peak("float32"), both.notes) == (4.0, 6.0, ("why",))


def test_bfloat16_may_be_computed_in_float32_but_not_the_reverse() -> None:
    slow, fast = limits(float32=5.0, bfloat16=2.0), limits(float32=5.0, bfloat16=9.0)
    assert (slow.peak("bfloat16"), slow.best("bfloat16")) == (5.0, ("way, float32", 5.0))
    assert (fast.peak("bfloat16"), fast.peak("float32")) == (9.0, 5.0)


def test_an_implementation_that_is_missing_is_noted_and_a_slow_one_is_not_tried_on_large_matrices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def missing(dtype: str, n: int) -> None:
        raise ImportError("No module named 'other'")

    def slow(dtype: str, n: int) -> object:
        asked.append((dtype, n))
        return (lambda: time.sleep(0.01)) if dtype == "float32" else None

    monkeypatch.setattr(probes, "MATMULS", {"other": missing, "slow": slow})
    monkeypatch.setattr(probes, "LEAST_BUFFER", 1 << 20)
    monkeypatch.setattr(probes, "last_level_cache", lambda: 0)
    monkeypatch.setattr(probes, "SIZES", (4, 64))
    found = probes.find_limits(0.0)
    assert found.notes == ("other: No module named 'other'",) and found.buffer_bytes == 1 << 20
    assert asked == [("float32", 4), ("bfloat16", 4)] and list(found.ways["float32"]) == ["slow 4"]
    assert found.peak("float32") == found.peak("bfloat16") < 2 * 4**3 / 0.01
    assert set(found.ways[READ]) == set(NATIVE_READS) and found.bandwidth > 0


def test_the_command_prints_a_table_and_one_line_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a child, with whatever is installed; nothing is known of the figures but that they are some."""
    monkeypatch.setattr(sys, "argv", ["roofline", "--seconds", "0"])
    roofline_command.main()
    out = capsys.readouterr().out
    record = last_line(out)
    share = record.pop("foreign_cpu_share")
    assert share is None or 0 <= share <= 1
    found = limits_of(record)
    assert found.notes == () and found.buffer_bytes >= 8 * found.cache_bytes
    assert {way.split()[0] for way in found.ways["float32"]} == {"numpy", "torch", "onednn", "jax", "native"}
    assert found.bandwidth > 1e8 and found.peak("bfloat16") >= found.peak("float32") > 1e8
    assert "read_streams" in out and "jax 1024" in out


def test_limits_that_cannot_be_measured_end_the_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(seconds: float) -> Limits:
        raise BackendError("not here")

    monkeypatch.setattr(roofline_command, "measure_limits", refused)
    monkeypatch.setattr(sys, "argv", ["roofline", "--seconds", "0"])
    with pytest.raises(SystemExit) as exit:
        roofline_command.main()
    assert exit.value.code == 1 and capsys.readouterr().err == "error: not here\n"


def test_the_command_says_which_ways_count_and_who_else_computed(capsys: pytest.CaptureFixture[str]) -> None:
    ways = {READ: {"slow": 1e9, "quick": 4e9}, "float32": {"x 64": 9e9}, "bfloat16": {"x 64": 5e9}}
    found = Limits(ways=ways, threads=2, cache_bytes=0, buffer_bytes=0)
    counted = [
        "bandwidth: quick, 4.000 GB/s",
        "peak of float32: x 64, 9.000 GFLOP/s",
        "peak of bfloat16: x 64, float32, 9.000 GFLOP/s",
    ]
    for share, warned in ((None, False), (0.01, False), (0.5, True)):
        print_limits(found, share)
        told = capsys.readouterr().out.splitlines()
        assert [line for line in told if re.match("bandwidth|peak", line)] == counted
        assert any(line.startswith("Other programs used 50% of the processors") for line in told) == warned


def test_a_child_that_fails_is_told_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"limits_s=0(?s:.)*seconds"):
        measure_limits("soon")


# The join.


SMALL = ("engine=history", "model=tiny-llama", "workload=fixed", "workload.num_requests=3", "workload.output_len=5")


def measured(monkeypatch: pytest.MonkeyPatch, *found: Limits) -> None:
    answers, beside = iter(found), iter([limit.bandwidth for limit in found])
    monkeypatch.setattr("experiments.measure.session.measure_limits", lambda seconds: next(answers))
    monkeypatch.setattr("experiments.measure.session.bandwidth_probe", lambda seconds: lambda: next(beside))


def test_a_result_has_both_measurements_and_uses_the_better(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(monkeypatch, limits(read=2e12, bfloat16=1e15), limits(read=1e12, bfloat16=4e15))
    command(monkeypatch, bench.main, *SMALL, "table=all")
    out = capsys.readouterr().out
    result = last_line(out)
    assert [result["limits"][when]["read_bytes_per_s"] for when in ("before", "after")] == [2e12, 1e12]
    assert json.loads((Path(result["run"]) / "results.json").read_text())["limits"] == result["limits"]
    assert all(0 < result[name] < 1 for name in LIMITED) and result["block_read_bytes_per_s"] == [2e12]
    assert "roofline" in out and "MBU" in out and "invalid" not in out
    # Three prompts of 128 tokens are the first step, and four steps of one token each follow: the work is known to the byte.
    steps = [step(*[(128, 128)] * 3), *(step(*[(1, 129 + i)] * 3) for i in range(4))]
    work = count(steps, open_checkpoint(zoo.resolve("tiny-llama")).config, "bfloat16")
    assert result["mbu"] == pytest.approx(work.bytes.sum() / (result["duration"] * 2e12))
    assert result["mfu"] == pytest.approx(work.flops.sum() / (result["duration"] * 4e15))


def test_a_result_above_the_limit_is_marked(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(monkeypatch, limits(), limits())
    command(monkeypatch, bench.main, *SMALL)
    out = capsys.readouterr().out
    assert sum("invalid: " in reason for reason in last_line(out)["contaminated"]) == len(LIMITED)
    assert "invalid: roofline" in out


def test_the_limits_can_be_left_out(history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured(monkeypatch)
    command(monkeypatch, bench.main, *SMALL, "measure.limits_s=0")
    result = last_line(capsys.readouterr().out)
    assert result["limits"] is None and {result[name] for name in LIMITED} == {None}
