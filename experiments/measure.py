"""The timed part of a run: engines alive side by side, computing in turn on the same requests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig

from common.config import expect
from common.weights import zoo
from common.weights.checkpoint import Checkpoint, open_checkpoint
from experiments.config import EngineSpec, MeasureConfig, resolved
from experiments.console import Narrator
from experiments.drive import Window
from experiments.isolate import IsolatedEngine
from experiments.metrics import contaminations, summarize
from experiments.roofline import Limits, bandwidth_probe, better, efficiency, measure_limits, weights_bytes
from experiments.workload import Workload, WorkloadConfig, draw, known_options

Engine = TypeVar("Engine")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a run needs to know, checked before anything is started."""

    model: str
    checkpoint: Checkpoint
    engines: tuple[EngineSpec, ...]
    workload: Workload
    shares_prefixes: bool
    measure: MeasureConfig


def measure_config(config: DictConfig) -> MeasureConfig:
    return MeasureConfig(**known_options(MeasureConfig, "measure", resolved(config.measure)))


def make_plan(config: DictConfig, engines: Sequence[EngineSpec]) -> Plan:
    """Find the model, draw the workload, and see that it fits each engine."""
    how = measure_config(config)
    expect(
        how.kernel_passes == 0, "measure=kernels times one engine: python -m experiments.bench engine=torch measure=kernels."
    )
    model = resolved(config.model)["name"]
    checkpoint = open_checkpoint(zoo.resolve(str(model)))
    wanted = WorkloadConfig.of(resolved(config.workload))
    vocab_size, special_ids = vocabulary(checkpoint)
    workload = draw(wanted, config.seed, vocab_size, special_ids)
    for spec in engines:
        limit = spec.config.model_len(checkpoint.config)
        expect(
            workload.longest <= limit,
            f"Workload {workload.name} has a request of {workload.longest} tokens, prompt and output together; engine "
            f"{spec.label} serves {limit}. Shorten workload.prompt_len or workload.output_len, or raise max_model_len.",
        )
    return Plan(
        model=str(model),
        checkpoint=checkpoint,
        engines=tuple(engines),
        workload=workload,
        shares_prefixes=workload.shares_prefixes,
        measure=how,
    )


def vocabulary(checkpoint: Checkpoint) -> tuple[int, frozenset[int]]:
    """How many ids a prompt is drawn from, and which of them are special. A checkpoint may come without a tokenizer."""
    config = checkpoint.config
    named = {*config.eos_token_ids, *([config.bos_token_id] if config.bos_token_id is not None else [])}
    if checkpoint.path.is_dir() and not (checkpoint.path / "tokenizer.json").exists():
        return config.vocab_size, frozenset(named)
    from common.text.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(checkpoint.path)
    return min(config.vocab_size, tokenizer.vocab_size), tokenizer.special_ids | named


def measure(plan: Plan, directory: Path, narrator: Narrator) -> tuple[dict[str, dict[str, Any]], dict[str, list[Window]]]:
    """Run the plan's blocks. Returns the figures and the windows of each engine, by label."""
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(IsolatedEngine(spec, directory / f"{spec.label}.log")) for spec in plan.engines]
        figures = {engine.spec.label: prepare(engine, plan, narrator) for engine in engines}
        windows: dict[str, list[Window]] = {engine.spec.label: [] for engine in engines}
        before = machine_limits(plan.measure, narrator)
        probe = bandwidth_probe(plan.measure.limits_s / 2) if plan.measure.limits_s else lambda: None
        bandwidth = probe()
        for number, order in blocks(engines, plan.measure):
            for engine in order:
                narrator.say(f"block {number + 1} of {plan.measure.blocks}: {engine.spec.label}")
                window, last = engine.run(plan.workload), bandwidth
                bandwidth = probe()
                beside = max(last, bandwidth) if last and bandwidth else None
                windows[engine.spec.label].append(replace(window, bandwidth=beside))
        after = machine_limits(plan.measure, narrator)
        limits = better(before, after) if before and after else None
        for engine in engines:
            label, mine = engine.spec.label, windows[engine.spec.label]
            figures[label] |= summarize(mine, plan.workload.slo, plan.workload.concurrency)
            figures[label]["peak_rss_mb"] = engine.peak_rss_mb()
            here = limits if figures[label]["device"] == "cpu" else None  # another device has limits of its own
            figures[label] |= efficiency(mine, plan.checkpoint.config, engine.spec.config.dtype, here)
            figures[label]["block_read_bytes_per_s"] = [window.bandwidth for window in mine]
            figures[label]["limits"] = before and after and {"before": before.summary(), "after": after.summary()}
            figures[label]["contaminated"] = contaminations(figures[label], plan.shares_prefixes)
    return figures, windows


def machine_limits(config: MeasureConfig, narrator: Narrator) -> Limits | None:
    """What the machine can do while its engines are idle; None if the configuration leaves it out."""
    if not config.limits_s:
        return None
    narrator.say("measuring the machine's limits")
    return measure_limits(config.limits_s)


def prepare(engine: IsolatedEngine, plan: Plan, narrator: Narrator) -> dict[str, Any]:
    """Load an engine and run the uncounted requests. Warm-up is what the engine compiles, and these."""
    loaded = engine.load(plan.checkpoint.path, narrator.progress(engine.spec.label))
    start = time.perf_counter()
    if plan.measure.warmup_requests:
        narrator.say(f"warming up {engine.spec.label}")
        engine.run(plan.workload.share(plan.measure.warmup_requests, plan.measure.warmup_output_len))
    warmup = loaded["warmup_s"] + time.perf_counter() - start
    memory = {name: loaded[name] for name in ("rss_mb", "peak_load_mb", "kv_pool_mb")}
    memory["weights_mb"] = weights_bytes(plan.checkpoint.config, engine.spec.config.dtype) / 2**20
    return {"device": loaded["caps"]["device"], "load_s": loaded["load_s"], "warmup_s": warmup} | memory


def blocks(
    engines: Sequence[Engine], config: MeasureConfig, clock: Callable[[], float] = time.perf_counter
) -> Iterator[tuple[int, Sequence[Engine]]]:
    """Rounds in which each engine runs once: A B, B A, A B, … so that a machine that drifts wrongs neither.

    No round starts that would, going by the longest so far, end after the budget.
    """
    begin = clock()
    longest = 0.0
    for number in range(config.blocks):
        start = clock()
        if number and start - begin + longest > config.budget_s:
            return
        yield number, engines if number % 2 == 0 else engines[::-1]
        longest = max(longest, clock() - start)


def setting(config: DictConfig, plan: Plan) -> dict[str, Any]:
    """What was run, for the result."""
    return {
        "model": plan.model,
        "dtype": config.dtype,
        "kernels": config.kernels,
        "seed": config.seed,
        "workload": plan.workload.name,
        "workload_hash": plan.workload.digest,
        "num_prompts": len(plan.workload.items),
    }
