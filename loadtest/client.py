"""The load client: connections that carry one request after the other, loops that keep them busy,
and what became of every request. It shares the machine with the service, so it only looks at the
status and at the end of a response.
"""

import asyncio
import contextlib
import http.client
import itertools
import random
import socket
import time
import urllib.parse
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import httptools
import numpy as np
import uvloop

TIMEOUT = 120.0  # seconds a client waits for a response

# Why a request has no status.
REFUSED = "connection refused"  # it was not sent
CLOSED = "closed before the request arrived"  # the server closed first: it took no request
RESET = "reset after the request arrived"  # lost, as those below
UNANSWERED = "closed without a response"
BROKEN = "closed in the middle of a response"
TIMED_OUT = "timed out"
LOST = (RESET, UNANSWERED, BROKEN, TIMED_OUT)
_TCP_CLOSE_WAIT = 8


class Outcome(NamedTuple):
    """What became of one request."""

    what: int | str  # a status, or one of the reasons above
    sent: float  # time.perf_counter()
    done: float
    retry_after: bool = False  # whether the response has a Retry-After of whole seconds

    @property
    def seconds(self) -> float:
        return self.done - self.sent


class Outcomes(list[Outcome]):
    """Requests in the order of their ends."""

    def counts(self) -> Counter[int | str]:
        return Counter(outcome.what for outcome in self)

    def lost(self) -> int:
        return sum(outcome.what in LOST for outcome in self)

    def latency(self, percent: float, status: int = 200) -> float:
        """This percentile of the latencies in seconds; 0 without responses of this status."""
        return percentile([each.seconds for each in self if each.what == status], percent)

    def __str__(self) -> str:
        counts = sorted(self.counts().items(), key=str)
        return "\n".join(f"{what}: {count}" for what, count in counts)


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else 0.0


class Connection(asyncio.Protocol):
    """A kept connection that carries one request after the other."""

    def __init__(self) -> None:
        self.open = False
        self._parser = httptools.HttpResponseParser(self)
        self._received = self._retry_after = False
        self._waiting: asyncio.Future[Outcome] | None = None
        self._sent = 0.0

    @classmethod
    async def connect(cls, url: str) -> "Connection":
        """Raises: OSError."""
        address = urllib.parse.urlsplit(url)
        tls = address.scheme == "https"
        host, port = address.hostname or "localhost", address.port or (443 if tls else 80)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, host, port, ssl=tls or None)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.open = cast(asyncio.Transport, transport), True

    async def send(self, request: bytes, timeout: float = TIMEOUT) -> Outcome:
        """Send a whole request and wait for the response. Never raises."""
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        self._received = self._retry_after = False
        self._sent = time.perf_counter()
        timer = loop.call_later(timeout, self._settle, TIMED_OUT)
        if self.open:
            self._transport.write(request)
        if not self.open:
            self._settle(CLOSED)
        try:
            return await self._waiting
        finally:
            timer.cancel()

    def _settle(self, what: int | str) -> None:
        if self._waiting is not None and not self._waiting.done():
            now = time.perf_counter()
            self._waiting.set_result(Outcome(what, self._sent, now, self._retry_after))
        if not isinstance(what, int):
            self.close()

    def data_received(self, data: bytes) -> None:
        self._received = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._settle(BROKEN)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if name.lower() == b"retry-after":
            self._retry_after = value.isdigit()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if not self._parser.should_keep_alive():
            self.close()
        self._settle(self._parser.get_status_code())

    def eof_received(self) -> None:
        # A kernel answers bytes for a closed connection with a reset. Without one (CLOSE_WAIT) the
        # server has read the request.
        sock = self._transport.get_extra_info("socket")
        (state,) = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        taken = state == _TCP_CLOSE_WAIT
        self._settle(BROKEN if self._received else UNANSWERED if taken else CLOSED)

    def connection_lost(self, error: Exception | None) -> None:
        # The kernel says EPIPE for a reset that comes after the server's FIN, else ECONNRESET.
        came_first = error is None or isinstance(error, BrokenPipeError)
        self._settle(BROKEN if self._received else CLOSED if came_first else RESET)
        self.open = False

    def close(self) -> None:
        self.open = False
        self._transport.close()


async def closed_loop(
    url: str,
    requests: Iterator[bytes],
    outcomes: Outcomes,
    until: asyncio.Event,
    *,
    connection: Connection | None = None,
    think: float = 0.0,
    keep: bool = True,
) -> None:
    """One client that sends the next request when it has its response, until `until` is set. It
    waits up to `think` seconds in between, opens a connection for every request unless `keep`, and
    connects again where the server has closed.

    Args:
        connection: for the first request.
    """
    while not until.is_set():
        if connection is None or not connection.open:
            try:
                connection = await Connection.connect(url)
            except OSError as error:
                what = RESET if isinstance(error, ConnectionResetError) else REFUSED
                outcomes.append(Outcome(what, now := time.perf_counter(), now))
                await asyncio.sleep(0.02)
                continue
        if think:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(until.wait(), random.uniform(0, think))
            if not connection.open:
                continue
        outcomes.append(await connection.send(next(requests)))
        if not keep:
            connection.close()
    if connection is not None:
        connection.close()


@contextlib.asynccontextmanager
async def clients(
    url: str, requests: Sequence[bytes], outcomes: Outcomes, number: int, **options: Any
) -> AsyncIterator[None]:
    """So many closed loops, with these options, while the body runs. They share the requests. At
    the end their last responses are awaited.
    """
    until, cycle = asyncio.Event(), itertools.cycle(requests)
    loops = [closed_loop(url, cycle, outcomes, until, **options) for _ in range(number)]
    running = asyncio.gather(*loops)
    try:
        yield
    finally:
        until.set()
        await running


async def open_loop(
    url: str,
    requests: Sequence[bytes],
    outcomes: Outcomes,
    *,
    rate: float,
    seconds: float,
    connections: int,
) -> int:
    """Send `rate` requests a second whatever comes back, on as many kept connections as that takes.

    Returns: how many were not sent because all `connections` were waiting.
    """
    idle: list[Connection] = []
    busy: set[asyncio.Task[None]] = set()
    unsent = 0

    async def one(request: bytes) -> None:
        connection = None
        while idle and connection is None:
            connection = idle.pop()
            if not connection.open:
                connection = None
        try:
            connection = connection or await Connection.connect(url)
        except OSError:
            outcomes.append(Outcome(REFUSED, now := time.perf_counter(), now))
            return
        outcomes.append(await connection.send(request))
        if connection.open:
            idle.append(connection)

    started, sent = time.perf_counter(), 0
    while (now := time.perf_counter()) < started + seconds:
        while sent < (now - started) * rate:
            sent += 1
            if len(busy) >= connections:
                unsent += 1
                continue
            task = asyncio.create_task(one(requests[sent % len(requests)]))
            busy.add(task)
            task.add_done_callback(busy.discard)
        await asyncio.sleep(0.004)
    await asyncio.gather(*busy)
    for connection in idle:
        connection.close()
    return unsent


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
        counts = outcomes.counts()
        unanswered = not any(isinstance(what, int) for what in counts)
        for what in counts:
            if unanswered or what in (REFUSED, BROKEN, TIMED_OUT):
                raise OSError(f"{url}: {what}")
        counted = [each for each in outcomes if each.sent < deadline and isinstance(each.what, int)]
        good = [each for each in counted if each.what == 200]
        shares = sum((min(each.done, deadline) - each.sent) / each.seconds for each in good)
        latencies = tuple(each.seconds * 1e3 for each in good)
        rate, failed = shares * client.units / seconds, len(counted) - len(good)
        results.append(Result(rate, latencies, failed, cpu_each))
    return results


async def _drive(
    url: str, clients: Sequence[Client], seconds: float
) -> tuple[list[Outcomes], float, float]:
    """Returns: each client's outcomes, the end of the time, and the processor time in seconds."""
    until, loops = asyncio.Event(), []
    by_connection: list[list[Outcomes]] = []
    for client in clients:
        by_connection.append([Outcomes() for _ in range(client.connections)])
        for own in by_connection[-1]:
            connection = await Connection.connect(url)
            loops.append(closed_loop(url, client.requests, own, until, connection=connection))
    cpu, deadline = time.thread_time(), time.perf_counter() + seconds
    async with asyncio.TaskGroup() as group:
        for loop in loops:
            group.create_task(loop)
        await asyncio.sleep(seconds)
        # Every connection has one request under way at the deadline.
        every = [own for all_own in by_connection for own in all_own]
        while not all(own and own[-1].done >= deadline for own in every):
            await asyncio.sleep(0.002)
        until.set()
    cpu = time.thread_time() - cpu
    return [Outcomes(itertools.chain(*all_own)) for all_own in by_connection], deadline, cpu


def get(
    url: str, path: str, timeout: float = 30.0, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of a GET on a connection of its own.

    Raises: OSError when the service cannot be reached.
    """
    address = urllib.parse.urlsplit(url)
    tls = address.scheme == "https"
    kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
    connection = kind(address.netloc, timeout=timeout)
    try:
        connection.request("GET", address.path.rstrip("/") + path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}") from None
    finally:
        connection.close()
