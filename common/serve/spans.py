"""A span of OpenTelemetry for every request that was admitted, by the semantic conventions for generative AI."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from common.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from common.serve.model import ServedModel

REQUESTED = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty", "max_tokens")
"""Sampling parameters that the conventions name."""


class Spans:
    """Goes on with the trace of whoever asks, where a `traceparent` came. Spans are exported by a thread of their own."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, StatusCode

        self._extract, self._kind, self._failed = extract, SpanKind.SERVER, StatusCode.ERROR
        self._provider = TracerProvider(resource=Resource.create({"service.name": "tandem"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tandem")

    @classmethod
    def to(cls, endpoint: str) -> Self:
        """`endpoint` takes OTLP over HTTP, in protobuf. Raises `ConfigError` where the packages are missing."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise ConfigError(f"--otlp-endpoint needs OpenTelemetry ({error}): pip install -e '.[otel]'.") from error
        return cls(OTLPSpanExporter(endpoint=endpoint))

    def end(self, facts: Mapping[str, Any], arrival: float, headers: Mapping[str, str], error: str | None = None) -> None:
        """The span of one HTTP request, which ends now. `facts` hold those of `named`; `error`: why there is no answer."""
        now, wall = time.perf_counter(), time.time_ns()
        at = lambda moment: wall - int((now - moment) * 1e9)  # noqa: E731
        title = f"{facts['gen_ai.operation.name']} {facts['gen_ai.response.model']}"
        span = self._tracer.start_span(title, self._extract(headers), self._kind, dict(facts), start_time=at(arrival))
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(self._failed)
        span.end(at(now))

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()


def named(operation: str, model: ServedModel, asked: str | None) -> dict[str, Any]:
    """What every span tells: what was done, and by which model, that was `asked` for by a name of its own."""
    name = model.names[0]
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "tandem",
        "gen_ai.request.model": asked or name,
        "gen_ai.response.model": name,
    }
