"""`measure=kernels`: the operators that are timed, what they need, the command and its refusals."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import EngineConfig, ModelConfig
from common.step_log import record_step
from experiments import bench, compare
from experiments.engines.process import EngineFailure, IsolatedEngine
from experiments.kernels import benchmark, operators
from experiments.kernels.benchmark import Shape, make_batch, needs
from experiments.report.kernel_tables import print_tables
from experiments.report.writer import write_report
from experiments.roofline.limits import READ, Limits
from experiments.roofline.work import count
from tests.backends import THREADS, checkpoint, device, part
from tests.history_backend import ROOT, command, history, last_line

__all__ = ["history"]

OPTIONS = ("model=tiny-llama", "dtype=float32", "threads=1", "measure=kernels", "measure.kernel_passes=2")
LIMITS = Limits(
    ways={READ: {"way": 1e11}, "float32": {"way": 1e12}, "bfloat16": {"way": 1e12}}, threads=1, cache_bytes=0, buffer_bytes=0
)
DECODE, PREFILL = Shape("decode", 3, 30, 1), Shape("prefill", 1, 0, 40)
LONG = Shape("long", 8, 4095, 1)


def model(**options: Any) -> ModelConfig:
    return replace(checkpoint("tiny-llama").config, **options)


# What an operator needs.


@pytest.mark.parametrize("shape", [DECODE, PREFILL, LONG, *benchmark.SHAPES], ids=lambda shape: shape.name)
@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True, "qkv_bias": True, "mlp_bias": True, "layer_window": (0, 20)}])
def test_layers_and_head_need_together_what_a_step_needs(shape: Shape, options: dict[str, Any]) -> None:
    config = model(**options)
    batch = make_batch(shape, config.vocab_size, 16)
    parts, step = needs(config, "bfloat16", batch, 16), count([record_step(batch, 16, 0, 0)], config, "bfloat16")
    alone = [parts[name] for name in ("project", "attend", "combine")]
    rows = 0 if config.tie_embeddings else parts["embed"].bytes
    assert rows + parts["layers"].bytes + parts["head"].bytes == step.bytes[0]
    assert sum(part.flops for part in alone) + parts["head"].flops == step.flops[0]
    assert parts["layers"].flops == sum(part.flops for part in alone)
    own = (
        2 * 2 * config.num_kv_heads * config.head_dim * config.num_layers * batch.num_tokens
    )  # of bfloat16, read again by attend
    assert parts["layers"].bytes == sum(part.bytes for part in alone) - own


def test_the_work_of_a_decode_step_as_worked_out_by_hand() -> None:
    c = model()
    D, F, N, K, H, L, V = (
        *(c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim, c.num_layers, c.vocab_size),
    )
    work = needs(c, "float32", make_batch(DECODE, V, 16), 16)
    qkv, rest = (N + 2 * K) * H * D, N * H * D + 3 * F * D
    assert {name: (float(w.bytes) / 4, float(w.flops)) for name, w in work.items()} == {
        "embed": (3 * D, 0),
        "project": (L * (qkv + D + 3 * 2 * K * H), 2 * 3 * L * qkv),
        "attend": (L * 3 * 31 * 2 * K * H, 4 * N * H * L * 3 * 31),
        "combine": (L * (rest + D), 2 * 3 * L * rest),
        "layers": (
            L * (qkv + rest + 2 * D + 3 * 2 * K * H + 3 * 30 * 2 * K * H),
            2 * 3 * L * (qkv + rest) + 4 * N * H * L * 93,
        ),
        "head": (V * D + D, 2 * 3 * V * D),
        "sample": (3 * V, 0),
    }


def test_a_figure_is_the_work_over_the_time_and_the_time_over_the_limit() -> None:
    work = needs(model(), "float32", make_batch(PREFILL, 320, 16), 16)["head"]
    ways = {READ: {"way": 1e9}, "float32": {"way": 1e12}, "bfloat16": {"way": 1e12}}
    limits = Limits(ways=ways, threads=1, cache_bytes=0, buffer_bytes=0)
    got = benchmark.figures(work, (0.4, 0.5, 0.7), (0.9, 1.0, 1.2), limits, "float32")
    assert got["mib"] == float(work.bytes) / 2**20 and got["gb_per_s"] == pytest.approx(float(work.bytes) / 0.5 / 1e9)
    assert got["limit_ms"] == pytest.approx(float(work.bytes) / 1e9 * 1e3) and got["ratio"] == 2.0
    assert got["fraction"] == pytest.approx(float(work.bytes) / 1e9 / 0.5)
    assert (got["ms"], got["quartiles_ms"], got["framework_quartiles_ms"]) == (500.0, [400.0, 700.0], [900.0, 1200.0])


def test_a_figure_above_the_limit_and_other_programs_contaminate() -> None:
    decode: dict[str, Any] = {"head": (0.9, 9.0), "sample": (None, 0.5)}
    figures = {"decode": decode, "prefill": {"head": (1.0, 9.0)}}
    told = lambda found: {  # noqa: E731
        shape: {operator: {"fraction": fraction, "mib": mib} for operator, (fraction, mib) in rows.items()}
        for shape, rows in found.items()
    }
    assert benchmark.contaminations(told(figures), 0.0, 0) == []
    figures["decode"]["sample"], figures["prefill"]["head"] = (1.01, 0.5), (1.2, 9.0)
    (reason,) = benchmark.contaminations(told(figures), 0.0, 0)
    assert reason.startswith("invalid: above the limit are sample in decode (1.01), head in prefill (1.20); the machine was")
    cached, slow = benchmark.contaminations(told(figures), 0.0, 1 << 20)
    assert cached.startswith(
        "invalid: above the limit are sample in decode (1.01); their data fit the last-level cache of 1 MiB"
    )
    assert slow.startswith("invalid: above the limit are head in prefill (1.20); the machine was slower")
    assert "other programs used 50% of the processors" in benchmark.contaminations(told(figures), 0.5, 0)


def test_limits_that_moved_during_the_run_are_a_doubt() -> None:
    before = {"read_bytes_per_s": 3.0e10, "float32_flops_per_s": 2e11, "bfloat16_flops_per_s": 3e11}
    assert benchmark.moved({"before": before, "after": before | {"read_bytes_per_s": 3.2e10}}) == []
    for first, second in ((4.5e10, 3.0e10), (3.0e10, 4.5e10)):
        (doubt,) = benchmark.moved(
            {"before": before | {"read_bytes_per_s": first}, "after": before | {"read_bytes_per_s": second}}
        )
        assert f"memory read {first / 1e9:.2f} and {second / 1e9:.2f} GB/s" in doubt and "matmul" not in doubt


# What is timed.


class Operators:
    """One kind of kernels on one step, run operator by operator."""

    def __init__(self, kind: str, backend: str, shape: Shape) -> None:
        config = EngineConfig(dtype="float32", threads=THREADS, max_num_seqs=4, max_num_batched_tokens=64)
        self.backend, pages = backend, 1 + shape.seqs * shape.pages(16)
        part(backend, "kernels").open_library()
        batch = make_batch(shape, 320, 16)
        self.held, programs, inputs = operators.load(kind, backend, checkpoint("tiny-llama"), config, 64, pages)
        self.held |= inputs(batch)
        glue = operators.GLUES[backend]()
        self.programs: dict[str, Callable[[], None]] = {}
        for program in programs:
            self.programs[program.__name__] = glue.runner(program, self.held)
        self.tokens, self.rows = batch.num_tokens, len(batch.logit_rows)

    def run(self, operator: str) -> None:
        self.programs[operator]()

    def host(self, *path: Any) -> np.ndarray:
        value: Any = self.held
        for key in path:
            value = value[key]
        return part(self.backend, "arrays").to_host(value)

    def put(self, name: str, array: np.ndarray) -> None:
        self.held[name] = part(self.backend, "arrays").to_device(array, device(self.backend))


@pytest.mark.parametrize("shape", [DECODE, PREFILL], ids=lambda shape: shape.name)
def test_both_kinds_of_an_operator_compute_the_same(backend: str, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    glue = operators.GLUES[backend]()._replace(after=lambda x, _: x)  # JAX's adds a little to one number
    monkeypatch.setitem(operators.GLUES, backend, lambda: glue)
    native, framework = (Operators(kind, backend, shape) for kind in ("native", "framework"))
    T, R = native.tokens, native.rows

    def both(operator: str) -> None:
        native.run(operator)
        framework.run(operator)

    def expect_near(got: np.ndarray, right: np.ndarray) -> None:
        assert np.abs(right).max() > 0.01 and np.abs(got - right).max() < 1e-4 * np.abs(right).max()

    both("embed")
    expect_near(native.host("x"), framework.host("x")[:T])
    both("project")
    expect_near(native.host("q"), framework.host("qkv", -1, 0)[:T])
    native.put("q", framework.host("qkv", 0, 0)[:T])
    both("attend")
    expect_near(native.host("q"), framework.host("out")[:T])
    for operator in ("combine", "layers"):
        before = native.host("x").copy()
        both(operator)
        expect_near(native.host("x"), framework.host("x")[:T])
        assert np.abs(native.host("x") - before).max() > 0.01
    both("head")
    expect_near(native.host("logits"), framework.host("logits")[:R])
    native.put("logits", framework.host("logits")[:R])
    both("sample")
    assert native.host("sampled")[:, 0].tolist() == framework.host("tokens")[:R].tolist()


def test_passes_of_both_kinds_take_turns(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    glue, ran = operators.GLUES[backend](), list[str]()

    def runner(program: operators.Program, held: operators.Held) -> Callable[[], None]:
        run = glue.runner(program, held)

        def noted() -> None:
            ran.append(program.__qualname__.partition("_programs")[0])
            run()

        return noted

    monkeypatch.setitem(operators.GLUES, backend, lambda: glue._replace(runner=runner))
    part(backend, "kernels").open_library()
    config = EngineConfig(dtype="float32", threads=THREADS, max_num_seqs=4, max_num_batched_tokens=64)
    found = list(operators.time_shapes(backend, checkpoint("tiny-llama"), config, [DECODE, PREFILL], passes=3))
    turns = 2 * (1 + 3)  # shapes, and passes, the first to wake all
    assert [kind for kind, _ in itertools.groupby(ran)] == ["native", "framework"] * turns
    assert [(name, list(times)) for name, times, *_ in found] == [
        (name, list(operators.KINDS)) for name in ("decode", "prefill")
    ]


# The command.


def test_the_command_times_every_operator_and_keeps_the_run(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(benchmark, "SHAPES", (DECODE, PREFILL))
    asked: list[float] = []
    monkeypatch.setattr("experiments.measure.session.measure_limits", lambda seconds: asked.append(seconds) or LIMITS)
    command(monkeypatch, bench.main, f"engine={backend}", *OPTIONS, "report=true")
    out = capsys.readouterr().out
    result = last_line(out)
    assert "Limits before and after: memory read 100.0 and 100.0 GB/s, matmul float32 1,000 and 1,000 GFLOP/s" in out
    assert re.fullmatch(rf"{backend}-[0-9a-f]+\.so", result["kernel_library"])
    assert (result["engine"], result["model"], result["passes"], len(asked)) == (backend, "tiny-llama", 2, 2)
    assert json.loads((Path(result["run"]) / "results.json").read_text()) == result
    assert set(result["shapes"]) == {"decode", "prefill"} and "decode" in out and "of limit" in out
    for timed_operators in result["shapes"].values():
        assert set(timed_operators) == {"embed", "project", "attend", "combine", "layers", "head", "sample"}
        for values in timed_operators.values():
            assert values["ms"] > 0 and values["ratio"] == pytest.approx(values["framework_ms"] / values["ms"])
            assert values["fraction"] == pytest.approx(values["limit_ms"] / values["ms"])
            for kind in ("", "framework_"):
                low, high = values[f"{kind}quartiles_ms"]
                assert low <= values[f"{kind}ms"] <= high
            limit = max(values["mib"] * 2**20 / 1e11, values["gflop"] / 1e3)
            assert values["limit_ms"] == pytest.approx(limit * 1e3)


@pytest.mark.parametrize(("end", "code"), [(KeyboardInterrupt(), 130), (EngineFailure("it is gone"), 1)])
def test_a_run_of_kernels_that_is_cut_short_keeps_results_and_report_of_its_whole_shapes(
    end: BaseException, code: int, history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "SHAPES", (DECODE, PREFILL))
    monkeypatch.setattr("experiments.measure.session.measure_limits", lambda _: LIMITS)
    whole = IsolatedEngine.time_kernels

    def cut_short(self: IsolatedEngine, *arguments: Any) -> Iterator[Any]:
        yield next(whole(self, *arguments))
        raise end

    monkeypatch.setattr(IsolatedEngine, "time_kernels", cut_short)
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, bench.main, "engine=torch", *OPTIONS, "report=true")
    assert exit.value.code == code
    (partial,) = (history / "runs").iterdir()
    output, errors = capfd.readouterr()
    assert output == "" and f"Report of the 1 whole shape: runs/{partial.name}/report.html\n" in errors
    assert ("Interrupted. What was written so far is in" in errors) is (code == 130)
    result = json.loads((partial / "results.json").read_text())
    assert partial.suffix == ".partial" and list(result["shapes"]) == ["decode"] and result["limits"]["after"] is None
    assert result["shapes"]["decode"]["layers"]["fraction"] > 0 and result["foreign_cpu_share"] >= 0
    said = (partial / "report.md").read_text()
    assert said.startswith("## Partial, of 1 shape: torch\n") and "before the run alone, which was cut short" in said
    assert ("it is gone" in said) is (code == 1) and "% to " not in said


def timed(fraction: float) -> dict[str, Any]:
    """Results of two shapes, whose layers come to `fraction` of the limit in the one and to half of it in the other."""
    figures: dict[str, Any] = dict.fromkeys(benchmark.FIGURES, 1.0) | {
        "quartiles_ms": [0.9, 1.1],
        "framework_quartiles_ms": [0.9, 1.1],
    }
    summary = {"read_bytes_per_s": 3.3e10, "float32_flops_per_s": 2e11, "bfloat16_flops_per_s": 3e11}
    shapes = {shape: {"layers": figures | {"fraction": share}} for shape, share in (("decode", fraction), ("prefill", 0.5))}
    return {
        "engine": "torch",
        "model": "any",
        "dtype": "bfloat16",
        "passes": 9,
        "failures": {},
        "limits": {"before": summary, "after": summary | {"read_bytes_per_s": 3.1e10}},
        "contaminated": benchmark.contaminations(shapes, 0.0, 0),
        "unsure": ["the machine's limits moved"],
        "kernel_arithmetic": "AMX",
        "shapes": shapes,
    }


def test_what_spoils_the_tables_stands_above_them(capsys: pytest.CaptureFixture[str]) -> None:
    print_tables(timed(1.25))
    told = capsys.readouterr().out
    assert told.startswith("contaminated torch: invalid: above the limit are layers in decode (1.25)")
    assert told.count("contaminated: torch (AMX), any, bfloat16, decode") == 1 and "torch: the machine's limits moved." in told
    assert "0.9000–1.100" in told and "a cache answers faster than memory" in " ".join(told.split())
    limits = " ".join(told.split()).partition("Limits before and after: ")[2]
    assert limits.startswith("memory read 33.00 and 31.00 GB/s, matmul float32 200.0 and 200.0 GFLOP/s")
    print_tables(timed(0.75))
    assert "contaminated" not in capsys.readouterr().out


def test_a_run_of_kernels_has_a_report_with_their_shares_and_limits(tmp_path: Path) -> None:
    for name, value in (("results", timed(1.25)), ("environment", {"cpu": "any"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "config.yaml").write_text("model: {}\nengine: {}\n")
    page = write_report(tmp_path).read_text()
    assert "memory read 33.00 and 31.00 GB/s" in page and "0.9000–1.100" in page and "a cache answers faster" in page
    assert "may be contaminated" in page and "trace.perfetto.json" not in page
    said = (tmp_path / "report.md").read_text()
    assert "native (AMX) kernels" in said and "of the limit, all layers: contaminated" in said
    assert "median of 9 passes" in said and "50% to 125%" in said and "**torch is contaminated**: invalid: above" in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert rows[0][1:] == ["decode", "prefill"] and rows[2] == ["layers", "1.25 (1.0×)", "0.50 (1.0×)"]
    assert not (tmp_path / "trace.perfetto.json").exists()


def test_kernels_that_take_too_long_are_given_up(
    history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(
            monkeypatch, bench.main, "engine=torch", "model=tiny-llama", "measure=kernels", "measure.limits_s=0",
            "measure.timeout_s=0.01",
        )  # fmt: skip
    assert exit.value.code == 1
    assert "did not answer 'time_kernels' within measure.timeout_s=0.01" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("main", "overrides", "said"),
    [
        (bench.main, ("engine=history",), "engine=history has no native kernels"),
        (bench.main, ("engine=hf",), "engine=hf has no native kernels"),
        (bench.main, ("engine=llamacpp",), "engine=llamacpp has no native kernels"),
        (bench.main, ("engine=torch", "kernels=framework"), "got kernels=framework"),
        (bench.main, ("engine=torch", 'fail_if=["num_steps > 1"]'), "measure=kernels runs none"),
        (bench.main, ("engine=torch", "engine.compile=true"), "compile=true"),
        (bench.main, ("engine=torch", "engine.block_size=8"), "block_size must be a multiple of 16"),
        (bench.main, ("engine=torch", "measure.kernel_passes=-1"), "measure.kernel_passes must be an integer"),
        (compare.main, (), "experiments.bench engine=torch measure=kernels"),
    ],
)
@pytest.mark.usefixtures("peers_there")
def test_what_has_no_native_kernels_is_refused_in_one_message(
    main: Callable[[], None],
    overrides: tuple[str, ...],
    said: str,
    history: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, main, "model=tiny-llama", "measure=kernels", "measure.limits_s=0", *overrides)
    assert exit.value.code == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and said in told[0]
    assert not (history / "runs").exists()
