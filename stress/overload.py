"""Send four times what the service can serve, and see that it refuses the rest and stays well.

    python -m stress.overload [--seconds 60] [--times 4] [--at-once 1000] [--workers 1]

The load is open: a request is sent when its time has come, whatever became of those before. Then
--at-once connections send one each at the same moment. Every answer must be 200, or 429 with
Retry-After; /health must be answered throughout; and full speed be back within 2 s. Exits with 1
otherwise.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from stress.load import (
    TIMED_OUT,
    Connection,
    Outcome,
    Service,
    Tally,
    closed_loop,
    get,
    mixed,
    open_loop,
    serve,
)

BOUND = 15.0  # seconds: MAX_QUEUE_SECONDS, and some
BACK = 2.0  # seconds
RECOVERED = 0.8  # of the speed before: the machine's own noise is larger than 10 %


class Speed(NamedTuple):
    """Good answers: by the clock, and by what the workers computed, which others on the machine do
    not change.
    """

    a_second: float
    a_cpu_second: float

    def __str__(self) -> str:
        return f"{self.a_second:.0f} requests/s, {self.a_cpu_second:.0f} for a second of CPU time"


class Report(NamedTuple):
    capacity: Speed
    offered: float  # requests a second that were sent
    unsent: int  # because every connection was waiting
    tally: Tally
    at_once: Tally
    health: list[float]  # seconds each probe took
    memory: list[float]  # MB: before, in the middle of the load, at its end
    after: Speed  # from 2 s after the load on

    @property
    def good(self) -> bool:
        both = [*self.tally, *self.at_once]
        return (
            {outcome.what for outcome in both} <= {200, 429}
            and all(outcome.retry_after for outcome in both if outcome.what == 429)
            and self.tally.latency(0.99) < BOUND
            and self.unsent == 0
            and max(self.health) < BACK
            and self.after.a_cpu_second > RECOVERED * self.capacity.a_cpu_second
            and self.after.a_second > RECOVERED / 2 * self.capacity.a_second
        )

    def __str__(self) -> str:
        during = self.tally.counts()[200] / (len(self.tally) / self.offered)
        before, middle, end = self.memory
        lines = [
            f"can serve: {self.capacity}",
            f"sent: {self.offered:.0f} requests/s, {self.unsent} more had no connection left",
            f"answers: {dict(self.tally.counts())}, {during:.0f} good ones a second",
            f"p50 and p99 of the good ones: {self.tally.latency(0.5):.2f} s, "
            f"{self.tally.latency(0.99):.2f} s; the longest: {self.tally.latency(1):.2f} s",
            f"p99 of the refusals: {refusal_latency(self.tally) * 1e3:.0f} ms",
            f"at once: {dict(self.at_once.counts())}",
            f"/health: at most {max(self.health) * 1e3:.0f} ms in {len(self.health)} probes",
            f"memory: {before:.0f} MB before, {middle:.0f} MB in the middle, {end:.0f} MB after",
            f"can serve, 2 s after: {self.after}",
        ]
        return "\n".join(lines)


def refusal_latency(tally: Tally) -> float:
    refused = sorted(outcome.seconds for outcome in tally if outcome.what == 429)
    return refused[int(0.99 * len(refused))] if refused else 0.0


async def full_speed(service: Service, seconds: float) -> Speed:
    """How fast 64 clients that each wait for their answer get theirs."""
    tally, until, requests = Tally(), asyncio.Event(), mixed()
    clients = [
        asyncio.create_task(closed_loop(service.port, requests, tally, until, seed=number))
        for number in range(64)
    ]
    started, computed = time.monotonic(), sum(service.cpu_seconds().values())
    await asyncio.sleep(seconds)
    seconds, good = time.monotonic() - started, tally.counts()[200]
    computed = sum(service.cpu_seconds().values()) - computed
    until.set()
    await asyncio.gather(*clients)
    return Speed(good / seconds, good / computed)


async def probe(service: Service, seconds: list[float], until: asyncio.Event) -> None:
    while not until.is_set():
        started = time.monotonic()
        try:
            status = await asyncio.to_thread(get, service.port, "/health", 20.0)
        except OSError:
            status = 0
        seconds.append(time.monotonic() - started if status == 200 else float("inf"))
        await asyncio.sleep(0.5)


async def all_at_once(service: Service, count: int) -> Tally:
    """`count` connections that send one request each at the same moment."""

    async def one(request: bytes) -> Outcome:
        try:
            connection = await Connection.connect(service.port)
        except OSError:
            return Outcome(TIMED_OUT, time.monotonic(), 0.0, False)
        outcome = await connection.ask(request)
        connection.close()
        return outcome

    requests = mixed()
    return Tally(
        await asyncio.gather(*(one(requests[number % len(requests)]) for number in range(count)))
    )


async def overload(
    models_dir: str, *, seconds: float, times: float = 4.0, at_once: int = 1000, **env: str
) -> Report:
    """Measure what the service can serve, and send `times` as much for some seconds."""
    tally, health, until, requests = Tally(), list[float](), asyncio.Event(), mixed()
    with serve(models_dir, **env) as service:
        await full_speed(service, 1.0)
        capacity = await full_speed(service, min(8.0, seconds))
        memory = [service.memory()]
        probes = asyncio.create_task(probe(service, health, until))
        unsent = 0
        for _ in range(2):
            unsent += await open_loop(
                service.port,
                requests,
                tally,
                rate=times * capacity.a_second,
                seconds=seconds / 2,
                connections=1500,
            )
            memory.append(service.memory())
        offered = len(tally) / seconds
        together = await all_at_once(service, at_once)
        await asyncio.sleep(BACK)
        after = await full_speed(service, min(8.0, seconds))
        until.set()
        await probes
    return Report(capacity, offered, unsent, tally, together, health, memory, after)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--times", type=float, default=4.0)
    parser.add_argument("--at-once", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    report = asyncio.run(
        overload(
            os.environ.get("MODELS_DIR", "models"),
            seconds=options.seconds,
            times=options.times,
            at_once=options.at_once,
            WEB_CONCURRENCY=str(options.workers),
        )
    )
    print(report)
    sys.exit(not report.good)


if __name__ == "__main__":
    main()
