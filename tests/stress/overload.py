"""Send four times what the service can serve, and check that it refuses the rest and stays healthy.

    python -m tests.stress.overload [--seconds 60] [--times 4] [--at-once 1000] [--workers 1]

The load is open: requests are sent at a fixed rate, whatever became of those before. Then --at-once
connections send one each at the same moment. Every response must be 200, or 429 with Retry-After;
/health must be answered throughout; and full speed be back within 2 s. Exits with 1 otherwise.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from loadtest.client import Outcome, get
from loadtest.service import Service, serve
from tests.stress import common
from tests.stress.common import REFUSED, Outcomes, Witness, clients

BOUND = 45.0  # seconds: MAX_QUEUE_SECONDS, and some
BACK = 2.0  # seconds
RECOVERED = 0.8  # of the speed before; the machine's own noise is larger than 10 %


class Speed(NamedTuple):
    """Good responses a second, and for a second of the workers' CPU time. The latter does not
    depend on what else the machine does.
    """

    a_second: float
    a_cpu_second: float

    def __str__(self) -> str:
        return f"{self.a_second:.0f} requests/s, {self.a_cpu_second:.0f} for a second of CPU time"


class Report(NamedTuple):
    capacity: Speed
    offered: float  # requests a second that were sent
    unsent: int  # because every connection was waiting
    outcomes: Outcomes
    at_once: Outcomes
    health: list[float]  # seconds of each probe
    memory: list[float]  # MiB: before, in the middle of the load, at its end
    after: Speed  # from 2 s after the load on

    @property
    def good(self) -> bool:
        both = [*self.outcomes, *self.at_once]
        return (
            {outcome.what for outcome in both} <= {200, 429}
            and self.outcomes.latency(99) < BOUND
            and self.unsent == 0
            and max(self.health) < BACK
            and self.after.a_cpu_second > RECOVERED * self.capacity.a_cpu_second
            and self.after.a_second > RECOVERED / 2 * self.capacity.a_second
        )

    @property
    def explained(self) -> str:
        return (
            "The service must answer what it can (200) and refuse the rest at once (429, with "
            f"Retry-After), and nothing else. p99 must be under {BOUND:.0f} s: the work that may "
            f"wait, and some. /health must answer within {BACK:.0f} s each time. Good responses "
            "should be about as many as before the load, memory should stay as it is, and "
            f"{RECOVERED:.0%} of the speed, by CPU time, be back {BACK:.0f} s after it."
        )

    def __str__(self) -> str:
        counts, latency = self.outcomes.counts(), self.outcomes.latency
        during = counts[200] / (len(self.outcomes) / self.offered)
        before, middle, end = self.memory
        lines = [
            f"can serve: {self.capacity}",
            f"sent: {self.offered:.0f} requests/s, {self.unsent} more had no connection left",
            f"responses: {dict(counts)}, {during:.0f} good ones a second",
            f"p50 and p99 of the good ones: {latency(50):.2f} s, {latency(99):.2f} s; "
            f"the longest: {latency(100):.2f} s",
            f"p99 of the refusals: {latency(99, 429) * 1e3:.0f} ms",
            f"at once: {dict(self.at_once.counts())}",
            f"/health: at most {max(self.health) * 1e3:.0f} ms in {len(self.health)} probes",
            f"memory: {before:.0f} MiB before, {middle:.0f} MiB in the middle, {end:.0f} MiB after",
            f"can serve, 2 s after: {self.after}",
        ]
        return "\n".join(lines)


async def full_speed(service: Service, requests: list[bytes], seconds: float) -> Speed:
    """The speed with 64 closed loops, over so many seconds or until the first good response."""
    outcomes = Outcomes()
    async with clients(service.url, requests, outcomes, 64):
        started, before = time.perf_counter(), computed(service)
        await asyncio.sleep(seconds)
        while not outcomes.counts()[200]:
            await asyncio.sleep(0.05)
        seconds, good = time.perf_counter() - started, outcomes.counts()[200]
        used = computed(service) - before
    return Speed(good / seconds, good / max(used, 0.01))


def computed(service: Service) -> float:
    """Processor seconds that its workers have used so far."""
    return sum(common.cpu_seconds(service.process.pid).values())


async def probe(url: str, seconds: list[float]) -> None:
    """Ask for /health twice a second until cancelled; a failure takes infinitely long."""
    while True:
        started = time.perf_counter()
        try:
            status, _ = await asyncio.to_thread(get, url, "/health", 20.0)
        except OSError:
            status = 0
        seconds.append(time.perf_counter() - started if status == 200 else math.inf)
        await asyncio.sleep(0.5)


class Pool:
    """Kept connections, as many as there are requests at the same time."""

    def __init__(self, url: str) -> None:
        self._url, self._idle = url, list[Witness]()

    async def send(self, request: bytes) -> Outcome:
        connection = None
        while self._idle and (connection is None or not connection.open):
            connection = self._idle.pop()
        try:
            if connection is None or not connection.open:
                connection = await Witness.connect(self._url)
        except OSError:
            return Outcome(REFUSED, now := time.perf_counter(), now)
        outcome = await connection.send(request)
        self._idle.append(connection)
        return outcome

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


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
    pool, busy = Pool(url), set[asyncio.Task[None]]()
    sent = unsent = 0

    async def send(request: bytes) -> None:
        outcomes.append(await pool.send(request))

    started = time.perf_counter()
    while (now := time.perf_counter()) < started + seconds:
        while sent < (now - started) * rate:
            sent += 1
            if len(busy) >= connections:
                unsent += 1
                continue
            task = asyncio.create_task(send(requests[sent % len(requests)]))
            busy.add(task)
            task.add_done_callback(busy.discard)
        await asyncio.sleep(0.004)
    await asyncio.gather(*busy)
    pool.close()
    return unsent


async def send_at_once(url: str, requests: Sequence[bytes], count: int) -> Outcomes:
    """`count` connections that send one request each at the same moment."""
    pool = Pool(url)
    sends = (pool.send(requests[number % len(requests)]) for number in range(count))
    outcomes = Outcomes(await asyncio.gather(*sends))
    pool.close()
    return outcomes


async def overload(
    *,
    seconds: float = 60.0,
    times: float = 4.0,
    at_once: int = 1000,
    workers: int = 1,
    **environ: str,
) -> Report:
    """Measure what the service can serve, and send `times` as much for some seconds."""
    outcomes, health, unsent = Outcomes(), list[float](), 0
    with serve({"WEB_CONCURRENCY": str(workers), **environ}) as service:
        url, requests = service.url, common.mixed(service.url)
        common.say("what the service can serve: some seconds")
        await full_speed(service, requests, min(1.0, seconds))
        capacity = await full_speed(service, requests, min(8.0, seconds))
        memory = [service.memory()[1]]
        probes = asyncio.create_task(probe(url, health))
        for half in ("first", "second"):
            sent = times * capacity.a_second
            common.say(f"{half} half of the load: {sent:.0f} requests/s for {seconds / 2:g} s")
            unsent += await open_loop(
                url,
                requests,
                outcomes,
                rate=sent,
                seconds=seconds / 2,
                connections=1500,
            )
            memory.append(service.memory()[1])
        common.say(f"{at_once} connections at once, then the speed again")
        offered = len(outcomes) / seconds
        together = await send_at_once(url, requests, at_once)
        await asyncio.sleep(BACK)
        after = await full_speed(service, requests, min(8.0, seconds))
        probes.cancel()
    return Report(capacity, offered, unsent, outcomes, together, health, memory, after)


if __name__ == "__main__":
    common.run(__doc__, overload)
