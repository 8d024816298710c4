"""Prometheus metrics by vLLM's names: those that can be told truthfully. Gauges and totals of the engine are read when asked.

Times run from when the HTTP request came to when the host saw a token; that a client sees it later is the client's to measure.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.serve.worker import Call, Piece
from common.step_log import StepRecord

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
COUNTS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
STEP_TOKENS = tuple(2**power for power in range(15))
GAUGES = {
    "num_requests_running": ("num_running", "Requests that hold pages and a row."),
    "num_requests_waiting": ("num_waiting", "Requests that wait to run, the preempted among them."),
    "kv_cache_usage_perc": ("kv_cache_usage", "Share of KV pages in use; 1 is all."),
}
COUNTERS = {
    "generation_tokens": ("generation_tokens", "Tokens generated."),
    "num_preemptions": ("num_preemptions", "Requests sent back to waiting for want of pages."),
    "prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
}
"""Metric → the entry of `InferenceEngine.stats` that it tells, and what that is."""
OF_REPLICAS = {
    "replicas_lost": ("num_replicas_lost", "Replicas that have ended and were started anew."),
    "prompts_handed_over": ("prompts_handed_over", "Requests whose pages came from the engine that had computed the prompt."),
    "prompts_recomputed": ("prompts_recomputed", "Requests whose prompt was computed again where they went on."),
}
"""Of those that there are."""
OF_A_REPLICA = GAUGES | COUNTERS | {"prompt_tokens": ("prompt_tokens", "Prompt tokens of the requests that it was given.")}


@dataclass(slots=True)
class _Clock:
    """When things happened to one request, on the clock of `perf_counter`."""

    scheduled: float | None = None
    first: float | None = None
    last: float = 0.0
    tokens: int = 0


class Metrics:
    """The metrics of the server. The worker updates them once a step."""

    def __init__(self, model_name: str, engine: str) -> None:
        self._labels = {"model_name": model_name, "engine": engine}
        self._registry = CollectorRegistry()
        self._clocks: dict[str, _Clock] = {}
        seconds = self._histogram
        self._ttft = seconds("time_to_first_token_seconds", "From the request to its first token.", FIRST)
        self._itl = seconds("inter_token_latency_seconds", "Between two tokens of a request.", BETWEEN)
        self._tpot = seconds("request_time_per_output_token_seconds", "Mean time between a request's tokens.", BETWEEN)
        self._e2e = seconds("e2e_request_latency_seconds", "From the request to its last token, or its embedding.", WHOLE)
        self._queue = seconds("request_queue_time_seconds", "From the request to its first step.", WHOLE)
        self._prefill = seconds("request_prefill_time_seconds", "From the first step to the first token.", WHOLE)
        self._decode = seconds("request_decode_time_seconds", "From the first token to the last.", WHOLE)
        self._inference = seconds("request_inference_time_seconds", "From the first step to the last token.", WHOLE)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a finished request.", COUNTS)
        self._generation = self._histogram("request_generation_tokens", "Output tokens of a finished request.", COUNTS)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a finished request.", COUNTS)
        self._step = self._histogram("iteration_tokens_total", "Tokens that went through the model in a step.", STEP_TOKENS)
        self._success = Counter(
            "vllm:request_success", "Finished requests.", (*self._labels, "finished_reason"), registry=self._registry
        )
        self._accepted = Counter(
            "vllm:prompt_tokens",
            "Prompt tokens of the requests that were accepted.",
            tuple(self._labels),
            registry=self._registry,
        ).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(f"vllm:{name}", text, tuple(self._labels), buckets=buckets, registry=self._registry)
        return family.labels(**self._labels)

    def observe(self, records: list[StepRecord], fresh: list[tuple[Call, list[Piece]]]) -> None:
        for record in records:
            self._step.observe(int(record.counts.sum()))
            for name in record.started:
                if name in self._clocks:
                    self._clocks[name].scheduled = record.submitted
        for call, pieces in fresh:
            for piece in pieces:
                self._piece(call, piece)

    def _piece(self, call: Call, piece: Piece) -> None:
        request = call.requests[piece.number]
        clock = self._clocks.get(request.request_id)
        if clock is None:
            return  # its client has disconnected
        if piece.delta.token_ids:
            if clock.first is None:
                clock.first = piece.event.time
                self._ttft.observe(piece.event.time - call.arrival)
            else:
                self._itl.observe(piece.event.time - clock.last)
            clock.last = piece.event.time
            clock.tokens += len(piece.delta.token_ids)
        if piece.delta.finish is None:
            return
        del self._clocks[request.request_id]
        self._success.labels(**self._labels, finished_reason=piece.delta.finish.value).inc()
        self._prompt.observe(len(request.prompt_token_ids))
        self._generation.observe(clock.tokens)
        if request.params.max_tokens is not None:
            self._max_tokens.observe(request.params.max_tokens)
        if clock.first is None:
            return
        self._e2e.observe(clock.last - call.arrival)
        self._decode.observe(clock.last - clock.first)
        if clock.tokens > 1:
            self._tpot.observe((clock.last - clock.first) / (clock.tokens - 1))
        if clock.scheduled is not None:
            self._queue.observe(clock.scheduled - call.arrival)
            self._prefill.observe(clock.first - clock.scheduled)
            self._inference.observe(clock.last - clock.scheduled)

    def begin(self, call: Call) -> None:
        """Follow the requests of a call from now on."""
        self._clocks.update((request.request_id, _Clock()) for request in call.requests)

    def accepted(self, call: Call) -> None:
        """All requests of a call were; an engine counts those too that came before one of their call that was refused."""
        self._accepted.inc(sum(len(request.prompt_token_ids) for request in call.requests))

    def end(self, call: Call, aborted: bool = False) -> None:
        """Follow them no more; `aborted`: what has not ended by itself was accepted, and then given up by its reader."""
        for request in call.requests:
            if self._clocks.pop(request.request_id, None) is not None and aborted:
                self._success.labels(**self._labels, finished_reason="abort").inc()

    def embedded(self, lengths: Iterable[int], arrival: float, finished_reason: str) -> None:
        """An HTTP request for embeddings ends now; `lengths` are its prompts', in tokens, each of which counts as a request."""
        for length in lengths:
            self._accepted.inc(length)
            self._success.labels(**self._labels, finished_reason=finished_reason).inc()
            if finished_reason == "stop":
                self._prompt.observe(length)
                self._e2e.observe(time.perf_counter() - arrival)

    def text(self, stats: Mapping[str, Any], age_s: float) -> bytes:
        """The exposition, with what the engine's `stats` say, which are `age_s` seconds old."""
        families = CollectorRegistry()
        told = "Seconds since the engine gave the statistics of this page; they grow old during a long step."
        age = Gauge("tandem:stats_age_seconds", told, tuple(self._labels), registry=families)
        age.labels(**self._labels).set(age_s)
        families.register(_Stats(self._labels, stats))
        return generate_latest(self._registry) + generate_latest(families)


class _Stats(Collector):
    def __init__(self, labels: Mapping[str, str], stats: Mapping[str, Any]) -> None:
        self._labels, self._stats = labels, stats

    def collect(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        for metric, (key, text) in GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm:{metric}", text, labels=names)
            gauge.add_metric(values, self._stats[key])
            yield gauge
        for metric, (key, text) in COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:{metric}", text, labels=names)
            counter.add_metric(values, self._stats[key])
            yield counter
        yield from self._by_replica()

    def _by_replica(self) -> Iterator[Metric]:
        """The metrics of each replica. Their names differ from the sums, so that a query over a name counts once."""
        replicas = self._stats.get("replicas", ())
        if not replicas:
            return
        names, values = [*self._labels, "replica", "role"], list(self._labels.values())
        serves = GaugeMetricFamily("tandem:replica_serves", "Whether a replica serves.", labels=names)
        for index, stats in enumerate(replicas):
            serves.add_metric([*values, str(index), stats.get("role", "both")], stats["serves"])
        yield serves
        for metric, (key, text) in OF_A_REPLICA.items():
            kind = GaugeMetricFamily if metric in GAUGES else CounterMetricFamily
            family = kind(f"tandem:replica_{metric}", text, labels=names)
            for index, stats in enumerate(replicas):
                if key in stats:
                    family.add_metric([*values, str(index), stats.get("role", "both")], stats[key])
            yield family
        for metric, (key, text) in OF_REPLICAS.items():
            if key in self._stats:
                counter = CounterMetricFamily(f"tandem:{metric}", text, labels=list(self._labels))
                counter.add_metric(values, self._stats[key])
                yield counter
