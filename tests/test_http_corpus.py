"""The requests of http_cases.py are given to llhttp alone and to a running server."""

import asyncio
import base64
import contextlib
import json
import socket

import httptools
import pytest
from http_cases import CASES, CLOSE, CUT, KEEP, Case, Request, message

TIMEOUT = 10  # seconds for one connection
CONNECTIONS = 48  # at once
CUTS = 12  # places at which a case is cut in two, each on a connection of its own
SHORT = 1000  # bytes; longer cases are sent in one piece only

REFUSED = "refused"
UPGRADED = "another protocol follows"

# Sent after each case that keeps the connection open. It also shows where the case's bytes end.
LAST = message("GET /last HTTP/1.1", "Connection: close")
LAST_REQUEST: Request = ("GET", "/last", b"")

Address = tuple[str, int]


class Llhttp:
    """Feeds the bytes of one connection to llhttp in its strict mode and keeps its decisions."""

    def __init__(self) -> None:
        self.accepted: list[Request] = []
        self.end = KEEP
        self.target = self.body = b""
        self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:
        self.target = self.body = b""
        self.end = CUT

    def on_url(self, part: bytes) -> None:
        self.target += part

    def on_body(self, part: bytes) -> None:
        self.body += part

    def on_message_complete(self) -> None:
        method = self.parser.get_method().decode()
        self.accepted.append((method, self.target.decode("latin-1"), self.body))
        self.end = KEEP if self.parser.should_keep_alive() else CLOSE

    def feed(self, data: bytes) -> bool:
        """Returns whether more bytes would be looked at."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.end = UPGRADED
        except httptools.HttpParserError:
            # llhttp also reports bytes after a request with `Connection: close`.
            if self.end != CLOSE:
                self.end = REFUSED
        return self.end not in (UPGRADED, REFUSED)


def decision(*pieces: bytes) -> tuple[list[Request], str]:
    """The requests that llhttp accepts, and how the connection goes on."""
    llhttp = Llhttp()
    all(llhttp.feed(piece) for piece in pieces)
    return llhttp.accepted, llhttp.end


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decisions_are_llhttps_unless_a_reason_is_given(case: Case) -> None:
    ours = list(case.accepted), case.end if isinstance(case.end, str) else REFUSED
    assert (decision(case.data) != ours) == bool(case.differs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_llhttp_decides_the_same_however_the_bytes_are_cut(case: Case) -> None:
    if len(case.data) <= SHORT:
        whole = decision(case.data)
        for at in range(1, len(case.data)):
            assert decision(case.data[:at], case.data[at:]) == whole
        assert decision(*(bytes([byte]) for byte in case.data)) == whole


class Fault(Exception):
    """The server sent something that it must not send."""


def read_responses(data: bytes, methods: list[str]) -> tuple[list[Request | None], int | None]:
    """Split a server's bytes into echoed requests and the status of a refusal at the end.

    `methods` are those of the requests that it must accept. The answer to HEAD is None.
    """
    answers: list[Request | None] = []
    while data:
        head, found, data = data.partition(b"\r\n\r\n")
        if not found or not head.startswith(b"HTTP/1.1 "):
            raise Fault(f"not a response: {head!r}")
        status = int(head[9:12])
        if status == 100:
            continue
        lines = [line.partition(b":") for line in head.lower().split(b"\r\n")[1:]]
        fields = {name: value.strip() for name, _, value in lines}
        if status == 200 and methods[len(answers) : len(answers) + 1] == ["HEAD"]:
            answers.append(None)
            continue
        length = int(fields[b"content-length"])
        body, data = data[:length], data[length:]
        if status != 200:
            if not fields[b"content-type"].startswith(b"application/json"):
                raise Fault(f"a refusal that is not JSON: {head!r}")
            if fields.get(b"connection") != b"close" or data:
                raise Fault(f"more than one refusal, or no `Connection: close`: {head!r} {data!r}")
            return answers, status
        echo = json.loads(body)
        answers.append((echo["method"], echo["target"], base64.b64decode(echo["body"])))
    return answers, None


def wire(case: Case) -> bytes:
    return case.data + LAST if case.end == KEEP else case.data


async def exchange(address: Address, case: Case, pieces: list[bytes], pause: float) -> bytes:
    """Send the pieces and return all that comes until the server closes."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A refusal may come, and the connection be reset, before everything is sent.
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                await loop.sock_sendall(sock, piece)
                await asyncio.sleep(pause)
        with contextlib.suppress(ConnectionError):
            if case.end == CUT:
                while received.count(b"HTTP/1.1 200") < len(case.accepted):
                    part = await loop.sock_recv(sock, 65536)
                    if not part:
                        return bytes(received)
                    received += part
                sock.shutdown(socket.SHUT_WR)
            while part := await loop.sock_recv(sock, 65536):
                received += part
    return bytes(received)


def fault(case: Case, received: bytes) -> str:
    """What is wrong with the server's bytes; empty if nothing is."""
    requests = [*case.accepted, LAST_REQUEST] if case.end == KEEP else list(case.accepted)
    expected = [None if request[0] == "HEAD" else request for request in requests]
    try:
        answers, status = read_responses(received, [request[0] for request in requests])
    except (Fault, KeyError, ValueError) as error:
        return repr(error)
    allowed: set[int | None] = set(case.end) if isinstance(case.end, frozenset) else {None}
    if case.end == CUT:  # a refusal is as good as closing without one
        allowed = {None, 400, 408}
    if answers != expected or status not in allowed:
        return f"answered {answers} and {status}, not {expected} and one of {allowed}"
    return ""


async def send_all(
    address: Address, sent: list[tuple[Case, list[bytes]]], pause: float
) -> list[str]:
    """Send cases in these pieces, many at once. Returns what is wrong, a line for each case."""
    found: dict[str, str] = {}
    free = asyncio.Semaphore(CONNECTIONS)

    async def send(case: Case, pieces: list[bytes]) -> None:
        async with free:
            try:
                async with asyncio.timeout(TIMEOUT):
                    wrong = fault(case, await exchange(address, case, pieces, pause))
            except TimeoutError:
                wrong = f"no end after {TIMEOUT} s"
        if wrong:
            found.setdefault(case.name, f"{case.name}, first piece {pieces[0]!r}: {wrong}")

    await asyncio.gather(*(send(case, pieces) for case, pieces in sent))
    return list(found.values())


SHORT_CASES = [case for case in CASES if len(case.data) <= SHORT]


def check(address: Address, sent: list[tuple[Case, list[bytes]]], pause: float = 0) -> None:
    found = asyncio.run(send_all(address, sent, pause))
    assert not found, "\n".join(found[:20])


def test_the_server_decides_as_listed(echo_server: Address) -> None:
    check(echo_server, [(case, [wire(case)]) for case in CASES])


def test_the_server_decides_the_same_byte_by_byte(echo_server: Address) -> None:
    # Other connections have their turn between two bytes, so most bytes are received alone.
    check(echo_server, [(case, [bytes([byte]) for byte in wire(case)]) for case in SHORT_CASES])


def test_the_server_decides_the_same_about_bytes_cut_in_two(echo_server: Address) -> None:
    sent = []
    for case in SHORT_CASES:
        data = wire(case)
        for at in range(1, len(data), -(-len(data) // CUTS)):
            sent.append((case, [data[:at], data[at:]]))
    check(echo_server, sent, pause=0.002)
