"""Open kept-alive connections at the same moment, and see how the workers share them.

    python -m stress.spread [--connections 32] [--workers 2] [--seconds 10]

Every worker must hold its part of them within an eighth, when they are opened and some seconds
after a worker was killed under load. Exits with 1 otherwise.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from stress.load import Connection, Service, Tally, closed_loop, serve, texts


class Report(NamedTuple):
    opened: list[int]  # connections of each worker
    later: list[int]  # of each, after a worker was killed and the load went on
    rate: float  # good answers a second, before
    computed: list[float]  # CPU seconds of each worker, before

    @property
    def good(self) -> bool:
        share = sum(self.opened) / len(self.opened)
        slack = max(2, share / 8)
        return all(abs(held - share) <= slack for held in (*self.opened, *self.later))

    def __str__(self) -> str:
        seconds = [round(seconds, 1) for seconds in self.computed]
        return (
            f"connections of each worker: {self.opened}\n"
            f"{self.rate:.0f} requests/s; CPU seconds of each worker: {seconds}\n"
            f"after a worker was killed: {self.later}"
        )


async def all_serving(service: Service, workers: int, seconds: float = 20.0) -> None:
    """Wait until every worker serves: the first to do so has made the service ready.

    Raises: RuntimeError when it takes longer than some seconds.
    """
    for _ in range(int(seconds * 20)):
        if service.log.read_text().count(" main: serving ") >= workers:
            return
        await asyncio.sleep(0.05)
    raise RuntimeError(f"not all workers serve: {service.log.read_text()}")


async def settled(service: Service, connections: int, seconds: float = 20.0) -> list[int]:
    """Connections of each worker, once they are as many as there should be and spread, or after
    some seconds.
    """
    for _ in range(int(seconds * 10)):
        await asyncio.sleep(0.1)
        held = list(service.connections().values())
        if sum(held) == connections and max(held) - min(held) <= 4:
            break
    return held


async def spread(
    models_dir: str, *, connections: int, workers: int, seconds: float, **env: str
) -> Report:
    """Open connections, use them for some seconds, kill a worker, use them again."""
    with serve(models_dir, WEB_CONCURRENCY=str(workers), **env) as service:
        await all_serving(service, workers)
        idle = await asyncio.gather(*(Connection.connect(service.port) for _ in range(connections)))
        await asyncio.sleep(0.5)
        opened = list(service.connections().values())
        for connection in idle:
            connection.close()
        tally, until = Tally(), asyncio.Event()
        requests = [texts(1, 20, seed) for seed in range(50)]
        before = service.cpu_seconds()
        clients = [
            asyncio.create_task(closed_loop(service.port, requests, tally, until, seed=number))
            for number in range(connections)
        ]
        await asyncio.sleep(seconds)
        rate = tally.counts()[200] / seconds
        computed = [after - before[pid] for pid, after in service.cpu_seconds().items()]
        os.kill(service.workers()[0], signal.SIGKILL)
        await asyncio.sleep(seconds)
        later = await settled(service, connections)
        until.set()
        await asyncio.gather(*clients)
    return Report(opened, later, rate, computed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args(arguments)
    report = asyncio.run(
        spread(
            os.environ.get("MODELS_DIR", "models"),
            connections=options.connections,
            workers=options.workers,
            seconds=options.seconds,
        )
    )
    print(report)
    sys.exit(not report.good)


if __name__ == "__main__":
    main()
