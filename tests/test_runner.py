"""Each backend's runner, a step at a time: pages that travel, tokens that stay on the device, nothing compiled late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common.engine import build_engine
from common.errors import BackendError, ConfigError
from common.interface import ModelRunner, Result, load_backend
from common.request import Request, SamplingParams
from common.schedule.trace import Recorder
from tests.backends import BACKENDS, Packer, checkpoint, engine_config, make_engine, shared_runner
from tests.replays import replay

MODEL = "tiny-llama"
CONFIG = engine_config(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)
PAGES, B = 64, CONFIG.block_size
VOCAB = checkpoint(MODEL).config.vocab_size
PROMPT = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()
TOLERANCE = 2e-4
"""Of float32 logprobs, whatever the schedule."""


@pytest.fixture
def runner(backend: str) -> ModelRunner:
    runner = shared_runner(backend, MODEL, PAGES, CONFIG)
    runner.reset()
    return runner


def test_compile_is_refused_where_the_step_is_compiled_always() -> None:
    with pytest.raises(ConfigError, match="compile=true is not among its options"):
        load_backend("jax", engine_config(compile=True))


def packer(seed: int = 0) -> Packer:
    return Packer(PAGES, B, num_rows=4, max_len=128, seed=seed)


def prefill(runner: ModelRunner, pack: Packer, row: int, tokens: list[int]) -> Result:
    """Run a prompt in chunks; the result of the last."""
    for start in range(0, len(tokens), 32):
        result = runner.submit(pack.step([(row, start, min(32, len(tokens) - start))])).result()
    return result


def decode(runner: ModelRunner, pack: Packer, row: int, at: int, token: int, steps: int) -> list[int]:
    """Greedy tokens from `token` at position `at` on, that one included."""
    tokens = [token]
    for position in range(at, at + steps):
        pack.rows.tokens[row, position] = tokens[-1]
        tokens.append(int(runner.submit(pack.step([(row, position, 1)])).result().tokens[0]))
    return tokens


@pytest.mark.parametrize("kernels", ["framework", "native"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_come_back_as_they_were_written(backend: str, dtype: str, kernels: str) -> None:
    small = engine_config(dtype=dtype, kernels=kernels, max_num_seqs=2, max_num_batched_tokens=32)
    runner = shared_runner(backend, MODEL, PAGES, small)
    runner.reset()
    config, rng = checkpoint(MODEL).config, np.random.default_rng(0)
    before = runner.read_pages(0, range(PAGES))
    shape = (config.num_layers, 3, B, config.num_kv_heads, config.head_dim)
    assert before["k"].shape == (shape[0], PAGES, *shape[2:]) and before["k"].dtype.name == dtype
    arrays = {name: rng.standard_normal(shape).astype(before[name].dtype) for name in ("k", "v")}
    runner.write_pages(0, [9, 2, 63], arrays)
    after = runner.read_pages(0, [63, 9, 2])
    assert all(np.array_equal(after[name], arrays[name][:, [2, 0, 1]]) for name in arrays)
    others = [page for page in range(PAGES) if page not in (9, 2, 63)]
    assert all(np.array_equal(runner.read_pages(0, others)[name], before[name][:, others]) for name in arrays)
    after["k"][:] = 7  # a copy: the pool must not see this
    assert not (runner.read_pages(0, [9])["k"] == 7).any()
    none = runner.read_pages(0, [])
    assert none["v"].shape == none["k"].shape == (shape[0], 0, *shape[2:])
    runner.write_pages(0, [], none)


@pytest.mark.parametrize("kernels", ["framework", "native"])
def test_pages_are_written_where_the_pools_are(backend: str, kernels: str) -> None:
    config = engine_config(kernels=kernels, max_num_seqs=2, max_num_batched_tokens=32)
    runner: Any = shared_runner(backend, MODEL, PAGES, config)
    runner.reset()

    def places() -> list[int]:
        pools = [pool for pools in runner.state.cache for pool in pools]
        return [pool.data_ptr() if backend == "torch" else pool.unsafe_buffer_pointer() for pool in pools]

    before = places()
    for pages in ([3], [5, 1, 40]):
        runner.write_pages(0, pages, runner.read_pages(0, pages))
    assert places() == before


@pytest.mark.parametrize("kernels", ["framework", "native"])
def test_no_number_of_pages_compiles_anything_after_warm_up(backend: str, kernels: str) -> None:
    runner = shared_runner(backend, MODEL, PAGES, engine_config(kernels=kernels, max_num_seqs=2, max_num_batched_tokens=32))
    runner.reset()
    rng, before = np.random.default_rng(1), runner.compilations
    for count in (1, 2, 17, 35):
        pages = rng.permutation(np.arange(1, PAGES))[:count].tolist()
        arrays = {name: rng.standard_normal(x.shape, np.float32) for name, x in runner.read_pages(0, pages).items()}
        runner.write_pages(0, pages, arrays)
        after = runner.read_pages(0, pages)
        assert all(np.array_equal(after[name], arrays[name]) for name in arrays)
    assert runner.compilations == before


@pytest.mark.parametrize("kernels", ["framework", "native"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_page_takes_the_bytes_that_are_stored(
    backend: str, dtype: str, kernels: str, family: str, families: dict[str, Path]
) -> None:
    """Heads of 24 are padded by the native kernels, those of 32 are not."""
    runner: Any = load_backend(backend, engine_config(dtype=dtype, kernels=kernels))
    runner.load(checkpoint(families[family]))
    runner.allocate([7])
    (group,) = runner.kv_groups()
    assert sum(pool.nbytes for pools in runner.state.cache for pool in pools) == 7 * group.page_bytes
    runner.close()


@pytest.mark.parametrize(("writer", "reader"), [(a, b) for a in BACKENDS for b in BACKENDS])
def test_pages_of_one_engine_are_continued_by_another(writer: str, reader: str) -> None:
    first, second = (shared_runner(name, MODEL, PAGES, CONFIG) for name in (writer, reader))
    second.reset()
    pack = packer()
    row = pack.add(PROMPT, length=60)
    right = decode(second, pack, row, 40, int(prefill(second, pack, row, PROMPT).tokens[0]), 10)
    first.reset()
    pack = packer()
    row = pack.add(PROMPT, length=60)
    token = int(prefill(first, pack, row, PROMPT).tokens[0])
    arrays = first.read_pages(0, pack.rows.pages[row, :3].tolist())
    second.reset()
    elsewhere = packer(seed=5)
    other = elsewhere.add(PROMPT, length=60)
    second.write_pages(0, elsewhere.rows.pages[other, :3].tolist(), arrays)
    assert decode(second, elsewhere, other, 40, token, 10) == right


def test_a_token_the_host_does_not_know_is_taken_from_its_row(runner: ModelRunner) -> None:
    prompts = [PROMPT[:5], PROMPT[5:19], PROMPT[19:28], PROMPT[28:]]

    def run(fills: list[int]) -> list[int]:
        runner.reset()
        pack = packer()
        rows = [pack.add(prompt, length=40) for prompt in prompts]
        tokens = {}
        for row, prompt in zip(rows, prompts, strict=True):
            tokens[row] = int(prefill(runner, pack, row, prompt).tokens[0])
        order = [rows[2], rows[0], rows[3]]  # neither all rows nor in their order
        for row in order:
            pack.rows.tokens[row, len(prompts[rows.index(row)])] = tokens[row]
        plan = [(row, len(prompts[rows.index(row)]), 1) for row in order]
        second = runner.submit(pack.step(plan, fills=fills)).result().tokens.tolist()
        # Once more, all from the device: what the step before sampled.
        plan = [(row, start + 1, 1) for row, start, _ in plan]
        return second + runner.submit(pack.step(plan, fills=[0, 1, 2])).result().tokens.tolist()

    known = run([])
    assert len(set(known)) > 1
    assert known == run([0, 1, 2]) == run([1])


def test_pages_are_copied_before_the_step_reads_them(runner: ModelRunner) -> None:
    pack = packer()
    row = pack.add(PROMPT, length=60)
    right = decode(runner, pack, row, 40, int(prefill(runner, pack, row, PROMPT).tokens[0]), 1)
    twin = pack.add([*PROMPT, right[0]], length=60)
    spare = [pack.free.pop() for _ in range(20)]  # more pairs than one call of any backend takes
    pairs = [*zip(pack.rows.pages[row, :3].tolist(), pack.rows.pages[twin, :3].tolist(), strict=True)]
    pairs += [(pack.rows.pages[row, 0], page) for page in spare]
    batch = pack.step([(twin, 40, 1)], copies=np.array([pairs]))
    assert runner.submit(batch).result().tokens.tolist() == right[1:]
    copied = runner.read_pages(0, [int(pack.rows.pages[row, 0]), *spare])
    assert all((x == x[:, :1]).all() and x[:, 0].any() for x in copied.values())


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "top_k": 5}, {"logprobs": 4}], ids=str
)
def test_a_step_may_have_no_tokens_or_ask_for_none(runner: ModelRunner, params: dict[str, Any]) -> None:
    empty = runner.submit(packer().step([])).result()
    assert (len(empty.tokens), empty.token_starts.tolist(), len(empty.finite)) == (0, [0], 0)
    pack = packer()
    row = pack.add(PROMPT, **params)
    inside = runner.submit(pack.step([(row, 0, 20)], samples=[])).result()
    assert (len(inside.tokens), inside.token_starts.tolist(), len(inside.finite)) == (0, [0, 0], 0)
    rest = runner.submit(pack.step([(row, 20, 20)])).result()
    runner.reset()
    assert rest.tokens.tolist() == prefill(runner, pack, row, PROMPT).tokens.tolist()


def test_a_result_is_as_documented(runner: ModelRunner) -> None:
    pack = packer()
    rows = [pack.add(PROMPT[:n], logprobs=k) for n, k in ((9, 3), (7, None), (8, 5))]
    result = runner.submit(pack.step([(rows[0], 0, 9), (rows[1], 0, 6), (rows[2], 0, 8)], samples=[0, 2])).result()
    assert result.token_starts.tolist() == [0, 1, 1, 2] and result.finite.tolist() == [True, True]
    ids, floats = np.dtype(np.int32), np.dtype(np.float32)
    wanted = {"tokens": (ids, (2,)), "ranks": (ids, (2,)), "top_ids": (ids, (2, 5))}
    wanted |= {"logprobs": (floats, (2,)), "top_logprobs": (floats, (2, 5))}
    assert {name: (getattr(result, name).dtype, getattr(result, name).shape) for name in wanted} == wanted
    assert result.ranks is not None and result.top_ids is not None and result.ranks.tolist() == [1, 1]
    assert result.tokens.tolist() == result.top_ids[:, 0].tolist()


@pytest.mark.parametrize(
    "numbers",
    [
        {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 4, "block_size": 1},
        {"max_num_seqs": 1, "max_num_batched_tokens": 32, "max_model_len": 20},
        {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 5, "block_size": 32},
    ],
    ids=["everything least", "one sequence", "a budget above the context"],
)
def test_small_engines_run(backend: str, numbers: dict[str, int]) -> None:
    engine = make_engine(backend, MODEL, engine_config(**numbers), pages=8)
    greedy = SamplingParams(max_tokens=2, temperature=0.0)
    requests = [Request(request_id=name, prompt_token_ids=PROMPT[:2], params=greedy) for name in "ab"]
    one, other = ([event.token_id for event in events] for events in engine.run(requests).values())
    assert one == other and len(one) == 2 and engine.stats()["num_resets"] == 0


def test_a_result_is_the_same_when_it_is_taken_twice(runner: ModelRunner) -> None:
    pack = packer()
    pending = runner.submit(pack.step([(pack.add(PROMPT[:9]), 0, 9)]))
    assert pending.result() is pending.result()


def test_a_reset_forgets_every_page(runner: ModelRunner) -> None:
    pack = packer()
    prefill(runner, pack, pack.add(PROMPT), PROMPT)
    assert any(x.any() for x in runner.read_pages(0, range(1, PAGES)).values())
    runner.reset()
    assert not any(x.any() for x in runner.read_pages(0, range(PAGES)).values())


def test_a_closed_runner_says_so(backend: str) -> None:
    runner = load_backend(backend, CONFIG)
    runner.load(checkpoint(MODEL))
    runner.allocate([PAGES])
    runner.close()
    runner.close()
    with pytest.raises(BackendError, match="closed"):
        runner.submit(packer().step([]))


def varied(n: int) -> list[Request]:
    """Requests of all lengths and kinds of sampling."""
    rng = np.random.default_rng(1)
    kinds = (
        {"temperature": 0.0},
        {"seed": 3},
        {"top_k": 5},
        {"top_p": 0.9, "logprobs": 3},
        {"temperature": 0.0, "logprobs": 20},
    )
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=rng.integers(0, VOCAB, int(rng.integers(1, 90))).tolist(),
            params=SamplingParams(max_tokens=int(rng.integers(1, 30)), **kinds[i % len(kinds)]),
        )
        for i in range(n)
    ]


def test_nothing_is_compiled_after_the_warm_up(backend: str) -> None:
    engine = make_engine(backend, MODEL, CONFIG, pages=PAGES, few=14)
    before = engine.stats()["compilations"]
    requests = varied(40)
    twins = [Request(request_id=f"{r.request_id}'", prompt_token_ids=r.prompt_token_ids) for r in requests]
    events = engine.run([request for pair in zip(requests, twins, strict=True) for request in pair])
    pack = packer()
    engine.runner.submit(pack.step([(pack.add(PROMPT), 0, 2)], copies=[[(1, 2)] * 17])).result()
    stats = engine.stats()
    assert all(e[-1].finish for e in events.values())
    assert stats["num_preemptions"] > 0 and stats["prefix_cache_hits"] > 0
    assert stats["compilations"] == before


def test_a_compilation_is_counted() -> None:
    runner = shared_runner("jax", MODEL, PAGES, CONFIG)
    before = runner.compilations
    assert before > 0
    jax.jit(lambda x: x * 3 + 1)(np.arange(5.0)).block_until_ready()
    assert runner.compilations > before


def likeliest(result: Result, row: int) -> dict[int, float]:
    """Token → log-probability, as a step reports them for one of its logit rows."""
    assert result.top_ids is not None and result.top_logprobs is not None
    return dict(zip(result.top_ids[row].tolist(), result.top_logprobs[row].tolist(), strict=True))


@pytest.mark.parametrize(("recorder", "other"), [BACKENDS, BACKENDS[::-1]])
def test_a_trace_of_one_backend_replays_on_the_other(recorder: str, other: str, tmp_path: Path) -> None:
    config = engine_config(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, num_blocks=PAGES)
    engine = build_engine(recorder, checkpoint(MODEL), config)
    engine.runner = Recorder(engine.runner, tmp_path / "trace")
    requests = [
        Request(
            request_id=r.request_id,
            prompt_token_ids=r.prompt_token_ids,
            params=SamplingParams(max_tokens=r.params.max_tokens, temperature=0.0, logprobs=20),
        )
        for r in varied(12)
    ]
    events = engine.run(requests)
    engine.close()
    steps, tokens = 0, 0
    for _, _, recorded, new in replay(tmp_path / "trace", shared_runner(other, MODEL, PAGES, CONFIG)):
        assert new.token_starts.tolist() == recorded.token_starts.tolist() and new.finite.all()
        steps, tokens = steps + 1, tokens + len(new.tokens)
        for i, (a, b) in enumerate(zip(recorded.tokens.tolist(), new.tokens.tolist(), strict=True)):
            tables = [likeliest(result, i) for result in (recorded, new)]
            shared = tables[0].keys() & tables[1].keys()
            error = max(abs(tables[0][token] - tables[1][token]) for token in shared)
            assert error < TOLERANCE and len(shared) >= 19
            assert a == b or all(abs(table[a] - table[b]) < 2 * error for table in tables)
    assert steps > 20 and tokens == sum(len(e) for e in events.values())
