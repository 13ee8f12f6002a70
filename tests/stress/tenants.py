"""Fill the queue with one key's batches, and check what another key's queries and the batches get.

    python -m tests.stress.tenants [--seconds 60] [--rounds 6] [--batches 30] [--workers 1]

Key A sends --batches batches at a time, in turn alone and beside key B, which sends a query every
half second. None of B's queries may be refused, 99 % of them must be answered within 250 ms, and A
must keep 85 % of its own speed. --seconds are those with queries. Exits with 1 otherwise.
"""

import asyncio
import re
import time
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
    batches: Outcomes  # A's
    queries: Outcomes  # B's
    alone: float  # A's texts a second
    beside: float

    @property
    def kept(self) -> float:
        return self.beside / self.alone

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
            f"A's batches: {dict(self.batches.counts())}\n"
            f"A's texts a second: {self.alone:.0f} alone, {self.beside:.0f} beside B, "
            f"{self.kept:.0%}\n"
            f"B's queries: {dict(self.queries.counts())}\n"
            f"p50, p99 and longest of B's queries: {', '.join(f'{ms:.0f}' for ms in latency)} ms"
        )


async def tenants(
    *,
    seconds: float = 60.0,
    rounds: int = 6,
    batches: int = 30,
    texts: int = 32,
    workers: int = 1,
    **environ: str,
) -> Report:
    """Send A's batches all the time, and B's queries for some seconds of each round."""
    of_batches, of_queries = Outcomes(), Outcomes()
    part, alone, beside = seconds / rounds, 0.0, 0.0
    keys = {"VECTOR_EMBEDDER_API_KEY": f"a:{A},b:{B}", "WEB_CONCURRENCY": str(workers)}
    with serve({**keys, **environ}) as service:
        load = LOADS["batch32"]._replace(texts=texts)
        of_a = with_key(common.some(service.url, load, 60), A)
        of_b = with_key(common.queries(service.url), B)
        async with clients(service.url, of_a, of_batches, batches):
            await asyncio.sleep(min(part, 5.0))  # until the speed is known
            for _ in range(rounds):
                before = await computed(service.url)
                await asyncio.sleep(part)
                between = await computed(service.url)
                await ask(service.url, of_b, of_queries, part)
                alone += between - before
                beside += await computed(service.url) - between
    beside -= len(of_queries)
    return Report(of_batches, of_queries, alone / seconds, beside / seconds)


async def computed(url: str) -> float:
    """Texts computed so far. Batches that share the engine end together, so they tell less."""
    _, page = await asyncio.to_thread(get, url, "/metrics", 60.0, {"X-API-Key": A})
    return sum(map(float, re.findall(rb"^embedder_chunks_total{.*} (\S+)$", page, re.MULTILINE)))


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
