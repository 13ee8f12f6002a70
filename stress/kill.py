"""Kill a worker under load (SIGKILL), again and again, and see who notices.

    python -m stress.kill [--kills 5] [--connections 16] [--workers 1]

Only requests inside the killed worker may fail. With one worker good answers must come again within
2 s; with several they must never be gone for as long as that. Exits with 1 otherwise.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from stress.load import BROKEN, CLOSED, RESET, UNANSWERED, Tally, closed_loop, serve, texts

BACK = 2.0  # seconds


class Report(NamedTuple):
    tally: Tally
    held: list[int]  # connections of each killed worker, when it was killed
    gaps: list[float]  # seconds after each kill without a good answer, the longest

    @property
    def failed(self) -> int:
        """Requests that were in a killed worker, or on their way to it."""
        return sum(outcome.what != 200 for outcome in self.tally)

    @property
    def good(self) -> bool:
        known = {200, BROKEN, CLOSED, RESET, UNANSWERED}
        return (
            set(self.tally.counts()) <= known
            and self.failed <= sum(self.held)
            and max(self.gaps) < BACK
        )

    def __str__(self) -> str:
        counts = self.tally.counts()
        gaps = ", ".join(f"{gap:.2f}" for gap in self.gaps)
        return "\n".join(
            [
                *(f"{what}: {count}" for what, count in sorted(counts.items(), key=str)),
                f"failed: {self.failed}, of {sum(self.held)} connections to killed workers",
                f"seconds without a good answer after each kill: {gaps}",
            ]
        )


async def kill(
    models_dir: str, *, kills: int, connections: int, workers: int, seconds: float = 3.0
) -> Report:
    """Kill the worker that holds most connections, every `seconds`."""
    tally, until = Tally(), asyncio.Event()
    held, killed_at = [], []
    with serve(models_dir, WEB_CONCURRENCY=str(workers)) as service:
        requests = [texts(1, 20, seed) for seed in range(50)]
        clients = [
            asyncio.create_task(closed_loop(service.port, requests, tally, until, seed=number))
            for number in range(connections)
        ]
        for _ in range(kills):
            await asyncio.sleep(seconds)
            workers_hold = service.connections()
            worker = max(workers_hold, key=workers_hold.__getitem__)
            held.append(workers_hold[worker])
            killed_at.append(time.monotonic())
            os.kill(worker, signal.SIGKILL)
        await asyncio.sleep(seconds)
        until.set()
        await asyncio.gather(*clients)
    answers = sorted(outcome.sent + outcome.seconds for outcome in tally if outcome.what == 200)
    gaps = []
    for start, end in zip(killed_at, [*killed_at[1:], time.monotonic()]):
        times = [start, *(at for at in answers if start < at < end)]
        gaps.append(max((b - a for a, b in zip(times, times[1:])), default=end - start))
    return Report(tally, held, gaps)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    report = asyncio.run(
        kill(
            os.environ.get("MODELS_DIR", "models"),
            kills=options.kills,
            connections=options.connections,
            workers=options.workers,
        )
    )
    print(report)
    sys.exit(not report.good)


if __name__ == "__main__":
    main()
