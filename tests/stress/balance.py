"""Open kept connections at the same moment, and check how evenly the workers share them.

    python -m tests.stress.balance [--connections 32] [--workers 2] [--seconds 10]

Every worker must hold an equal share of them within an eighth, when they are opened, and again some
seconds after a worker was killed under load. Exits with 1 otherwise.
"""

import asyncio
import os
import signal
from typing import NamedTuple

from loadtest.service import Service, serve
from tests.stress import common
from tests.stress.common import Outcomes, Witness, clients


class Report(NamedTuple):
    opened: list[int]  # connections of each worker
    later: list[int]  # the same after a worker was killed and the load went on
    rate: float  # good responses a second before
    computed: list[float]  # CPU seconds of each worker before

    @property
    def good(self) -> bool:
        share = sum(self.opened) / len(self.opened)
        slack = max(2, share / 8)
        return all(abs(held - share) <= slack for held in (*self.opened, *self.later))

    @property
    def explained(self) -> str:
        share = sum(self.opened) / len(self.opened)
        return (
            f"An equal share is {share:.1f} connections. Every worker must hold that, give or take "
            f"{max(2, share / 8):g}, after they were opened and after a worker was killed. The CPU "
            "seconds say whether they also got equal work."
        )

    def __str__(self) -> str:
        seconds = [round(seconds, 1) for seconds in self.computed]
        return (
            f"connections of each worker: {self.opened}\n"
            f"{self.rate:.0f} requests/s; CPU seconds of each worker: {seconds}\n"
            f"after a worker was killed: {self.later}"
        )


async def settled(service: Service, connections: int) -> list[int]:
    """Connections of each worker, once all are there and balanced, or after PATIENCE."""
    for _ in range(int(common.PATIENCE * 10)):
        await asyncio.sleep(0.1)
        held = list(common.connections(service).values())
        if sum(held) == connections and max(held) - min(held) <= 4:
            break
    return held


async def balance(
    *, connections: int = 32, workers: int = 2, seconds: float = 10.0, **environ: str
) -> Report:
    """Open connections, use them for some seconds, kill a worker, use them again."""
    outcomes = Outcomes()
    variables = {"WEB_CONCURRENCY": str(workers), "LOG_LEVEL": "info", **environ}
    with serve(variables) as service:
        await common.all_serving(service, workers)
        idle = await asyncio.gather(*(Witness.connect(service.url) for _ in range(connections)))
        opened = await settled(service, connections)
        for connection in idle:
            connection.close()
        before = common.cpu_seconds(service.process.pid)
        async with clients(service.url, common.queries(service.url), outcomes, connections):
            common.say(f"{connections} connections send queries for {seconds:g} s")
            await asyncio.sleep(seconds)
            rate = outcomes.counts()[200] / seconds
            after = common.cpu_seconds(service.process.pid)
            common.say(f"a worker is killed; {seconds:g} s more")
            os.kill(service.workers()[0], signal.SIGKILL)
            await asyncio.sleep(seconds)
            later = await settled(service, connections)
    return Report(opened, later, rate, [after[pid] - before[pid] for pid in after])


if __name__ == "__main__":
    common.run(__doc__, balance)
