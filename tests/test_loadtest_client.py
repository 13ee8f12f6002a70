"""loadtest/client.py: what it says of requests that get no response; the loops of tests/stress."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvloop
from servers import free_port

from loadtest import client
from loadtest.client import Connection, Outcome
from tests.stress import common, overload
from tests.stress.common import RESET, UNANSWERED, Outcomes, Witness

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 429 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """The URL of a server that gives every connection to `handler`, then closes it."""

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            await handler(reader, writer)

    server = await asyncio.start_server(closing, "127.0.0.1", 0)
    async with server:
        yield "http://127.0.0.1:%d" % server.sockets[0].getsockname()[1]


def sent_once(
    handler: Handler, timeout: float = 30.0, kind: type[Connection] = Connection
) -> client.Outcome:
    """What becomes of one request."""

    async def run() -> client.Outcome:
        async with serving(handler) as url:
            connection = await kind.connect(url)
            outcome = await connection.send(REQUEST, timeout)
            connection.close()
            return outcome

    return uvloop.run(run())


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(GOOD)


async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(BUSY)


async def read_and_leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")


async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(GOOD[:-1])


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def say_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0\r\n\r\n")
    await reader.read()


async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@pytest.mark.parametrize(
    ("handler", "what"),
    [
        (answer, 200),
        (refuse, 429),
        (read_and_leave, client.CLOSED),
        (reset, client.CLOSED),
        (break_off, client.BROKEN),
        (say_nonsense, client.BROKEN),
    ],
)
def test_what_becomes_of_a_request(handler: Handler, what: int | str) -> None:
    outcome = sent_once(handler)
    assert outcome.what == what and outcome.seconds >= 0


def test_a_server_that_says_nothing() -> None:
    assert sent_once(wait, timeout=0.05).what == client.TIMED_OUT


def test_a_request_after_the_server_has_closed() -> None:
    async def run() -> client.Outcome:
        async with serving(refuse) as url:
            connection = await Connection.connect(url)
            await connection.send(REQUEST)
            while connection.open:
                await asyncio.sleep(0.001)
            return await connection.send(REQUEST)

    assert uvloop.run(run()).what == client.CLOSED


def test_a_service_that_is_not_there_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(OSError, match=f"{url}: .*refused"):
        client.drive(url, [client.Client(iter([REQUEST]), 1)], 0.1)


# The clients of the stress commands


async def refuse_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(BUSY.replace(b"Retry-After: 1\r\n", b""))


@pytest.mark.parametrize(
    ("handler", "what"),
    [
        (answer, 200),
        (refuse, 429),
        (refuse_for_ever, common.NO_RETRY_AFTER),
        (read_and_leave, UNANSWERED),
        (reset, RESET),
        (break_off, client.BROKEN),
    ],
)
def test_lost_requests_are_told_from_others(handler: Handler, what: int | str) -> None:
    assert sent_once(handler, kind=Witness).what == what


def test_a_client_goes_on_after_the_server_has_closed() -> None:
    async def run(keep: bool) -> Outcomes:
        outcomes = Outcomes()
        async with serving(refuse if keep else answer) as url:
            async with common.clients(url, [REQUEST], outcomes, 2, keep=keep):
                while outcomes.counts()[429 if keep else 200] < 10:
                    await asyncio.sleep(0.001)
        return outcomes

    kept = uvloop.run(run(keep=True))
    assert set(kept.counts()) <= {429, client.CLOSED, RESET, UNANSWERED}
    assert set(uvloop.run(run(keep=False)).counts()) == {200}


def test_an_open_loop_keeps_its_rate_and_its_connections() -> None:
    async def run(handler: Handler, connections: int) -> tuple[Outcomes, int]:
        outcomes = Outcomes()
        async with serving(handler) as url:
            requests, some = [REQUEST], connections
            unsent = await overload.open_loop(
                url, requests, outcomes, rate=100.0, seconds=0.3, connections=some
            )
        return outcomes, unsent

    async def answer_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.5)
        writer.write(GOOD)

    outcomes, unsent = uvloop.run(run(answer_late, connections=3))
    assert outcomes.counts() == {200: 3} and unsent > 0
    outcomes, unsent = uvloop.run(run(answer, connections=1000))
    assert set(outcomes.counts()) == {200} and unsent == 0 and 0 < len(outcomes) <= 31


def test_latencies_are_percentiles_of_one_status() -> None:
    outcomes = Outcomes(Outcome(200, 0.0, seconds) for seconds in (1.0, 2.0, 3.0))
    outcomes.append(Outcome(429, 0.0, 9.0))
    assert [outcomes.latency(percent) for percent in (0, 50, 100)] == [1.0, 2.0, 3.0]
    assert outcomes.latency(99, status=429) == 9.0 and outcomes.latency(50, status=503) == 0.0
