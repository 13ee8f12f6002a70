"""Kill a worker under load (SIGKILL), again and again, and check how many requests fail.

    python -m tests.stress.kill [--kills 5] [--connections 16] [--workers 1]

Only requests inside the killed worker may fail. With one worker good responses must come again
within 2 s; with several they must never stop for as long as that. Exits with 1 otherwise.
"""

import asyncio
import os
import signal
import time
from typing import NamedTuple

from loadtest.client import BROKEN, CLOSED
from loadtest.service import serve
from tests.stress import common
from tests.stress.common import RESET, UNANSWERED, Outcomes, clients

BACK = 2.0  # seconds


class Report(NamedTuple):
    outcomes: Outcomes
    held: list[int]  # connections of each killed worker at that moment
    gaps: list[float]  # seconds without a good response after each kill, the longest

    @property
    def failed(self) -> int:
        """Requests inside a killed worker or on their way to it."""
        return len(self.outcomes) - self.outcomes.counts()[200]

    @property
    def good(self) -> bool:
        known = {200, BROKEN, CLOSED, RESET, UNANSWERED}
        expected = set(self.outcomes.counts()) <= known and self.failed <= sum(self.held)
        return expected and max(self.gaps) < BACK

    @property
    def explained(self) -> str:
        return (
            "A killed worker takes the requests with it that it had, at most one on each of its "
            f"connections: 'failed' must not be more than those. Good responses (200) must be back "
            f"within {BACK:.0f} s after each kill; with several workers, the others go on."
        )

    def __str__(self) -> str:
        gaps = ", ".join(f"{gap:.2f}" for gap in self.gaps)
        return (
            f"{self.outcomes}\n"
            f"failed: {self.failed}, of {sum(self.held)} connections to killed workers\n"
            f"seconds without a good response after each kill: {gaps}"
        )


async def kill(
    *, kills: int = 5, connections: int = 16, workers: int = 1, seconds: float = 3.0, **environ: str
) -> Report:
    """Kill the worker that holds most connections, every `seconds`."""
    outcomes, held, killed_at = Outcomes(), [], []
    variables = {"WEB_CONCURRENCY": str(workers), "LOG_LEVEL": "info", **environ}
    with serve(variables) as service:
        await common.all_serving(service, workers)
        async with clients(service.url, common.queries(service.url), outcomes, connections):
            for number in range(kills):
                common.say(f"kill {number + 1} of {kills}, in {seconds:g} s")
                await asyncio.sleep(seconds)
                by_worker = common.connections(service)
                worker = max(by_worker, key=by_worker.__getitem__)
                held.append(by_worker[worker])
                killed_at.append(time.perf_counter())
                os.kill(worker, signal.SIGKILL)
            await asyncio.sleep(seconds)
    answered, gaps = sorted(each.done for each in outcomes if each.what == 200), []
    for start, end in zip(killed_at, [*killed_at[1:], time.perf_counter()]):
        times = [start, *(at for at in answered if start < at < end)]
        gaps.append(max((b - a for a, b in zip(times, times[1:])), default=end - start))
    return Report(outcomes, held, gaps)


if __name__ == "__main__":
    common.run(__doc__, kill)
