"""Engines of several ranks in a process of their own: `Ranks` here, `main` there. JAX makes its devices as it starts.

A runner is made once for each number of ranks, and loads one model after the other.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.batch import KV
from common.config import EngineConfig
from common.engine import Engine
from common.interface import ModelRunner, load_backend
from common.kv_transfer.layout import layouts_of
from common.kv_transfer.protocol import Offer, Tag, common_layout
from common.request import Request, SamplingParams, TokenEvent
from common.weights.checkpoint import open_checkpoint
from tests.backends import Packer
from tests.history_backend import ROOT

PAGES, MOST = 32, 8
CONFIG = EngineConfig(
    dtype="float32", device="cpu", threads=2, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, num_blocks=PAGES
)
"""Few shapes, of which only those that a test needs are compiled."""

Asked = tuple[Sequence[int], dict[str, Any]]
"""A prompt, and what of `SamplingParams` is asked of its continuation."""
Answer = list[list[Any]]
"""Of each token, its id and, where asked for, its logprob and the likeliest tokens with theirs."""


class Ranks:
    """The process, as a context manager."""

    def __init__(self, backend: str) -> None:
        command = [sys.executable, "-m", "tests.ranks", backend]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=60)

    def ask(self, what: str, **arguments: Any) -> Any:
        """What the function `what` of this file returns there."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([what, arguments], default=str) + "\n")
        self.process.stdin.flush()
        answer, error = json.loads(self.process.stdout.readline())
        assert error is None, error
        return answer

    def run(self, ranks: int, model: Path, kernels: str, asked: Sequence[Asked], stages: int = 1) -> list[Answer]:
        answers: list[Answer] = self.ask("run", ranks=ranks, stages=stages, model=model, kernels=kernels, asked=asked)
        return answers


_runners: dict[tuple[int, int, str, str], ModelRunner] = {}
_loaded: dict[ModelRunner, str] = {}


def make_engine(backend: str, ranks: int, model: str, kernels: str, dtype: str = "float32", stages: int = 1) -> Engine:
    """With empty pages."""
    config = replace(CONFIG, tensor_parallel_size=ranks, pipeline_parallel_size=stages, kernels=kernels, dtype=dtype)
    runner = _runners.get((ranks, stages, kernels, dtype)) or load_backend(backend, config)
    _runners[ranks, stages, kernels, dtype] = runner
    if _loaded.get(runner) != model:
        runner.load(open_checkpoint(model))
        _loaded[runner] = model
    runner.allocate([PAGES])
    return Engine(runner, config, num_pages=PAGES)


def wanted(logit_bias: dict[str, float] | None = None, **params: Any) -> SamplingParams:
    bias = None if logit_bias is None else {int(token): by for token, by in logit_bias.items()}  # JSON has strings for keys
    return SamplingParams(ignore_eos=True, logit_bias=bias, **params)


def run(
    backend: str, ranks: int, model: str, kernels: str, asked: Sequence[Asked], dtype: str = "float32", stages: int = 1
) -> list[Answer]:
    """Continue prompts."""
    engine = make_engine(backend, ranks, model, kernels, dtype, stages)
    requests = [
        Request(request_id=str(i), prompt_token_ids=prompt, params=wanted(**params)) for i, (prompt, params) in enumerate(asked)
    ]
    events = engine.run(requests)
    assert engine.stats()["num_resets"] == 0
    return [_told(events[request.request_id]) for request in requests]


def _told(events: Sequence[TokenEvent]) -> Answer:
    told = lambda logprobs: [] if logprobs is None else [logprobs.logprob, logprobs.top_ids, logprobs.top_logprobs]  # noqa: E731
    return [[event.token_id, *told(event.logprobs)] for event in events]


def caps(backend: str, ranks: int, model: str, kernels: str, stages: int = 1) -> dict[str, Any]:
    runner = make_engine(backend, ranks, model, kernels, stages=stages).runner
    return asdict(runner.caps) | {"page_bytes": runner.kv_groups()[0].page_bytes} | runner.stats()


def told(backend: str, ranks: int, model: str, kernels: str, asked: Sequence[Asked], stages: int = 1) -> dict[str, float]:
    """By how much a run makes the counters of a runner rise."""
    run(backend, ranks, model, kernels, asked, stages=stages)
    runner = _runners[ranks, stages, kernels, "float32"]
    before = runner.stats()
    run(backend, ranks, model, kernels, asked, stages=stages)
    return {name: value - before[name] for name, value in runner.stats().items()}


def pages(
    backend: str,
    ranks: int,
    model: str,
    kernels: str,
    asked: Sequence[Asked],
    pages: Sequence[int],
    dtype: str = "float32",
    stages: int = 1,
) -> dict[str, Any]:
    """What stands in pages behind a run; and whether others are as they were written, once these are written there."""
    run(backend, ranks, model, kernels, asked, dtype, stages)
    runner = _runners[ranks, stages, kernels, dtype]
    held = runner.read_pages(0, pages)
    there = [PAGES - 1 - page for page in pages]
    runner.write_pages(0, there, held)
    again = runner.read_pages(0, there)
    none = runner.read_pages(0, [])
    runner.write_pages(0, [], none)
    same = all(np.array_equal(held[name], again[name]) and none[name].shape[1] == 0 for name in ("k", "v"))
    return {"same": same} | {name: x.astype(np.float32).tolist() for name, x in held.items()}


def handed_over(
    backend: str, ranks: int, other: str, others: int, block_size: int, model: str, kernels: str, asked: Sequence[Asked]
) -> list[Answer]:
    """Continue prompts that so many ranks of `backend` compute on `others` ranks of `other`, whose pages have another size."""
    first = make_engine(backend, ranks, model, kernels)
    config = replace(CONFIG, tensor_parallel_size=others, kernels=kernels, block_size=block_size)
    runner = load_backend(other, config)
    answers = []
    try:
        runner.load(open_checkpoint(model))
        runner.allocate([PAGES])
        then = Engine(runner, config, num_pages=PAGES)
        for prompt, params in asked:
            request = Request(request_id="r", prompt_token_ids=prompt, params=wanted(**params))
            begun = first.run([replace(request, params=replace(request.params, max_tokens=1), keep_pages=True)])["r"]
            offered, mine = (layouts_of(each.runner, each.config.block_size, "m") for each in (first, then))
            layout = common_layout(Offer(Tag("r", 0), len(prompt), tuple(each.fingerprint for each in offered)), mine)
            kv: Future[KV] = Future()
            arrays = layout.view(np.empty(layout.num_bytes(len(prompt)), np.uint8), len(prompt))
            first.read_kept("r", 0, arrays)
            kv.set_result(arrays)
            first.drop_kept("r")
            (token,) = [event.token_id for event in begun if event.token_id is not None]
            answers.append(_told([*begun, *then.run([replace(request, output_token_ids=(token,), kv=kv)])["r"]]))
        assert then.stats()["external_prefix_cache_hits"] == sum(len(prompt) for prompt, _ in asked)
    finally:
        runner.close()
    return answers


def masked(
    backend: str, ranks: int, model: str, kernels: str, prompt: Sequence[int], allowed: int, stages: int = 1
) -> list[int]:
    """The token chosen where a mask that comes while the step runs allows one."""
    runner = make_engine(backend, ranks, model, kernels, stages=stages).runner
    packer = Packer(PAGES, CONFIG.block_size, num_rows=4, max_len=128)
    masks = np.zeros((1, -(-runner.caps.vocab_size // 32)), np.uint32)
    masks[0, allowed // 32] = 1 << allowed % 32
    batch = packer.step([(packer.add(prompt), 0, len(prompt))], mask_rows=[0])
    tokens: list[int] = runner.submit(batch, lambda: masks).result().tokens.tolist()
    return tokens


def nothing(backend: str, ranks: int, model: str, kernels: str, prompt: Sequence[int], stages: int = 1) -> list[list[int]]:
    """The tokens of a step of no sequences, of one that asks for none, and of one that goes on where that ended: all three are
    submitted before a result is asked for."""
    runner = make_engine(backend, ranks, model, kernels, stages=stages).runner
    packer = Packer(PAGES, CONFIG.block_size, num_rows=4, max_len=128)
    row = packer.add(prompt)
    plans = [([], []), ([(row, 0, len(prompt) - 1)], []), ([(row, len(prompt) - 1, 1)], [0])]
    steps = [runner.submit(packer.step(plan, samples)) for plan, samples in plans]
    return [step.result().tokens.tolist() for step in steps]


def compiled(backend: str, ranks: int, model: str, kernels: str, asked: Sequence[Asked], stages: int = 1) -> int:
    """Programs that a run compiles after warm-up."""
    runner = make_engine(backend, ranks, model, kernels, stages=stages).runner
    runner.warmup()
    before = runner.compilations
    run(backend, ranks, model, kernels, asked, stages=stages)
    return runner.compilations - before


def said(backend: str, ranks: int, model: str, kernels: str, asked: Sequence[Asked]) -> list[list[Any]]:
    """What the ranks tell each other in one step: the kind and the shape of each collective."""
    make_engine(backend, ranks, model, kernels)
    runner: Any = _runners[ranks, 1, kernels, "float32"]
    if backend == "jax":
        runner._step._compiled.clear()
        run(backend, ranks, model, kernels, asked)
        (program,) = runner._step._compiled.values()
        found = re.findall(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(", program.as_text())
        shapes = [(kind, re.findall(r"\[([\d,]*)\]", result)) for result, kind in found]
        return [[kind, [int(d) for d in shape.split(",") if d]] for kind, each in shapes for shape in each]
    heard: list[list[Any]] = []

    run(backend, ranks, model, kernels, [(asked[0][0], asked[0][1] | {"max_tokens": 1})])
    group, exchange = runner.group, runner.group._line.exchange
    all_reduce, gather, exchange_in = group.all_reduce, group.gather, group._exchange_in

    def listening_all_reduce(x: Any) -> Any:
        heard.append(["all-reduce", list(x.shape)])
        return all_reduce(x)

    def listening_gather(x: Any) -> Any:
        heard.append(["all-gather", [ranks, *x.shape]])
        return gather(x)

    def listening_exchange_in(kernel: Any) -> None:
        before = exchange.told
        exchange_in(kernel)
        parts, told = exchange.told.parts - before.parts, exchange.told.bytes - before.bytes
        size = runner.model_config.hidden_size
        heard.extend([["all-reduce", [told // (4 * size * parts), size]]] * parts)

    group.all_reduce, group.gather, group._exchange_in = listening_all_reduce, listening_gather, listening_exchange_in
    before = exchange.told
    engine = Engine(runner, CONFIG, num_pages=PAGES)
    engine.run([Request(request_id="r", prompt_token_ids=asked[0][0], params=wanted(**asked[0][1]))])
    assert exchange.told.parts - before.parts == len(heard)
    del group.all_reduce, group.gather, group._exchange_in
    return heard


def main(backend: str) -> None:
    if backend == "jax":
        from jaxinfer.device import open_device

        open_device("cpu", CONFIG.threads, MOST)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            answer = [globals()[what](backend, **arguments), None]
        except Exception:
            answer = [None, traceback.format_exc()]
        print(json.dumps(answer), flush=True)
    for runner in _runners.values():
        runner.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
