"""Run the timed part: the engines are alive side by side and compute in turn on the same requests. A failed one drops out."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import util
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.config import EngineConfig, expect
from common.errors import TandemError
from common.model.partition import expect_shareable
from common.weights import zoo
from common.weights.checkpoint import Checkpoint, open_checkpoint
from experiments.display.progress import ProgressReporter
from experiments.engines.environments import stored_weights
from experiments.engines.process import EngineFailure, IsolatedEngine
from experiments.engines.spec import EngineSpec, scale
from experiments.load.driver import Window
from experiments.load.profiler import Profile
from experiments.load.workload import Workload, WorkloadConfig, draw
from experiments.measure.blocks import PRECISION, block_order, level, reason_to_stop, tail, time_left
from experiments.measure.config import MeasureConfig
from experiments.metrics.disturbed import disturbed_blocks, dropped_blocks, no_verdict
from experiments.metrics.latency import block_percentiles, intervals, ratios
from experiments.metrics.metrics import block_contaminations, contaminations, output_throughput, summarize, unsure
from experiments.metrics.statistics import Comparison, compare_all, undecided
from experiments.options import known_options, resolved
from experiments.roofline.efficiency import efficiency, no_roofline
from experiments.roofline.limits import Limits, better, measure_limits
from experiments.roofline.probes import bandwidth_probe
from experiments.roofline.work import weights_bytes
from experiments.runs.records import kept_rows

LOADED = ("rss_mib", "peak_load_mib", "kv_pool_mib", "rank_mib")
"""Figures that the process of an engine reports when it has loaded."""
KERNELS = ("kernel_arithmetic", "kernel_library")
"""The entries of `Caps` on native kernels."""
PROFILED_REQUESTS, PROFILED_OUTPUT_LEN = 8, 16
"""Of the window under a profiler, at most."""
INTERRUPTED = "it was interrupted"
Probe = Callable[[], float | None]
PROBED = 0.1
"""Of the time between two probes of the bandwidth, at most this share again may be spent on one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The checked options of a run. No process has started yet."""

    model: str
    checkpoint: Checkpoint
    engines: tuple[EngineSpec, ...]
    workload: Workload
    measure: MeasureConfig
    seed: int = 0
    """Draws the order of the blocks."""


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
        expect_fits(workload, spec, checkpoint)
    return Plan(
        model=str(model),
        checkpoint=checkpoint,
        engines=tuple(engines),
        workload=workload,
        measure=how,
        seed=config.seed,
    )


def expect_fits(workload: Workload, spec: EngineSpec, checkpoint: Checkpoint) -> None:
    """Raises `ConfigError` if an engine would refuse the model, or a request of the workload, once it is loaded."""
    stored_weights(spec.name, checkpoint)
    expect_shareable(checkpoint.config, spec.config.tensor_parallel_size, spec.config.pipeline_parallel_size)
    config, limit = spec.config, spec.config.model_len(checkpoint.config)
    has = f"Workload {workload.name} has a request of {workload.longest} tokens, prompt and output together"
    most = checkpoint.config.max_position
    more = f", or raise max_model_len, to {most} at most" if workload.longest <= most else f": the model has {most} positions"
    expect(
        workload.longest <= limit,
        f"{has}; engine {spec.label} serves {limit}. Shorten workload.prompt_len or workload.output_len{more}.",
    )
    room = math.inf if config.num_blocks is None else (config.num_blocks - 1) * config.block_size
    expect(
        workload.longest - 1 <= room,  # nothing follows the last token, so that it needs no page
        f"{has}; engine {spec.label} has pages for {room}. "
        f"Shorten workload.prompt_len or workload.output_len, or raise num_blocks={config.num_blocks}.",
    )
    prompt, step = max(len(item.prompt) for item in workload.items), config.max_num_batched_tokens
    expect(
        config.enable_chunked_prefill or prompt <= step,
        f"Workload {workload.name} has a prompt of {prompt} tokens, and engine {spec.label} computes it in one step, of "
        f"max_num_batched_tokens={step}. Shorten it, raise that, or set enable_chunked_prefill=true.",
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


@dataclass
class Outcome:
    """The results of the timed part."""

    windows: dict[str, list[Window]]
    """Of each engine, also of one that failed later, by label and block."""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each engine that did not fail."""
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Of each but the first that did not fail with that one."""
    order: list[list[str]] = field(default_factory=list)
    """Labels as they ran, by block."""
    stopped: str = INTERRUPTED
    """Why no further block ran, ..."""
    stopped_by: str = ""
    """... and by which option, if it was one."""
    limits: dict[str, Limits | None] = field(default_factory=lambda: {"before": None, "after": None})
    """The limits of the machine, before the blocks and after them."""
    unmeasured: str = ""
    """Why a measurement beside the engines failed; empty if none did."""
    dropped_blocks: dict[int, str] = field(default_factory=dict)
    """Block → the reason for which it is dropped."""
    profiles: dict[str, Profile] = field(default_factory=dict)
    """Of each engine that has a profiler, if `measure.profile` is set."""

    @staticmethod
    def of(plan: Plan) -> Outcome:
        """Of a run that has not begun."""
        return Outcome({spec.label: [] for spec in plan.engines})

    @property
    def survivors(self) -> list[str]:
        """Engines that have not failed, in the order in which they were named."""
        return [label for label in self.windows if label not in self.failures]

    @property
    def comparable(self) -> list[str]:
        """Engines that have not failed and compute on the weights of the run, so that their outputs can be compared."""
        return [label for label in self.survivors if label in self.figures and not self.figures[label].get("stored_weights")]

    @contextlib.contextmanager
    def row_of(self, engine: IsolatedEngine, narrator: ProgressReporter) -> Iterator[None]:
        """Record the failure of an engine within the block and go on with the other engines.

        Raise an error that the user can correct, which an engine raises before it has loaded."""
        label = engine.spec.label
        try:
            yield
        except (EngineFailure, TandemError) as error:
            if isinstance(error, TandemError) and label not in self.figures:
                raise
            failure = EngineFailure.of(error, label)
            self.failures[label] = failure.record()
            self.figures.pop(label, None)
            narrator.alarm(failure.message)
            engine.close()

    @property
    def disturbed(self) -> dict[int, str]:
        """The blocks that other programs disturbed, with the reason."""
        return disturbed_blocks({label: self.windows[label] for label in self.survivors})

    def dropped(self) -> list[dict[str, Any]]:
        """Return the blocks that no figure counts, each with its reason."""
        return [{"block": block, "reason": reason} for block, reason in self.dropped_blocks.items()]

    @property
    def no_verdict(self) -> str:
        """Why the comparisons are undecided whatever they measured; empty where few enough blocks are disturbed."""
        return no_verdict(len(self.disturbed), len(self.order))

    def kept(self) -> dict[str, list[Window]]:
        """Return the windows that figures count, of each survivor."""
        dropped = dropped_blocks(self.disturbed, len(self.order))
        return {label: [w for i, w in enumerate(self.windows[label]) if i not in dropped] for label in self.survivors}

    def compared(self, plan: Plan, ended: bool) -> dict[str, Comparison]:
        """Each survivor but the first with that one, by what has been measured so far."""
        throughputs = {label: [output_throughput(window) for window in windows] for label, windows in self.kept().items()}
        if len(throughputs) < 2:
            return {}
        count = len(throughputs) - 1
        found = compare_all(
            throughputs, plan.measure.criteria, plan.seed, level(plan.measure, count, ended), self.miss(plan, ended)
        )
        why = self.no_verdict
        return {label: undecided(label, each, why) for label, each in found.items()} if why else found

    def miss(self, plan: Plan, ended: bool) -> float:
        """Return the share of 1 - confidence that an interval leaves out after the blocks so far."""
        count = max(1, len(self.survivors) - 1)
        clean = len(self.order) - len(self.disturbed)
        return tail(plan.measure, count, clean, self.stopped_by if ended else PRECISION)

    def add_latencies(self, plan: Plan) -> None:
        """Add the intervals of latencies to the figures and to the comparisons."""
        blocks = {label: block_percentiles(windows) for label, windows in self.kept().items()}
        confidence, missed = plan.measure.confidence, self.miss(plan, ended=True)
        for label, mine in blocks.items():
            estimates = intervals(mine, confidence, missed)
            self.figures[label]["latency_intervals"] = {figure: asdict(each) for figure, each in estimates.items()}
        if self.comparisons:
            found = ratios(blocks, self.survivors[0], confidence, missed)
            self.comparisons = {label: replace(each, latencies=found[label]) for label, each in self.comparisons.items()}

    def conclude(self, plan: Plan) -> None:
        """Figures and comparisons, by the windows that there are."""
        known = [] if self.unmeasured else [limits for limits in self.limits.values() if limits]
        limits = functools.reduce(better, known) if known else None
        summaries = {when: found and found.summary() for when, found in self.limits.items()} if known else None
        kept = self.kept()
        self.dropped_blocks = dropped_blocks(self.disturbed, len(self.order))
        for windows in self.windows.values():
            windows[:] = [replace(window, dropped=i in self.dropped_blocks) for i, window in enumerate(windows)]
        for spec in plan.engines:
            if spec.label in self.survivors:
                figures = self.figures[spec.label]
                here = limits if figures["device"] == "cpu" else None  # another device has limits of its own
                figures |= window_figures(kept[spec.label], plan, spec, here) | {"limits": summaries}
                figures["contaminated"] = contaminations(figures, plan.workload.shares_prefixes)
                alone = block_contaminations(kept[spec.label], plan.workload.shares_prefixes)
                figures["block_contaminated"] = alone
                if not figures["contaminated"]:
                    numbers = [i for i in range(len(self.windows[spec.label])) if i not in self.dropped_blocks]
                    figures["contaminated"] = [
                        f"block {i}: {each}" for i, found in zip(numbers, alone, strict=True) for each in found
                    ]
                figures["unsure"] = unsure(figures)
        self.comparisons = self.compared(plan, ended=True)
        self.add_latencies(plan)

    def cut_short(self, plan: Plan) -> int:
        """Conclude by the blocks that are whole, and forget the windows of one that is not. Returns how many are."""
        blocks = min((len(self.windows[label]) for label in self.survivors), default=0)
        self.windows = {label: windows[:blocks] for label, windows in self.windows.items()}
        self.order = self.order[:blocks]
        if blocks:
            self.conclude(plan)
        return blocks

    def settled(self, plan: Plan) -> bool:
        """Whether every interval is narrow, and none shows a difference that is yet to be proven."""
        found = self.compared(plan, ended=False).values()
        return all(each.width <= plan.measure.precision and not each.unproven for each in found)


def measure(plan: Plan, outcome: Outcome, directory: Path, narrator: ProgressReporter) -> None:
    """Load the engines of the plan and run its blocks. Results and failures of engines go into the outcome.

    Raise an error that the user can correct."""
    with kept_rows(directory, outcome.windows), contextlib.ExitStack() as stack:
        engines = {
            spec.label: stack.enter_context(IsolatedEngine(spec, directory / f"{spec.label}.log", plan.measure.timeout_s))
            for spec in plan.engines
        }
        for label, engine in engines.items():
            with outcome.row_of(engine, narrator):
                outcome.figures[label] = prepare(engine, plan, narrator)
        outcome.limits["before"] = machine_limits(plan.measure, narrator)
        run_blocks(outcome, engines, plan, narrator)
        outcome.limits["after"], outcome.unmeasured = limits_after(plan.measure, narrator)
        for label in outcome.survivors:
            with outcome.row_of(engines[label], narrator):
                outcome.figures[label]["peak_rss_mib"] = engines[label].peak_rss_mib()
        outcome.conclude(plan)
        for label in outcome.survivors:
            time_between_ranks(engines[label], outcome.figures[label], plan, narrator)
        if plan.measure.profile:
            profile_engines(outcome, engines, plan, narrator)


def run_blocks(outcome: Outcome, engines: Mapping[str, IsolatedEngine], plan: Plan, narrator: ProgressReporter) -> None:
    """Run blocks until there is a reason to stop. Nothing is computed or drawn while a window runs."""
    config = plan.measure
    probe: Probe = sparing(bandwidth_probe(config.limits_s / 2)) if config.limits_s else lambda: None
    settled = lambda: outcome.settled(plan)  # noqa: E731
    bandwidth = probe()
    begin, longest = time.perf_counter(), 0.0
    while outcome.survivors:
        number, disturbed, start = len(outcome.order), len(outcome.disturbed), time.perf_counter()
        done, others = number - disturbed, len(outcome.survivors) - 1
        if stopped := reason_to_stop(config, done, start - begin, longest, others, settled, disturbed):
            outcome.stopped, outcome.stopped_by = stopped
            break
        order = [label for label in block_order(list(engines), number, plan.seed) if label in outcome.survivors]
        outcome.order.append(order)
        asked = plan.workload.fresh(number, plan.seed)  # of all engines in this block
        end = start + time_left(config, done, start - begin, longest)
        for label in order:
            narrator.block(number, disturbed, config.blocks, label, end - time.perf_counter())
            with outcome.row_of(engines[label], narrator):
                window, last = served(label, engines[label].run(asked)), bandwidth
                bandwidth = probe()
                beside = max(last, bandwidth) if last and bandwidth else None
                outcome.windows[label].append(replace(window, bandwidth=beside))
        longest = max(longest, time.perf_counter() - start)
    else:
        outcome.stopped = "no engine was left"
    narrator.end_blocks(outcome.stopped)


def sparing(probe: Probe, clock: Callable[[], float] = time.perf_counter) -> Probe:
    """`probe`, run anew where it takes at most `PROBED` of the time since it ran last; where not, it answers as it did then. A
    long window has a probe on either side; of short ones several share theirs."""
    answer, cost, ended = None, 0.0, -math.inf

    def spared() -> float | None:
        nonlocal answer, cost, ended
        begin = clock()
        if cost <= PROBED * (begin - ended):
            answer = probe()
            ended = clock()
            cost = ended - begin
        return answer

    return spared


def time_between_ranks(engine: IsolatedEngine, figures: dict[str, Any], plan: Plan, narrator: ProgressReporter) -> None:
    """Measure the time between ranks of an engine that counts the bytes between them and not the time.

    The profiler of the framework sees it in one more window, which no other figure counts."""
    if figures["communication_mib_per_step"] is None or figures["communication_ms_per_step"] is not None:
        return
    label, config, seen = engine.spec.label, engine.spec.config, None
    if config.pipeline_parallel_size > 1:
        figures["communication_time"] = "not reported: the engine does not count how long its stages wait for each other"
        return
    narrator.say(f"profiling the communication between the ranks of {label}")
    workload = plan.workload.share(PROFILED_REQUESTS, PROFILED_OUTPUT_LEN)
    try:
        seen = engine.time_collectives(workload)
    except (EngineFailure, TandemError) as error:
        narrator.alarm(f"No time between the ranks of {label}: {EngineFailure.of(error, label).message}")
    if seen is None:
        figures["communication_time"] = "not reported: the engine does not count it, and no profiler here sees it"
        return
    ranks = config.tensor_parallel_size
    figures["communication_ms_per_step"] = 1e3 * seen.seconds / ranks
    figures["communication_share"] = seen.seconds / ranks / seen.step_seconds
    figures["communication_time"] = (
        "that of a rank's all-reduce and all-gather, waiting included, as the framework's profiler saw them in a window of its "
        f"own: {len(workload.items)} requests of at most {PROFILED_OUTPUT_LEN} output tokens, "
        f"{1e3 * seen.step_seconds:.3g} ms a step"
    )


def profile_engines(outcome: Outcome, engines: Mapping[str, IsolatedEngine], plan: Plan, narrator: ProgressReporter) -> None:
    """One more window of each engine that can, under its framework's profiler, when all that counts has been measured.

    What fails here costs the engine its profile and nothing else."""
    workload = plan.workload.share(PROFILED_REQUESTS, PROFILED_OUTPUT_LEN)
    for label in outcome.survivors:
        narrator.say(f"profiling {label}")
        try:
            profile = engines[label].profile(workload)
        except (EngineFailure, TandemError) as error:
            narrator.alarm(f"No kernels of {label}: {EngineFailure.of(error, label).message}")
            continue
        if profile is None:
            narrator.say(f"{label} has no profiler here: its kernels are left out")
            continue
        outcome.profiles[label] = profile
        if profile.left_out:
            narrator.say(f"{label}: {len(profile.kernels)} kernels are kept, and {profile.left_out} after them left out")


def served(label: str, window: Window) -> Window:
    """Return the window if any of its requests succeeded; otherwise raise `EngineFailure`."""
    if not any(row.ok for row in window.rows):
        error = next((row.error for row in window.rows if row.error), "it gave fewer tokens than were asked for")
        message = f"None of the {len(window.rows)} requests to engine {label!r} succeeded; the first error: {error}"
        raise EngineFailure(message, label=label)
    return window


def window_figures(windows: Sequence[Window], plan: Plan, spec: EngineSpec, limits: Limits | None) -> dict[str, Any]:
    """Return the figures of the windows of an engine."""
    return {
        **summarize(windows, plan.workload.slo, plan.workload.concurrency),
        **efficiency(windows, plan.checkpoint.config, spec.config.dtype, limits),
        "communication_share": None,
        "communication_time": None,
        "no_roofline_because": no_roofline(windows, limits, spec.config.data_parallel_size + spec.config.prefill_parallel_size),
        "block_read_bytes_per_s": [window.bandwidth for window in windows],
    }


def figure_names(plan: Plan) -> list[str]:
    """Every figure that a row can have, known before anything runs."""
    named = window_figures([], plan, plan.engines[0], None)
    loaded = (
        *scale(plan.engines[0]),
        "device",
        "stored_weights",
        "kernels_used",
        *KERNELS,
        "auto_took_framework",
        "load_s",
        "warmup_s",
        *LOADED,
        "weights_mib",
        "peak_rss_mib",
    )
    return [*named, *loaded, "limits", "contaminated", "block_contaminated", "unsure", "latency_intervals"]


def machine_limits(config: MeasureConfig, narrator: ProgressReporter) -> Limits | None:
    """What the machine can do while its engines are idle; None if the configuration leaves it out."""
    if not config.limits_s:
        return None
    narrator.say("measuring the machine's limits")
    return measure_limits(config.limits_s)


def limits_after(config: MeasureConfig, narrator: ProgressReporter) -> tuple[Limits | None, str]:
    """`machine_limits` behind what was timed, which is worth keeping without them: then None, and why."""
    try:
        return machine_limits(config, narrator), ""
    except TandemError as error:
        narrator.alarm(str(error))
        return None, f"{error}\nAll else is there."


def prepare(engine: IsolatedEngine, plan: Plan, narrator: ProgressReporter) -> dict[str, Any]:
    """Load an engine and run the uncounted requests. Warm-up is what the engine compiles, and these."""
    loaded = engine.load(plan.checkpoint.path, narrator.progress(engine.spec.label))
    start = time.perf_counter()
    if plan.measure.warmup_requests:
        narrator.say(f"warming up {engine.spec.label}")
        engine.run(plan.workload.share(plan.measure.warmup_requests, plan.measure.warmup_output_len))
    warmup = loaded["warmup_s"] + time.perf_counter() - start
    memory = {name: loaded[name] for name in LOADED}
    stored = stored_weights(engine.spec.name, plan.checkpoint)
    memory["weights_mib"] = (
        sum(plan.checkpoint[name].raw().nbytes for name in plan.checkpoint.names())
        if stored
        else weights_bytes(plan.checkpoint.config, engine.spec.config.dtype)
    ) / 2**20
    if memory["rank_mib"] is None and memory["kv_pool_mib"] is not None and engine.spec.config.ranks == 1:
        memory["rank_mib"] = whole_rank_mib(memory, engine.spec.config)
    caps = loaded["caps"]
    ours = util.find_spec(f"{engine.spec.name}infer")  # what outside engines compute by is their own
    kernels = ", ".join(caps["kernels"]) if ours else None
    what = {
        "device": caps["device"],
        "stored_weights": stored,
        "kernels_used": kernels,
        **{name: caps[name] for name in KERNELS},
    }
    why = caps["framework_because"] if engine.spec.config.kernels == "auto" else None
    if why:
        narrator.say(f"{engine.spec.label}: kernels=auto took the framework's kernels, not the native ones: {why}")
    what["auto_took_framework"] = why
    return scale(engine.spec) | what | {"load_s": loaded["load_s"], "warmup_s": warmup} | memory


def whole_rank_mib(memory: Mapping[str, float], config: EngineConfig) -> float:
    """Of an engine that does not share out its model: all weights, and its part of the pages of all replicas."""
    return memory["weights_mib"] + memory["kv_pool_mib"] / (config.data_parallel_size + config.prefill_parallel_size)


def setting(config: DictConfig, plan: Plan) -> dict[str, Any]:
    """What was run, for the result."""
    return {
        "model": plan.model,
        "checkpoint": plan.checkpoint.path.name,
        "dtype": config.dtype,
        "kernels": config.kernels,
        "seed": config.seed,
        "workload": plan.workload.name,
        "workload_hash": plan.workload.digest,
        "num_prompts": len(plan.workload.items),
    }
