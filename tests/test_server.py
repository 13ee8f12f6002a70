"""Slow, odd and hostile clients on raw sockets: none of them keeps another from its answer."""

import contextlib
import http.client
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import httpx
import numpy as np
import pytest
from servers import KEY, Server, serve, wait_ready

from server.limits import Limits

LIMITS = Limits()
RECEIVE_TIMEOUT, CLOSE_TIMEOUT = LIMITS.receive_timeout, LIMITS.close_timeout
THREADS = 4
MAX_BODY = 100_000
SOON = 2.5  # seconds in which even a busy machine answers what no slow client holds up
BODY = b'{"text": "hello"}'


@pytest.fixture(scope="module")
def cramped(models_dir: pathlib.Path) -> Iterator[Server]:
    """Four request threads, so that five slow clients would take them all."""
    limits = {"MAX_BODY_SIZE": str(MAX_BODY), "MAX_TEXTS_PER_BATCH": "1000"}
    with serve(models_dir, PRECISION="fp32", REQUEST_THREADS=str(THREADS), **limits) as server:
        yield server


@pytest.fixture(autouse=True)
def unharmed(cramped: Server) -> Iterator[None]:
    """After every test others are answered at once, by the same process, and no log has a
    traceback."""
    (worker,) = children(cramped)
    yield
    assert_prompt(cramped)
    assert children(cramped) == [worker]
    assert "Traceback" not in cramped.log


def children(server: Server) -> list[int]:
    pid = server.process.pid
    return [
        int(pid) for pid in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]


def assert_prompt(server: Server) -> None:
    started = time.monotonic()
    assert httpx.get(server.url + "/health", trust_env=False, timeout=5).status_code == 200
    assert server.embed("others are served")
    assert time.monotonic() - started < SOON


def head(
    *fields: str, path: str = "/embeddings", method: str = "POST", version: str = "1.1"
) -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: test", f"X-API-Key: {KEY}", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def whole(body: bytes = BODY, *fields: str, version: str = "1.1") -> bytes:
    return head(f"Content-Length: {len(body)}", *fields, version=version) + body


def batch(texts: list[str]) -> bytes:
    body = json.dumps({"texts": texts}).encode()
    return head(f"Content-Length: {len(body)}", path="/embeddings/batch") + body


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


CHUNKED = head("Transfer-Encoding: chunked")
GET_HEALTH = head(path="/health", method="GET")


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def error(self) -> str:
        decoded = json.loads(self.body)
        assert decoded.keys() == {"error", "error_type"}
        message: str = decoded["error"]
        return message

    @property
    def vector(self) -> list[float]:
        assert self.status == 200, self.body
        (vector,) = json.loads(self.body)["embeddings"]
        assert len(vector) == 384
        result: list[float] = vector
        return result


class Client:
    """One raw connection."""

    def __init__(
        self, server: Server, sent: bytes = b"", receive_buffer: int | None = None
    ) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(20)
        self.sock.connect(("127.0.0.1", server.port))
        self._file = self.sock.makefile("rb")
        self.send(sent)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def finish(self) -> None:
        """Close the sending side."""
        self.sock.shutdown(socket.SHUT_WR)

    def answer(self, body: bool = True) -> Answer:
        version, status, _ = self._file.readline().split(b" ", 2)
        assert version.startswith(b"HTTP/1.")
        headers = http.client.parse_headers(self._file)
        length = int(headers["Content-Length"]) if body and "Content-Length" in headers else 0
        return Answer(int(status), headers, self._file.read(length))

    def closed(self) -> bool:
        """Whether the server has closed the connection, with nothing more sent."""
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True

    def silent(self, seconds: float = 0.3) -> bool:
        """Whether nothing comes for a while, not even the end."""
        self.sock.settimeout(seconds)
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(20)
        return False


# Slow clients


def test_slow_clients_hold_up_nobody_and_are_given_up(cramped: Server) -> None:
    """One more of each kind than there are threads, all at the same time."""
    stalled = {
        "request line": b"POST /embedd",
        "head": head("Content-Length: 17")[:-2],
        "body": whole()[:-1],
        "body not begun": head("Content-Length: 17"),
        "expected body": head("Content-Length: 17", "Expect: 100-continue"),
        "chunk": CHUNKED + b"11\r\n" + BODY[:-1],
        "chunk's end": CHUNKED + chunks(BODY)[:-2],
        "chunk's size": CHUNKED + chunks(BODY) + b"1",
        "last chunk": CHUNKED + chunks(BODY) + b"0\r\n",
        "second request": whole() + head("Content-Length: 17"),
    }
    with contextlib.ExitStack() as stack:
        slow = [
            (kind, stack.enter_context(Client(cramped, sent)))
            for kind, sent in stalled.items()
            for _ in range(THREADS + 1)
        ]
        mute = [stack.enter_context(Client(cramped)) for _ in range(THREADS + 1)]
        trickling = [stack.enter_context(Client(cramped)) for _ in range(THREADS + 1)]
        started = time.monotonic()
        assert_prompt(cramped)
        request = whole()
        step = -(-len(request) // 12)
        for at in range(0, len(request), step):
            for client in trickling:
                client.send(request[at : at + step])
            assert_prompt(cramped)
            time.sleep(0.35)
        assert time.monotonic() - started > RECEIVE_TIMEOUT + 0.5
        for client in trickling:
            assert client.answer().vector
        for kind, client in slow:
            if kind == "second request":
                assert client.answer().vector
            if kind == "expected body":
                assert client.answer().status == 100
            answer = client.answer()
            assert answer.status == 408, kind
            assert "3 s" in answer.error and answer.headers["Connection"] == "close"
            assert client.closed(), kind
        assert time.monotonic() - started < RECEIVE_TIMEOUT + 5
        for client in mute:
            assert client.silent(0.01)
            client.send(whole())
            assert client.answer().vector


def test_a_request_may_arrive_byte_by_byte(cramped: Server) -> None:
    for request in (whole(), CHUNKED + chunks(BODY[:5], BODY[5:]) + b"0\r\n\r\n"):
        with Client(cramped) as client:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(2):  # the second time its head is known
                for at in range(len(request)):
                    client.send(request[at : at + 1])
                    time.sleep(0.0005)
                assert client.answer().vector


def test_clients_that_never_read_hold_up_nobody(cramped: Server) -> None:
    """Their answers wait in the event loop, not in a thread; one that reads slowly gets all of
    its own."""
    with contextlib.ExitStack() as stack:
        # 460 kB is more than the kernel takes without a reader, 4.6 MB more than it ever takes.
        # That clients which stop reading are cut is shown in test_http_limits.py, in less time.
        slow, *_ = [
            stack.enter_context(Client(cramped, batch(["a"] * texts), receive_buffer=4096))
            for texts in [1000, *[100] * THREADS]
        ]
        received = [slow.sock.recv(1)]  # computed
        started = time.monotonic()
        while time.monotonic() < started + 6.5:
            received += [slow.sock.recv(4096) for _ in range(25)]
            time.sleep(0.75)
            assert_prompt(cramped)
        while not received[-1].endswith(b"]}"):
            received.append(slow.sock.recv(65_536))
            assert received[-1]
        _, body = b"".join(received).split(b"\r\n\r\n")
        assert len(json.loads(body)["embeddings"]) == 1000


def test_clients_that_read_nothing_share_the_bytes_of_a_large_response(cramped: Server) -> None:
    """Swagger UI's 1.7 MB wait to be sent to each of them."""
    (worker,) = children(cramped)

    def resident() -> int:
        pages = int(pathlib.Path(f"/proc/{worker}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    path = "/docs/swagger-ui-bundle.js"
    size = len(cramped.client.get(path).content)
    before = resident()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            client = stack.enter_context(Client(cramped, head(path=path, method="GET"), 4096))
            assert client.sock.recv(1) == b"H"
        assert resident() - before < 20 * size


def assert_reset(clients: list[Client], within: float) -> None:
    """The server gives up all of these clients in so many seconds; nothing is read."""
    deadline = time.monotonic() + within
    for client in clients:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while time.monotonic() < deadline:
                client.send(b"x")
                time.sleep(0.05)


def test_a_client_that_never_closes_is_closed(cramped: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(Client(cramped, whole(BODY, "Connection: close")))
            for _ in range(THREADS + 1)
        ]
        for client in clients:
            answer = client.answer()
            assert answer.vector and answer.headers["Connection"] == "close"
            assert client.closed()
        assert_prompt(cramped)
        assert_reset(clients, within=CLOSE_TIMEOUT + 3)


# HTTP


def test_a_connection_carries_many_requests(cramped: Server) -> None:
    with Client(cramped) as client:
        for number in range(50):
            client.send(whole(b'{"text": "%d"}' % number) if number % 2 else GET_HEALTH)
            answer = client.answer()
            assert answer.status == 200 and answer.headers["Connection"] == "keep-alive"
        assert client.silent()


TRACED = ("X-Request-Id: {}", "X-Forwarded-For: 10.0.0.{}", "Traceparent: 00-{:032x}-{:016x}-01")


def test_a_head_that_comes_again_is_answered_as_the_first_time(cramped: Server) -> None:
    """From the second time on the application's routing is passed by, and nothing else."""
    bodies = [BODY, b'{"texd": 1}', b'{"text": ""}', b'{"text": "hello", "dimensions": 999}', b"{"]
    with Client(cramped) as client:

        def answer(body: bytes, number: int) -> Answer:
            fields = [each.format(number, number) for each in TRACED]
            client.send(whole(body, *fields))
            return client.answer()

        by_flask = {body: answer(body, 0) for body in bodies[1:]}
        vectors = [answer(BODY, number).vector for number in range(1, 4)]
        assert vectors[0] == vectors[1] == vectors[2]
        for number, body in enumerate(bodies[1:], 4):
            again, first = answer(body, number), by_flask[body]
            assert (again.status, again.body) == (first.status, first.body)
            assert again.status == 400
            assert again.headers["X-Request-Id"] == str(number)
            different = {"Date", "X-Request-Id"}
            assert {*again.headers} == {*first.headers}
            for name in {*first.headers} - different:
                assert again.headers[name] == first.headers[name], name
        assert answer(BODY, 9).headers["X-Request-Id"] == "9"
    assert "10.0.0." not in cramped.log  # behind no front end it is not the client's address


def test_heads_that_differ_in_the_length_of_the_body_alone(cramped: Server) -> None:
    bodies = [json.dumps({"text": "word " * count}).encode() for count in (1, 50, 2, 5000, 1, 200)]
    vectors = []
    for body in bodies:
        with Client(cramped, whole(body)) as client:
            vectors.append(client.answer().vector)
    with Client(cramped) as client:
        for body, vector in zip(bodies, vectors):
            client.send(whole(body))
            assert np.dot(client.answer().vector, vector) > 0.9999
        for spelled in ("Content-Length:17", "Content-Length: \t17 ", "content-length: 0017"):
            client.send(3 * (head(spelled) + BODY))
            assert len({tuple(client.answer().vector) for _ in range(3)}) == 1
        client.send(head("Content-Length: 0"))
        assert client.answer().status == 400
        client.send(head(f"Content-Length: {MAX_BODY + 1}"))
        assert client.answer().status == 413


def test_a_known_head_opens_no_other_door(cramped: Server) -> None:
    """Another key, route, method or type is another head, however often a good one has come; so is
    one that sends a field twice, and a body over the limit stays one.
    """
    good = whole()
    twice = whole(BODY, "X-Request-Id: a", "X-Request-Id: b")
    cases = [
        (good.replace(KEY.encode(), b"wrong"), 401),
        (whole(BODY, "X-API-Key: wrong"), 400),  # which of the two is the key?
        (good.replace(b"X-API-Key: ", b"Authorization: Bearer wrong-"), 401),
        (good.replace(b"X-API-Key: ", b"Authorization: Bearer "), 200),
        (good.replace(b"X-API-Key:", b"X_API_Key:"), 401),
        (good.replace(b"/embeddings", b"/nowhere"), 404),
        (good.replace(b"POST", b"PUT"), 405),
        (whole(BODY, "Content-Type: text/plain"), 415),
        (twice, 200),
        (head(f"Content-Length: {MAX_BODY + 1}"), 413),
    ]
    for sent, status in cases:
        with Client(cramped, good + good) as client:
            assert client.answer().vector and client.answer().vector
            client.send(sent)
            assert client.answer().status == status, sent
    with Client(cramped, whole(BODY, "X-Forwarded-For: 10.0.0.1") * 2) as client:
        assert client.answer().vector and client.answer().vector
        client.send(whole(BODY, "X-Forwarded-For: " + "1" * 9000))
        assert client.answer().status == 431
    for value in ("é".encode(), b"\x01"):
        with Client(cramped, good + good) as client:
            assert client.answer().vector and client.answer().vector
            field = b"X-Request-Id: " + value
            client.send(good.replace(b"Host: test", b"Host: test\r\n" + field))
            answer = client.answer()
            assert answer.status in (200, 400)
            assert value not in answer.headers.get("X-Request-Id", "").encode()


def test_openais_errors_keep_their_form_when_the_head_is_known(cramped: Server) -> None:
    def request(body: bytes) -> bytes:
        return head(f"Content-Length: {len(body)}", path="/v1/embeddings") + body

    with Client(
        cramped, request(b'{"input": "hello"}') * 2 + request(b'{"input": [""]}')
    ) as client:
        assert client.answer().status == client.answer().status == 200
        error = json.loads(client.answer().body)["error"]
        assert error["param"] == "input" and "text is empty" in error["message"]


def test_pipelined_requests_are_answered_in_order(cramped: Server) -> None:
    dimensions = [*range(1, 41), 384]
    bodies = [b'{"text": "hello", "dimensions": %d}' % number for number in dimensions]
    requests = [
        (
            CHUNKED + chunks(body[:9], body[9:]) + b"0\r\nX-Trailer: 1\r\n\r\n"
            if at % 3
            else whole(body)
        )
        for at, body in enumerate(bodies)
    ]
    with Client(cramped, b"".join(requests)) as client:
        client.finish()  # what was sent before is still answered
        answers = [client.answer() for _ in requests]
        assert [len(json.loads(answer.body)["embeddings"][0]) for answer in answers] == dimensions
        assert client.closed()


def test_what_follows_a_refused_body_is_the_next_request(cramped: Server) -> None:
    """An unread body, even one that looks like a request, is no request."""
    inner = whole(b'{"text": "smuggled"}')
    wrong_key = head(f"Content-Length: {len(inner)}").replace(KEY.encode(), b"wrong") + inner
    with Client(cramped, wrong_key + whole()) as client:
        assert client.answer().status == 401
        assert client.answer().vector
        assert client.silent()


@pytest.mark.parametrize("field", ["", "Connection: keep-alive"])
def test_http_1_0(cramped: Server, field: str) -> None:
    fields = [field] if field else []
    with Client(cramped, whole(BODY, *fields, version="1.0")) as client:
        assert client.answer().vector
        if field:
            client.send(whole(BODY, "Connection: close", version="1.0"))
            assert client.answer().vector
        assert client.closed()


def test_an_empty_line_before_a_request_is_ignored(cramped: Server) -> None:
    with Client(cramped, b"\r\n" + GET_HEALTH) as client:
        assert client.answer().status == 200


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_expect_100_continue(cramped: Server, chunked: bool) -> None:
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(BODY)}"
    with Client(cramped, head(framing, "Expect: 100-Continue")) as client:
        assert client.answer().status == 100
        client.send(chunks(BODY) + b"0\r\n\r\n" if chunked else BODY)
        assert client.answer().vector  # and not a second 100
        client.send(whole())
        assert client.answer().vector


def test_expect_100_continue_of_a_body_over_the_limit_is_told_so(cramped: Server) -> None:
    with Client(cramped, head(f"Content-Length: {MAX_BODY + 1}", "Expect: 100-continue")) as client:
        answer = client.answer()
        assert answer.status == 413 and str(MAX_BODY) in answer.error
        assert client.closed()


def test_expect_is_ignored_in_http_1_0_and_where_the_body_is_already_here(cramped: Server) -> None:
    for request in (
        whole(BODY, "Expect: 100-continue"),
        head("Expect: 100-continue", path="/health", method="GET"),
    ):
        with Client(cramped, request) as client:
            assert client.answer().status == 200
    with Client(
        cramped, head("Content-Length: 17", "Expect: 100-continue", version="1.0")
    ) as client:
        assert client.silent()
        client.send(BODY)
        assert client.answer().vector


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
@pytest.mark.parametrize("size, status", [(90_000, "200"), (MAX_BODY + 1, "413")])
def test_curl_posts_large_bodies(
    cramped: Server, tmp_path: pathlib.Path, size: int, status: str
) -> None:
    body = tmp_path / "body"
    body.write_bytes(BODY.ljust(size))
    options = ["-H", f"X-API-Key: {KEY}", "-H", "Content-Type: application/json"]
    for framing in ([], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect: 100-continue"]):
        command = ["curl", "-sS", "--noproxy", "*", "-o", os.devnull, "-w", "%{http_code}"]
        result = subprocess.run(
            [
                *command,
                *options,
                *framing,
                "--data-binary",
                f"@{body}",
                f"{cramped.url}/embeddings",
            ],
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert (result.stdout, result.stderr) == (status, "")


# Too much


@pytest.mark.parametrize("key, status", [(KEY, 413), ("wrong", 401)])
@pytest.mark.parametrize(
    "sent",
    [
        head(f"Content-Length: {MAX_BODY + 1}"),
        head(f"Content-Length: {10**17}"),
        CHUNKED + b"ffffffffffffffff\r\n" + b" " * (MAX_BODY + 1),
        CHUNKED + chunks(b" " * MAX_BODY) + b"1\r\n ",
    ],
    ids=["length", "huge length", "huge chunk", "chunks"],
)
def test_a_body_over_the_limit_is_refused_before_it_has_come(
    cramped: Server, sent: bytes, key: str, status: int
) -> None:
    with Client(cramped, sent.replace(KEY.encode(), key.encode())) as client:
        answer = client.answer()
        assert answer.status == status and answer.headers["Connection"] == "close"
        if status == 413:
            assert str(MAX_BODY) in answer.error and "MAX_BODY_SIZE" in answer.error
        assert client.closed()


def test_a_client_that_sends_on_still_gets_its_413(cramped: Server) -> None:
    with Client(cramped, head("Content-Length: 50000000")) as client:
        client.send(b" " * 50_000_000)
        assert client.answer().status == 413


def test_a_large_body_in_many_chunks_costs_little(service: Server) -> None:
    """gunicorn's own reader copies what is left of the body for every chunk: 20 s for this one."""
    text = b"x" * 16_384
    with Client(service, CHUNKED + chunks(b'{"text": "') + chunks(text) * 1800) as client:
        started = time.monotonic()
        client.send(chunks(b'"}') + b"0\r\n\r\n")
        answer = client.answer()
        assert answer.status == 413 and str(len(text) * 1800) in answer.error
        assert time.monotonic() - started < SOON


def test_unfinished_bodies_take_bounded_memory(cramped: Server) -> None:
    """Four times the largest body; the largest holders are turned away, small ones are not."""
    with contextlib.ExitStack() as stack:
        size = MAX_BODY - 1000  # heads count too
        unfinished = head(f"Content-Length: {size}") + b" " * (size - 1)
        clients = [stack.enter_context(Client(cramped, unfinished)) for _ in range(8)]
        with Client(cramped, head(f"Content-Length: {len(BODY)}")) as small:
            waiting = [client for client in clients if client.silent(0.2)]
            assert len(waiting) == 4
            for client in set(clients) - set(waiting):
                answer = client.answer()
                assert answer.status == 429 and answer.headers["Retry-After"] == "1"
                assert str(4 * MAX_BODY) in answer.error
            small.send(BODY)
            assert small.answer().vector
        waiting[0].send(b" ")
        assert waiting[0].answer().status == 400  # white space is no JSON
        with Client(cramped, unfinished) as client:
            assert client.silent()


def test_small_requests_arrive_while_large_ones_wait_for_a_thread(cramped: Server) -> None:
    """Large bodies that are worked on do not count as unfinished ones: nobody is turned away for
    them, however slow the engine is.
    """
    body = b'{"text": "hello"'.ljust(MAX_BODY - 1000) + b"}"
    large = head(f"Content-Length: {len(body)}") + body
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(cramped, large)) for _ in range(8)]
        with Client(cramped, head(f"Content-Length: {len(BODY)}")) as small:
            small.send(BODY)
            assert small.answer().vector
        assert all(client.answer().vector for client in clients)


def test_more_connections_than_can_be_held(models_dir: pathlib.Path) -> None:
    """The oldest that sends nothing makes room for the next."""
    limits = {"REQUEST_THREADS": str(THREADS), "GUNICORN_CMD_ARGS": "--worker-connections 20"}
    with serve(models_dir, PRECISION="fp32", **limits) as server:
        server.client.close()  # its kept-alive connections would count too
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(Client(server, b"POST /" if number % 2 else b""))
                for number in range(60)
            ]
            with Client(server, GET_HEALTH) as client:
                assert client.answer().status == 200
            with Client(server, whole()) as client:
                assert client.answer().vector
            assert all(client.closed() for client in clients[:40])
            assert all(client.silent(0.01) for client in clients[45:])
        assert "Traceback" not in server.log


def test_running_out_of_files_ends_nothing(cramped: Server) -> None:
    (worker,) = children(cramped)
    limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    opened = [int(name) for name in os.listdir(f"/proc/{worker}/fd")]
    with contextlib.ExitStack() as stack:
        try:
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (max(opened) + 3, limits[1]))
            free = max(opened) + 3 - len(opened)
            clients = [stack.enter_context(Client(cramped, whole())) for _ in range(free + 10)]
            assert clients[0].answer().vector
            assert clients[-1].silent()
        finally:
            resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
        assert all(client.answer().vector for client in clients[1:])


def test_two_hundred_callers_at_once_are_all_answered(service: Server) -> None:
    start = threading.Barrier(200)

    def call(number: int) -> list[float]:
        with Client(service) as client:
            start.wait(30)
            client.send(whole(b'{"text": "caller %d"}' % number))
            return client.answer().vector

    with ThreadPoolExecutor(200) as pool:
        vectors = list(pool.map(call, range(200)))
    assert len({tuple(vector) for vector in vectors}) == 200
    assert "Traceback" not in service.log


# Broken HTTP


@pytest.mark.parametrize(
    "sent",
    [
        head("Content-Length: x") + BODY,
        head("Content-Length: -1") + BODY,
        head("Content-Length: +17") + BODY,
        head("Content-Length: 1_7") + BODY,
        head("Content-Length:") + BODY,
        head("Content-Length: 17, 17") + BODY,
        head("Content-Length: " + "9" * 19) + BODY,
        head("Content-Length: " + "9" * 5000) + BODY,
        head("Content-Length: 5000", "Content-Length: 5000"),
        head("Content-Length: 17", "Content-Length: 5000"),
        head("Content-Length: 5000", "Transfer-Encoding: chunked") + b"f00\r\n",
        head("Content-Length : 17") + BODY,
        head("Content-Length:\r\n 17") + BODY,
        head("Transfer-Encoding : chunked") + BODY,
        head("Transfer-Encoding: gzip") + b"f00\r\n",
        head("Transfer-Encoding: gzip, chunked") + b"f00\r\n",
        head("Transfer-Encoding: chunked, chunked") + b"f00\r\n",
        head("Transfer-Encoding: identity") + b"f00\r\n",
        head("Transfer-Encoding: chunked", version="1.0") + b"0\r\n\r\n",
        CHUNKED + b"x\r\n" + BODY,
        CHUNKED + b"\r\n" + BODY,
        CHUNKED + b"-1\r\n" + BODY,
        CHUNKED + b"0x11\r\n" + BODY,
        CHUNKED + b" 11\r\n" + BODY,
        CHUNKED + b"11\n" + BODY + b"\n0\n\n" + b" " * 5000,
        CHUNKED + b"1" * 17 + b"\r\n" + BODY,
        CHUNKED + b"10\r\n" + BODY + b"\r\n0\r\n\r\n",
        CHUNKED + b"12\r\n" + BODY + b"\r\n0\r\n\r\n",
        CHUNKED + b"11\r\n" + BODY + b"XX0\r\n\r\n",
        CHUNKED + b"1" * 5000,
        CHUNKED + b"11;" + b"x" * 5000,
        CHUNKED + chunks(BODY) + b"0\r\n" + b"X: y\r\n" * 2000,
        CHUNKED + chunks(BODY) + b"0\r\nX: y\n\n",
        CHUNKED + b"11;a\rb\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"get / HTTP/1.1\r\n\r\n",
        b"GET nowhere HTTP/1.1\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        head("No colon") + BODY,
        head("X: a\rb") + BODY,
        head("X: a\nContent-Length: 17") + BODY,
        head(*[f"X-{number}: y" for number in range(100)]),
        head("X: " + "y" * 9000),
        head("X: " + "y" * 100_000),
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
        head("Expect: nothing"),
    ],
    ids=lambda sent: ascii(sent.removeprefix(head()[:-2]).removeprefix(CHUNKED)[:40]),
)
def test_broken_http_is_a_4xx_and_the_end_of_the_connection(cramped: Server, sent: bytes) -> None:
    """At once, not when the client is given up; nothing of what follows counts as a request."""
    for good in (b"", whole(), CHUNKED + chunks(BODY) + b"0\r\n\r\n"):
        with Client(cramped, good + sent + GET_HEALTH) as client:
            assert not good or client.answer().vector
            status = client.answer().status
            assert 400 <= status < 500 and status != 408
            assert client.closed()


def test_a_head_without_end_is_refused(cramped: Server) -> None:
    with Client(cramped, b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000) as client:
        answer = client.answer()
        assert answer.status == 431 and "32768" in answer.error
        assert client.closed()


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /emb",
        head("Content-Length: 17")[:-1],
        head("Content-Length: 17"),
        whole()[:-1],
        CHUNKED,
        CHUNKED + b"11\r\n" + BODY[:-1],
        CHUNKED + chunks(BODY),
        CHUNKED + chunks(BODY) + b"0\r\n",
    ],
    ids=ascii,
)
def test_a_request_that_breaks_off_is_answered_400(cramped: Server, sent: bytes) -> None:
    with Client(cramped, sent) as client:
        client.finish()
        answer = client.answer()
        assert answer.status == 400 and "broke off" in answer.error
        assert client.closed()


def test_clients_that_vanish_are_forgotten(cramped: Server) -> None:
    """With a reset, at every stage of a request and where an answer is on its way."""
    linger = b"\1\0\0\0\0\0\0\0"
    request = whole()
    stages = [(request * 2)[:at] for at in (0, 1, 10, len(request) - 1, len(request), 500)]
    refused = head("Content-Length: x")
    expecting = head("Content-Length: 17", "Expect: 100-continue")
    for sent in [*stages, refused, expecting, batch(["a"] * 100)]:
        for _ in range(THREADS + 1):
            with Client(cramped, sent) as client:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                client.sock.close()


def test_random_bytes_are_the_clients_fault(cramped: Server) -> None:
    """Mutated requests: an answer below 500 (501 is HTTP's own), or a closed connection."""
    seed = random.Random(int(os.environ.get("FUZZ_SEED", "7")))
    goods = [whole(), CHUNKED + chunks(BODY[:7], BODY[7:]) + b"0\r\nX: y\r\n\r\n", GET_HEALTH]
    statuses = set()
    for _ in range(400):
        sent = bytearray(seed.choice(goods))
        for _ in range(seed.randint(1, 4)):
            at = seed.randrange(len(sent))
            piece = seed.choice(
                [b"", b"\r\n", b"\n", b"\0", b"0", b"f", b":", b" ", seed.randbytes(3)]
            )
            sent[at : at + seed.randint(0, 3)] = piece
        with Client(cramped, bytes(sent)) as client:
            client.finish()
            with contextlib.suppress(ValueError, ConnectionResetError):
                while True:
                    statuses.add(client.answer(body=b"HEAD" not in sent[:10]).status)
    assert 200 in statuses and 400 in statuses
    assert {status for status in statuses if status >= 500} <= {501}


# Shutdown


def test_sigterm_answers_what_was_accepted_and_ends_in_time(models_dir: pathlib.Path) -> None:
    """With idle, mute, stalled and unread connections open beside the requests that run."""
    with serve(models_dir, PRECISION="fp32", REQUEST_THREADS="8") as server:
        with contextlib.ExitStack() as stack:

            def client(sent: bytes = b"") -> Client:
                return stack.enter_context(Client(server, sent))

            idle = [client(GET_HEALTH) for _ in range(3)]
            assert all(one.answer().status == 200 for one in idle)
            mute = client()
            stalled = [client(whole()[:-1]), client(b"POST /"), client(CHUNKED + b"11\r\n{")]
            unread = stack.enter_context(Client(server, batch(["a"] * 100), receive_buffer=4096))
            assert unread.sock.recv(1) == b"H"
            running = [client(batch(["word " * 100] * 3)) for _ in range(12)]
            time.sleep(0.3)
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            idle[0].send(whole())  # a request on its way when the signal came
            answer = idle[0].answer()
            assert answer.vector and answer.headers["Connection"] == "close"
            for one in running:
                answer = one.answer()
                assert answer.status == 200 and len(json.loads(answer.body)["embeddings"]) == 3
            assert mute.closed() and idle[1].closed()
            assert time.monotonic() - started < 6
            for one in stalled:
                assert one.answer().status == 408
            assert all(one.closed() for one in [*idle, mute, *stalled, *running])
            assert server.process.wait(10) == 0
            assert time.monotonic() - started < 10
        assert "Traceback" not in server.log


def test_the_requests_a_worker_begins_with_do_not_count_for_max_requests(
    models_dir: pathlib.Path,
) -> None:
    with serve(models_dir, wait=False, GUNICORN_CMD_ARGS="--max-requests 100") as server:
        asked, kept, ready = 0, "keep-alive", False
        while kept == "keep-alive":
            time.sleep(0.0 if ready else 0.05)
            with contextlib.suppress(httpx.ConnectError):
                answer = server.client.get("/health/ready")
                asked, kept = asked + 1, answer.headers["Connection"]
                ready = answer.status_code == 200
        assert ready and asked == 100
        assert "starting anew" in server.log


def test_a_unix_socket_is_served_as_well(models_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "socket")
    with (
        serve(models_dir, wait=False, GUNICORN_CMD_ARGS=f"--bind unix:{path}") as server,
        httpx.Client(transport=httpx.HTTPTransport(uds=path), headers={"X-API-Key": KEY}) as client,
    ):
        server.client.close()
        server.client = client
        client.base_url = httpx.URL("http://localhost")
        while server.process.poll() is None and "Listening" not in server.log:
            time.sleep(0.02)
        wait_ready(server)
        first, again = (client.post("/embeddings", json={"text": "hello"}) for _ in range(2))
        assert first.status_code == again.status_code == 200
        assert first.json() == again.json()
