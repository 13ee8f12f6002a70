"""server/connection.py: what a connection does between two requests."""

import base64
import contextlib
import json
import os
import pathlib
import socket
import time
from typing import Any

Address = tuple[str, int]
GET = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"


def connect(address: Address, sent: bytes) -> tuple[socket.socket, Any]:
    sock = socket.create_connection(address, timeout=20)
    sock.sendall(sent)
    return sock, sock.makefile("rb")


def read(file: Any) -> tuple[int, Any]:
    """A response's status, and its decoded body."""
    status = int(file.readline().split()[1])
    length = 0
    while (line := file.readline()) != b"\r\n":
        if line.lower().startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    return status, json.loads(file.read(length)) if length else None


def post(body: bytes) -> bytes:
    return b"POST /0 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def test_a_connection_is_kept_after_a_large_response(echo_server: Address) -> None:
    body = b"x" * 100_000
    sock, file = connect(echo_server, post(body))
    with sock:
        assert base64.b64decode(read(file)[1]["body"]) == body
        time.sleep(4.5)  # longer than the steps in which slow readers are looked after
        sock.sendall(GET % 7)
        assert read(file)[1]["target"] == "/7"


def test_pipelined_requests_are_answered_though_the_client_has_ended(echo_server: Address) -> None:
    count = 200
    sock, file = connect(echo_server, b"".join(GET % number for number in range(count)))
    with sock:
        sock.shutdown(socket.SHUT_WR)
        targets = [read(file)[1]["target"] for _ in range(count)]
        assert targets == [f"/{number}" for number in range(count)]
        assert file.read(1) == b""


def test_the_next_of_two_pipelined_requests_is_told_to_continue(echo_server: Address) -> None:
    expecting = b"POST /2 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    sock, file = connect(echo_server, GET % 1 + expecting)
    with sock:
        assert read(file)[1]["target"] == "/1"
        assert read(file)[0] == 100
        sock.sendall(b"hi")
        assert read(file)[1]["target"] == "/2"


def test_a_connection_keeps_no_body_that_was_answered(echo_server_limits: Any) -> None:
    """Its memory would count for nothing, and idle connections are many."""
    address = echo_server_limits(max_body=4_000_000)
    first, file = connect(address, GET % 0)
    with first:
        assert read(file)[0] == 200  # the worker runs
    before = resident(address)
    kept = []
    for _ in range(50):
        sock, file = connect(address, post(b"x" * 2_000_000))
        assert read(file)[0] == 200
        kept.append(sock)
    assert resident(address) - before < 60_000_000
    for sock in kept:
        sock.close()


def resident(address: Address) -> int:
    """Bytes of memory of the server's worker. Its configuration names the port (echo_server.py)."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            command = (process / "cmdline").read_bytes().split(b"\0")
            config = next((part for part in command if b"gunicorn-" in part), b"").decode()
            named = config and f":{address[1]}'" in pathlib.Path(config).read_text()
            if named and parent(process) != os.getpid():
                pages = int((process / "statm").read_text().split()[1])
                return pages * os.sysconf("SC_PAGE_SIZE")
    raise AssertionError("no such server")


def parent(process: pathlib.Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])
