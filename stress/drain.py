"""Stop the service again and again under load, and see that no accepted request is lost.

    python -m stress.drain [--restarts 20] [--connections 32] [--workers 1] [--flood]

A request counts as accepted when its bytes reached the server before the server closed the
connection, and as answered by a status: 200, or 503 for what could not be computed in time. A third
of the clients sends at once when it has its answer, a third opens a connection for every request,
and a third thinks for up to 3 s, so that its connections are idle when the server closes them.
Exits with 1 when a request was lost, or a stop took 10 s or did not end with 0.
"""

import argparse
import asyncio
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from stress.load import CLOSED, Service, Tally, closed_loop, free_port, mixed, texts

GRACE = 10.0  # seconds
THINK = 3.0


class Report(NamedTuple):
    tally: Tally
    exits: list[int]
    stops: list[float]  # seconds

    @property
    def good(self) -> bool:
        in_time = all(code == 0 for code in self.exits) and max(self.stops) < GRACE
        return in_time and not self.tally.lost() and set(self.tally.counts()) >= {200}

    def __str__(self) -> str:
        counts = self.tally.counts()
        lines = [f"{what}: {count}" for what, count in sorted(counts.items(), key=str)]
        return "\n".join(
            [
                *lines,
                f"lost: {self.tally.lost()} of {len(self.tally)}",
                f"closed before it arrived: {counts[CLOSED]}",
                f"exit codes: {sorted(set(self.exits))}",
                f"seconds to stop: {min(self.stops):.1f} to {max(self.stops):.1f}",
            ]
        )


async def drain(
    models_dir: str,
    *,
    restarts: int,
    connections: int,
    seconds: float = 2.0,
    flood: bool = False,
    **env: str,
) -> Report:
    """Start the service and stop it after some seconds of load, `restarts` times; `flood` keeps its
    queue full with long requests.
    """
    port, tally, exits, stops = free_port(), Tally(), [], []
    until = asyncio.Event()
    short, long = mixed(), [texts(90, 250, seed) for seed in range(4)]
    clients = [
        asyncio.create_task(
            closed_loop(
                port,
                long if flood and number % 2 else short,
                tally,
                until,
                think=THINK if number % 3 == 2 else 0.0,
                keep=number % 3 != 1,
                seed=number,
            )
        )
        for number in range(connections)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for restart in range(restarts):
            log = pathlib.Path(folder) / f"log{restart}"
            service = Service(models_dir, port, log, **env)
            try:
                await asyncio.to_thread(service.wait_ready)
                await asyncio.sleep(seconds + restart % 7 / 10)
            finally:
                code, took = await asyncio.to_thread(service.stop)
            exits.append(code)
            stops.append(took)
            if "Traceback" in log.read_text():
                raise RuntimeError(log.read_text())
    until.set()
    await asyncio.gather(*clients)
    return Report(tally, exits, stops)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--flood", action="store_true", help="keep the queue full")
    options = parser.parse_args(arguments)
    report = asyncio.run(
        drain(
            os.environ.get("MODELS_DIR", "models"),
            restarts=options.restarts,
            connections=options.connections,
            flood=options.flood,
            WEB_CONCURRENCY=str(options.workers),
        )
    )
    print(report)
    sys.exit(not report.good)


if __name__ == "__main__":
    main()
