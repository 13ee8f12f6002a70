"""The load client: connections that carry one request after the other, and what became of every
request. It shares the machine with the service, so it only looks at the status and at the end of a
response.
"""

import asyncio
import contextlib
import http.client
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Self, cast

import httptools
import numpy as np
import uvloop

TIMEOUT = 120.0  # seconds a client waits for a response

# Why a request has no status.
CLOSED = "closed before a response"
BROKEN = "closed in the middle of a response"
TIMED_OUT = "timed out"


class Outcome(NamedTuple):
    """What became of one request."""

    what: int | str  # a status, or one of the reasons above
    sent: float  # time.perf_counter()
    done: float

    @property
    def seconds(self) -> float:
        return self.done - self.sent


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else 0.0


class Connection(asyncio.Protocol):
    """A kept connection that carries one request after the other."""

    def __init__(self) -> None:
        self.open = False
        self._parser = httptools.HttpResponseParser(self)
        self.received = False  # whether something of the response has come
        self._waiting: asyncio.Future[Outcome] | None = None
        self._sent = 0.0

    @classmethod
    async def connect(cls, url: str) -> Self:
        """Raises: OSError."""
        address = urllib.parse.urlsplit(url)
        tls = address.scheme == "https"
        host, port = address.hostname or "localhost", address.port or (443 if tls else 80)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, host, port, ssl=tls or None)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.open = cast(asyncio.Transport, transport), True

    async def send(self, request: bytes, timeout: float = TIMEOUT) -> Outcome:
        """Send a whole request and wait for the response. Never raises."""
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        self.received = False
        self._sent = time.perf_counter()
        timer = loop.call_later(timeout, self.settle, TIMED_OUT)
        if self.open:
            self.transport.write(request)
        if not self.open:
            self.settle(CLOSED)
        try:
            return await self._waiting
        finally:
            timer.cancel()

    def settle(self, what: int | str) -> None:
        """Say what has become of the request, unless that is known."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(Outcome(what, self._sent, time.perf_counter()))
        if not isinstance(what, int):
            self.close()

    def data_received(self, data: bytes) -> None:
        self.received = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.settle(BROKEN)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if not self._parser.should_keep_alive():
            self.close()
        self.settle(self._parser.get_status_code())

    def connection_lost(self, error: Exception | None) -> None:
        self.settle(BROKEN if self.received else CLOSED)
        self.open = False

    def close(self) -> None:
        self.open = False
        self.transport.close()


class Client(NamedTuple):
    """A closed loop on each of so many connections; all take the next of `requests`."""

    requests: Iterator[bytes]
    connections: int
    units: int = 1  # texts or pictures in a request


class Result(NamedTuple):
    """What one client got in one round."""

    rate: float  # texts or pictures a second
    latencies: tuple[float, ...] = ()  # ms, of the requests answered with 200
    failed: int = 0  # responses of another status
    cpu: float = 0.0  # ms of the load client's own processor time for a request, over all clients

    @property
    def p50(self) -> float:
        return percentile(self.latencies, 50)

    @property
    def p99(self) -> float:
        return percentile(self.latencies, 99)


def drive(url: str, clients: Sequence[Client], seconds: float) -> list[Result]:
    """Let all clients send to one service for some seconds at the same time.

    They go on until the last request sent within the time is answered, so that the load is full for
    every response that counts. A request under way when the time ends counts by the share of its
    duration that lies within the time. A request that meets the end of a kept connection does not
    count; the client connects again.

    Returns: one result a client.
    Raises: OSError when the service cannot be reached, does not answer or breaks off a response.
    """
    try:
        by_client, deadline, cpu = uvloop.run(_drive(url, clients, seconds))
    except OSError as error:
        raise OSError(f"{url}: {error}") from None
    cpu_each = cpu * 1e3 / sum(map(len, by_client))
    results = []
    for client, outcomes in zip(clients, by_client):
        if not any(isinstance(each.what, int) for each in outcomes):
            raise OSError(f"{url}: {outcomes[0].what}")
        counted = [each for each in outcomes if each.sent < deadline and isinstance(each.what, int)]
        good = [each for each in counted if each.what == 200]
        shares = sum((min(each.done, deadline) - each.sent) / each.seconds for each in good)
        latencies = tuple(each.seconds * 1e3 for each in good)
        rate, failed = shares * client.units / seconds, len(counted) - len(good)
        results.append(Result(rate, latencies, failed, cpu_each))
    return results


async def _drive(
    url: str, clients: Sequence[Client], seconds: float
) -> tuple[list[list[Outcome]], float, float]:
    """Returns: each client's outcomes, the end of the time, and the processor time in seconds."""
    by_client: list[list[Outcome]] = [[] for _ in clients]
    opened = [
        (client.requests, outcomes, await Connection.connect(url))
        for client, outcomes in zip(clients, by_client)
        for _ in range(client.connections)
    ]
    within = len(opened)  # connections that have not yet passed the deadline

    async def loop(
        requests: Iterator[bytes], outcomes: list[Outcome], connection: Connection
    ) -> None:
        nonlocal within
        late = False
        try:
            while within:
                if not connection.open:
                    connection = await Connection.connect(url)
                outcome = await connection.send(next(requests))
                outcomes.append(outcome)
                if outcome.what in (BROKEN, TIMED_OUT):
                    raise OSError(outcome.what)
                if outcome.done >= deadline and not late:
                    late, within = True, within - 1
        finally:
            connection.close()

    cpu, deadline = time.thread_time(), time.perf_counter() + seconds
    await asyncio.gather(*(loop(*each) for each in opened))
    return by_client, deadline, time.thread_time() - cpu


def get(
    url: str, path: str, timeout: float = 30.0, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of a GET on a connection of its own.

    Raises: OSError when the service cannot be reached.
    """
    address = urllib.parse.urlsplit(url)
    tls = address.scheme == "https"
    kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
    with contextlib.closing(kind(address.netloc, timeout=timeout)) as connection:
        try:
            connection.request("GET", address.path.rstrip("/") + path, headers=headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"{url}: {error}") from None
