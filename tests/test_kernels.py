"""Native kernels: what the definitions say, on every model family; and the same bits on both engines, whatever the schedule."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import pytest
import torch

from common.batch import null_batch
from common.config import Dtype, EngineConfig
from common.errors import BackendError, ConfigError
from common.kernels.cpu import build, usable
from common.kernels.cpu.pages import keys_in, keys_out, values_in, values_out
from common.kernels.cpu.step import max_step_size, pack_changes, pack_step
from common.system.hardware import cxx_compiler, matrix_unit
from experiments.correctness.reference import NumpyModel
from jaxinfer.parallel import Group
from tests.backends import BACKENDS, Packer, checkpoint, device, native_logits, native_weights, paged_logits, part
from tests.families import BOUND, FAMILIES
from tests.test_model import PROMPTS, STEPS
from tests.test_sampling import changed, changes

BF16_BOUND = 0.11
"""How far bfloat16 logits of a tiny model may be from the float64 judge's, in standard deviations of the logits."""
Steps = Sequence[Sequence[tuple[int, int, int]]]


def same_bits(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def whole(prompts: Sequence[Sequence[int]]) -> Steps:
    """Each prompt alone, in one step."""
    return [[(i, 0, len(prompt))] for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_judge(backend: str, family: str, families: dict[str, Path]) -> None:
    judge = NumpyModel(checkpoint(families[family]))
    exact = [judge.logits(prompt) for prompt in PROMPTS]
    for dtype, bound in (("float32", BOUND), ("bfloat16", BF16_BOUND)):
        native = native_logits(backend, families[family], PROMPTS, STEPS, dtype)
        assert max(float(np.abs(a - b).max()) for a, b in zip(native, exact, strict=True)) < bound * exact[0].std()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_engines_compute_the_same_bits(family: str, dtype: str, families: dict[str, Path]) -> None:
    jax_logits, torch_logits = (native_logits(backend, families[family], PROMPTS, STEPS, dtype) for backend in BACKENDS)
    assert same_bits(jax_logits, torch_logits)


def test_without_native_kernels_the_bits_differ(families: dict[str, Path]) -> None:
    """That the comparison of bits can fail."""
    jax_logits, torch_logits = (paged_logits(backend, families["llama2"], PROMPTS, STEPS, 8) for backend in BACKENDS)
    assert not same_bits(jax_logits, torch_logits)


LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130, 511, 512, 513, 600)
"""On both sides of the edges of pages, blocks and partitions."""


def long_prompts(vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab, n).tolist() for n in LENGTHS]


def chunked(prompts: Sequence[Sequence[int]], size: int) -> Steps:
    """All prompts together, `size` tokens of each a step; those of one token first."""
    steps = []
    for start in range(0, max(map(len, prompts)), size):
        step = [(i, start, min(size, len(prompt) - start)) for i, prompt in enumerate(prompts) if len(prompt) > start]
        steps.append(sorted(step, key=lambda part: part[2] > 1))
    return steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["smollm", "gemma3"])
def test_company_chunks_and_place_change_no_bit(backend: str, family: str, dtype: str, families: dict[str, Path]) -> None:
    path = families[family]
    prompts = long_prompts(199)
    alone = native_logits(backend, path, prompts, whole(prompts), dtype)
    for size in (1, 7, 16, 100):
        some = prompts if size > 1 else [prompt[:70] for prompt in prompts]
        right = [logits[: len(prompt)] for logits, prompt in zip(alone, some, strict=True)]
        assert same_bits(native_logits(backend, path, some, chunked(some, size), dtype), right), size
    backwards = native_logits(backend, path, prompts[::-1], chunked(prompts[::-1], 33), dtype, page_size=32)
    assert same_bits(backwards[::-1], alone)


def test_every_number_of_sequences_gives_the_same_bits(backend: str, families: dict[str, Path]) -> None:
    path = families["smollm"]
    prompts = np.random.default_rng(2).integers(0, 199, (40, 20)).tolist()
    alone = native_logits(backend, path, prompts, whole(prompts), "bfloat16")
    for count in (*range(2, 16), 24, 25, 37, 40):
        # Prefill without the last token, then a step of one token each.
        steps = [*([(i, 0, 19)] for i in range(count)), [(i, 19, 1) for i in range(count)]]
        assert same_bits(native_logits(backend, path, prompts[:count], steps, "bfloat16"), alone[:count]), count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rubbish_in_unused_slots_changes_nothing(backend: str, dtype: str, families: dict[str, Path]) -> None:
    for family in ("llama2", "gemma3"):
        clean, dirty = (
            native_logits(backend, families[family], PROMPTS, STEPS, dtype, rubbish=rubbish) for rubbish in (0.0, float("nan"))
        )
        assert same_bits(clean, dirty)


def test_one_thread_and_many_compute_the_same_bits(families: dict[str, Path]) -> None:
    prompts = long_prompts(199)[-2:]
    kernels = part("torch", "kernels")
    kernels.open_library()
    outputs = []
    for threads in (1, 2, 5):
        torch.ops.tandem.threads(threads)
        outputs.append(native_logits("torch", families["smollm"], prompts, chunked(prompts, 50), "bfloat16"))
    torch.ops.tandem.threads(1)
    assert same_bits(outputs[0], outputs[1]) and same_bits(outputs[0], outputs[2])


# ── by construction: between operators the frameworks compute nothing ────────────────────────────────────────────────────

MOVES = {"ffi_call", "jit", "pjit"}
"""What a native step of JAX may consist of."""


def primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from primitives(value.jaxpr)


def native_state(backend: str, path: Path, dtype: str = "bfloat16") -> tuple[Any, Any, np.ndarray, int]:
    config, kernels = checkpoint(path).config, part(backend, "kernels")
    weights = native_weights(backend, path, dtype)
    packer = Packer(8, 16)
    batch = packer.step([(packer.add(PROMPTS[0]), 0, 48)])
    arrays = np.zeros(4, np.int32), np.zeros((1, config.vocab_size), np.float32)
    last, logits = part(backend, "arrays").to_device(arrays, device(backend))
    state = part(backend, "step").State(kernels.make_cache(config, 8, 16, dtype), last, logits)
    return weights, state, pack_step(batch), batch.num_tokens


def test_layers_that_ranks_share_out_are_operators_and_two_sums_each(families: dict[str, Path]) -> None:
    path, kernels = families["gemma3"], part("jax", "kernels")
    config = checkpoint(path).config
    weights, state, step, tokens = native_state("jax", path)

    class Summing(Group):
        def all_reduce(self, x: jax.Array) -> jax.Array:
            return jax.lax.psum(x, "ranks")

    def run(weights: Any, state: Any, step: Any) -> Any:
        x_TD = kernels.embed(config, weights, step, state.last_tokens, tokens)
        return kernels.layers_in_terms(config, weights, step, state.cache, x_TD, Summing())

    traced = jax.make_jaxpr(run, axis_env=[("ranks", 2)])(weights, state, step)
    seen = list(primitives(traced.jaxpr))
    assert set(seen) <= MOVES | {"psum", "psum_invariant"}
    assert seen.count("ffi_call") == 1 + 4 * config.num_layers  # attention's term, its sum added; the MLP's
    assert len([name for name in seen if "psum" in name]) == 2 * config.num_layers


def test_a_native_step_of_jax_is_operators_and_nothing_else(families: dict[str, Path]) -> None:
    path, kernels = families["gemma3"], part("jax", "kernels")
    config = checkpoint(path).config
    weights, state, step, tokens = native_state("jax", path)

    def run(weights: Any, state: Any, step: Any) -> Any:
        return kernels.sample(kernels.forward(config, weights, state, step, tokens)[0], step)

    seen = list(primitives(jax.make_jaxpr(run)(weights, state, step).jaxpr))
    assert set(seen) <= MOVES and seen.count("ffi_call") == 4  # embed, layers, head, sample
    with_an_add = jax.make_jaxpr(lambda *args: run(*args)[0] + 1)(weights, state, step)
    assert not set(primitives(with_an_add.jaxpr)) <= MOVES


def test_a_native_step_of_torch_is_operators_and_nothing_else(families: dict[str, Path]) -> None:
    path, kernels = families["gemma3"], part("torch", "kernels")
    config = checkpoint(path).config
    weights, state, step, tokens = native_state("torch", path)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def run(step: torch.Tensor) -> torch.Tensor:
        return kernels.sample(kernels.forward(config, weights, state, step, tokens)[0], step)[0]

    torch._dynamo.reset()
    eager = run(torch.from_numpy(step)).numpy()
    compiled = torch.compile(run, backend=backend, fullgraph=True)(torch.from_numpy(step)).numpy()
    called = [node.target for node in graphs[0].graph.nodes if node.op.startswith("call")]
    ours = [target for target in called if str(target).startswith("tandem.")]
    assert {target for target in called if target not in ours} <= {torch.empty}
    assert len(ours) == 4  # embed, layers, head, sample
    assert np.array_equal(eager[:, :3], compiled[:, :3])  # token, finite, digest; nobody asked for more


@pytest.mark.parametrize("most", [None, 7])
def test_logits_are_changed_exactly_whatever_the_pieces(backend: str, most: int | None, families: dict[str, Path]) -> None:
    kernels = part(backend, "kernels")
    kernels.open_library()
    vocab, words = 199, (lambda x: x) if backend == "jax" else torch.from_numpy
    packer = Packer(8, 16)
    c = changes(3, vocab)
    batch = packer.step([(packer.add(PROMPTS[0][:4]), 0, 4) for _ in range(3)], **c)
    logits = np.random.default_rng(0).standard_normal((3, vocab)).astype(np.float32) * 5
    step, got = words(pack_step(batch)), words(logits)
    for at in range(0, len(c["edit_rows"]), most or len(c["edit_rows"])):
        got = kernels.adjust(step, words(pack_changes(batch, at, most)), got)
    assert np.array_equal(np.asarray(got), changed(logits, c))


def test_layers_in_parts_compute_the_same_bits(backend: str, families: dict[str, Path]) -> None:
    path, kernels = families["gemma3"], part(backend, "kernels")
    config = checkpoint(path).config
    results = []
    for keep in (None, part(backend, "observe").ignore):
        weights, state, step, tokens = native_state(backend, path)
        words = step if backend == "jax" else torch.from_numpy(step)
        state, _ = kernels.forward(config, weights, state, words, tokens, keep)
        host = part(backend, "arrays").to_host((state.logits, state.cache.k[0], state.cache.v[0]))
        results.append([np.ascontiguousarray(array).tobytes() for array in host])
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama2", "gemma3"])
def test_layers_in_the_terms_of_one_rank_compute_the_same_bits(
    backend: str, family: str, dtype: str, families: dict[str, Path]
) -> None:
    path, kernels = families[family], part(backend, "kernels")
    config, alone = checkpoint(path).config, part(backend, "parallel").ALONE
    results = []
    for layers in (kernels.layers, lambda *x: kernels.layers_in_terms(config, *x, alone)):
        weights, state, step, tokens = native_state(backend, path, dtype)
        words = step if backend == "jax" else torch.from_numpy(step)
        x_TD = kernels.embed(config, weights, words, state.last_tokens, tokens)
        cache, x_TD = layers(weights, words, state.cache, x_TD)
        host = part(backend, "arrays").to_host((x_TD, cache.k[0], cache.v[0]))
        results.append([np.ascontiguousarray(array).tobytes() for array in host])
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_lies_between_the_parts_can_be_computed_with(backend: str, dtype: str, families: dict[str, Path]) -> None:
    path, kernels = families["llama2"], part(backend, "kernels")
    config = checkpoint(path).config
    weights, state, step, _ = native_state(backend, path, dtype)
    words = step if backend == "jax" else torch.from_numpy(step)
    x = part(backend, "arrays").to_device(
        np.random.default_rng(0).standard_normal((48, config.hidden_size)).astype(np.float32), device(backend)
    )

    def halves(step: Any, cache: Any, x: Any) -> Any:
        _, q = kernels.project(config, weights, 0, step, cache, x)
        return kernels.combine(weights, 0, step, q * 0.5, x * 0), kernels.combine(weights, 0, step, q * 0.25 + q * 0.25, x * 0)

    whole, again = part(backend, "arrays").to_host((jax.jit(halves) if backend == "jax" else halves)(words, state.cache, x))
    assert np.isfinite(whole).all() and whole.any() and np.array_equal(whole, again)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def operators() -> Any:
    part("torch", "kernels").open_library()
    return torch.ops.tandem


def test_an_operator_refuses_what_does_not_fit(families: dict[str, Path]) -> None:
    ops = operators()
    weights, state, step, tokens = native_state("torch", families["llama2"])
    config = checkpoint(families["llama2"]).config
    words, layers, ropes = torch.from_numpy(step), weights.layers, weights.ropes
    x = torch.zeros((tokens, config.hidden_size))
    q = torch.zeros((tokens, config.num_heads, config.head_dim), dtype=torch.bfloat16)
    (k,), (v,) = state.cache
    good = {"step": words, "weights": layers, "ropes": ropes, "x": x, "k": k, "v": v}
    ops.project(**good, q=q, layer=1)
    ops.layers(**good)
    for wrong, change in (
        ("step", {"step": words[:20].contiguous()}),
        ("step", {"step": torch.full_like(words, -1)}),
        ("weights", {"weights": layers[:, 64:].contiguous()}),
        (r"weights: expected uint8\[\*, \*\]", {"weights": layers[0]}),
        ("ropes", {"ropes": ropes[:, :, 1:].contiguous()}),
        ("ropes: expected the table", {"ropes": ropes[:0]}),
        ("position", {"ropes": ropes[:, :10].contiguous()}),
        ("x: expected float32", {"x": x[1:]}),
        ("x: expected float32 .*, got int32", {"x": x.int()}),
        ("step: expected int32 .*, got float32", {"step": words.view(torch.float32)}),
        ("ropes: expected float32", {"ropes": ropes.int()}),
        ("k: expected bfloat16.*, got float32", {"k": k.float()}),
        ("k: expected bfloat16", {"k": k[1:].contiguous()}),
        ("v: expected bfloat16.*, got Half", {"v": v.half()}),
        ("slot", {"k": k[:, :1].contiguous(), "v": v[:, :1].contiguous()}),
        ("contiguous", {"x": x.t().contiguous().t()}),
    ):
        for operator, more in ((ops.project, {"q": q, "layer": 0}), (ops.layers, {})):
            with pytest.raises(ValueError, match=wrong):
                operator(**(good | change), **more)
    ops.layers_in_terms(**good, memory=torch.empty(0, dtype=torch.uint8), rank=0, ranks=1)
    for wrong, rank in ((r"memory: expected uint8\[\d+\], got uint8\[64\]", 1), ("rank: expected one of 2, got 2", 2)):
        with pytest.raises(ValueError, match=wrong):
            ops.layers_in_terms(**good, memory=torch.zeros(64, dtype=torch.uint8), rank=rank, ranks=2)
    with pytest.raises(ValueError, match=r"q: expected bfloat16.*, got float32"):
        ops.project(**good, q=q.float(), layer=0)
    for layer in (-1, config.num_layers):
        with pytest.raises(ValueError, match=f"layer: expected one of {config.num_layers}, got {layer}"):
            ops.project(**good, q=q, layer=layer)
    with pytest.raises(ValueError, match="layer's were expected"):
        ops.layers(**(good | {"weights": weights.head[None]}))
    with pytest.raises(ValueError, match="head's were expected"):
        ops.embed(words, layers[0], state.last_tokens, x)
    with pytest.raises(ValueError, match=r"last_tokens: expected int32.*, got float32"):
        ops.embed(words, weights.head, state.last_tokens.float(), x)
    bad = words.clone()
    bad[8] = config.vocab_size
    with pytest.raises(ValueError, match="token id"):
        ops.embed(bad, weights.head, state.last_tokens, x)
    bad = words.clone()
    bad[8 + tokens + 1] += 1
    with pytest.raises(ValueError, match="positions of a sequence"):
        ops.attend(bad, layers, k, v, q, 0)
    bad = words.clone()
    bad[8 + 3 * tokens + 1] = tokens + 100_000
    with pytest.raises(ValueError, match="sequences of the step"):
        ops.attend(bad, layers, k, v, q, 0)
    with pytest.raises(ValueError, match="page of the table"):
        ops.attend(words, layers, k[:, :2].contiguous(), v[:, :2].contiguous(), q, 0)


def test_changes_that_do_not_fit_are_refused() -> None:
    ops, packer = operators(), Packer(8, 16)
    batch = packer.step([(packer.add(PROMPTS[0][:4]), 0, 4)], **changes(1, 40))
    step, logits, edits = torch.from_numpy(pack_step(batch)), torch.zeros((1, 40)), changes(1, 40) | {"mask_rows": [0] * 3}
    good = {name: np.asarray(array) for name, array in edits.items()}
    for wrong, change in (
        ("a token to edit", {"edit_ids": good["edit_ids"] + 40}),
        ("a token to edit", {"edit_ids": good["edit_ids"] - 40}),
        ("a row to edit", {"edit_rows": good["edit_rows"] + 1}),
        ("a row to edit", {"edit_rows": good["edit_rows"] - 1}),
        ("a row to mask", {"mask_rows": good["mask_rows"] + 1}),
        ("a row to mask", {"mask_rows": good["mask_rows"] - 1}),
        ("changes: expected the counts", {"masks": good["masks"][:, :1]}),
    ):
        packed = torch.from_numpy(pack_changes(packer.step([(0, 0, 4)], **(good | change))))
        with pytest.raises(ValueError, match=wrong):
            ops.adjust(step, packed, logits, logits.clone())
    packed = torch.from_numpy(pack_changes(packer.step([(0, 0, 4)], **good)))
    ops.adjust(step, packed, logits, logits.clone())
    for wrong, arguments in (
        ("changes: expected int32", (step, packed[:-1].clone(), logits, logits.clone())),
        ("logits: expected a row for each", (step, packed, logits[:0], logits[:0])),
        ("changed: expected float32", (step, packed, logits, logits[:, 1:].contiguous())),
    ):
        with pytest.raises(ValueError, match=wrong):
            ops.adjust(*arguments)


def test_jax_reports_what_does_not_fit(families: dict[str, Path]) -> None:
    kernels = part("jax", "kernels")
    weights, state, step, tokens = native_state("jax", families["llama2"])
    config = checkpoint(families["llama2"]).config
    x, halves = np.zeros((tokens, config.hidden_size), np.float32), jax.tree.map(lambda pool: pool.view("float16"), state.cache)
    forward = jax.jit(lambda w, s, x: kernels.forward(config, w, s, x, tokens)[0].logits)
    layers = jax.jit(kernels.layers)
    for wrong, run in (
        ("step: expected int32 of at least", lambda: forward(weights, state, step[:20])),
        ("step: expected int32 .*, got float32", lambda: forward(weights, state, step.view(np.float32))),
        (
            "last_tokens: expected int32.*, got float32",
            lambda: forward(weights, state._replace(last_tokens=np.zeros(4, np.float32)), step),
        ),
        ("x: expected float32 .*, got int32", lambda: layers(weights, step, state.cache, x.astype(np.int32))),
        ("k: expected bfloat16.*, got float16", lambda: layers(weights, step, halves, x)),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=wrong):
            jax.block_until_ready(run())


@pytest.mark.parametrize(
    ("options", "reason"), [({"block_size": 8}, "multiple of 16"), ({"compile": True}, "nothing to compile")]
)
def test_auto_falls_back_where_native_says_why_not(
    backend: str, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    unusable, model = part(backend, "kernels").unusable, checkpoint("tiny-llama").config
    assert unusable(EngineConfig(kernels="auto"), model, device(backend)) is None
    assert unusable(EngineConfig(kernels="framework"), model, device(backend)) == "kernels=framework"
    with pytest.raises(ConfigError, match=reason):
        unusable(EngineConfig(kernels="native", **options), model, device(backend))
    with caplog.at_level("INFO"):
        told = unusable(EngineConfig(kernels="auto", **options), model, device(backend))
    assert reason in told and reason in caplog.text


def test_auto_falls_back_where_no_library_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kernels").write_text("in the way")
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    model, opened = checkpoint("tiny-llama").config, lambda: build.build("limits")
    with caplog.at_level("INFO"):
        assert "TANDEM_CACHE" in (usable.unusable(EngineConfig(kernels="auto"), model, "cpu", opened) or "")
    assert "using framework" in caplog.text
    with pytest.raises(BackendError, match="TANDEM_CACHE"):
        usable.unusable(EngineConfig(kernels="native"), model, "cpu", opened)


@pytest.mark.parametrize("folder", ["file/cache", "~nobody-of-this-name/cache"])
def test_auto_falls_back_where_there_is_no_cache(
    backend: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = checkpoint("tiny-llama")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_CACHE", folder)
    for once in (part(backend, "kernels").built_library, part(backend, "kernels").open_library):
        once.cache_clear()  # as in a new process
    with caplog.at_level("INFO"):
        runner = part(backend, "runner").ModelRunner(EngineConfig(device="cpu", kernels="auto"))
        runner.load(model)
    assert (runner.caps.kernels, runner.caps.kernel_library, runner.caps.kernel_arithmetic) == (("framework",), None, None)
    assert "TANDEM_CACHE" in runner.caps.framework_because
    assert caplog.text.count("using framework") == 1
    runner = part(backend, "runner").ModelRunner(EngineConfig(device="cpu", kernels="native"))
    with pytest.raises(BackendError, match="TANDEM_CACHE"):
        runner.load(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_runner_names_the_library_that_it_has_loaded_and_what_that_multiplies_with(backend: str, dtype: Dtype) -> None:
    runner = part(backend, "runner").ModelRunner(EngineConfig(device="cpu", kernels="native", dtype=dtype, max_num_seqs=2))
    runner.load(checkpoint("tiny-llama"))
    assert re.fullmatch(rf"{backend}-[0-9a-f]{{24}}\.so", runner.caps.kernel_library)
    vectors, narrow = ("AVX-512", "portable vectors"), ("AMX", "AVX-512 BF16")
    assert runner.caps.kernel_arithmetic in (vectors if dtype == "float32" else vectors + narrow)
    if not os.environ.get("TANDEM_CXXFLAGS"):
        assert (runner.caps.kernel_arithmetic == "AMX") == (dtype == "bfloat16" and matrix_unit())
    assert runner.caps.framework_because is None


def test_a_library_that_does_not_load_is_a_backend_error() -> None:
    def opened() -> None:
        ctypes.CDLL(__file__)

    with pytest.raises(BackendError, match="load its library"):
        usable.unusable(EngineConfig(kernels="native"), checkpoint("tiny-llama").config, "cpu", opened)


def test_each_engine_of_a_process_computes_with_its_own_threads(backend: str) -> None:
    kernels, model = part(backend, "kernels"), checkpoint("tiny-llama")
    assert kernels.unusable(EngineConfig(kernels="native"), model.config, device(backend)) is None
    steps, states = {}, {}
    for threads in (1, 5):
        steps[threads] = kernels.Step(EngineConfig(threads=threads, max_num_seqs=2, max_num_batched_tokens=8), device(backend))
        steps[threads].load(model, 64)
        states[threads] = steps[threads].warmup(steps[threads].make_state(4))

    def started(threads: int) -> int:
        before = {thread.id for thread in psutil.Process().threads()}
        states[threads], fetch = steps[threads].run(states[threads], null_batch(1, 1, 16))
        fetch()
        return len({thread.id for thread in psutil.Process().threads()} - before)

    assert [started(threads) for threads in (1, 5, 5, 1, 5)] == [0, 4, 0, 0, 4]


def test_libraries_that_nobody_used_for_long_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    names = ("sample-old", "sample-new", "limits-old")
    for name in names:
        (tmp_path / "kernels").mkdir(exist_ok=True)
        for suffix in (".so", ".digest"):
            (tmp_path / "kernels" / name).with_suffix(suffix).touch()
            if name.endswith("old"):
                os.utime((tmp_path / "kernels" / name).with_suffix(suffix), (0, 0))
    used = build.build("sample")
    os.utime(used, (0, 0))
    assert build.build("sample") == used  # and so it is not old any more
    build.build("sample", options=("-DANOTHER",))
    left = {path.stem for path in used.parent.iterdir()} - {used.stem}
    assert used.exists() and set(names) - left == {"sample-old"}
    assert {path.suffix for path in used.parent.glob(f"{used.stem}.*")} == {".so", ".digest"}


@pytest.mark.accept
@pytest.mark.parametrize(
    "options",
    [
        "-UTANDEM_AMX -DTANDEM_WIDEN -DTANDEM_FEW_ROWS=0",
        "-UTANDEM_AMX -UTANDEM_WIDEN -UTANDEM_FEW_ROWS",
        "-UTANDEM_AMX -mno-avx512bf16",
        "-DTANDEM_PORTABLE",
    ],
    ids=["as on Intel", "as on AMD", "without BF16", "any processor"],
)
def test_what_other_processors_would_compute_passes_the_same_tests(options: str) -> None:
    """Every build has a fixed order of roundings of its own, and all of them equal the definition."""
    tests = ["tests/test_kernels.py", "tests/test_native_operators.py", "-m", "not accept", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        env=os.environ | {"TANDEM_CXXFLAGS": options},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_compiler_may_have_arguments_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", f"env LANG=C {cxx_compiler()[0]}")
    assert build.build("limits").exists()
    (tmp_path / "cxx").write_text("no program")
    (tmp_path / "cxx").chmod(0o700)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    with pytest.raises(BackendError, match="Set CXX"):
        build.build("limits")


def test_sources_are_read_alike_whatever_the_locale() -> None:
    read = [sys.executable, "-c", "from common.kernels.cpu import build; print(build._digest([]))"]
    plain = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    told = subprocess.run(read, env=plain, capture_output=True, text=True)
    assert told.stdout.strip() == build._digest([]), told.stderr


def test_a_library_cut_short_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    library = build.build("sample")
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert build.build("sample").read_bytes() == whole
    library.with_suffix(".digest").write_bytes(b"\xff\xfe")
    assert build.build("sample").read_bytes() == whole


def test_of_processes_that_need_a_library_one_compiles_it_and_says_so_and_the_others_wait(tmp_path: Path) -> None:
    code = "from common.kernels.cpu.build import build; print(build('limits'))"
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[1]}
    cache = os.environ | {"TANDEM_CACHE": str(tmp_path)}
    ran = [subprocess.Popen([sys.executable, "-c", code], env=cache, **pipes) for _ in range(3)]
    outputs, errors = zip(*(process.communicate() for process in ran), strict=True)
    folder = tmp_path / "kernels"
    said = f"compiling limits.cc for this processor, once, which can take a minute; kept in {folder}\n"
    assert sorted(errors) == ["", "", said] and len(set(outputs)) == 1
    assert sorted(path.suffix for path in folder.iterdir()) == [".digest", ".lock", ".so"]


def test_what_pytorch_makes_by_default_is_not_what_a_step_is_made_of(families: dict[str, Path]) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        _, state, *_ = native_state("torch", families["llama2"])
    finally:
        torch.set_default_dtype(before)
    assert state.logits.dtype == torch.float32


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendError, match=r"no C\+\+ compiler"):
        build.build("limits")
    monkeypatch.undo()
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    with pytest.raises(BackendError, match=r"could not compile limits\.cc: it ended with exit code 1\.\n.*error"):
        build.build("limits", options=("-DTANDEM_INLINE=%", "-include/nowhere.h"))
    assert not list(tmp_path.rglob("*.so"))


def test_of_a_compilers_words_the_first_error_is_told() -> None:
    words = "a.h:1: warning: old\n" * 500 + "k.h:7:1: error: expected ';'\n" + "k.h:9:1: error: as above\n" * 500
    told = build.first_error(words)
    assert told.startswith("k.h:7:1: error: expected ';'\nk.h:9:1") and len(told) == build.READ
    assert build.first_error("collect2: ld returned 1\n" * 500).endswith("ld returned 1\n")


# ── layouts ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pair", [1, 2])
def test_pages_go_in_and_come_out(pair: int) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 16, 2, 24)).astype(np.float32)
    keys, values = keys_in(x, pair), values_in(x, pair)
    assert keys.shape == (5 * 2, 3, 24 // pair, 16, pair) and values.shape == (5 * 2, 3, 16 // pair, 32, pair)
    assert keys[4 * 2 + 1, 2, 7, 5, 0] == x[4, 2, 5, 1, 7 * pair] and values[4 * 2 + 1, 2, 5, 7, 0] == x[4, 2, 5 * pair, 1, 7]
    assert np.array_equal(keys_out(keys, 2), x) and np.array_equal(values_out(values, 2, 24), x)


def test_the_largest_step_fits_its_size() -> None:
    packer = Packer(400, 16, num_rows=8)
    rows = [packer.add([1] * 512, temperature=1.0, top_k=3) for _ in range(8)]
    batch = packer.step([(row, 500, 1) for row in rows[:7]] + [(rows[7], 450, 57)])
    assert len(pack_step(batch)) <= max_step_size(64, 8, 32, 8)


ROUGH = """
#include "vec.h"
using namespace tandem;
extern "C" __attribute__((visibility("default"))) void rough(const float* x, int n, float* power, float* reciprocal) {
  for (int i = 0; i < n; i += LANES) {
    store(power + i, rough_exp2(load(x + i)));
    store(reciprocal + i, rough_reciprocal(load(x + i)));
  }
}
"""


@pytest.mark.parametrize("portable", [False, True], ids=["this_processor", "portable"])
def test_what_is_rounded_to_bfloat16_at_once_is_wrong_by_a_twentieth_of_that_at_most(portable: bool, tmp_path: Path) -> None:
    """A bfloat16's rounding is 2^-9 of it: results of whole kernels, which have many, would not show a power that is worse."""
    (tmp_path / "rough.cc").write_text(ROUGH)
    more = ["-DTANDEM_PORTABLE"] if portable else []
    command = [*(cxx_compiler() or []), *build.machine_options(), *more, f"-I{build.FOLDER}", str(tmp_path / "rough.cc")]
    subprocess.run([*command, "-o", str(tmp_path / "rough.so")], check=True)
    x = np.linspace(-125.9, 127, 1 << 18, dtype=np.float32)
    power, reciprocal = np.empty_like(x), np.empty_like(x)
    at = lambda array: ctypes.c_void_p(array.ctypes.data)  # noqa: E731
    ctypes.CDLL(str(tmp_path / "rough.so")).rough(at(x), len(x), at(power), at(reciprocal))
    assert np.abs(power / np.exp2(x.astype(np.float64)) - 1).max() < 9e-5 < 2**-9 / 20
    assert np.abs(reciprocal * x.astype(np.float64) - 1)[np.abs(x) > 1e-3].max() < 2**-14
