"""A load generator light enough to share a machine with what it measures: one thread, epoll, whole
requests as bytes, and of an answer only its status and its end are looked at.

The loop is closed: a connection sends when it has its answer.
"""

import contextlib
import http.client
import json
import select
import socket
import ssl
import statistics
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

TIMEOUT = 120.0  # seconds without any answer, after which a service counts as hung
_ROOM = memoryview(bytearray(262_144))  # for what is received; recv() would map so much each time
_LATER = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Client(NamedTuple):
    """One client: so many connections to one service, each sending the next of `requests`."""

    url: str
    requests: Iterator[bytes]
    connections: int
    units: int = 1  # texts or pictures in a request


class Result(NamedTuple):
    """One client over one round."""

    rate: float  # texts or pictures a second
    latencies: tuple[float, ...]  # ms, of the requests answered with 200
    failed: int  # answers other than 200
    cpu: float = 0.0  # ms of the generator's own processor time a request, of all clients together

    @property
    def p50(self) -> float:
        return float(np.percentile(self.latencies or [0.0], 50))

    @property
    def p99(self) -> float:
        return float(np.percentile(self.latencies or [0.0], 99))


class _Connection:
    def __init__(self, client: Client, poll: select.epoll) -> None:
        self.client, self.poll = client, poll
        self.exchanges: list[tuple[float, float, int]] = []  # sent, answered, status
        self.request, self.sent_bytes, self.sent = b"", 0, 0.0
        self._connect()

    def _connect(self) -> None:
        address = urllib.parse.urlsplit(self.client.url)
        host, tls = address.hostname or "localhost", address.scheme == "https"
        self.socket = socket.create_connection((host, address.port or (443 if tls else 80)), 30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            context = ssl.create_default_context()
            self.socket = context.wrap_socket(self.socket, server_hostname=host)
        self.socket.setblocking(False)
        self.fresh, self.closing, self.stuck = True, False, False
        self.buffer, self.end = bytearray(), 0
        self.poll.register(self.socket, select.EPOLLIN)

    def begin(self, now: float) -> None:
        """Send the next request."""
        self.request, self.sent = next(self.client.requests), now
        self._send_again()

    def _send_again(self) -> None:
        if self.closing:
            self.socket.close()
            self._connect()
        self.buffer.clear()
        self.sent_bytes, self.end = 0, 0
        self.flush()

    def flush(self) -> None:
        whole = len(self.request)
        with contextlib.suppress(*_LATER):
            while self.sent_bytes < whole:
                self.sent_bytes += self.socket.send(memoryview(self.request)[self.sent_bytes :])
        if self.stuck != (self.sent_bytes < whole):
            self.stuck = not self.stuck
            self.poll.modify(self.socket, select.EPOLLIN | (select.EPOLLOUT * self.stuck))

    def receive(self) -> int | None:
        """Returns: the status once the answer is whole, else None."""
        while not self._whole():
            try:
                length = self.socket.recv_into(_ROOM)
            except _LATER:
                return None
            if not length:
                if self.buffer or self.fresh:
                    raise OSError("closed the connection in the middle of an answer")
                self.closing = True  # a kept connection may end before it is used again
                self._send_again()
                return None
            self.buffer += _ROOM[:length]
        self.fresh = False
        return int(self.buffer[9:12])

    def _whole(self) -> bool:
        if not self.end:
            head_end = self.buffer.find(b"\r\n\r\n") + 4
            if head_end < 4:
                return False
            head = bytes(self.buffer[:head_end]).lower()
            self.closing = b"\r\nconnection: close" in head
            at = head.find(b"\r\ncontent-length:")
            if at < 0 and b"\r\ntransfer-encoding: chunked" not in head:
                raise OSError("answers without a length")
            self.end = (
                head_end + int(head[at + 17 : head.index(b"\r\n", at + 2)]) if at >= 0 else -1
            )
        if self.end < 0:  # chunked
            return self.buffer.endswith(b"\r\n0\r\n\r\n")
        return len(self.buffer) >= self.end


def drive(clients: Sequence[Client], seconds: float) -> list[Result]:
    """Let all clients send for some seconds, at the same time.

    They go on until the last request sent within the time is answered, so that the answers that are
    counted were all given under the full load. A request that was under way when the time ended
    counts by the share of its time that lay within.

    Returns: one result a client.
    Raises: OSError when a service cannot be reached, hangs or breaks off an answer.
    """
    poll, groups = select.epoll(), []
    started = cpu = 0.0
    try:
        for client in clients:
            with _named(client.url):
                groups.append([_Connection(client, poll) for _ in range(client.connections)])
        connections = {c.socket.fileno(): c for group in groups for c in group}
        started, cpu = time.perf_counter(), time.thread_time()
        deadline = started + seconds
        for connection in list(connections.values()):
            connection.begin(time.perf_counter())
        within = running = len(connections)  # requests under way: sent within the time, and all
        while running:
            events = poll.poll(TIMEOUT)
            if not events:
                raise OSError(f"{clients[0].url}: no answer for {TIMEOUT:.0f} s")
            for number, event in events:
                connection = connections[number]
                with _named(connection.client.url):
                    if event & select.EPOLLOUT:
                        connection.flush()
                    status = connection.receive()
                    if status is not None:
                        now = time.perf_counter()
                        connection.exchanges.append((connection.sent, now, status))
                        within -= connection.sent < deadline
                        if now < deadline or within:
                            within += now < deadline
                            connection.begin(now)
                        else:
                            running -= 1
                            poll.unregister(number)
                if connection.socket.fileno() != number:  # it connected anew
                    connections[connection.socket.fileno()] = connections.pop(number)
        cpu = time.thread_time() - cpu
    finally:
        for group in groups:
            for connection in group:
                connection.socket.close()
        poll.close()
    total = sum(len(connection.exchanges) for group in groups for connection in group)
    results = []
    for client, group in zip(clients, groups):
        exchanges = [x for connection in group for x in connection.exchanges if x[0] < deadline]
        good = [(sent, done) for sent, done, status in exchanges if status == 200]
        shares = sum((min(done, deadline) - sent) / (done - sent) for sent, done in good)
        latencies = tuple((done - sent) * 1e3 for sent, done in good)
        failed = len(exchanges) - len(good)
        results.append(
            Result(shares * client.units / seconds, latencies, failed, cpu / total * 1e3)
        )
    return results


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """Say of whom an error is."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{url}: {error}") from None


def alternate(
    sides: Sequence[Callable[[int], None]], rounds: int, say: Callable[[str], None]
) -> None:
    """Call every side once a round with the round's number, forwards and backwards in turn, so that
    a machine whose speed drifts hits them alike. Round 0 comes before the `rounds` that count, to
    warm up. `say` is told of each round.
    """
    for number in range(rounds + 1):
        say(f"round {number}" if number else "warming up")
        for side in sides if number % 2 else sides[::-1]:
            side(number)


def middle(results: Sequence[Result]) -> Result:
    """Rate and processor time as medians over rounds, the latencies of all, failures summed."""
    return Result(
        statistics.median(result.rate for result in results),
        tuple(latency for result in results for latency in result.latencies),
        sum(result.failed for result in results),
        statistics.median(result.cpu for result in results),
    )


def get(url: str, path: str) -> tuple[int, bytes]:
    """Status and body of a GET.

    Raises: OSError when the service cannot be reached.
    """
    address = urllib.parse.urlsplit(url)
    tls = address.scheme == "https"
    kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
    connection = kind(address.netloc, timeout=30)
    try:
        connection.request("GET", address.path.rstrip("/") + path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}") from None
    finally:
        connection.close()


def takes_images(url: str) -> bool:
    """Whether the service's default model takes pictures; False where it does not say.

    Raises: OSError when the service cannot be reached.
    """
    status, body = get(url, "/health/ready")
    try:
        return status == 200 and bool(json.loads(body).get("supports_images"))
    except (ValueError, AttributeError):
        return False
