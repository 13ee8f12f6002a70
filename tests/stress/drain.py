"""Stop the service again and again under load, and check that no accepted request is lost.

    python -m tests.stress.drain [--restarts 20] [--connections 32] [--workers 1] [--flood]

A request is accepted when its bytes reached the server before the server closed the connection. It
is answered by a status: 200, or 503 for what could not be computed in time. A third of the clients
sends at once when it has its response, a third opens a connection for every request, and a third
waits for up to 3 s, so that its connections are idle when the server closes them. With --flood half
of the requests are long, which keeps the queue full. Exits with 1 when a request was lost, or a
stop took 10 s or did not end with exit code 0.
"""

import asyncio
import pathlib
import tempfile
from typing import NamedTuple

from loadtest.client import CLOSED
from loadtest.service import Service, free_port
from tests.stress import common
from tests.stress.common import Outcomes, clients

GRACE = 10.0  # seconds
THINK = 3.0


class Report(NamedTuple):
    outcomes: Outcomes
    exits: list[int]
    stops: list[float]  # seconds

    @property
    def good(self) -> bool:
        in_time = all(code == 0 for code in self.exits) and max(self.stops) < GRACE
        return in_time and not self.outcomes.lost() and 200 in self.outcomes.counts()

    @property
    def explained(self) -> str:
        return (
            "Numbers before a colon are statuses: 200 is a good response, 429 and 503 say that the "
            "service had no time for a request, and the client may send it again. 'connection "
            "refused' and 'closed before it arrived' are requests that no service had. lost are "
            "those that arrived and had no response: there must be none. Exit codes must be 0, and "
            f"every stop take less than {GRACE:.0f} s."
        )

    def __str__(self) -> str:
        return (
            f"{self.outcomes}\n"
            f"lost: {self.outcomes.lost()} of {len(self.outcomes)}\n"
            f"closed before it arrived: {self.outcomes.counts()[CLOSED]}\n"
            f"exit codes: {sorted(set(self.exits))}\n"
            f"seconds to stop: {min(self.stops):.1f} to {max(self.stops):.1f}"
        )


async def drain(
    *,
    restarts: int = 20,
    connections: int = 32,
    workers: int = 1,
    flood: bool = False,
    seconds: float = 2.0,
    **environ: str,
) -> Report:
    """Start the service and stop it after some seconds of load, `restarts` times.

    Raises: OSError when it does not start; RuntimeError, with the log, when it logs a traceback.
    """
    port, outcomes, exits, stops = free_port(), Outcomes(), [], []
    url, environ = f"http://127.0.0.1:{port}", {"WEB_CONCURRENCY": str(workers), **environ}
    requests = common.mixed(url)
    if flood:
        requests += common.long_batches(url) * (len(requests) // 4)
    third = connections // 3
    with tempfile.TemporaryDirectory() as folder:
        async with (
            clients(url, requests, outcomes, connections - 2 * third),
            clients(url, requests, outcomes, third, keep=False),
            clients(url, requests, outcomes, third, think=THINK),
        ):
            for restart in range(restarts):
                common.say(f"restart {restart + 1} of {restarts}: {len(outcomes)} requests so far")
                service = Service(pathlib.Path(folder) / f"log{restart}", environ, port=port)
                try:
                    await asyncio.to_thread(service.wait_ready)
                    await asyncio.sleep(seconds + restart % 7 / 10)
                finally:
                    exits.append(await asyncio.to_thread(service.stop))
                stops.append(service.stop_seconds)
                if "Traceback" in service.log:
                    raise RuntimeError(service.log)
    return Report(outcomes, exits, stops)


if __name__ == "__main__":
    common.run(__doc__, drain)
