"""Fill the queue with one key's batches, and check what another key's queries and the batches get.

    python -m tests.stress.tenants [--seconds 60] [--batches 30] [--texts 32] [--workers 1]

Key A sends --batches batches at a time, first alone and then beside key B, which sends a query
every half second. None of B's queries may be refused, 99 % of them must be answered within 250 ms,
and A must keep 85 % of its own speed. Exits with 1 otherwise.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

from loadtest.client import get
from loadtest.loads import LOADS
from loadtest.loads import key as loadtest_key
from loadtest.service import serve
from tests.stress import common
from tests.stress.common import Outcomes, Witness, clients

A, B = "key-of-tenant-a", "key-of-tenant-b"
EVERY = 0.5  # seconds between two queries of B
WITHIN, KEPT = 0.250, 0.85


class Report(NamedTuple):
    alone: Outcomes  # A's batches
    beside: Outcomes
    queries: Outcomes  # B's
    rates: tuple[float, float]  # A's texts a second, alone and beside B

    @property
    def kept(self) -> float:
        return self.rates[1] / self.rates[0]

    @property
    def good(self) -> bool:
        answered = set(self.queries.counts()) == {200}
        return answered and self.queries.latency(99) <= WITHIN and self.kept >= KEPT

    @property
    def explained(self) -> str:
        return (
            f"A is alone at first. Then B sends a query every {EVERY} s: none may be refused, 99 % "
            f"must be answered within {WITHIN * 1e3:.0f} ms, and A must keep {KEPT:.0%} of its own "
            "speed."
        )

    def __str__(self) -> str:
        latency = [self.queries.latency(percent) * 1e3 for percent in (50, 99, 100)]
        return (
            f"A's batches alone: {dict(self.alone.counts())}, {self.rates[0]:.0f} texts/s\n"
            f"A's batches beside B: {dict(self.beside.counts())}, {self.rates[1]:.0f} texts/s, "
            f"{self.kept:.1%} of its own speed\n"
            f"B's queries: {dict(self.queries.counts())}\n"
            f"p50, p99 and longest of B's queries: {', '.join(f'{ms:.0f}' for ms in latency)} ms"
        )


async def tenants(
    *, seconds: float = 60.0, batches: int = 30, texts: int = 32, workers: int = 1, **environ: str
) -> Report:
    """Send A's batches for so many seconds alone, and as long beside B's queries."""
    alone, beside, queries = Outcomes(), Outcomes(), Outcomes()
    keys = {"VECTOR_EMBEDDER_API_KEY": f"a:{A},b:{B}", "WEB_CONCURRENCY": str(workers)}
    with serve({**keys, **environ}) as service:
        load = LOADS["batch32"]._replace(texts=texts)
        of_a = with_key(common.some(service.url, load, 60), A)
        of_b = with_key(common.queries(service.url), B)
        async with clients(service.url, of_a, Outcomes(), batches):
            await asyncio.sleep(min(seconds, 5.0))  # until the speed is known
        async with clients(service.url, of_a, alone, batches), rate(service.url) as first:
            await asyncio.sleep(seconds)
        async with clients(service.url, of_a, beside, batches), rate(service.url) as second:
            await ask(service.url, of_b, queries, seconds)
    rates = first[0], second[0] - len(queries) / seconds
    return Report(alone, beside, queries, rates)


@contextlib.asynccontextmanager
async def rate(url: str) -> AsyncIterator[list[float]]:
    """Texts a second that are computed while the body runs: all of them, since batches that share
    the engine end together. The list has the figure at the end.
    """

    async def computed() -> float:
        _, page = await asyncio.to_thread(get, url, "/metrics", 60.0, {"X-API-Key": A})
        return sum(
            map(float, re.findall(rb"^embedder_chunks_total{.*} (\S+)$", page, re.MULTILINE))
        )

    found = list[float]()
    before, started = await computed(), time.perf_counter()
    yield found
    found.append((await computed() - before) / (time.perf_counter() - started))


def with_key(requests: list[bytes], key: str) -> list[bytes]:
    """The same requests with this key, which decides before that of Authorization."""
    own, other = f"X-API-Key: {loadtest_key()}".encode(), f"X-API-Key: {key}".encode()
    return [request.replace(own, other, 1) for request in requests]


async def ask(url: str, requests: list[bytes], outcomes: Outcomes, seconds: float) -> None:
    """Send a request every EVERY seconds, whenever that before is answered."""
    started, sent = time.perf_counter(), list[asyncio.Task[None]]()

    async def send(request: bytes) -> None:
        connection = await Witness.connect(url)
        outcomes.append(await connection.send(request))
        connection.close()

    for number in range(max(1, int(seconds / EVERY))):
        await asyncio.sleep(max(0.0, started + number * EVERY - time.perf_counter()))
        sent.append(asyncio.create_task(send(requests[number % len(requests)])))
    await asyncio.sleep(max(0.0, started + seconds - time.perf_counter()))
    await asyncio.gather(*sent)


if __name__ == "__main__":
    common.run(__doc__, tenants)
