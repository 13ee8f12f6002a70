"""Stopped, killed, overloaded, left by its clients: the stress commands in their short forms,
and what they cannot show.
"""

import contextlib
import http.client
import json
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest
import uvloop
from conftest import WIDE
from servers import KEY, Server, serve

from api.routes import MAX_INLINE_BODY
from loadtest.client import CLOSED
from tests.stress import balance, common, drain, kill, overload, tenants
from tests.stress.common import REFUSED


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def long_batch(texts: int = 50, words: int = 250) -> bytes:
    """A request's body; at 250 words a text it takes seconds on two cores."""
    return json.dumps(
        {"texts": [f"{number} " + "word " * words for number in range(texts)]}
    ).encode()


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: Any


class Caller:
    """A request that is sent, and waits for nothing until it is asked to."""

    def __init__(self, server: Server, body: bytes, path: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
        self._connection.request("POST", path, body, headers)
        self.leave = self._connection.close

    def answer(self) -> Answer:
        with contextlib.closing(self._connection), self._connection.getresponse() as response:
            return Answer(response.status, response.headers, json.loads(response.read()))


Send = Callable[..., Caller]


@pytest.fixture
def send() -> Iterator[Send]:
    """Sends a whole request; its connection is closed at the end."""
    with contextlib.ExitStack() as stack:

        def call(server: Server, body: bytes, path: str = "/embeddings/batch") -> Caller:
            caller = Caller(server, body, path)
            stack.callback(caller.leave)
            return caller

        yield call


# The commands


def test_restarts_under_load_lose_nothing(
    models_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "mixed", common.queries)  # short, so that any machine can stop
    command = drain.drain(restarts=2, connections=12, seconds=0.5, MODELS_DIR=str(models_dir))
    report = uvloop.run(command)
    assert report.good, str(report)
    assert set(report.outcomes.counts()) <= {200, 429, 503, REFUSED, CLOSED}
    assert "restart 2 of 2: " in capsys.readouterr().err


def test_a_killed_worker_takes_only_its_own_requests(models_dir: pathlib.Path) -> None:
    command = kill.kill(kills=1, connections=8, workers=2, seconds=1.0, MODELS_DIR=str(models_dir))
    report = uvloop.run(command)
    assert report.failed <= sum(report.held) < 8, str(report)
    assert report.outcomes.counts()[200]


def test_what_passes_the_capacity_is_refused_politely(
    models_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overload, "BACK", 0.0)  # seconds to rest before the speed is measured again
    limits = {"REQUEST_THREADS": "4", "MAX_QUEUE_SECONDS": "0.5"}
    report = uvloop.run(
        overload.overload(seconds=0.6, at_once=150, MODELS_DIR=str(models_dir), **limits)
    )
    answers = [*report.outcomes, *report.at_once]
    assert {answer.what for answer in answers} == {200, 429}, str(report)


def test_connections_are_balanced_over_the_workers(models_dir: pathlib.Path) -> None:
    command = balance.balance(connections=32, workers=2, seconds=0.5, MODELS_DIR=str(models_dir))
    report = uvloop.run(command)
    assert sum(report.opened) == sum(report.later) == 32
    assert all(12 <= held <= 20 for held in (*report.opened, *report.later)), str(report)


def test_one_keys_queries_are_answered_beside_anothers_batches(models_dir: pathlib.Path) -> None:
    command = tenants.tenants(seconds=1.0, rounds=1, batches=4, texts=8, MODELS_DIR=str(models_dir))
    report = uvloop.run(command)
    assert set(report.queries.counts()) == set(report.batches.counts()) == {200}, str(report)
    assert report.queries.counts()[200] == 2


@pytest.mark.parametrize(("held", "says"), [([4, 4], "passed"), ([8, 0], "FAILED")])
def test_a_command_explains_its_figures_and_ends_with_a_verdict(
    held: list[int], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def command(*, seconds: float = 1.0) -> balance.Report:
        return balance.Report(held, [4, 4], 100.0, [seconds, 2.0])

    monkeypatch.setattr("sys.argv", ["balance", "--seconds", "3"])
    with pytest.raises(SystemExit) as end:
        common.run("What it does.", command)
    figures, _, explained = capsys.readouterr().out.partition("\n\n")
    assert "CPU seconds of each worker: [3.0, 2.0]" in figures
    assert explained.startswith("An equal share is 4.0 connections.")
    assert explained.endswith(f"\n{says}\n") and end.value.code == (says == "FAILED")


# Stopped


def test_what_cannot_be_computed_in_time_is_answered_503(
    models_dir: pathlib.Path, send: Send
) -> None:
    """A queue that takes far longer than the grace period, some of it without a thread yet, before
    an engine call that may take longer too.
    """
    limits = {
        "REQUEST_THREADS": "8",
        "MAX_QUEUE_TOKENS": "10000000",
        "INFERENCE_THREADS": "1",
        "MAX_BATCH_SIZE": "256",
        "MAX_BATCH_TOKENS": "65536",
        "EMBEDDING_MODEL": WIDE,
    }
    with serve(models_dir, PRECISION="fp32", **limits) as server:
        waiting = [send(server, long_batch(100, 500)) for _ in range(20)]
        kept = send(server, b'{"text": "hello"}', "/embeddings")
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        answers = [caller.answer() for caller in waiting]
        assert {answer.status for answer in answers} <= {200, 503}
        refused = [answer for answer in answers if answer.status == 503]
        assert refused
        for answer in answers:
            assert answer.headers["Connection"] == "close"
        for answer in refused:
            assert answer.headers["Retry-After"] == "1"
            assert answer.body["error_type"] == "shutting_down"
        assert kept.answer().status in (200, 503)
        assert server.process.wait(10) == 0
        assert time.monotonic() - started < 10
        assert "Traceback" not in server.log


def test_no_connection_is_taken_while_it_stops(models_dir: pathlib.Path, send: Send) -> None:
    with serve(models_dir, PRECISION="fp32") as server:
        running = send(server, long_batch(20))
        wait_for(lambda: server.client.get("/health").status_code == 200)
        server.process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                server.http().close()
                return False
            return True

        wait_for(refused)
        assert server.process.poll() is None
        answer = running.answer()
        assert answer.status == 200 and len(answer.body["embeddings"]) == 20
        assert answer.headers["Connection"] == "close"


# Overloaded


def test_probes_are_answered_while_every_thread_is_busy(
    models_dir: pathlib.Path, send: Send
) -> None:
    """And what finds no thread is refused, on a connection that stays."""
    limits = {"REQUEST_THREADS": "2", "INFERENCE_THREADS": "1"}
    with serve(models_dir, PRECISION="fp32", **limits) as server:
        waiting = [send(server, long_batch(15)) for _ in range(2 + 6)]
        with httpx.Client(
            base_url=server.url, headers={"X-API-Key": KEY}, trust_env=False, timeout=60
        ) as client:

            def turned_away() -> httpx.Response:
                body = b'{"input": "hello"}'.ljust(
                    MAX_INLINE_BODY + 1
                )  # a smaller one needs no thread
                json = {"Content-Type": "application/json"}
                return client.post("/v1/embeddings", content=body, headers=json)

            wait_for(lambda: turned_away().status_code == 429)
            for _ in range(3):
                answer = turned_away()
                assert answer.status_code == 429
                assert answer.headers["Retry-After"] in ("1", "2", "3")
                assert answer.headers["Connection"] == "keep-alive"
                assert "2 threads are busy" in answer.json()["error"]["message"]
            with server.http() as sock:  # the body, if it comes, must not look like a request
                sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
                refusal = sock.recv(65_536)
                assert b" 401 " in refusal and b"Connection: close" in refusal
            for path in ("/health", "/health/ready", "/healthcheck"):
                assert client.get(path).status_code == 200
        for caller in waiting[2:]:
            caller.leave()
        assert waiting[0].answer().status == 200


def test_a_request_waits_for_a_thread_only_so_long(models_dir: pathlib.Path, send: Send) -> None:
    limits = {"REQUEST_THREADS": "1", "INFERENCE_THREADS": "1", "MAX_QUEUE_SECONDS": "0.2"}
    with serve(models_dir, PRECISION="fp32", **limits) as server:
        running = send(server, long_batch(30))
        late = send(server, b'{"text": "hello"}'.ljust(MAX_INLINE_BODY + 1), "/embeddings")
        answer = late.answer()
        assert answer.status == 429
        assert "no thread was free for" in answer.body["error"]
        assert running.answer().status == 200


# Left


@pytest.mark.parametrize("threads", [4, 1], ids=["waiting for the engine", "waiting for a thread"])
def test_what_a_client_has_left_behind_is_not_computed(
    models_dir: pathlib.Path, send: Send, threads: int
) -> None:
    limits = {"REQUEST_THREADS": str(threads), "INFERENCE_THREADS": "1", "LOG_LEVEL": "debug"}
    with serve(models_dir, PRECISION="fp32", **limits) as server:
        running = send(server, long_batch(80))  # longer than GONE_AFTER on any machine
        for _ in range(3):
            send(server, long_batch()).leave()
        assert running.answer().status == 200
        assert server.embed("others are served")
        assert server.log.count("/embeddings/batch 499 ") == 3
        assert server.log.count("/embeddings/batch 200 ") == 1
