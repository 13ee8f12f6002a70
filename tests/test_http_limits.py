"""Limits of time, bytes and turns for one connection.

The numbers H1 to H11 are those of a list of inputs that made the service fail: H5, H6, H7 and H11
are in http_cases.py.
"""

import base64
import contextlib
import itertools
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from http_cases import get, message, post

Address = tuple[str, int]

# Seconds. Clients that must not be late send every 0.1 s, so a busy machine has a second to spare.
HEAD, BODY, RECEIVE, SEND, IDLE = 1.6, 2.0, 1.2, 1.0, 1.5
EVERY = 0.1
PATIENCE = 20.0  # a test fails after so long
MAX_BODY = 1_500_000  # bytes
CLOSE = "Connection: close"


@pytest.fixture(scope="module")
def server(echo_server_limits: Callable[..., Address]) -> Address:
    return echo_server_limits(
        head_timeout=HEAD,
        body_timeout=BODY,
        receive_timeout=RECEIVE,
        send_timeout=SEND,
        keepalive=IDLE,
        max_body=MAX_BODY,
    )


class Response(NamedTuple):
    status: int
    fields: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> dict[str, str]:
        assert self.fields["content-type"] == "application/json"
        content: dict[str, str] = json.loads(self.body)
        return content


def connect(address: Address, patience: float = PATIENCE) -> socket.socket:
    return socket.create_connection(address, timeout=patience)


def read_to_end(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def last_response(sock: socket.socket) -> Response:
    """The only response that is still to come: the server closes after it."""
    head, _, body = read_to_end(sock).partition(b"\r\n\r\n")
    start, *lines = head.decode("latin-1").split("\r\n")
    named = [line.partition(": ") for line in lines]
    fields = {name.lower(): value for name, _, value in named}
    assert fields["connection"] == "close"
    return Response(int(start.split()[1]), fields, body)


def ask(address: Address, sent: bytes) -> Response:
    with connect(address) as sock:
        sock.sendall(sent)
        return last_response(sock)


def trickle(sock: socket.socket, pieces: Iterable[bytes]) -> float:
    """Send a piece every 0.1 s until the server sends something or closes. Returns the seconds."""
    began = time.monotonic()
    for piece in pieces:
        sock.sendall(piece)
        if select.select([sock], [], [], EVERY)[0] or time.monotonic() - began > PATIENCE:
            break
    return time.monotonic() - began


def bytes_of(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


# -- turns


def test_a_flood_of_requests_leaves_others_their_turn(server: Address) -> None:
    """H1. The flood is not over when another client has had 40 responses."""
    received = bytearray()
    with connect(server, 3 * PATIENCE) as flood, connect(server) as other:

        def read() -> None:
            while part := flood.recv(65536):
                received.extend(part)

        reader = threading.Thread(target=read)
        reader.start()
        requests = get("/flood") * 30_000 + get("/flood", CLOSE)
        writer = threading.Thread(target=flood.sendall, args=(requests,))
        writer.start()
        while not received:
            time.sleep(0.001)
        for _ in range(40):
            other.sendall(get("/other"))
            assert other.recv(65536).startswith(b"HTTP/1.1 200 ")
        meanwhile = len(received)
        reader.join(3 * PATIENCE)
        writer.join(3 * PATIENCE)
    assert received.count(b"HTTP/1.1 200 ") == 30_001
    assert meanwhile < len(received)


# -- time to send a request


def all_at_once(check: Callable[..., None], cases: list[tuple[Any, ...]]) -> None:
    """Check cases in threads: they do little but wait."""
    with ThreadPoolExecutor(len(cases)) as pool:
        for checked in [pool.submit(check, *case) for case in cases]:
            checked.result()


def test_a_request_may_not_trickle_in_for_ever(server: Address) -> None:
    """H9: there is a limit for the whole head and for the whole body."""

    def check(begin: bytes, repeated: bytes, limit: float) -> None:
        with connect(server) as sock:
            sock.sendall(begin)
            passed = trickle(sock, itertools.repeat(repeated))
            response = last_response(sock)
        assert response.status == 408
        assert f"{limit:g} s" in response.json["error"]
        assert passed > limit - EVERY

    chunked = "Transfer-Encoding: chunked"
    all_at_once(
        check,
        [
            (b"GET / HTTP/1.1\r\nHost: a\r\nLong: ", b"v", HEAD),
            (b"GET / HTTP/1.1\r\nHost: a\r\n", b"A: b\r\n", HEAD),
            (post("", "Content-Length: 1000"), b"b", BODY),
            (post("", chunked), b"1\r\nb\r\n", BODY),
            (post("0\r\n", chunked), b"A: b\r\n", BODY),
        ],
    )


def test_a_client_that_stops_in_a_request_is_told_so(server: Address) -> None:
    def check(begin: bytes) -> None:
        response = ask(server, begin)
        assert response.status == 408
        if not begin.startswith(b"HEAD"):
            assert f"{RECEIVE:g} s" in response.json["error"]
        else:
            assert not response.body

    head = b"GET / HTTP/1.1\r\nHost: a\r\n"
    half = post("half", "Content-Length: 8")
    all_at_once(check, [(b"G",), (head,), (half,), (head.replace(b"GET", b"HEAD"),)])


def test_a_slow_request_is_served(server: Address) -> None:
    """Each byte but the last is alone, and all of them take less than the limits."""
    sent = post("slow", "Content-Length: 4", CLOSE)
    with connect(server) as sock:
        for byte in bytes_of(sent):
            sock.sendall(byte)
            time.sleep(HEAD / 4 / len(sent))
        assert last_response(sock).status == 200


def test_the_limits_begin_anew_with_each_request(server: Address) -> None:
    """Several slow requests on one connection take longer than the limit for one head."""
    began = time.monotonic()
    with connect(server) as sock:
        while time.monotonic() - began < HEAD + EVERY:
            for piece in (b"GET / HTTP/1.1\r\n", b"Host: a\r\n", b"A: b\r\n", b"\r\n"):
                sock.sendall(piece)
                time.sleep(EVERY)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_an_idle_connection_is_closed_without_a_word(server: Address) -> None:
    def check(pieces: Iterable[bytes], responses: int) -> None:
        with connect(server) as sock:
            trickle(sock, pieces)
            assert read_to_end(sock).count(b"HTTP/1.1 ") == responses

    all_at_once(check, [([], 0), ([get("/")], 1), (itertools.repeat(b"\r\n"), 0)])


# -- time to take a response


def narrow(address: Address) -> socket.socket:
    """A connection whose client has room for little that it has not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    sock.settimeout(PATIENCE)
    sock.connect(address)
    return sock


def test_only_a_client_that_stops_reading_is_cut(server: Address) -> None:
    """H8. A slow but steady reader takes several times the limit and gets all."""

    def check(field: str) -> None:
        request = post("v" * MAX_BODY, f"Content-Length: {MAX_BODY}", field)
        received = bytearray()
        began = time.monotonic()
        with narrow(server) as steady, narrow(server) as stopped:
            stopped.sendall(request)
            steady.sendall(request)
            while part := steady.recv(20_000):
                received += part
                # 330 kB/s: 2 MB take 6 s.
                time.sleep(max(0, began + len(received) / 330_000 - time.monotonic()))
            rest = 0
            with contextlib.suppress(ConnectionError):
                while part := stopped.recv(65536):
                    rest += len(part)
        echo = json.loads(received.partition(b"\r\n\r\n")[2])
        assert base64.b64decode(echo["body"]) == b"v" * MAX_BODY
        assert time.monotonic() - began > 5 * SEND
        assert rest < MAX_BODY

    all_at_once(check, [("Connection: close",), ("Connection: keep-alive",)])


# -- bytes


@pytest.mark.parametrize(
    "name, sent, status",
    [
        ("a cookie of 9 kB", get("/", f"Cookie: {'c' * 9000}"), 431),
        ("70 fields", get("/", *(f"F{number}: v" for number in range(70))), 431),
        ("a long head", get("/", *(f"F{number}: {'v' * 4000}" for number in range(20))), 431),
        ("a head without an end", get("/", "F: " + "v" * 100_000)[:-4], 431),
        ("a target of 9 kB", get("/" + "t" * 9000), 414),
        ("two equal Content-Types", post("", *["Content-Type: application/json"] * 2), 400),
        ("Expect of something else", post("", "Expect: a-miracle", "Content-Length: 1"), 417),
        ("Content-Length", post("", f"Content-Length: {MAX_BODY + 1}"), 413),
        (
            "chunks",
            post(f"{MAX_BODY + 1:x}\r\n{'v' * (MAX_BODY + 1)}", "Transfer-Encoding: chunked"),
            413,
        ),
        ("a broken line", get("/", "no colon"), 400),
        ("a broken start", b"\0\1\2\3", 400),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_refusal_is_json(server: Address, name: str, sent: bytes, status: int) -> None:
    """H10."""
    response = ask(server, sent)
    assert response.status == status
    assert set(response.json) == {"error", "error_type"}
    assert int(response.fields["content-length"]) == len(response.body)


@pytest.mark.parametrize(
    "sent, status",
    [
        (message("HEAD /x HTTP/1.1", "Content-Length: 2", CLOSE, body="{}"), 200),
        (message("HEAD /x HTTP/1.1", "Host: b"), 400),
        (message("HEAD /x HTTP/1.1", "no colon"), 400),
        (message("HEAD /x HTTP/1.1", f"Cookie: {'c' * 9000}"), 431),
        (message("HEAD /x HTTP/1.1", f"Content-Length: {MAX_BODY + 1}"), 413),
        (message("HEAD /x HTTP/1.1", "Transfer-Encoding: chunked", body="x"), 400),
    ],
)
def test_no_response_to_head_has_a_body(server: Address, sent: bytes, status: int) -> None:
    """H4, whether the application answers or the server refuses."""
    response = ask(server, sent)
    assert (response.status, response.body) == (status, b"")
    assert int(response.fields["content-length"]) > 0
