"""OpenTelemetry traces: a span for each request, and within it its parts (engine/spans.py), sent
over OTLP by HTTP. On where the environment names a collector and requirements-otel.txt is
installed; nothing of OpenTelemetry is imported otherwise. Its own variables (OTEL_…) apply.
"""

import importlib.util
import threading
import time
from collections.abc import Mapping

from api import health
from engine import spans
from server.messages import OWN, Request

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTER = "OTEL_TRACES_EXPORTER"
# The specification's name of the one that sends traces, and the Python SDK's.
EXPORTERS = ("otlp", "otlp_proto_http")
# The first that is set decides.
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
NAME = "vector-embedder"  # of the service, unless OTEL_SERVICE_NAME says otherwise
FLUSH = 1.0  # seconds for the last spans when the worker ends
UNTRACED = frozenset((*health.PATHS, "/metrics"))


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for traces."""
    disabled = _value(environ, "OTEL_SDK_DISABLED") == "true"
    none = _exporters(environ) == ["none"]
    return not (disabled or none) and any(_value(environ, name) for name in ENDPOINTS)


def missing(environ: Mapping[str, str]) -> str | None:
    """What to say where traces are asked for and cannot be made; None otherwise."""
    if not wanted(environ):
        return None
    if (exporters := _exporters(environ)) and not {*exporters} & {*EXPORTERS}:
        value = ",".join(exporters)
        return f"{EXPORTER}={value}: no traces are sent; the service can send otlp only"
    protocol = next((name for name in PROTOCOLS if _value(environ, name)), PROTOCOLS[0])
    if (value := _value(environ, protocol)) not in ("", "http/protobuf"):
        return f"{protocol}={value}: no traces are sent; the service can send http/protobuf only"
    names = ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    try:
        if all(importlib.util.find_spec(name) for name in names):
            return None
    except ModuleNotFoundError:  # a parent is missing
        pass
    return (
        f"{ENDPOINTS[0]} is set, but OpenTelemetry is not installed: no traces are sent; "
        "pip install -r requirements-otel.txt"
    )


def _exporters(environ: Mapping[str, str]) -> list[str]:
    """Several may be named; the service knows one."""
    return [name.strip() for name in _value(environ, EXPORTER).split(",") if name.strip()]


def _value(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name, "").strip().lower()


class Traces:
    """The spans of one worker's requests."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Raises: ImportError where OpenTelemetry is not installed."""
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = "OTEL_SERVICE_NAME" in environ or "service.name" in environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        )
        resource = Resource.create({} if named else {"service.name": NAME})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(NAME)
        self._trace, self._propagator = trace, TraceContextTextMapPropagator()

    def begin(self, request: Request) -> None:
        """Begin the span of a request, below the caller's where it sends `traceparent`, and record
        its parts. The response names the span in `traceresponse`, and so do the log's lines.
        """
        if request.client == OWN or request.path in UNTRACED:
            return
        span = self._tracer.start_span(
            request.method,
            self._propagator.extract(request.headers),
            self._trace.SpanKind.SERVER,
            {"http.request.method": request.method},
            start_time=_unix(request.arrived),
        )
        context = span.get_span_context()
        flags = int(context.trace_flags)
        name = f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"
        request.headers["traceparent"] = request.notes["traceresponse"] = name
        request.trace = span, []
        spans.recording.set(request.trace[1] if span.is_recording() else None)

    def end(self, request: Request, route: str | None, status: int) -> None:
        """The response has been sent: end its span.

        Args:
            route: the span is named by it and not by the path, which may hold anything, also a
                key; None for a path that is no route.
        """
        if request.trace is None:
            return
        span, recorded = request.trace
        request.trace = None
        parent = self._trace.set_span_in_context(span)
        for part in recorded:
            made = self._tracer.start_span(
                part.name, parent, attributes=part.attributes, start_time=_unix(part.start)
            )
            made.end(_unix(part.end))
        if route is not None:
            span.update_name(f"{request.method} {route}")
            span.set_attribute("http.route", route)
            if request.path == route:
                span.set_attribute("url.path", route)
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what has not been sent. A collector that does not answer cannot hold up the end."""
        sender = threading.Thread(target=self._provider.shutdown, daemon=True)
        sender.start()
        sender.join(FLUSH)


def make(environ: Mapping[str, str]) -> Traces | None:
    """The traces that the environment asks for; None where it does not, or they are `missing`."""
    return Traces(environ) if wanted(environ) and not missing(environ) else None


def _unix(monotonic: float) -> int:
    """A time of `time.monotonic`, or of `time.perf_counter`, which is the same clock on Linux, as
    nanoseconds of Unix time.
    """
    return time.time_ns() - int((time.monotonic() - monotonic) * 1e9)
