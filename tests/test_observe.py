"""`ModelRunner.observe`: the step it runs is the step that serves, and what it shows is what float64 computes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from common.config import EngineConfig
from common.errors import BackendError
from common.interface import ModelRunner, load_backend
from common.schedule.trace import Recorder
from experiments.correctness.observe import compare_row, with_context
from experiments.correctness.reference import NumpyModel
from tests.backends import Packer, checkpoint
from tests.history_runner import HistoryRunner

Case = tuple[str, str, str]
"""Backend, kernels, dtype."""
MODEL, PAGES = "tiny-llama", 16
PROMPTS = [list(range(40, 60)), list(range(7, 18)), [3]]
BOUND = {"float32": 2e-5, "bfloat16": 0.2}
"""How far a tensor may be from float64, of its root mean square; the largest of two layers was 3e-6 and 0.1."""
CASES = [
    (backend, kernels, dtype)
    for backend, kernels in (("jax", "native"), ("torch", "framework"), ("torch", "native"))
    for dtype in ("float32", "bfloat16")
]
COMPILED = ("jax", "framework", "float32")
"""XLA takes seconds for each program of this one."""
SHOWN = {
    "framework": ["attn_norm", "q", "k", "v", "attention", "attn_residual", "mlp", "residual"],
    "native": ["q", "attention", "residual"],
}


@cache
def make_runner(backend: str, kernels: str, dtype: str) -> ModelRunner:
    options: dict[str, Any] = {"kernels": kernels, "dtype": dtype, "device": "cpu", "threads": 1}
    runner = load_backend(
        backend, EngineConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, **options)
    )  # not warmed up: what is not used is not compiled
    runner.load(checkpoint(MODEL))
    runner.allocate([PAGES])
    return runner


@pytest.mark.parametrize("case", [COMPILED, *CASES], ids="-".join)
def test_what_is_shown_is_what_float64_computes_in_order(case: Case) -> None:
    runner, (_, kernels, dtype) = make_runner(*case), case
    runner.reset()
    packer = Packer(PAGES, 16, num_rows=4, max_len=64)
    rows = [packer.add(prompt) for prompt in PROMPTS]
    # The first prompt in two pieces, so that there is a past.
    runner.observe(packer.step([(rows[0], 0, 12)], samples=[]))
    batch = packer.step([(rows[2], 0, 1), (rows[0], 12, 8), (rows[1], 0, 11)])
    taps = runner.observe(batch)
    layers = [f"layers.{layer}.{tensor}" for layer in range(2) for tensor in SHOWN[kernels]]
    last = ["final_norm"] if kernels == "framework" else []
    assert list(taps) == ["embedding", *layers, *last, "logits", "tokens"]
    taps = with_context(runner, batch, 16, taps)
    for seq, prompt in enumerate((PROMPTS[2], PROMPTS[0], PROMPTS[1])):
        exact: dict[str, np.ndarray] = {}
        NumpyModel(checkpoint(MODEL)).logits(prompt, exact.__setitem__)
        mine, context = slice(*batch.query_starts[seq : seq + 2]), batch.kv_lengths[:seq].sum()
        for name, tap in taps.items():
            if name == "tokens":
                continue
            if name.endswith(("keys", "values")):
                truth = exact[name.replace("keys", "k").replace("values", "v")]
                got = tap[context : context + len(prompt)]
            elif name == "logits":
                truth, got = exact[name][-1:], tap[seq : seq + 1]
            else:
                truth, got = exact[name][-(mine.stop - mine.start) :], tap[mine]
            assert got.shape == truth.shape and got.dtype == np.float32, name
            assert np.abs(got - truth).max() < BOUND[dtype] * np.sqrt((truth**2).mean()), (name, seq)
    assert (taps["tokens"] == taps["logits"].argmax(1)).all()


@pytest.mark.parametrize("case", [pytest.param(COMPILED, marks=pytest.mark.accept), *CASES], ids="-".join)
def test_an_observed_step_leaves_the_pages_that_a_served_one_leaves(case: Case) -> None:
    runner, (_, kernels, dtype) = make_runner(*case), case
    left = []
    for observe in (False, True):
        runner.reset()
        packer = Packer(PAGES, 16, num_rows=4, max_len=64)
        row = packer.add(PROMPTS[0] + [9])
        prompt, decode = packer.step([(row, 0, 20)]), packer.step([(row, 20, 1)], fills=[0])
        for batch in (prompt, decode):  # the second reads the token that the first chose
            result = None if observe else runner.submit(batch).result()
            taps = runner.observe(batch, ("tokens",)) if observe else {}
        pages = runner.read_pages(0, packer.rows.pages[row, :2].tolist())
        tokens = taps["tokens"] if result is None else result.tokens
        left.append((pages["k"][:, :, :].astype(np.float32), tokens))
    (served, chosen), (observed, shown) = left
    assert (shown == chosen).all() and list(taps) == ["tokens"]
    exact = kernels == "native"
    assert (
        np.array_equal(served, observed) if exact else np.allclose(served, observed, atol=1e-5 if dtype == "float32" else 0.1)
    )


@pytest.mark.parametrize("case", [pytest.param(COMPILED, marks=pytest.mark.accept), *CASES], ids="-".join)
def test_a_row_of_logits_for_every_token_can_be_asked_for(case: Case) -> None:
    from experiments.correctness.perplexity import every_row

    runner = make_runner(*case)
    runner.reset()
    packer = Packer(PAGES, 16, num_rows=4, max_len=64)
    batch = every_row(packer.step([(packer.add(PROMPTS[0]), 0, 20)]))
    taps = runner.observe(batch, ("logits",))
    assert taps["logits"].shape == (20, 320)
    exact = NumpyModel(checkpoint(MODEL)).logits(PROMPTS[0])
    assert np.abs(taps["logits"] - exact).max() < 0.1 * exact.std()


@pytest.mark.accept
def test_a_block_under_torch_compile_shows_what_it_returns_and_is_not_compiled_anew() -> None:
    options: dict[str, Any] = {"kernels": "framework", "compile": True, "device": "cpu", "threads": 1}
    runner = load_backend("torch", EngineConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, **options))
    runner.load(checkpoint(MODEL))
    runner.allocate([PAGES])
    runner.warmup()
    compiled, packer = runner.compilations, Packer(PAGES, 16, num_rows=4, max_len=64)
    taps = runner.observe(packer.step([(packer.add(PROMPTS[0]), 0, 20)]))
    layers = [f"layers.{layer}.{tensor}" for layer in range(2) for tensor in ("q", "k", "v", "attention", "residual")]
    assert list(taps) == ["embedding", *layers, "final_norm", "logits", "tokens"]
    assert runner.compilations == compiled > 0


def test_a_runner_that_shows_nothing_says_so(tmp_path: Any) -> None:
    runner = HistoryRunner(num_pages=4)
    batch = Packer(4, 16).step([])
    assert not runner.caps.observes
    for closed in (runner, Recorder(runner, tmp_path / "trace")):
        with pytest.raises(BackendError, match="does not show"):
            closed.observe(batch)


def test_rows_of_logits_are_compared_as_distributions() -> None:
    a, b = np.array([1.0, 2.0, 3.0], np.float32), np.array([1.0, 2.5, 3.0], np.float32)
    same = compare_row(a, a + 5, (2, 2))
    assert same["kld"] == pytest.approx(0, abs=1e-9) and same["logprobs"][0] == pytest.approx(same["logprobs"][1])
    p, q = (np.exp(x) / np.exp(x).sum() for x in (a, b))
    found = compare_row(a, b, (2, 1))
    assert found["kld"] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    assert found["logprobs"][1] == pytest.approx((np.log(q[2]), np.log(q[1])), rel=1e-5)
    assert found["error"] == pytest.approx(0.5 / a.std())
    for bad in (np.nan, np.inf, -np.inf):
        assert compare_row(a, np.array([1.0, bad, 3.0], np.float32), (2, 2))["kld"] == np.inf
