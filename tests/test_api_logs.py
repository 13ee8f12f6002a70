"""Logs: what a line says, in both forms, and what none ever says."""

import json
import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import NAME
from servers import ROOT, Server, free_port, launch, serve
from test_server import Client, children

from image_embeddings import probe_picture

KEYS = ("keymark-first-0123456789", "keymark-second-987654321")
TEXT = "textmark"  # in every text that is sent
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "00f067aa0ba902b7"
AUTH = {"X-API-Key": KEYS[0]}
ID = re.compile(r"[0-9a-f]{32}")
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def marked(models_dir: pathlib.Path, form: str, **env: str) -> Any:
    """A service with `KEYS`; its client sends none."""
    return serve(
        models_dir,
        PRECISION="fp32",
        LOG_FORMAT=form,
        VECTOR_EMBEDDER_API_KEY=",".join(KEYS),
        **{"GOOGLE_CLOUD_PROJECT": "a-project", **env},
    )


@pytest.fixture(scope="module")
def json_service(models_dir: pathlib.Path) -> Iterator[Server]:
    with marked(models_dir, "json", LOG_LEVEL="debug") as server:
        yield server


@pytest.fixture(scope="module")
def text_service(models_dir: pathlib.Path) -> Iterator[Server]:
    with marked(models_dir, "text") as server:
        yield server


def until(true: Callable[[], object], every: float = 0.01) -> None:
    """Wait until something holds, and look every so many seconds."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(every)


def entries(server: Server) -> list[dict[str, Any]]:
    """All of the log; every line is one JSON object."""
    lines = server.log.splitlines()
    found = [json.loads(line) for line in lines]
    assert all(isinstance(entry, dict) for entry in found)
    return found


def entry(server: Server, request_id: str) -> dict[str, Any]:
    """A request's own line, which is written after its answer."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        # The last line may be half-written when it is read.
        lines = [line for line in server.log.split("\n")[:-1] if request_id in line]
        found = [line for line in map(json.loads, lines) if "httpRequest" in line]
        if found:
            (one,) = found
            return dict(one)
        time.sleep(0.01)
    raise AssertionError(server.log)


def line(server: Server, request_id: str) -> str:
    """The same, as text."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for found in server.log.split("\n")[:-1]:
            if request_id in found:
                return found
        time.sleep(0.01)
    raise AssertionError(server.log)


def ask(server: Server, path: str, body: Any = None, **headers: str) -> dict[str, Any]:
    """The log entry of a request that was sent with these headers."""
    sent = {**AUTH, **{name.replace("_", "-"): value for name, value in headers.items()}}
    answer = server.client.request("GET" if body is None else "POST", path, json=body, headers=sent)
    return entry(server, answer.headers["X-Request-Id"])


def test_a_requests_entry_is_what_cloud_logging_reads(json_service: Server) -> None:
    before = time.time()
    body = {"text": TEXT}
    answer = json_service.post(
        "/embeddings?chunks=false", body, headers={**AUTH, "User-Agent": "me/1"}
    )
    found = entry(json_service, answer.headers["X-Request-Id"])
    latency = found["httpRequest"].pop("latency")
    assert re.fullmatch(r"\d+\.\d{6}s", latency) and 0 < float(latency[:-1]) < 60
    assert found["httpRequest"] == {
        "requestMethod": "POST",
        "requestUrl": "/embeddings",
        "status": 200,
        "requestSize": str(len(answer.request.content)),
        "responseSize": str(len(answer.content)),
        "userAgent": "me/1",
        "remoteIp": "127.0.0.1",
        "protocol": "HTTP/1.1",
    }
    assert found["severity"] == "INFO"
    assert re.fullmatch(r"POST /embeddings 200 \d+\.\d ms", found["message"])
    stamp = re.fullmatch(r"(\S+)\.\d{6}Z", found["time"])
    assert stamp
    when = time.mktime(time.strptime(stamp[1] + " UTC", "%Y-%m-%dT%H:%M:%S %Z")) - time.timezone
    assert before - 1 <= when <= time.time()
    assert found.keys() == {"severity", "message", "time", "httpRequest", "requestId"}


def test_requests_that_look_alike_have_their_own_entries(json_service: Server) -> None:
    for number, agent in enumerate([b"User-Agent: a/1", b"User-Agent: b/22", b"X: no agent"] * 2):
        body = b'{"text": "%s"}' % (b"hi " * (number + 1))
        sent = (
            b"POST /embeddings?chunks=false HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\n%s\r\n"
            b"X-Request-Id: same-%d\r\nContent-Length: %d\r\n\r\n%s"
        ) % (KEYS[0].encode(), agent, number, len(body), body)
        with Client(json_service, sent) as client:
            assert client.answer().status == 200
        found = entry(json_service, f"same-{number}")["httpRequest"]
        assert found["userAgent"] == agent.decode().partition("User-Agent: ")[2]
        assert found["remoteIp"] == "127.0.0.1" and found["requestSize"] == str(len(body))


@pytest.mark.parametrize(
    ("header", "value", "span", "sampled"),
    [
        ("traceparent", f"00-{TRACE}-{SPAN}-01", SPAN, True),
        ("traceparent", f"00-{TRACE}-{SPAN}-00", SPAN, False),
        ("X-Cloud-Trace-Context", f"{TRACE}/74;o=1", "000000000000004a", True),
        ("X-Cloud-Trace-Context", f"{TRACE}/74", "000000000000004a", False),
        ("X-Cloud-Trace-Context", TRACE, None, False),
    ],
)
def test_an_entry_is_linked_to_its_trace(
    json_service: Server, header: str, value: str, span: str | None, sampled: bool
) -> None:
    found = ask(json_service, "/v1/models", **{header: value})
    assert found["logging.googleapis.com/trace"] == f"projects/a-project/traces/{TRACE}"
    assert found.get("logging.googleapis.com/spanId") == span
    assert found["logging.googleapis.com/trace_sampled"] is sampled


@pytest.mark.parametrize(
    "value",
    ["", "nonsense", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}"],
)
def test_a_broken_trace_is_left_out(json_service: Server, value: str) -> None:
    found = ask(json_service, "/v1/models", traceparent=value, X_Cloud_Trace_Context=value)
    assert not [name for name in found if "trace" in name]


@pytest.mark.parametrize("sent", ["a", "Az09._:+/=@-", "x" * 128])
def test_a_sane_request_id_is_kept(json_service: Server, sent: str) -> None:
    answer = json_service.client.get("/nowhere", headers={"X-Request-Id": sent})
    assert answer.headers["X-Request-Id"] == sent
    until(lambda: f'"requestId":"{sent}"' in json_service.log)


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", "a\tb", 'a"b', "é".encode(), "{}", "a;b"])
def test_any_other_request_id_is_replaced(json_service: Server, sent: str | bytes) -> None:
    headers: Any = [("X-Request-Id", sent)]
    answers = [json_service.client.get("/health", headers=headers) for _ in range(2)]
    first, second = (answer.headers["X-Request-Id"] for answer in answers)
    assert ID.fullmatch(first) and ID.fullmatch(second) and first != second


def test_every_answer_has_a_request_id(json_service: Server) -> None:
    for method, path in (
        *(("GET", path) for path in ("/health", "/health/ready", "/docs", "/metrics", "/nowhere")),
        ("POST", "/embeddings"),
        ("POST", "/metrics"),
        ("HEAD", "/health"),
        ("OPTIONS", "/embeddings"),
    ):
        for headers in ({}, AUTH):
            answer = json_service.client.request(method, path, headers=headers)
            assert ID.fullmatch(answer.headers["X-Request-Id"]), (method, path)


def test_what_the_server_answers_itself_is_logged(json_service: Server) -> None:
    sent = (
        b"POST /embeddings?key=%s HTTP/1.1\r\nX-Request-Id: %s\r\nUser-Agent: raw\r\n"
        b"traceparent: 00-%s-%s-01\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n"
        % (KEYS[0].encode(), b"refused", TRACE.encode(), SPAN.encode())
    )
    with Client(json_service, sent) as client:
        answer = client.answer()
    assert answer.status == 400 and answer.headers["X-Request-Id"] == "refused"
    found = entry(json_service, "refused")
    assert found["message"] == "POST /embeddings 400 validation"
    assert found["severity"] == "WARNING"
    assert found["httpRequest"]["requestUrl"] == "/embeddings"
    assert found["httpRequest"]["userAgent"] == "raw"
    assert found["logging.googleapis.com/spanId"] == SPAN
    broken = f"POST / HTTP/1.1\r\nX-API-Key {KEYS[0]}\r\n\r\n".encode()
    with Client(json_service, broken) as client:
        assert client.answer().status == 400
    until(lambda: '"POST / 400 validation"' in json_service.log)


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_key_and_no_text_gets_into_the_log(
    models_dir: pathlib.Path, clip_models_dir: pathlib.Path, form: str
) -> None:
    """Of all that clients send, good and bad, at the most talkative level, but for the names of
    fields that are ignored.
    """
    bodies = [
        *({name: TEXT} for name in ("text", "texts", "input", "inputs", "image", "images", "x")),
        *({name: [TEXT, "x"]} for name in ("texts", "input", "inputs", "images")),
        {"inputs": {"source_sentence": TEXT, "sentences": [TEXT]}},
        {"text": TEXT, "model": KEYS[0], "prompt_name": KEYS[1]},
        {"text": [TEXT, {TEXT: TEXT}]},
        {"text": f"{TEXT} " * 400, "chunks": True},
        [TEXT],
        TEXT,
    ]
    credentials = [
        *({"X-API-Key": key} for key in (*KEYS, "keymark-wrong")),
        *({"Authorization": f"{scheme} {KEYS[1]}"} for scheme in ("Bearer", "Basic")),
        {"Cookie": f"key={KEYS[0]}", "User-Agent": f"agent {KEYS[0]}"},
    ]
    key = KEYS[0].encode()
    raw = [
        b"POST /embeddings HTTP/1.1\r\nX-API-Key %s\r\n\r\n" % key,
        b"POST /embeddings HTTP/1.1\r\nX-API-Key: %s\x00\r\n\r\n" % key,
        b"POST /embeddings HTTP/1.1\r\nX-API-Key: a\r\n %s\r\n\r\n" % key,
        b"POST /embeddings?key=%s HTTP/9.9\r\n\r\n" % key,
        b"POST /%s HTTP/1.1\r\nExpect: %s\r\n\r\n" % (key, key),
        b"%s / HTTP/1.1\r\n\r\n" % key,
        b"POST /embeddings HTTP/1.1\r\nTransfer-Encoding: %s\r\n\r\n" % key,
        b"POST http://user:%s@host/ HTTP/1.1\r\nContent-Length: 1\r\n\r\n" % key,
        b"POST /embeddings HTTP/1.1\r\nContent-Length: 99\r\nX-API-Key: %s\r\n\r\n{textmark" % key,
        b"POST /embeddings HTTP/1.1\r\nX-API-Key: %s" % key,
        b"textmark keymark",
    ]
    folder = clip_models_dir if form == "json" else models_dir
    with marked(folder, form, LOG_LEVEL="debug") as server:
        client = server.client
        documented = client.get("/openapi.json").json()["paths"]
        routes = [(method, path) for path, made in documented.items() for method in made]
        for method, path in routes:
            path = path.replace("{model}", KEYS[0])
            for body in bodies:
                answer = client.request(method, path, json=body, headers=AUTH)
                assert answer.status_code < 500 or answer.status_code == 501
            for sent in credentials:
                url = f"{path}?key={KEYS[0]}&text={TEXT}"
                client.request(method, url, json=bodies[0], headers=sent)
            broken = {**AUTH, "Content-Type": "application/json"}
            client.request(method, path, content=f'{{"text": "{TEXT}', headers=broken)
            client.request(method, path, content=TEXT, headers={**AUTH, "Content-Type": TEXT})
            picture = {TEXT: (TEXT, probe_picture()), "b": (TEXT, TEXT.encode())}
            client.request(method, path, files=picture, headers=AUTH)
        client.get(f"/{KEYS[0]}/{KEYS[1]}", headers=AUTH)
        client.get(f"/{'x' * 505}{KEYS[0]}", headers=AUTH)
        client.get("/" + "".join(f"%{ord(letter):02x}" for letter in KEYS[0]), headers=AUTH)
        for request in raw:
            with Client(server, request) as connection:
                connection.finish()
                assert connection.answer().status >= 400
        last = client.get("/nowhere", headers=AUTH).headers["X-Request-Id"]
        line(server, last)
        client.close()  # a stop would wait for its kept connection
        server.process.send_signal(signal.SIGTERM)  # so that the last lines are there too
        assert server.process.wait(30) == 0
        log = server.log.lower()
    assert len(log.splitlines()) > len(routes) * len(bodies)
    assert "keymark" not in log and TEXT not in log
    assert "traceback" not in log
    if form == "json":
        assert all(isinstance(json.loads(found), dict) for found in log.splitlines())


@pytest.mark.parametrize(
    ("path", "logged"),
    [
        (
            "/a%0a2026-01-01T00:00:00.000Z%20INFO%20forged",
            r"/a\n2026-01-01T00:00:00.000Z INFO forged",
        ),
        ("/a%0d%1b[31m%00%7f", r"/a\r\x1b[31m\x00\x7f"),
        ("/%c2%85%e2%80%a8", r"/\x85\u2028"),
        ("/caf%c3%a9/%f0%9f%98%80", "/café/😀"),
        ("/%ff%fe", "/��"),
        ("/" + "x" * 600, "/" + "x" * 511 + "…"),
    ],
)
def test_nothing_sent_forges_a_line(
    json_service: Server, text_service: Server, path: str, logged: str
) -> None:
    assert ask(json_service, path)["httpRequest"]["requestUrl"] == logged
    answer = text_service.client.get(path, headers=AUTH)
    found = line(text_service, answer.headers["X-Request-Id"])
    assert f" WARNING GET {logged} 404 " in found


def test_an_agent_is_escaped_and_cut(json_service: Server) -> None:
    with Client(json_service) as client:
        client.send(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: agent\r\n")
        client.send(b"User-Agent: \xff\x85\t" + b"y" * 300 + b"\r\n\r\n")
        assert client.answer().status == 200
    agent = entry(json_service, "agent")["httpRequest"]["userAgent"]
    assert agent == "ÿ\\x85\\t" + "y" * 253 + "…"


def test_text_is_one_short_line(text_service: Server) -> None:
    answer = text_service.post("/embeddings", {"text": TEXT}, headers=AUTH)
    known = answer.headers["X-Request-Id"]
    shape = rf"{STAMP} INFO POST /embeddings 200 \d+\.\d ms {len(answer.content)} bytes 127.0.0.1 "
    assert re.fullmatch(shape + known, line(text_service, known))


def test_probes_are_logged_at_debug_level_only(json_service: Server, text_service: Server) -> None:
    for path in ("/health", "/health/ready", "/healthcheck"):
        assert ask(json_service, path)["severity"] == "DEBUG"
        text_service.client.get(path)
    last = text_service.client.get("/nowhere").headers["X-Request-Id"]
    line(text_service, last)
    assert "/health" not in text_service.log


def test_levels(models_dir: pathlib.Path) -> None:
    with marked(models_dir, "text", LOG_LEVEL="warning") as server:
        server.post("/embeddings", {"text": TEXT}, headers=AUTH)
        last = server.client.get("/nowhere").headers["X-Request-Id"]
        assert " WARNING GET /nowhere 401 " in line(server, last)
        assert server.log.count("\n") == 1


def test_the_start_says_what_is_served(json_service: Server) -> None:
    (started,) = [found for found in entries(json_service) if "serving" in found["message"]]
    assert started["severity"] == "INFO" and started["logger"] == "main"
    for part in (NAME, "fp32", "384 dimensions", "64 request", "300000 tokens", "60 s"):
        assert part in started["message"]
    assert any(found.get("logger") == "gunicorn" for found in entries(json_service))


def test_failures_are_one_entry_with_their_traceback(models_dir: pathlib.Path) -> None:
    failing = [sys.executable, str(ROOT / "tests" / "failing_service.py")]
    with marked(models_dir, "json", prefix=failing) as server:
        trace = {"traceparent": f"00-{TRACE}-{SPAN}-01", "X-Request-Id": "failed"}
        assert server.client.get("/fail", headers={**AUTH, **trace}).status_code == 500
        assert server.client.get("/fail_elsewhere", headers=AUTH).status_code == 200
        assert server.client.get("/warn", headers=AUTH).status_code == 200
        assert entry(server, "failed")["severity"] == "ERROR"
        messages = {found["message"]: found for found in entries(server)}
        assert KEYS[0] not in server.log
        (error,) = [text for text in messages if text.startswith("unexpected error")]
        assert "\nTraceback (most recent call last):\n" in error
        assert error.endswith("RuntimeError: first line\n2026-01-01 INFO forged ***")
        assert messages[error]["severity"] == "ERROR"
        assert messages[error]["requestId"] == "failed"
        assert messages[error]["logging.googleapis.com/spanId"] == SPAN
        (uncaught,) = [text for text in messages if "ZeroDivisionError" in text]
        assert messages[uncaught]["severity"] == "CRITICAL" and "Traceback" in uncaught
        assert any("UserWarning: a warning" in text for text in messages)
        assert "said\\r\\n\\x1b[31mforged\\u2028\\ud800 é" in messages
        assert messages["printed too"]["logger"] == "print"
        assert any(text.startswith("cannot be logged: TypeError") for text in messages)
    with marked(models_dir, "text", prefix=failing) as server:
        server.client.get("/fail", headers={**AUTH, **trace})
        server.client.get("/warn", headers=AUTH)
        line(server, "failed")
        assert not re.search("^2026-01-01", server.log, re.MULTILINE)
        for found in server.log.replace("printed too\n", "", 1).splitlines():
            assert re.match(rf"{STAMP} [A-Z]+ |    ", found), found
        assert "    2026-01-01 INFO forged ***" in server.log
        assert "(request failed)" in server.log


def test_workers_that_die_and_a_shutdown_are_logged_as_json_too(models_dir: pathlib.Path) -> None:
    with marked(models_dir, "json", WEB_CONCURRENCY="2") as server:
        victim = children(server)[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(children(server)) == 2 and victim not in children(server))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        found = entries(server)
    assert any(str(victim) in one["message"] and one["severity"] == "ERROR" for one in found)


def test_a_start_that_fails_says_so_in_json(
    models_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for env in ({"LOG_FORMAT": "json", "PORT": "x"}, {"K_SERVICE": "s", "PORT": "x"}):
        process = launch(models_dir, tmp_path / "log", free_port(), **{**env})
        assert process.wait(30) != 0
        (only,) = (tmp_path / "log").read_text().splitlines()
        found = json.loads(only)
        assert found["severity"] == "CRITICAL"
        assert found["message"].startswith("cannot start: PORT='x'")


def test_on_cloud_run(models_dir: pathlib.Path) -> None:
    """JSON is the default, and the client's address is what the front end adds last."""
    run = {"K_SERVICE": "embedder", "VECTOR_EMBEDDER_API_KEY": KEYS[0], "LOG_LEVEL": "debug"}
    with serve(models_dir, PRECISION="fp32", **run) as server:
        forwarded = {
            "X_Forwarded_For": "6.6.6.6, 203.0.113.9",
            "traceparent": f"00-{TRACE}-{SPAN}-01",
        }
        found = ask(server, "/v1/models", **forwarded)
        assert found["httpRequest"]["remoteIp"] == "203.0.113.9"
        assert found["traceId"] == TRACE  # without the project's name it has no link
        assert not [name for name in found if name.startswith("logging.googleapis.com")]
        assert (
            ask(server, "/health", X_Forwarded_For="no\taddress")["httpRequest"]["remoteIp"]
            == "127.0.0.1"
        )


def test_elsewhere_a_forwarded_address_is_not_believed(json_service: Server) -> None:
    found = ask(json_service, "/health", X_Forwarded_For="203.0.113.9")
    assert found["httpRequest"]["remoteIp"] == "127.0.0.1"
