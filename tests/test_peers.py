"""Outside engines: weights in their form, the interpreter that runs each, and the loops of the adapters without the engines.

The tests marked `accept` run the engines themselves, where `make peers` has brought them.
"""

import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from common.config import Dtype, EngineConfig
from common.errors import BackendError, CheckpointError, ConfigError, RequestError
from common.interface import Caps
from common.request import Request, SamplingParams, Status
from common.weights import zoo
from common.weights.checkpoint import Checkpoint, open_checkpoint
from common.weights.gguf_parts import read_metadata
from common.weights.parameters import NUMPY_DTYPES
from experiments import compare
from experiments.baselines.llamacpp import LlamaCppEngine
from experiments.baselines.vllm import VllmEngine
from experiments.engines import conversion, environments
from experiments.engines.conversion import digest, gguf_file, hugging_face_directory, write_directory, write_gguf
from experiments.engines.environments import PEERS, Peer, interpreter, own_file, stored_weights
from experiments.engines.process import IsolatedEngine
from experiments.engines.spec import EngineSpec
from experiments.load.workload import Item, Workload
from experiments.measure import session
from experiments.report.findings import correctness
from tests.families import FAMILIES
from tests.history_backend import CONFIG, PACKAGE, ROOT, command, history, last_line

__all__ = ["history"]

TINY = ("tiny-llama", "tiny-qwen3", "tiny-gemma3")
REAL = ("smollm2-135m", pytest.param("gemma3-270m", marks=pytest.mark.accept))


# Weights.


def expect_same(written: Checkpoint, source: Checkpoint, dtype: str) -> None:
    """The same configuration but for names and special tokens, and the same tensors once rounded. GGUF stores Gemma's norms as
    w + 1, which float32 rounds."""
    ours = replace(source.config, family=written.config.family, bos_token_id=None, eos_token_ids=())
    assert replace(written.config, bos_token_id=None, eos_token_ids=()) == ours
    assert written.names() == source.names()
    for name in source.names():
        mine, theirs = (entry.dense().astype(NUMPY_DTYPES[dtype]) for entry in (source[name], written[name]))
        lossy = written.path.suffix == ".gguf" and source.config.norm_offset and name.endswith("norm.weight")
        assert np.abs(mine.astype(np.float32) - theirs.astype(np.float32)).max() <= (2**-24 if lossy else 0), name


def installed(name: str) -> Checkpoint:
    try:
        return open_checkpoint(zoo.resolve(name))
    except CheckpointError as error:
        pytest.skip(f"{name} is not there: {error}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", TINY)
def test_a_folder_and_a_file_hold_the_weights_they_were_written_from(name: str, dtype: str, tmp_path: Path) -> None:
    source = open_checkpoint(zoo.resolve(name))
    write_directory(source, dtype, tmp_path / "folder")
    folder = open_checkpoint(tmp_path / "folder")
    expect_same(folder, source, dtype)
    assert {folder[each].encoding for each in folder.names()} == {{"bfloat16": "BF16", "float32": "F32"}[dtype]}
    write_gguf(source, dtype, tmp_path / "file.gguf")
    file = open_checkpoint(tmp_path / "file.gguf")
    if name == "tiny-gemma3":  # a GGUF file cannot tell that every third layer sees all
        source = replace(source, config=file.config)
    expect_same(file, source, dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_written_as_it_is_or_refused(name: str, families: dict[str, Path], tmp_path: Path) -> None:
    source = open_checkpoint(families[name])
    for write, path in ((write_directory, tmp_path / "folder"), (write_gguf, tmp_path / "file.gguf")):
        try:
            written = conversion.written(source, "bfloat16", path, write)
        except ConfigError as error:
            assert write is write_gguf and name in UNTELLABLE, error
        else:
            assert write is write_directory or name not in UNTELLABLE
            expect_same(open_checkpoint(written), source, "bfloat16")


UNTELLABLE = ("mistral", "qwen2-window", "llama3", "gemma3")
"""With windows that llama.cpp does not compute, or with numbers that no released model of the family has."""


def test_the_frequencies_of_llama_3_are_told_by_their_divisors(families: dict[str, Path], tmp_path: Path) -> None:
    source = open_checkpoint(families["llama3"])
    released = replace(source.config.ropes[0], low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    source = replace(source, config=replace(source.config, ropes=(released,)))
    expect_same(open_checkpoint(conversion.written(source, "float32", tmp_path / "file.gguf", write_gguf)), source, "float32")


@pytest.mark.parametrize("name", REAL)
def test_quantized_weights_are_decoded_once_for_both_forms(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = installed(name)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    for convert_to in (hugging_face_directory, gguf_file):
        written = convert_to(source, "bfloat16")
        expect_same(open_checkpoint(written), source, "bfloat16")
        stamp = written.stat().st_mtime_ns
        assert convert_to(source, "bfloat16") == written and written.stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob(".*"))


def test_a_folder_is_handed_on_as_it_is_and_a_file_is_made_for_each_dtype() -> None:
    source = open_checkpoint(zoo.resolve("tiny-llama"))
    assert hugging_face_directory(source, "bfloat16") == source.path
    assert gguf_file(source, "bfloat16") != gguf_file(source, "float32")


def test_what_cannot_be_converted_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(zoo.resolve("tiny-gemma3"))
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="layer_window"):
        gguf_file(source, "bfloat16")
    assert not list(tmp_path.iterdir())


def test_a_file_has_a_text_for_each_token() -> None:
    checkpoint = open_checkpoint(zoo.resolve("tiny-llama"))
    tokens = read_metadata(gguf_file(checkpoint, "float32"))["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == checkpoint.config.vocab_size and all(tokens)


VOCABULARY = """
import sys
import llama_cpp
options = llama_cpp.llama_model_default_params()
options.vocab_only = True
vocab = llama_cpp.llama_model_get_vocab(llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), options))
text = llama_cpp.ctypes.create_string_buffer(64)
for token in range(llama_cpp.llama_vocab_n_tokens(vocab)):
    size = llama_cpp.llama_token_to_piece(vocab, token, text, 64, 0, True)
    assert text.raw[:size] == b"%d " % token, (token, text.raw[:size])
    assert not llama_cpp.llama_vocab_is_eog(vocab, token), token
"""


@pytest.mark.accept
def test_llama_cpp_spells_each_token_and_knows_none_that_it_would_forbid() -> None:
    try:
        python = interpreter("llamacpp")
    except BackendError as error:
        pytest.skip(str(error))
    file = gguf_file(open_checkpoint(zoo.resolve("tiny-llama")), "float32")
    subprocess.run([python, "-c", VOCABULARY, file], check=True)


def test_another_weight_or_setting_is_another_model(tmp_path: Path) -> None:
    source = open_checkpoint(zoo.resolve("tiny-llama"))
    write_directory(source, "float32", tmp_path / "copy")
    copy = open_checkpoint(tmp_path / "copy")
    assert digest(copy) == digest(source)
    assert digest(replace(copy, config=replace(copy.config, norm_eps=1e-4))) != digest(source)
    file = tmp_path / "copy" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert digest(open_checkpoint(tmp_path / "copy")) != digest(source)


# The interpreter.


def test_our_engines_run_in_this_environment_and_a_peer_in_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_PEERS", str(tmp_path))
    assert interpreter("jax") == interpreter("hf") == Path(sys.executable)
    for name, peer in PEERS.items():
        with pytest.raises(BackendError, match=rf"engine={name} .*\.venv-{peer.environment}.* make peers"):
            interpreter(name)
    assert interpreter_of(tmp_path, "vllm") == interpreter("vllm")
    (tmp_path / ".venv-vllm" / "done").unlink()
    with pytest.raises(BackendError, match=r"\.venv-vllm is not whole. Run: make peers"):
        interpreter("vllm")


def test_an_engine_that_lacks_its_package_is_told_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "PACKAGES", {"hf": "no_such_package"})
    with pytest.raises(BackendError, match=r"engine=hf needs the package 'no_such_package'\. Run: pip install"):
        interpreter("hf")


def interpreter_of(folder: Path, name: str) -> Path:
    """Makes this Python pass for that of a peer, whose engine it does not have."""
    python = folder / f".venv-{name}" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / f".venv-{name}" / "done").touch()
    return python


def test_a_peer_that_is_not_there_is_told_before_any_engine_starts(
    history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_PEERS", str(history))
    monkeypatch.setattr(IsolatedEngine, "__init__", lambda *_: pytest.fail("an engine was started"))
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, "model=tiny-llama", "engines=[history,history]", "peers=[vllm]")
    assert exit.value.code == 2 and "Run: make peers" in capfd.readouterr().err
    assert not (history / "runs").exists()


@pytest.mark.usefixtures("peers_there")
@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("{name:hf,schedule:continuous}", "engine=hf has schedule=static and nothing else; got continuous"),
        ("{name:hf,compile:true}", "engine=hf has compile=false and nothing else; got true"),
        ("{name:jax,compile:true}", "compile=true is not among its options"),
        ("{name:llamacpp,cache:paged}", "engine=llamacpp has cache=dense and nothing else; got paged"),
        ("{name:vllm,tensor_parallel_size:2,compile:false}", "engine=vllm has tensor_parallel_size=1 and nothing else; got 2"),
        ("{name:vllm_server,data_parallel_size:2}", "data_parallel_size=2 does not reach the server"),
        (
            "{name:vllm,pipeline_parallel_size:2,compile:false}",
            "engine=vllm has pipeline_parallel_size=1 and nothing else; got 2",
        ),
        ("{name:llamacpp_server,tensor_parallel_size:2}", "tensor_parallel_size=2 does not reach the server"),
    ],
)
def test_what_an_engine_cannot_do_is_told_before_weights_are_converted_or_anything_starts(
    engine: str, said: str, history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, "model=tiny-llama", f"engines=[history,{engine}]")
    assert exit.value.code == 2 and said in capfd.readouterr().err
    assert not (history / "runs").exists()


def test_a_peer_runs_our_modules_with_no_more_than_make_peers_installs() -> None:
    """With the project's other requirements out of reach, as they are in a peer's environment."""
    line = re.search(r"^ISOLATE := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    named = {need.partition(">=")[0] for need in needs} | {"omegaconf", "transformers"}
    missing = named - set(line[1].split())
    modules = [module for module, packages in packages_distributions().items() if missing & set(packages)]
    assert {"jax", "torch", "hydra", "omegaconf", "rich", "pandas"} <= set(modules)
    script = f"import sys; sys.modules.update(dict.fromkeys({modules}))\n"
    script += "import experiments.engines.worker, experiments.baselines.vllm, experiments.baselines.llamacpp"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_peers_come_after_the_engines(
    history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_PEERS", str(history))
    interpreter_of(history, "llamacpp")
    with pytest.raises(SystemExit) as exit:
        command(
            monkeypatch, compare.main, "model=tiny-llama", "engines=[history]", "peers=[{name:llamacpp,max_num_seqs:2}]",
            "workload=single", "workload.output_len=4", "measure=quick",
        )  # fmt: skip
    # The second engine was started in its environment, found our modules there, and lacked the engine itself.
    assert (
        exit.value.code == 2
        and "needs the package 'llama_cpp', which is not installed. Run: make peers" in capfd.readouterr().err
    )


def test_peers_must_be_a_list(history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(monkeypatch, compare.main, "model=tiny-llama", "engines=[history,history]", "peers=vllm")
    assert "peers must be a list" in capfd.readouterr().err


# A peer on the weights as stored.


@pytest.mark.usefixtures("peers_there")
def test_a_peer_on_stored_weights_refuses_a_checkpoint_without_a_gguf_file_before_anything_starts(
    history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, "model=tiny-llama", "workload=single", "engines=[history]", "peers=[llamacpp_gguf]")
    said = capfd.readouterr().err
    assert exit.value.code == 2 and "is no GGUF file. Set model=path/to/file.gguf, or use engine=llamacpp" in said
    assert not (history / "runs").exists()


@pytest.mark.parametrize(("kind", "name"), [(3, "Q4_1"), (15, "Q4_K_M"), (0, "F32"), (None, "BF16, F32"), (9999, "BF16, F32")])
def test_stored_weights_have_the_name_of_the_quantization_in_the_file(
    kind: int | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(open_checkpoint(zoo.resolve("tiny-llama")), "bfloat16", tmp_path / "tiny.gguf")
    file = open_checkpoint(tmp_path / "tiny.gguf")
    monkeypatch.setattr(environments, "read_metadata", lambda path: {"general.file_type": kind})
    assert stored_weights("llamacpp_gguf", file) == name
    assert stored_weights("llamacpp", file) is stored_weights("torch", file) is None
    assert own_file(file, "float32") == file.path  # no copy is written


@pytest.fixture
def quantized(history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that compares engines with a peer of other tokens, whose weights come from the function given."""
    (history / "packages" / "quantizedinfer").mkdir()
    other = PACKAGE.replace("vocab_size=320", "vocab_size=319")
    assert other != PACKAGE
    (history / "packages" / "quantizedinfer" / "__init__.py").write_text(other)
    (history / "configs" / "engine" / "quantized.yaml").write_text(CONFIG.replace("name: history", "name: quantized"))
    python = interpreter_of(history, "quantized")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={history / "packages"}:{ROOT} exec {sys.executable} "$@"\n')
    monkeypatch.setenv("TANDEM_PEERS", str(history))
    monkeypatch.setattr(session, "vocabulary", lambda checkpoint: (300, frozenset()))
    write_gguf(open_checkpoint(zoo.resolve("tiny-llama")), "float32", history / "tiny.gguf")

    def run(weights: Callable[[Checkpoint, str], Path], engines: str) -> tuple[dict[str, Any], str]:
        monkeypatch.setitem(PEERS, "quantized", Peer(environment="quantized", weights=weights))
        small = ("workload=fixed", "workload.num_requests=2", "workload.prompt_len=8", "workload.output_len=4")
        command(
            monkeypatch, compare.main, "model=tiny.gguf", f"engines={engines}", "peers=[quantized]", "dtype=float32", *small,
            "measure=quick", "measure.limits_s=0",
        )  # fmt: skip
        out = capfd.readouterr().out
        return last_line(out), out

    return run


def test_an_engine_on_stored_weights_is_timed_and_its_outputs_are_not_compared(quantized: Callable[..., Any]) -> None:
    result, out = quantized(own_file, "[history,history]")
    assert [mine["stored_weights"] for mine in result["engines"].values()] == [None, None, "F32"]
    assert set(result["comparisons"]) == {"history-2", "quantized"} and set(result["agreement"]) == {"history-2"}
    assert (result["tokens_equal"], result["tokens_equal_share"], result["timed_differences"]) == (True, 1.0, 0)
    assert "quantized: outputs not compared, other weights: F32." in out


@pytest.mark.accept
def test_one_engine_beside_stored_weights_has_no_pass_and_the_same_tokens_on_the_weights_of_the_run_are_a_defect(
    quantized: Callable[..., Any],
) -> None:
    result, _ = quantized(own_file, "[history]")
    assert result["tokens_equal"] is result["tokens_equal_share"] is result["timed_differences"] is None
    with pytest.raises(SystemExit) as exit:
        quantized(lambda checkpoint, dtype: checkpoint.path, "[history]")
    assert exit.value.code == 4


def test_the_report_names_the_engines_that_are_not_compared() -> None:
    engines = {"jax": {"stored_weights": None}, "llamacpp_gguf": {"stored_weights": "Q4_K_M"}}
    results = {"engines": engines, "unjustified_divergences": None, "tokens_equal_share": None}
    verdicts = list(correctness(SimpleNamespace(results=results, engines=engines, partial=False)))
    assert [each.said for each in verdicts] == [
        "llamacpp_gguf: outputs not compared, other weights: Q4_K_M.",
        "The pass in float32 was left out (fewer than two engines compute on the same weights).",
    ]


# The loops.

CAPS = Caps(backend="llamacpp", device="cpu", dtypes=(), kernels=(), max_tokens=8, max_seqs=3, max_model_len=40, vocab_size=97)


def following(tokens: Sequence[int]) -> int:
    """The token that the engines below put after a history."""
    return (sum((i + 1) * token for i, token in enumerate(tokens)) + len(tokens)) % CAPS.vocab_size


def expected(prompt: Sequence[int], count: int) -> list[int]:
    tokens = [*prompt]
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


@dataclass
class Remembering:
    """A decoder whose caches hold the tokens themselves."""

    cells: dict[int, list[int]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    def decode(self, tokens: list[int], positions: list[int], slots: list[int], wanted: list[bool]) -> np.ndarray:
        assert len(tokens) == len(positions) == len(slots) == len(wanted)
        self.sizes.append(len(tokens))
        rows = []
        for token, position, slot, want in zip(tokens, positions, slots, wanted, strict=True):
            assert 0 <= slot < CAPS.max_seqs
            cells = self.cells.setdefault(slot, [])
            assert position == len(cells), "a slot was not empty, or a token was left out"
            cells.append(token)
            if want:
                # Two equal logits at the top: the lower id is to be chosen.
                rows.append([1.0 if other >= following(cells) else -1.0 for other in range(CAPS.vocab_size)])
        return np.array(rows, np.float32).reshape(len(rows), CAPS.vocab_size)

    def forget(self, slot: int) -> None:
        del self.cells[slot]

    def close(self) -> None: ...


def greedy(name: str, prompt: Iterable[int], count: int | None, **options: Any) -> Request:
    params = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True} | options
    return Request(request_id=name, prompt_token_ids=tuple(prompt), params=SamplingParams(**params))


def test_every_request_gets_the_tokens_of_its_own_history_within_the_budget() -> None:
    decoder = Remembering()
    engine = LlamaCppEngine(decoder, CAPS)
    rng = np.random.default_rng(0)
    asked = {f"{n}": (rng.integers(0, 97, rng.integers(1, 20)).tolist(), int(rng.integers(1, 20))) for n in range(12)}
    events = engine.run(greedy(name, *each) for name, each in asked.items())
    for name, (prompt, count) in asked.items():
        assert [event.token_id for event in events[name]] == expected(prompt, count)
        assert [event.finish for event in events[name]] == [None] * (count - 1) + [Status.FINISHED_LENGTH]
        assert [event.time for event in events[name]] == sorted(event.time for event in events[name])
    assert max(decoder.sizes) == CAPS.max_tokens and decoder.cells == {}
    assert engine.stats() == {"steps": len(decoder.sizes), "compilations": 0}


def test_requests_that_decode_never_wait_for_a_prompt() -> None:
    engine = LlamaCppEngine(Remembering(), CAPS)
    engine.add(greedy("short", [1], 6))
    engine.add(greedy("long", [2] * 30, 1))
    assert [[event.request_id for event in engine.step()] for _ in range(4)] == [["short"]] * 4


def test_an_aborted_request_ends_once_and_frees_its_slot() -> None:
    decoder = Remembering()
    engine = LlamaCppEngine(decoder, CAPS)
    for name in "abcd":
        engine.add(greedy(name, [5, 6], 9))
    engine.step()
    assert engine.abort("b") and engine.abort("d") and not engine.abort("b") and not engine.reset_prefix_cache()
    ends = {event.request_id: event.finish for event in engine.step() if event.finish}
    assert ends == {"b": Status.FINISHED_ABORT, "d": Status.FINISHED_ABORT} and sorted(decoder.cells) == [0, 2]
    while engine.has_work:
        engine.step()
    assert decoder.cells == {} and engine.reset_prefix_cache()


def test_log_probabilities_are_of_the_raw_logits_for_who_asked() -> None:
    engine = LlamaCppEngine(Remembering(), CAPS)
    engine.add(greedy("a", [3], 1, logprobs=2))
    engine.add(greedy("b", [3], 1))
    first, second = engine.step()
    token = following([3])
    logits = np.where(np.arange(CAPS.vocab_size) >= token, 1.0, -1.0)
    assert first.logprobs is not None and second.logprobs is None
    assert first.logprobs.logprob == pytest.approx(1 - np.log(np.exp(logits).sum()))
    assert (first.logprobs.rank, list(first.logprobs.top_ids)) == (1, [token, token + 1])
    assert list(first.logprobs.top_logprobs) == [first.logprobs.logprob] * 2


class Stepping:
    """What `VllmEngine` uses of an `LLMEngine`: it gives each request a token a step, at times none and then two."""

    def __init__(self) -> None:
        self.live: dict[str, tuple[list[int], int, SimpleNamespace]] = {}
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self.steps = 0

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: SimpleNamespace) -> None:
        self.live[request_id] = (prompt["prompt_token_ids"], len(prompt["prompt_token_ids"]), params)

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            del self.live[name]

    def reset_prefix_cache(self) -> bool:
        return True

    def step(self) -> list[SimpleNamespace]:
        self.steps += 1
        if self.steps % 3 == 1:
            return []
        outputs = []
        for name, (tokens, prompt_len, params) in list(self.live.items()):
            count = min(1 + (self.steps % 3 == 2), params.max_tokens - (len(tokens) - prompt_len))
            fresh = expected(tokens, count)
            tokens += fresh
            done = len(tokens) - prompt_len == params.max_tokens
            ranked = lambda token: {token + 1: entry(-2.0, 2), token: entry(-1.0, 1), token + 2: entry(-3.0, 3)}  # noqa: E731
            completion = SimpleNamespace(
                token_ids=fresh,
                finish_reason="length" if done else None,
                logprobs=[ranked(token) for token in fresh] if params.logprobs is not None else None,
            )
            outputs.append(
                SimpleNamespace(
                    request_id=name, outputs=[completion], prompt_token_ids=tokens[:prompt_len], num_cached_tokens=2
                )
            )
            if done:
                del self.live[name]
        return outputs


def entry(logprob: float, rank: int) -> SimpleNamespace:
    return SimpleNamespace(logprob=logprob, rank=rank)


def vllm_engine() -> VllmEngine:
    params: Callable[..., SimpleNamespace] = SimpleNamespace
    return VllmEngine(Stepping(), replace(CAPS, backend="vllm"), params, lambda: 7)


def test_what_vllm_gives_comes_out_token_by_token() -> None:
    engine = vllm_engine()
    asked = {"a": ([1, 2, 3], 5), "b": ([4], 2), "c": ([9] * 10, 1)}
    events = engine.run(greedy(name, *each) for name, each in asked.items())
    for name, (prompt, count) in asked.items():
        assert [event.token_id for event in events[name]] == expected(prompt, count)
        assert [event.finish for event in events[name]] == [None] * (count - 1) + [Status.FINISHED_LENGTH]
        assert all(event.time <= time.perf_counter() for event in events[name])
    assert not engine.has_work and engine.reset_prefix_cache()
    counters = {"prefix_cache_queries": 14, "prefix_cache_hits": 6, "compilations": 7}
    assert engine.stats() == {"steps": 5} | counters


def test_an_aborted_request_of_vllm_ends_once() -> None:
    engine = vllm_engine()
    engine.add(greedy("a", [1], 9))
    engine.add(greedy("b", [1], 9))
    engine.step()
    assert engine.abort("a") and not engine.abort("a") and not engine.reset_prefix_cache()
    events = engine.step()
    assert [(event.request_id, event.finish) for event in events if event.finish] == [("a", Status.FINISHED_ABORT)]
    assert {event.request_id for event in events if event.token_id is not None} == {"b"}


def test_log_probabilities_of_vllm_are_ordered_and_cut() -> None:
    engine = vllm_engine()
    events = engine.run([greedy("a", [1], 1, logprobs=2), greedy("b", [1], 1)])
    (event,) = events["a"]
    token = following([1])
    assert event.logprobs is not None and events["b"][0].logprobs is None
    assert (event.logprobs.logprob, event.logprobs.rank) == (-1.0, 1)
    assert (event.logprobs.top_ids, event.logprobs.top_logprobs) == ([token, token + 1], [-1.0, -2.0])


@pytest.mark.parametrize("build", [lambda: LlamaCppEngine(Remembering(), CAPS), vllm_engine])
@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (greedy("x", [1], 4, temperature=1.0), "greedy requests"),
        (greedy("x", [1], 4, ignore_eos=False), "ignore_eos=True"),
        (greedy("x", [1], 4, stop=["."]), "no stops"),
        (greedy("x", [1], 4, stop_token_ids=[5]), "no stops"),
        (greedy("x", [1], None), "max_tokens"),
        (greedy("x", [1, 97], 4), r"\[0, 97\)"),
        (greedy("x", [1] * 38, 4), "38 prompt and 4 output tokens exceed max_model_len=40"),
        (greedy("live", [1], 4), "still live"),
    ],
)
def test_what_an_engine_does_not_serve_it_refuses(build: Callable[[], Any], request_: Request, said: str) -> None:
    engine = build()
    engine.add(greedy("live", [1], 4))
    with pytest.raises(RequestError, match=said):
        engine.add(request_)
    assert set(engine.run([])) == {"live"}


def test_a_request_too_long_for_a_slot_is_told_what_to_do() -> None:
    with pytest.raises(RequestError, match="3 slots of equal size: lower max_num_seqs or raise num_blocks"):
        LlamaCppEngine(Remembering(), CAPS).add(greedy("x", [1] * 40, 1))


# The engines themselves.


def outputs(name: str, checkpoint: Path, folder: Path, dtype: Dtype, **options: Any) -> list[tuple[int, ...]]:
    """Eight greedy tokens after each of three prompts."""
    prompts = [tuple(np.random.default_rng(n).integers(0, 250, n).tolist()) for n in (5, 17, 40)]
    config = EngineConfig(
        dtype=dtype,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        max_model_len=128,
        enable_prefix_caching=False,
        threads=1,
        **options,
    )
    with IsolatedEngine(EngineSpec(label=name, name=name, config=config), folder / f"{name}-{dtype}.log", 600.0) as engine:
        engine.load(checkpoint)
        window = engine.run(Workload("three", tuple(Item(0.0, prompt, 8) for prompt in prompts)))
    assert all(row.ok and row.finish == "length" for row in window.rows)
    return [row.tokens for row in window.rows]


@pytest.mark.accept
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["tiny-qwen3", "smollm2-135m"])
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.weights is not own_file])
def test_a_peer_answers_as_our_engine_does(name: str, model: str, dtype: Dtype, tmp_path: Path) -> None:
    """The weights are the same and go to the right place: a wrong one changes tokens at once. bfloat16 has near-ties."""
    try:
        interpreter(name)
    except BackendError as error:
        pytest.skip(str(error))
    source = installed(model).path
    theirs = outputs(name, source, tmp_path, dtype, **({"block_size": 32} if name == "vllm" else {"cache": "dense"}))
    ours = outputs("torch", source, tmp_path, dtype)
    if dtype == "float32":
        assert theirs == ours
    else:
        assert [tokens[0] for tokens in theirs] == [tokens[0] for tokens in ours]


@pytest.mark.accept
def test_llama_cpp_runs_the_quantized_file_itself(tmp_path: Path) -> None:
    """Rounded activations may change a token later, and rarely the first."""
    try:
        interpreter("llamacpp_gguf")
    except BackendError as error:
        pytest.skip(str(error))
    source = installed("smollm2-135m")
    assert stored_weights("llamacpp_gguf", source) == "Q4_1"
    theirs = outputs("llamacpp_gguf", source.path, tmp_path, "bfloat16", cache="dense")
    ours = outputs("torch", source.path, tmp_path, "bfloat16")
    assert sum(a[0] == b[0] for a, b in zip(theirs, ours, strict=True)) >= 2


@pytest.mark.accept
@pytest.mark.parametrize("name", ["llamacpp_server", "vllm_server"])
def test_a_server_is_started_for_a_comparison_and_ended_with_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    small = ("model=tiny-qwen3", "dtype=float32", "workload=fixed", "workload.num_requests=3", "workload.output_len=8")
    try:
        command(monkeypatch, compare.main, *small, "measure=quick", "measure.limits_s=0", f"engines=[torch,{name}]")
    except SystemExit as exit:
        told = capfd.readouterr().err
        if exit.code == 2 and "There is no program" in told:
            pytest.skip(told)
        pytest.fail(told)
    result = last_line(capfd.readouterr().out)
    assert [figures["completed"] for figures in result["engines"].values()] == [3, 3]
    assert (result["tokens_equal"], result["unjustified_divergences"]) == (True, 0)
    assert result["tokens_equal_share"] == {"vllm_server": 1.0, "llamacpp_server": None}[name]  # which names them if asked why
    assert result["max_abs_logprob_diff"] < 1e-4
    end = time.monotonic() + 20  # its supervisor ends it once we have let go of it
    while (left := started_in(tmp_path)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def started_in(folder: Path) -> list[list[str]]:
    """The command line of each process that works there, but for ours."""
    there = (each.info for each in psutil.process_iter(["pid", "cwd", "cmdline"]) if each.info["cwd"] == str(folder))
    return [info["cmdline"] for info in there if info["pid"] != os.getpid()]
