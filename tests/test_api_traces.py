"""api/traces.py: a collector gets the spans of requests over OTLP."""

import http.server
import pathlib
import queue
import re
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
from servers import KEY, Server, serve
from test_api_logs import entry

from api import traces
from engine import spans

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
HERE = traces.missing({ENDPOINT: "http://127.0.0.1:1"}) is None
needs_packages = pytest.mark.skipif(not HERE, reason="requirements-otel.txt is not installed")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(NamedTuple):
    url: str
    spans: "queue.Queue[Any]"  # of opentelemetry.proto.trace.v1, with their resource's attributes


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """A receiver of OTLP over HTTP, as far as traces need one."""
    pytest.importorskip("opentelemetry.proto")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: "queue.Queue[Any]" = queue.Queue()

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            assert self.headers["Content-Type"] == "application/x-protobuf"
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        got.put((span, attributes(resource.resource)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield Collector(f"http://127.0.0.1:{server.server_port}", got)
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def traced(models_dir: pathlib.Path, collector: Collector) -> Iterator[Server]:
    environ = {ENDPOINT: collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50", "LOG_FORMAT": "json"}
    with serve(models_dir, PRECISION="fp32", **environ) as server:
        yield server


def attributes(holder: Any) -> dict[str, Any]:
    found = {}
    for pair in holder.attributes:
        kind = pair.value.WhichOneof("value")
        found[pair.key] = getattr(pair.value, kind)
    return found


def ask(server: Server, path: str, body: object, **headers: str) -> httpx.Response:
    headers = {"X-API-Key": KEY, **headers}
    return httpx.post(server.url + path, json=body, headers=headers, trust_env=False, timeout=60)


def until_trace(collector: Collector, trace: str) -> list[Any]:
    """All spans that come until the root of a trace, which is the last one sent of it."""
    came: list[Any] = []
    while True:
        span, _ = collector.spans.get(timeout=60)
        came.append(span)
        if span.trace_id.hex() == trace and span.name.startswith(("POST", "GET")):
            return came


def of_trace(collector: Collector, trace: str) -> dict[str, list[Any]]:
    """The spans of a trace by name."""
    found: dict[str, list[Any]] = {}
    for span in until_trace(collector, trace):
        if span.trace_id.hex() == trace:
            found.setdefault(span.name, []).append(span)
    return found


@needs_packages
@pytest.mark.parametrize("size", [1, 20_000])  # the latter in a thread
def test_a_request_is_a_span_of_its_callers_trace_and_its_parts_are_within(
    traced: Server, collector: Collector, size: int
) -> None:
    body = {"text": "What is deep learning?" + " " * size}
    response = ask(traced, "/embeddings", body, traceparent=f"00-{TRACE}-{PARENT}-01")
    assert response.status_code == 200
    found = of_trace(collector, TRACE)
    (root,) = found.pop("POST /embeddings")
    assert root.parent_span_id.hex() == PARENT and root.kind == root.SPAN_KIND_SERVER
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.route": "/embeddings",
        "url.path": "/embeddings",
        "http.response.status_code": 200,
    }
    name = f"00-{TRACE}-{root.span_id.hex()}-01"
    assert response.headers["traceresponse"] == name
    assert set(found) == {spans.TOKENISE, spans.WAIT, spans.COMPUTE}
    (tokenise,), (wait,), (compute,) = (
        found[name] for name in (spans.TOKENISE, spans.WAIT, spans.COMPUTE)
    )
    for part in (tokenise, wait, compute):
        assert part.parent_span_id == root.span_id
        assert part.start_time_unix_nano <= part.end_time_unix_nano
    order = [root, tokenise, wait, compute]
    slack = 2_000_000  # ns, between two clocks
    for before, after in zip(order, order[1:]):
        assert before.start_time_unix_nano <= after.start_time_unix_nano + slack
    assert compute.end_time_unix_nano <= root.end_time_unix_nano + slack
    assert attributes(tokenise) == {"inputs": 1}
    assert attributes(compute)["inputs"] == 1 and attributes(compute)["tokens"] == 7


@needs_packages
def test_without_a_caller_a_trace_begins_here_and_the_log_names_it(
    traced: Server, collector: Collector
) -> None:
    response = ask(traced, "/v1/embeddings", {"input": ["one", "two texts"]})
    trace = response.headers["traceresponse"].split("-")[1]
    found = of_trace(collector, trace)
    (root,) = found["POST /v1/embeddings"]
    assert root.parent_span_id == b""
    assert entry(traced, response.headers["X-Request-Id"])["traceId"] == trace


@needs_packages
def test_errors_are_spans_and_unknown_paths_are_no_names(
    traced: Server, collector: Collector
) -> None:
    response = ask(traced, f"/{KEY}", {})
    (root,) = of_trace(collector, response.headers["traceresponse"].split("-")[1])["POST"]
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.response.status_code": 404,
    }


@needs_packages
@pytest.mark.parametrize(
    ("method", "path", "headers", "size", "status", "name", "route"),
    [
        ("POST", f"/{KEY}", {"X-API-Key": "wrong"}, 0, 401, "POST", None),
        ("POST", f"/{KEY}", {}, 33_554_433, 413, "POST", None),
        ("GET", f"/v1/models/{KEY}", {}, 0, 404, "GET /v1/models/{model}", "/v1/models/{model}"),
        ("DELETE", "/embeddings", {}, 0, 405, "DELETE /embeddings", "/embeddings"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_was_typed_is_in_no_span_whatever_the_status(
    traced: Server,
    collector: Collector,
    method: str,
    path: str,
    headers: dict[str, str],
    size: int,
    status: int,
    name: str,
    route: str | None,
) -> None:
    response = httpx.request(
        method,
        traced.url + path,
        content=b" " * size,
        headers={"X-API-Key": KEY, **headers},
        trust_env=False,
    )
    assert response.status_code == status
    trace = response.headers["traceresponse"].split("-")[1]
    span = None
    while span is None or span.trace_id.hex() != trace:
        span, _ = collector.spans.get(timeout=60)
    assert span.name == name
    found = attributes(span)
    assert found.get("http.route") == route and found["http.response.status_code"] == status
    assert KEY not in str(span).lower()


@needs_packages
def test_what_the_caller_does_not_sample_is_not_sent_and_probes_are_not_traced(
    traced: Server, collector: Collector
) -> None:
    unsampled = ask(traced, "/embed", {"text": "a"}, traceparent=f"00-{'1' * 32}-{PARENT}-00")
    assert unsampled.headers["traceresponse"].endswith("-00")
    assert "traceresponse" not in traced.client.get("/health/ready").headers
    later = ask(traced, "/embed", {"text": "b"})
    came = until_trace(collector, later.headers["traceresponse"].split("-")[1])
    assert came[-1].name == "POST /embed"
    assert "1" * 32 not in {span.trace_id.hex() for span in came}
    assert not [span.name for span in came if "health" in span.name]


@needs_packages
def test_a_collector_that_is_not_there_costs_neither_requests_nor_the_end(
    models_dir: pathlib.Path,
) -> None:
    environ = {ENDPOINT: "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with serve(models_dir, PRECISION="fp32", **environ) as server:
        assert len(server.embed("a text")) == 384
        assert server.stop() == 0 and server.stop_seconds < 10
        assert "Traceback" not in server.log


def test_without_the_packages_a_line_says_what_to_install(
    models_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Packages of that name which hold nothing stand in for their absence."""
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").touch()
    environ = {ENDPOINT: "http://127.0.0.1:9", "PYTHONPATH": str(tmp_path)}
    with serve(models_dir, PRECISION="fp32", **environ) as server:
        assert len(server.embed("a text")) == 384
        said = [line for line in server.log.splitlines() if "OpenTelemetry" in line]
    assert len(said) == 1 and re.search(
        "WARNING start: OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is not installed: no "
        "traces are sent; pip install -r requirements-otel.txt$",
        said[0],
    )


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({ENDPOINT: " "}, False),
        ({ENDPOINT: "http://a"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a/v1/traces"}, True),
        ({ENDPOINT: "http://a", "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_SERVICE_NAME": "a"}, False),
        ({ENDPOINT: "http://a", "OTEL_TRACES_EXPORTER": "None"}, False),
        ({ENDPOINT: "http://a", "OTEL_TRACES_EXPORTER": " none,"}, False),
        ({ENDPOINT: "http://a", "OTEL_TRACES_EXPORTER": "otlp"}, True),
    ],
)
def test_traces_are_made_where_a_collector_is_named(environ: dict[str, str], wanted: bool) -> None:
    assert traces.wanted(environ) == wanted


OF_TRACES = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER=zipkin: .* can send otlp only"),
        ({"OTEL_TRACES_EXPORTER": "zipkin, console"}, "OTEL_TRACES_EXPORTER=zipkin,console: "),
        ({"OTEL_TRACES_EXPORTER": "otlp_proto_grpc"}, "OTEL_TRACES_EXPORTER=otlp_proto_grpc: "),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": " grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL=grpc: no traces are sent; .* can send http/protobuf only",
        ),
        ({OF_TRACES: "http/json"}, f"{OF_TRACES}=http/json: no traces are sent"),
        ({OF_TRACES: "grpc", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, f"{OF_TRACES}=grpc"),
    ],
    ids=str,
)
def test_another_way_of_sending_is_not_taken_for_ours(environ: dict[str, str], says: str) -> None:
    asked = {ENDPOINT: "http://127.0.0.1:9", **environ}
    said = traces.missing(asked)
    assert said and re.match(says, said) and traces.make(asked) is None
    assert traces.missing(environ) is None  # nobody has asked for traces


@needs_packages
@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
        {"OTEL_TRACES_EXPORTER": "console, OTLP"},
        {"OTEL_TRACES_EXPORTER": "otlp_proto_http"},
        {OF_TRACES: "HTTP/protobuf", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
    ids=str,
)
def test_the_way_of_sending_may_be_said(environ: dict[str, str]) -> None:
    assert traces.missing({ENDPOINT: "http://127.0.0.1:9", **environ}) is None


def test_parts_are_recorded_only_while_somebody_asks() -> None:
    assert spans.timed("a part", lambda: 5, 1) == 5
    recorded: spans.Recording = []
    spans.recording.set(recorded)
    with pytest.raises(ZeroDivisionError):
        spans.timed("a part", lambda: 1 / 0, 3)
    spans.recording.set(None)
    ((name, start, end, more),) = recorded
    assert (name, more) == ("a part", {"inputs": 3}) and start <= end
    recorded.append(spans.Span(spans.COMPUTE, 7.0, 8.0, {}))
    spans.waited(recorded, 5.0)
    assert recorded[2] == (spans.WAIT, 5.0, 7.0, {})
