"""`LLM` on real engines with a tiny model, the text of a request from its tokens, and the command line."""

from __future__ import annotations

import gc
import inspect
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any

import numpy as np
import psutil
import pytest

import common
from common.config import EngineConfig
from common.engine import Engine
from common.errors import BackendError, CheckpointError, ConfigError, RequestError, TandemError
from common.llm import LLM
from common.llm.__main__ import main
from common.llm.async_llm import AsyncLLM
from common.llm.outputs import CompletionOutput, RequestOutput
from common.process.exits import FAILURE, READER_GONE
from common.process.interrupt import defer_sigint
from common.request import Logprobs, Request, SamplingParams, Status, TokenEvent
from common.text.output import Delta, OutputText
from common.text.tokenizer import Tokenizer, open_tokenizer
from common.weights.zoo import resolve

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SMALL = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 256,
    "num_blocks": 80,
    "threads": 1,
}
CHAT = [{"role": "user", "content": "Say it"}]


@pytest.fixture(scope="module", params=["jax", "torch"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM("tiny-llama", backend=request.param, **SMALL) as llm:
        yield llm
        while llm.engine.has_work:
            llm.engine.step()
        assert llm.engine.stats()["kv_cache_usage"] == 0, "a request left pages behind"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_tokenizer(resolve("tiny-llama"))


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True} | changes)


def assert_idle(llm: LLM) -> None:
    """Nothing runs any more: one step may report ends that are known already."""
    llm.engine.step()
    assert not llm.engine.has_work


def only(outputs: Sequence[RequestOutput]) -> CompletionOutput:
    assert len(outputs) == len(outputs[0].outputs) == 1
    return outputs[0].outputs[0]


# ---- generate -------------------------------------------------------------------------------------------------------------


def test_outputs_come_in_the_order_of_the_prompts_with_the_names_of_vllm(llm: LLM) -> None:
    prompts = ["the rest", "another one", "x" * 50, "in", "and more than can run at once", "of"]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == prompts
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == llm.tokenizer.encode(prompt)
        assert output.finished and len({o.request_id for o in outputs}) == len(outputs)
        (completion,) = output.outputs
        assert completion.index == 0 and completion.finish_reason == "length" and completion.stop_reason is None
        assert len(completion.token_ids) == 24
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert completion.cumulative_logprob is None and completion.logprobs is None and completion.error is None
        assert only(llm.generate(prompt, GREEDY)) == completion, "alone as in company"


def test_a_prompt_may_be_text_or_ids_in_every_form(llm: LLM) -> None:
    text = "the one"
    ids = llm.tokenizer.encode(text)
    forms: list[Any] = [text, ids, tuple(ids), np.array(ids), {"prompt": text}, {"prompt_token_ids": ids}]
    outputs = [llm.generate(form, GREEDY)[0] for form in forms] + llm.generate(forms, GREEDY)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert all(output.prompt_token_ids == ids for output in outputs)
    assert [output.prompt for output in outputs[:6]] == [text, None, None, None, text, None]


def test_sampling_params_are_one_for_all_or_one_each_or_the_defaults(llm: LLM) -> None:
    each = [greedy(max_tokens=n) for n in (1, 3, 2)]
    assert [len(o.outputs[0].token_ids) for o in llm.generate(["a", "b", "c"], each)] == [1, 3, 2]
    assert 0 < len(only(llm.generate("a")).token_ids) <= 16
    assert llm.generate([], GREEDY) == []


def test_a_seed_decides_what_is_sampled(llm: LLM) -> None:
    hot = [SamplingParams(temperature=2.0, seed=seed, max_tokens=24, ignore_eos=True) for seed in (1, 1, 2)]
    first, again, other = (output.outputs[0].token_ids for output in llm.generate(["the"] * 3, hot))
    assert first == again != other


def test_n_continuations_of_a_prompt_are_joined_by_index_and_fork_its_pages(llm: LLM) -> None:
    prompts = ["Once upon a time there was a little", "the"]
    assert isinstance(llm.engine, Engine)
    forks = llm.engine.scheduler.num_forks
    hot = SamplingParams(n=3, temperature=2.0, seed=5, max_tokens=24, ignore_eos=True)
    joined = llm.generate(prompts, hot)
    assert llm.engine.scheduler.num_forks > forks
    for prompt, output in zip(prompts, joined, strict=True):
        assert output.prompt == prompt and [each.index for each in output.outputs] == [0, 1, 2]
        seeds = [replace(hot, n=1, seed=5 + i) for i in range(3)]
        alone = [only(llm.generate(prompt, params)).token_ids for params in seeds]
        assert [each.token_ids for each in output.outputs] == alone and len(set(map(tuple, alone))) == 3
    with pytest.raises(RequestError, match="got n=3"):
        llm.stream("the", hot)
    assert_idle(llm)


def test_logprobs_hold_the_chosen_token_and_the_likeliest(llm: LLM) -> None:
    completion = only(llm.generate("the", SamplingParams(temperature=3.0, seed=4, max_tokens=24, logprobs=3, ignore_eos=True)))
    assert completion.logprobs is not None and len(completion.logprobs) == 24
    for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
        assert token in found
        assert len(found) == (3 if found[token].rank <= 3 else 4)
        assert [found[t].rank for t in found if t != token] == sorted({1, 2, 3} - {found[token].rank})[: len(found) - 1]
        assert all(p.logprob <= 0 and p.decoded_token == llm.tokenizer.decode([t], False) for t, p in found.items())
    total = sum(found[token].logprob for token, found in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total, abs=1e-6)


def test_prompt_logprobs_hold_every_token_of_the_prompt_but_the_first(llm: LLM) -> None:
    (output,) = llm.generate("the cat sat", greedy(prompt_logprobs=2, max_tokens=3))
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(output.prompt_token_ids) > 2
    first, *others = output.prompt_logprobs
    assert first is None
    for token, found in zip(output.prompt_token_ids[1:], others, strict=True):
        assert found is not None and len(found) == (2 if found[token].rank <= 2 else 3)
    (plain,) = llm.generate("the cat sat", greedy(max_tokens=3))
    assert plain.prompt_logprobs is None and plain.outputs[0].token_ids == output.outputs[0].token_ids


def test_a_bad_word_does_not_come_up(llm: LLM) -> None:
    free = only(llm.generate("the", greedy()))
    word = llm.tokenizer.decode(free.token_ids[3:6]).strip()
    assert word
    kept = only(llm.generate("the", greedy(bad_words=[word])))
    spelt = llm.tokenizer.bad_words([word])
    assert kept.token_ids != free.token_ids
    assert not any(tuple(kept.token_ids[i : i + len(ids)]) == ids for ids in spelt for i in range(len(kept.token_ids)))


def test_a_stop_string_ends_the_request_wherever_it_lies(llm: LLM) -> None:
    free = only(llm.generate("the", GREEDY))
    for begin, length in ((1, 1), (3, 4), (7, 9)):
        stop = free.text[begin : begin + length]
        cut = free.text.index(stop)
        plain, kept = (
            only(llm.generate("the", greedy(stop=stop, max_tokens=200, include_stop_str_in_output=include)))
            for include in (False, True)
        )
        assert_idle(llm)
        assert plain.text == free.text[:cut] and kept.text == free.text[: cut + length]
        for completion in (plain, kept):
            n = len(completion.token_ids)
            assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
            assert completion.token_ids == free.token_ids[:n], "the token that completes the string is the last"
            assert stop in llm.tokenizer.decode(free.token_ids[:n]) and stop not in llm.tokenizer.decode(
                free.token_ids[: n - 1]
            )


def test_a_stop_string_that_never_comes_changes_nothing(llm: LLM) -> None:
    free = only(llm.generate("the", GREEDY))
    assert only(llm.generate("the", greedy(stop=[free.text[-4:] + "~", "\x00never"]))) == free


def test_without_detokenizing_there_are_tokens_and_no_text(llm: LLM) -> None:
    completion = only(llm.generate("the", greedy(detokenize=False)))
    assert completion.text == "" and completion.token_ids == only(llm.generate("the", GREEDY)).token_ids


def test_ctrl_c_at_any_line_leaves_an_engine_that_serves_the_next_prompts(llm: LLM, ctrl_c: Callable[[], None]) -> None:
    """Pressed at a line drawn from the whole of a run: what is whole afterwards is the next run's tokens, pages and tables."""
    prompts = [list(range(5, 25)), [7, 8], list(range(40, 70))]
    files = (
        *("engine", "llm/__init__", "text/output"),
        *(f"schedule/{name}" for name in ("scheduler", "sequence", "step", "fault_isolation", "page_pool", "request_table")),
    )
    ours = {f"{Path(common.__file__).parent}/{name}.py" for name in files}
    left = -1

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in ours:
            return None
        left -= event == "line"
        if event == "line" and left == 0:
            ctrl_c()
        return trace

    def run(at: int) -> int:
        """With Ctrl-C at this line; how many lines there were."""
        nonlocal left
        left = at
        sys.settrace(trace)
        try:
            llm.generate(prompts, GREEDY)
        finally:
            sys.settrace(None)
        return at - left

    wanted = [only([output]).token_ids for output in llm.generate(prompts, GREEDY)]
    total = run(10**9)
    assert isinstance(llm.engine, Engine)
    for at in np.random.default_rng(0).integers(1, total, 40).tolist():
        with pytest.raises(KeyboardInterrupt):
            run(at)
        assert [only([output]).token_ids for output in llm.generate(prompts, GREEDY)] == wanted, at
        assert_idle(llm)
        assert not llm._live and not llm._deltas and not llm.engine.scheduler.leaving, at
        assert llm.engine.stats()["kv_cache_usage"] == 0, at


def test_a_ctrl_c_waits_for_the_block_or_to_be_let_in_and_a_second_one_for_nothing(ctrl_c: Callable[[], None]) -> None:
    reached: list[str] = []
    for way in ("end", "let in", "again"):
        with pytest.raises(KeyboardInterrupt), defer_sigint() as let_in:
            let_in()
            ctrl_c()
            reached.append(way)
            if way == "let in":
                let_in()
                reached.append("not this")
            if way == "again":
                ctrl_c()
                reached.append("nor this")
    assert reached == ["end", "let in", "again"]
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()


# ---- stream, chat ---------------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_same_in_pieces(llm: LLM) -> None:
    for params in (GREEDY, greedy(stop=only(llm.generate("the", GREEDY)).text[9:14])):
        whole = only(llm.generate("the", params))
        deltas = list(llm.stream("the", params))
        assert "".join(delta.text for delta in deltas) == whole.text
        assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [whole.finish_reason]
        assert deltas[-1].stop_reason == whole.stop_reason


def test_streams_may_be_read_in_turn_while_others_generate(llm: LLM) -> None:
    alone = {prompt: list(llm.stream(prompt, GREEDY)) for prompt in ("the", "of")}
    first, second = llm.stream("the", GREEDY), llm.stream("of", GREEDY)
    read: dict[str, list[Delta]] = {"the": [next(first)], "of": [next(second), next(second)]}
    assert only(llm.generate("in", GREEDY)).finish_reason == "length"
    read["of"] += second
    read["the"] += first
    assert read == alone


def test_threads_that_share_it_get_what_each_gets_alone(llm: LLM) -> None:
    prompts = ["one", "another and", "the third of", "a last one"]
    alone = [only(llm.generate(prompt, GREEDY)).token_ids for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            streamed = threads.submit(lambda: [token for delta in llm.stream(prompts[0], GREEDY) for token in delta.token_ids])
            together = list(threads.map(lambda prompt: only(llm.generate(prompt, GREEDY)).token_ids, prompts[1:]))
            assert [streamed.result(), *together] == alone
    assert_idle(llm)


def test_a_stream_takes_one_prompt(llm: LLM) -> None:
    with pytest.raises(RequestError, match="A stream continues one prompt, got list"):
        llm.stream(["one", "two"])


def test_leaving_a_stream_aborts_its_request(llm: LLM) -> None:
    stream = llm.stream("the", GREEDY)
    next(stream)
    assert llm.engine.has_work
    stream.close()
    assert not llm._live and not llm._deltas
    assert_idle(llm)
    assert only(llm.generate("the", GREEDY)).finish_reason == "length"


def test_chat_answers_what_the_template_makes_of_the_messages(llm: LLM) -> None:
    prompt = llm.chat_prompt(CHAT)
    assert prompt["prompt"] == "<|im_start|>user\nSay it<|im_end|>\n<|im_start|>assistant\n"
    (output,) = llm.chat(CHAT, GREEDY)
    assert (output.prompt, output.prompt_token_ids) == (prompt["prompt"], prompt["prompt_token_ids"])
    two = llm.chat([CHAT, [*CHAT, {"role": "assistant", "content": "it"}, *CHAT]], GREEDY)
    assert two[0].outputs == output.outputs and len(two[1].prompt_token_ids) > len(output.prompt_token_ids)


# ---- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("", GREEDY, "the prompt is empty"),
        ([[]], GREEDY, "the prompt is empty"),
        (["fine", 5], GREEDY, "Prompt 1 must be a string"),
        (["fine", {"prompt_token_ids": [1], "images": []}], GREEDY, "Prompt 1 must be a string"),
        (5, GREEDY, "prompts must be"),
        (np.array(5), GREEDY, "Prompt 0 must be a string"),
        ([np.array(3)], GREEDY, "Prompt 0 must be a string"),
        ({"prompt": 5, "prompt_token_ids": [1]}, GREEDY, "prompt must be a string, got 5"),
        ([1, 2**40], GREEDY, r"prompt_token_ids\[1\] must be an integer in"),
        ([1, -1], GREEDY, r"prompt_token_ids\[1\]"),
        ([1, "a"], GREEDY, r"prompt_token_ids\[1\]"),
        (["a", "b"], [GREEDY], "one sampling_params for each of 2 prompts, got 1"),
        ("a", {"max_tokens": 4}, "must be SamplingParams, got dict"),
        ("a", {}, "must be SamplingParams, got dict"),
        ("a", 0, "must be SamplingParams, got int"),
        (["fine", "x" * 4000], GREEDY, "256"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_and_nothing_is_left_behind(
    llm: LLM, prompts: Any, params: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params)
    assert not llm._live and not llm._deltas
    assert only(llm.generate("the", GREEDY)).finish_reason == "length"


def test_a_model_a_backend_or_an_option_that_is_unknown_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"Unknown engine option 'dtpye'.*Did you mean 'dtype'\?"):
        LLM("tiny-llama", dtpye="float32")
    with pytest.raises(CheckpointError, match=r"Did you mean 'tiny-llama'\?"):
        LLM("tiny-lama")
    with pytest.raises(BackendError, match=r"Unknown backend 'torhc'.*Did you mean 'torch'"):
        LLM("tiny-llama", backend="torhc")


VLLM = [
    "model",
    "tokenizer",
    "tokenizer_mode",
    "skip_tokenizer_init",
    "trust_remote_code",
    "allowed_local_media_path",
    "tensor_parallel_size",
    "dtype",
    "quantization",
    "revision",
    "tokenizer_revision",
    "chat_template",
    "seed",
    "gpu_memory_utilization",
    "swap_space",
    "cpu_offload_gb",
    "enforce_eager",
    "disable_custom_all_reduce",
    "hf_token",
    "hf_overrides",
    "pooler_config",
    "mm_processor_kwargs",
    "compilation_config",
    "logits_processors",
    "kv_cache_memory_bytes",
    "runner",
    "convert",
    "task",
    "structured_outputs_config",
    "speculative_config",
    "enable_lora",
    "load_format",
    "limit_mm_per_prompt",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "pipeline_parallel_size",
    "data_parallel_size",
    "block_size",
    "num_gpu_blocks_override",
    "distributed_executor_backend",
    "generation_config",
    "disable_log_stats",
]
"""Names of vLLM's constructor of `LLM`, and of its engine's arguments that it passes on."""


def test_a_name_of_vllm_is_taken_or_refused_with_the_reason() -> None:
    taken = {*inspect.signature(LLM).parameters, *(field.name for field in fields(EngineConfig))}
    for kind in (LLM, AsyncLLM):
        for name in [name for name in VLLM if name not in taken]:
            with pytest.raises(ConfigError, match=f"Unknown engine option '{name}'") as caught:
                kind("tiny-llama", **{name: 1})
            assert "Known: " not in str(caught.value) and "--num" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"2 GiB at most; num_blocks sets its pages"):
        LLM("tiny-llama", gpu_memory_utilization=0.9)


def test_a_closed_llm_says_so() -> None:
    llm = LLM("tiny-llama", backend="torch", **SMALL)
    llm.close()
    llm.close()
    for call in (lambda: llm.generate("the"), lambda: llm.embed("the"), lambda: llm.chat_prompt(CHAT)):
        with pytest.raises(RequestError, match="This LLM is closed"):
            call()
    assert llm._chat is None


def test_an_llm_that_nobody_has_any_more_ends_its_processes() -> None:
    before = psutil.Process().children()
    llm = LLM("tiny-llama", backend="torch", tensor_parallel_size=2, **SMALL)
    processes = [process for process in psutil.Process().children() if process not in before]
    assert processes
    del llm
    gc.collect()
    psutil.wait_procs(processes, 10)
    assert not any(process.is_running() for process in processes)


def test_whoever_generates_while_another_thread_closes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM("tiny-llama", backend="torch", **SMALL)
    in_step, closing, step = Event(), Event(), llm.engine.step

    def held_step() -> list[TokenEvent]:
        in_step.set()
        assert closing.wait(60)
        return step()

    monkeypatch.setattr(llm.engine, "step", held_step)
    with ThreadPoolExecutor(2) as threads:
        generated = threads.submit(llm.generate, "the", GREEDY)
        assert in_step.wait(60)
        closed = threads.submit(llm.close)
        while not llm._closed:
            time.sleep(0.001)
        closing.set()
        closed.result()
        with pytest.raises(RequestError, match="This LLM is closed"):
            generated.result()


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_stream_of_a_closed_llm_ends_with_an_error_that_says_so(backend: str) -> None:
    llm = LLM("tiny-llama", backend=backend, **SMALL)
    stream = llm.stream("the", GREEDY)
    next(stream)
    llm.close()
    with pytest.raises(TandemError, match="closed"):
        list(stream)


# ---- the text of one request, from events ---------------------------------------------------------------------------------


def follow(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    params: SamplingParams,
    finish: Status = Status.FINISHED_LENGTH,
    reason: Any = None,
) -> tuple[str, list[int], Delta]:
    """Text, tokens and last delta of a request whose engine emits `ids` and ends with `finish`."""
    output = OutputText(tokenizer, Request(request_id="r", prompt_token_ids=(1,), params=params))
    text, tokens = "", []
    for i, token in enumerate(ids):
        last = i == len(ids) - 1
        event = TokenEvent("r", token, 0.0, finish=finish if last else None, stop_reason=reason if last else None)
        delta = output.push(event)
        text, tokens = text + delta.text, [*tokens, *delta.token_ids]
        if delta.finish is not None:
            return text, tokens, delta
    raise AssertionError("no end")


@pytest.mark.parametrize(("include", "expected"), [(False, "ab"), (True, "abcd")])
def test_a_stop_string_wins_over_an_eos_behind_it(tokenizer: Tokenizer, include: bool, expected: str) -> None:
    """vLLM's check of this reports all six tokens, which arrive there at once; here those behind the string are dropped."""
    ids = [*tokenizer.encode("abcde"), tokenizer.eos_token_ids[0]]
    assert len(ids) == 6
    params = SamplingParams(stop="cd", include_stop_str_in_output=include)
    text, tokens, last = follow(tokenizer, ids, params, Status.FINISHED_STOP)
    assert (text, tokens, last.finish_reason, last.stop_reason) == (expected, ids[:4], "stop", "cd")


@pytest.mark.parametrize(
    ("min_tokens", "expected"), [(0, "ab"), (3, "ab"), (4, "abcab"), (12, "abcabcabcab"), (13, "abcabcabcabc")]
)
def test_stop_strings_count_from_the_token_that_completes_min_tokens(
    tokenizer: Tokenizer, min_tokens: int, expected: str
) -> None:
    """As EOS does. (In vLLM from the next one on.)"""
    params = SamplingParams(stop="c", min_tokens=min_tokens, max_tokens=None)
    text, _, last = follow(tokenizer, tokenizer.encode("abcabcabcabc"), params)
    assert text == expected
    assert last.stop_reason == ("c" if min_tokens <= 12 else None)


def test_the_cap_at_the_token_that_completes_a_stop_string_is_a_stop(tokenizer: Tokenizer) -> None:
    text, tokens, last = follow(tokenizer, tokenizer.encode("abcd"), SamplingParams(stop="cd"), Status.FINISHED_LENGTH)
    assert (text, len(tokens), last.finish, last.stop_reason) == ("ab", 4, Status.FINISHED_STOP, "cd")


@pytest.mark.parametrize(
    ("include", "skip", "expected"),
    [(False, True, "ab"), (False, False, "ab"), (True, True, "ab"), (True, False, "ab<|im_end|>")],
)
def test_the_token_that_ends_a_request_by_its_id_shows_no_text_unless_asked(
    tokenizer: Tokenizer, include: bool, skip: bool, expected: str
) -> None:
    ids = [*tokenizer.encode("ab"), tokenizer.eos_token_ids[0]]
    params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=skip)
    text, tokens, last = follow(tokenizer, ids, params, Status.FINISHED_STOP)
    assert (text, tokens, last.stop_reason) == (expected, ids, None)
    ordinary = tokenizer.encode("abc")
    text, tokens, last = follow(tokenizer, ordinary, params, Status.FINISHED_STOP, ordinary[-1])
    assert (text, tokens, last.stop_reason) == ("abc" if include else "ab", ordinary, ordinary[-1])


def test_what_is_held_back_comes_with_the_end_whatever_it_is(tokenizer: Tokenizer) -> None:
    lead = tokenizer.encode("é")[0]
    assert tokenizer.token_bytes(lead) == b"\xc3"
    params = SamplingParams(stop="bcd")
    output = OutputText(tokenizer, Request(request_id="r", prompt_token_ids=(1,), params=params))
    a, b, c = tokenizer.encode("abc")
    shown = [output.push(TokenEvent("r", token, 0.0)).text for token in (a, b, c)]
    end = output.push(TokenEvent("r", None, 0.0, finish=Status.FINISHED_ERROR, error="why"))
    assert shown == ["a", "", ""]
    assert (end.text, end.token_ids, end.finish_reason, end.error) == ("bc", (), "error", "why")
    assert follow(tokenizer, [a, lead], SamplingParams())[0] == "a\ufffd"


def test_a_stop_string_across_the_bytes_of_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🤗é!")
    assert len(ids) == 1 + 4 + 2 + 1
    text, tokens, last = follow(tokenizer, ids, SamplingParams(stop="🤗é"))
    assert (text, tokens, last.stop_reason) == ("x", ids[:7], "🤗é")


def test_logprobs_travel_with_their_token(tokenizer: Tokenizer) -> None:
    output = OutputText(tokenizer, Request(request_id="r", prompt_token_ids=(1,)))
    logprobs = Logprobs(-0.5, 1)
    assert output.push(TokenEvent("r", 5, 0.0, logprobs)).logprobs is logprobs


# ---- the command line -----------------------------------------------------------------------------------------------------

TINY = [
    "--model",
    "tiny-llama",
    "--backend",
    "torch",
    *(f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()),
]


def test_the_command_streams_the_text_and_a_line_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM("tiny-llama", backend="torch", **SMALL) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=8)
        plain, chat = only(llm.generate("the", params)).text, only(llm.chat(CHAT, params)).text
    arguments = [*TINY, "--temperature=0", "--max_tokens", "8"]
    assert main([*arguments, "the"]) == 0
    assert capsys.readouterr() == (plain + "\n", "")
    assert main([*arguments, "--chat", "Say it"]) == 0
    assert capsys.readouterr() == (chat + "\n", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the"))
    assert main([*arguments, "-"]) == 0
    assert capsys.readouterr() == (plain + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modle", "tiny-llama", "x"], r"Unknown option --modle. Did you mean '--model'?"),
        (["--enable_prefix_cachin=true", "x"], "Did you mean '--enable-prefix-caching'?"),
        (["--model", "tiny-lama", "x"], "Did you mean 'tiny-llama'?"),
        ([*TINY, "--backend", "torhc", "x"], "Did you mean 'torch'?"),
        ([*TINY, "--temperature", "nan", "x"], "temperature must be a number in [0, 100]"),
        ([*TINY, "--block-size", "3", "x"], "block_size must be a power of two"),
        ([*TINY, "--dtype", "float31", "x"], "Did you mean 'float32'?"),
        ([*TINY, "--device", "cudda", "x"], "Did you mean 'cuda'?"),
        ([*TINY, "x" * 4000], "256"),
        (["--model", "a" * 300, "x"], "File name too long"),
        ([*TINY, "--chat", "a\udcffb"], "must be Unicode text"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("stream", "said"), [("stdin", "standard input, which is closed"), ("stdout", "Standard output is closed")]
)
def test_a_stream_that_is_closed_is_told_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stream: str, said: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, stream, None)  # as Python has it
        assert main([*TINY, "-"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_output_that_takes_no_more_ends_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    for output, code, said in ((write, READER_GONE, ""), ("/dev/full", FAILURE, "error: Standard output cannot be written")):
        with open(output, "w") as file, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            with pytest.raises(SystemExit) as end:
                main([*TINY, "the"])
        err = capsys.readouterr().err
        assert end.value.code == code and err.startswith(said) and err.count("\n") == bool(said)


def test_what_the_encoding_of_standard_output_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM("tiny-llama", backend="torch", **SMALL) as llm:
        text = only(llm.generate("the", SamplingParams(temperature=0.0, max_tokens=24))).text
    assert not text.isascii()
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", newline=""))
    assert main([*TINY, "--temperature=0", "--max-tokens=24", "the"]) == 0
    assert raw.getvalue() == text.encode("ascii", "replace") + b"\n"


@pytest.mark.parametrize("arguments", [["--seed", "many", "x"], ["--compile", "perhaps", "x"], []])
def test_values_that_are_no_values_show_the_usage_and_exit_with_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_the_module_runs_as_a_program_without_a_traceback() -> None:
    done = subprocess.run([sys.executable, "-m", "common.llm", "--model", "no/such/path", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: Unknown model 'no/such/path'") and "Traceback" not in done.stderr


def test_a_progress_bar_is_for_terminals_only(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["the", "of"], GREEDY)
    assert capsys.readouterr() == ("", "")


def test_a_program_whose_output_is_closed_gets_its_answers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python starts with `>&-`
    assert len(llm.generate(["the", "of"], GREEDY)) == 2
