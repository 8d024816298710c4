"""Engines whose model is shared out over ranks: the tokens of one rank, and no more said than has to be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.engine import build_engine
from common.errors import BackendError, ConfigError
from common.interface import load_backend
from common.kernels.cpu.sums import open_library
from common.process import child
from common.weights import zoo
from common.weights.checkpoint import expected_shapes
from experiments.correctness.reference import NumpyModel
from tests.backends import BACKENDS, checkpoint, engine_config
from tests.families import FAMILIES
from tests.history_backend import ROOT
from tests.ranks import PAGES, Answer, Asked, Ranks
from tests.test_model import text

MODEL = "tiny-llama"
TOLERANCE = 2e-4
"""Of float32 logprobs, in whatever order they are summed."""
SEVERAL = (2, 4)
WIDER = pytest.mark.accept
SOME = ("smollm", "llama-biases", "gemma3")
"""Of the families, with tied tables and without, with biases, with windows and several rotary tables: on two ranks. All of
them, and four ranks: `accept`."""
ONE = {"ranks": 1, "stages": 1}
RNG = np.random.default_rng(0)
VOCAB = checkpoint(MODEL).config.vocab_size
PROMPTS = [RNG.integers(0, VOCAB, length).tolist() for length in (40, 7, 1, 33)]
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 20},
    {"seed": 3, "logprobs": 0},
    {"seed": 4, "top_k": 5},
    {"seed": 5, "top_p": 0.8, "temperature": 1.3},
    {"seed": 6, "min_p": 0.1, "top_k": 40, "top_p": 0.95, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "logit_bias": {5: 1.0, VOCAB - 1: 3.0}},
    {"seed": 7, "allowed_token_ids": [*range(3, VOCAB, 7)], "presence_penalty": 0.5, "logprobs": 2},
    {"temperature": 0.0, "prompt_logprobs": 2},
)


@pytest.fixture(scope="module", params=["framework", "native"])
def kernels(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def ranks(backend: str) -> Iterator[Ranks]:
    with Ranks(backend) as process:
        yield process


def model(name: str) -> Path:
    return zoo.resolve(name)


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [[token for token, *_ in answer] for answer in answers]


def judge(path: Path | str, prompt: list[int], answer: Answer) -> None:
    """Every token of a greedy answer is the float64 model's likeliest, or as likely, and its logprobs are the model's."""
    output = [token for token, *_ in answer]
    logits = NumpyModel(checkpoint(path)).logits([*prompt, *output[:-1]])[len(prompt) - 1 :]
    exact = logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    exact -= logits.max(axis=1, keepdims=True)
    for i, (token, logprob, top_ids, top_logprobs) in enumerate(answer):
        assert exact[i, token] > exact[i].max() - TOLERANCE and abs(exact[i, token] - logprob) < TOLERANCE
        assert np.abs(exact[i, top_ids] - top_logprobs).max() < TOLERANCE
        assert len(set(top_ids)) == len(top_ids) and min(exact[i, top_ids]) > np.sort(exact[i])[-len(top_ids)] - TOLERANCE


@pytest.mark.parametrize(
    ("number", "family"),
    [
        pytest.param(number, family, marks=() if number == 2 and family in SOME else WIDER)
        for number in SEVERAL
        for family in FAMILIES
    ],
)
def test_every_family_on_several_ranks_follows_the_judge(
    ranks: Ranks, kernels: str, number: int, family: str, families: dict[str, Path]
) -> None:
    prompts = [[token % 199 for token in prompt] for prompt in PROMPTS[:2]]
    asked: list[Asked] = [(prompt, {"temperature": 0.0, "max_tokens": 4, "logprobs": 5}) for prompt in prompts]
    for prompt, answer in zip(prompts, ranks.run(number, families[family], kernels, asked), strict=True):
        judge(families[family], prompt, answer)


@pytest.mark.accept
@pytest.mark.parametrize("number", SEVERAL)
def test_a_real_model_on_several_ranks_follows_the_judge(ranks: Ranks, kernels: str, number: int) -> None:
    prompt = text("smollm2-135m", 30)
    asked: list[Asked] = [(prompt, {"temperature": 0.0, "max_tokens": 24, "logprobs": 5})]
    (answer,) = ranks.run(number, model("smollm2-135m"), kernels, asked)
    judge("smollm2-135m", prompt, answer)


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=WIDER)])
def test_every_kind_of_sampling_gives_the_tokens_of_one_rank(ranks: Ranks, kernels: str, number: int) -> None:
    asked = [(prompt, params | {"max_tokens": 12}) for params in KINDS for prompt in PROMPTS]
    one, several = (ranks.run(each, model(MODEL), kernels, asked) for each in (1, number))
    assert len({tuple(answer) for answer in tokens(one)}) > len(KINDS)
    assert tokens(several) == tokens(one)
    for mine, right in zip(several, one, strict=True):
        for (_, *got), (_, *wanted) in zip(mine, right, strict=True):
            assert [np.shape(x) for x in got] == [np.shape(x) for x in wanted]
            if wanted:
                assert got[1] == wanted[1] and np.abs(np.subtract(got[2], wanted[2])).max(initial=0) < TOLERANCE


@pytest.mark.parametrize("number", SEVERAL)
@pytest.mark.parametrize("allowed", [0, 130, VOCAB - 1])
def test_a_mask_that_comes_while_the_step_runs_reaches_every_rank(
    ranks: Ranks, kernels: str, number: int, allowed: int
) -> None:
    asked = {"ranks": number, "model": model(MODEL), "kernels": kernels, "prompt": PROMPTS[1]}
    assert ranks.ask("masked", **asked, allowed=allowed) == [allowed]


@pytest.mark.parametrize("number", SEVERAL)
def test_two_sums_a_layer_are_told_and_one_of_the_embedding_and_no_logits(ranks: Ranks, kernels: str, number: int) -> None:
    config = checkpoint(MODEL).config
    filters = {"seed": 1, "top_k": 9, "top_p": 0.9, "max_tokens": 1, "logprobs": 20}
    said = ranks.ask("said", ranks=number, model=model(MODEL), kernels=kernels, asked=[(PROMPTS[3][:32], filters)])
    stream = [shape for kind, shape in said if kind == "all-reduce" and shape == [32, config.hidden_size]]
    assert len(stream) == 2 * config.num_layers + 1
    rows = 4 if ranks.process.args[-1] == "jax" else 1  # type: ignore[index]
    others = [shape for _, shape in said if shape != [32, config.hidden_size]]
    assert others and max(int(np.prod(shape)) for shape in others) <= rows * max(128, 20 * number)


@pytest.mark.parametrize("number", SEVERAL)
def test_pages_are_read_and_written_whole(ranks: Ranks, kernels: str, number: int, families: dict[str, Path]) -> None:
    for path in (model(MODEL), families["smollm"]):
        asked = [(PROMPTS[0], {"temperature": 0.0, "max_tokens": 2})]
        asked = [([token % 199 for token in prompt], params) for prompt, params in asked]
        step = {"model": path, "kernels": kernels, "asked": asked, "pages": [1, 2]}
        one, several = (ranks.ask("pages", ranks=n, **step) for n in (1, number))
        assert one["same"] and several["same"]
        for name in ("k", "v"):
            assert np.shape(one[name]) == np.shape(several[name])
            assert np.abs(np.subtract(one[name], several[name])).max() < 1e-4 and np.any(one[name])


def test_what_an_engine_of_several_ranks_says_of_itself(ranks: Ranks, kernels: str) -> None:
    one, two, four = (ranks.ask("caps", ranks=n, model=model(MODEL), kernels=kernels) for n in (1, 2, 4))
    assert one["observes"] and not two["observes"]
    assert two["kernels"] == [kernels] and two["vocab_size"] == one["vocab_size"] == VOCAB
    # Both KV heads split over two ranks; on four each of them is twice.
    assert two["page_bytes"] == one["page_bytes"] and four["page_bytes"] == 2 * one["page_bytes"]
    whole = PAGES * one["page_bytes"] + 4 * sum(
        int(np.prod(shape)) for shape in expected_shapes(checkpoint(MODEL).config).values()
    )
    assert "rank_bytes" not in one and 0.5 * whole < two["rank_bytes"] < 0.75 * whole


@pytest.mark.parametrize("number", SEVERAL)
def test_what_ranks_tell_each_other_is_counted(ranks: Ranks, kernels: str, number: int) -> None:
    config = checkpoint(MODEL).config
    asked = [(PROMPTS[3][:32], {"temperature": 0.0, "max_tokens": 1})]
    told = ranks.ask("told", ranks=number, model=model(MODEL), kernels=kernels, asked=asked)
    stream = (2 * config.num_layers + 1) * 32 * config.hidden_size * 4
    assert stream < told["communication_bytes"] < 1.25 * stream
    assert told.get("communication_seconds", 1.0) > 0


def test_with_native_kernels_both_engines_hold_the_same_bits_on_two_ranks(families: dict[str, Path]) -> None:
    """Of more than two the frameworks add up the terms in different orders."""
    asked = [([token % 199 for token in PROMPTS[0]], {"temperature": 0.0, "max_tokens": 8})]
    held = []
    for backend in BACKENDS:
        with Ranks(backend) as process:
            for family, dtype in (("smollm", "float32"), ("smollm", "bfloat16"), ("gemma3", "bfloat16")):
                step = {"model": families[family], "kernels": "native", "dtype": dtype, "asked": asked, "pages": [1, 2]}
                held.append(process.ask("pages", ranks=2, **step))
    assert held[:3] == held[3:]
    assert all(each["same"] for each in held)


# ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(
    scope="module",
    params=[("framework", 1), ("native", 1), ("native", 2), pytest.param(("framework", 2), marks=WIDER)],
    ids=lambda each: f"{each[0]}-{each[1]}",
)
def staged(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Kernels, and the ranks of each of two stages."""
    kernels, number = request.param
    return {"kernels": kernels, "ranks": number, "stages": 2}


@pytest.mark.parametrize(
    ("number", "stages"), [(1, 2), *(pytest.param(*sizes, marks=WIDER) for sizes in ((1, 3), (2, 2), (4, 2)))]
)
@pytest.mark.parametrize("family", [*SOME, *(pytest.param(name, marks=WIDER) for name in FAMILIES if name not in SOME)])
def test_every_family_in_stages_follows_the_judge(
    ranks: Ranks, kernels: str, number: int, stages: int, family: str, families: dict[str, Path]
) -> None:
    prompts = [[token % 199 for token in prompt] for prompt in PROMPTS]
    asked: list[Asked] = [(prompt, {"temperature": 0.0, "max_tokens": 4, "logprobs": 5}) for prompt in prompts]
    for prompt, answer in zip(prompts, ranks.run(number, families[family], kernels, asked, stages), strict=True):
        judge(families[family], prompt, answer)


@pytest.mark.accept
@pytest.mark.parametrize(("number", "stages"), [(1, 2), (1, 4), (2, 2), (4, 2)])
def test_a_real_model_in_stages_follows_the_judge(ranks: Ranks, kernels: str, number: int, stages: int) -> None:
    prompt = text("smollm2-135m", 30)
    asked: list[Asked] = [(prompt, {"temperature": 0.0, "max_tokens": 24, "logprobs": 5})]
    (answer,) = ranks.run(number, model("smollm2-135m"), kernels, asked, stages)
    judge("smollm2-135m", prompt, answer)


@pytest.mark.accept
def test_kv_heads_that_several_ranks_hold_are_in_stages_too(ranks: Ranks, families: dict[str, Path]) -> None:
    """Four ranks a stage, and two KV heads."""
    prompt = [token % 199 for token in PROMPTS[0]]
    asked: list[Asked] = [(prompt, {"temperature": 0.0, "max_tokens": 4, "logprobs": 5})]
    (answer,) = ranks.run(4, families["llama3"], "native", asked, 2)
    judge(families["llama3"], prompt, answer)


@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=WIDER)])
def test_with_native_kernels_stages_hold_the_bits_of_one_rank(ranks: Ranks, stages: int, families: dict[str, Path]) -> None:
    asked = [([token % 199 for token in PROMPTS[0]], {"temperature": 0.0, "max_tokens": 8})]
    for family, dtype in (("smollm", "float32"), ("gemma3", "bfloat16")):
        step = {"model": families[family], "kernels": "native", "dtype": dtype, "asked": asked, "pages": [1, 2]}
        one, several = (ranks.ask("pages", ranks=1, stages=n, **step) for n in (1, stages))
        assert one == several and several["same"]


def test_stages_with_several_steps_in_flight_give_the_tokens_of_one_rank(ranks: Ranks, staged: dict[str, Any]) -> None:
    asked = [(prompt, params | {"max_tokens": 6}) for params in KINDS[::2] for prompt in PROMPTS]
    one, several = (ranks.ask("run", model=model(MODEL), asked=asked, **(staged | size)) for size in (ONE, {}))
    assert tokens(several) == tokens(one)
    caps = ranks.ask("caps", model=model(MODEL), **staged)
    assert (caps["depth"], caps["pipelined"]) == (1, True)


@pytest.mark.parametrize("allowed", [0, VOCAB - 1])
def test_a_mask_that_comes_while_the_step_runs_reaches_the_last_stage(
    ranks: Ranks, staged: dict[str, Any], allowed: int
) -> None:
    assert ranks.ask("masked", model=model(MODEL), prompt=PROMPTS[1], allowed=allowed, **staged) == [allowed]


def test_a_step_without_tokens_goes_through_all_stages(ranks: Ranks, staged: dict[str, Any]) -> None:
    one, several = (ranks.ask("nothing", model=model(MODEL), prompt=PROMPTS[0][:30], **(staged | size)) for size in (ONE, {}))
    assert several == one and [len(tokens) for tokens in several] == [0, 0, 1]


def test_pages_of_stages_are_read_and_written_whole(ranks: Ranks, staged: dict[str, Any]) -> None:
    asked = [(PROMPTS[0], {"temperature": 0.0, "max_tokens": 2})]
    step = {"model": model(MODEL), "asked": asked, "pages": [1, 2]}
    one, several = (ranks.ask("pages", **step, **(staged | size)) for size in (ONE, {}))
    assert several["same"]
    for name in ("k", "v"):
        assert np.shape(one[name]) == np.shape(several[name])
        assert np.abs(np.subtract(one[name], several[name])).max() < 1e-4 and np.any(one[name])


def test_a_stage_holds_its_own_layers_and_hears_one_stream(ranks: Ranks, kernels: str) -> None:
    config = checkpoint(MODEL).config
    sizes = {"model": model(MODEL), "kernels": kernels, "ranks": 1}
    one, two = (ranks.ask("caps", stages=n, **sizes) for n in (1, 2))
    assert two["page_bytes"] == one["page_bytes"]
    shapes = expected_shapes(config).items()
    divisible = PAGES * one["page_bytes"] + 4 * sum(int(np.prod(shape)) for name, shape in shapes if ".layers." in name)
    table = 4 * config.vocab_size * config.hidden_size
    assert 0.5 * divisible < two["rank_bytes"] - table < 0.55 * divisible
    asked = [(PROMPTS[3][:32], {"temperature": 0.0, "max_tokens": 1})]
    told = ranks.ask("told", stages=2, asked=asked, **sizes)
    assert told["communication_bytes"] == 32 * config.hidden_size * 4


def test_stages_compile_nothing_after_warm_up(ranks: Ranks, staged: dict[str, Any]) -> None:
    asked = [(prompt, {"max_tokens": 6, "seed": 1, "presence_penalty": 0.5}) for prompt in PROMPTS]
    assert ranks.ask("compiled", model=model(MODEL), asked=asked, **staged) == 0


@pytest.mark.accept
def test_ranks_of_jax_can_be_made_where_jax_has_been_used_before() -> None:
    code = (
        "import json, jax, jax.numpy as jnp\nfrom common.llm import LLM\nfrom common.request import SamplingParams\n"
        "assert float(jnp.ones(3).sum()) == 3 and len(jax.devices()) == 1\n"
        "options = dict(backend='jax', dtype='float32', device='cpu', num_blocks=32, max_model_len=128, max_num_seqs=2)\n"
        "for ranks in (1, 2):\n"
        "    with LLM('tiny-llama', tensor_parallel_size=ranks, **options) as llm:\n"
        "        (answer,) = llm.generate(['the and of'], SamplingParams(temperature=0.0, max_tokens=6))\n"
        "        print(json.dumps(list(answer.outputs[0].token_ids)), flush=True)\n"
        "assert float(jnp.ones(4).sum()) == 4\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = done.stdout.splitlines()[-2:]
    assert one == two and len(json.loads(two)) == 6


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel_size": 3}, r"=3 does not divide the 128 features .* Numbers that do: 1, 2, 4, 8"),
        ({"pipeline_parallel_size": 31}, r"pipeline_parallel_size=31 .* has (\d+)\. Numbers that can: 1 to \1\."),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_divide_a_model_is_refused_before_a_rank_starts(
    backend: str, options: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "start", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ConfigError, match=said):
        build_engine(backend, checkpoint(MODEL), engine_config(**options))


def test_ranks_that_are_processes_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    open_library.cache_clear()
    with pytest.raises(BackendError, match=r"through a library .* cannot be had: There is no C\+\+ compiler"):
        load_backend("torch", engine_config(tensor_parallel_size=2, kernels="framework"))


def test_more_ranks_than_jax_has_devices_are_refused() -> None:
    import jax

    count = len(jax.local_devices(backend="cpu"))
    with pytest.raises(BackendError, match=f"needs {count + 1} devices, and JAX has {count} of cpu"):
        load_backend("jax", engine_config(tensor_parallel_size=count + 1))
