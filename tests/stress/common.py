"""What the stress commands share: command line, requests, clients, a look at the workers."""

import argparse
import asyncio
import contextlib
import inspect
import itertools
import os
import pathlib
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol

import uvloop

from loadtest.client import BROKEN, CLOSED, TIMED_OUT, Connection, Outcome, percentile
from loadtest.loads import LOADS, STREAM, Load, Target, requests
from loadtest.service import Service, children

# Why a request has no status, beside the client's own reasons.
REFUSED = "connection refused"  # it was not sent
RESET = "reset after the request arrived"
UNANSWERED = "closed after the request was read"
NO_RETRY_AFTER = "429 without Retry-After"
LOST = (RESET, UNANSWERED, BROKEN, TIMED_OUT)
PATIENCE = 20.0  # seconds
_TCP_ESTABLISHED = "01"
_TCP_CLOSE_WAIT = 8


class Report(Protocol):
    """What a stress command found. Its text is printed."""

    @property
    def good(self) -> bool: ...

    @property
    def explained(self) -> str:
        """What its figures mean, and which of them must be how large."""


def say(message: str) -> None:
    """Tell on stderr how far the command is."""
    print(message, file=sys.stderr, flush=True)


def run(description: str | None, command: Callable[..., Coroutine[Any, Any, Report]]) -> None:
    """Call `command` with options from the command line, one for each parameter that has a default,
    and print its report. Exits with 1 when the report is not good.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, parameter in inspect.signature(command).parameters.items():
        flag, default = "--" + name.replace("_", "-"), parameter.default
        if default is False:
            parser.add_argument(flag, action="store_true")
        elif default is not inspect.Parameter.empty:
            parser.add_argument(flag, type=type(default), default=default)
    report = uvloop.run(command(**vars(parser.parse_args())))
    print(f"{report}\n\n{report.explained}\n{'passed' if report.good else 'FAILED'}")
    sys.exit(not report.good)


# Requests


def some(url: str, load: Load, number: int) -> list[bytes]:
    """So many requests, to be sent again and again."""
    return list(itertools.islice(requests(Target(url), load, seed=0), number))


def queries(url: str) -> list[bytes]:
    return some(url, LOADS["query"], 50)


def long_batches(url: str) -> list[bytes]:
    """Requests that each keep the engine busy for seconds."""
    return some(url, STREAM, 4)


def mixed(url: str) -> list[bytes]:
    """Requests of all sizes in random order, half of them queries."""
    shares = {"query": 100, "passage": 50, "mixed": 20, "long": 10, "batch32": 20}
    made = [each for name, n in shares.items() for each in some(url, LOADS[name], n)]
    random.Random(1).shuffle(made)
    return made


# Clients


class Witness(Connection):
    """A connection that tells lost requests from those that the server did not take, which are
    CLOSED. It looks for Retry-After as well.
    """

    _retry_after = False

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._retry_after = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if name.lower() == b"retry-after":
            self._retry_after = value.isdigit()

    def settle(self, what: int | str) -> None:
        super().settle(NO_RETRY_AFTER if what == 429 and not self._retry_after else what)

    def eof_received(self) -> None:
        # A kernel answers bytes for a closed connection with a reset. Without one (CLOSE_WAIT) the
        # server has read the request.
        sock = self.transport.get_extra_info("socket")
        (state,) = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        taken = state == _TCP_CLOSE_WAIT
        self.settle(BROKEN if self.received else UNANSWERED if taken else CLOSED)

    def connection_lost(self, error: Exception | None) -> None:
        # The kernel says EPIPE for a reset that comes after the server's FIN, else ECONNRESET.
        came_first = error is None or isinstance(error, BrokenPipeError)
        self.settle(BROKEN if self.received else CLOSED if came_first else RESET)
        super().connection_lost(error)


class Outcomes(list[Outcome]):
    """What became of requests, in the order of their ends."""

    def counts(self) -> Counter[int | str]:
        return Counter(outcome.what for outcome in self)

    def lost(self) -> int:
        return sum(outcome.what in LOST for outcome in self)

    def latency(self, percent: float, status: int = 200) -> float:
        """This percentile of the latencies in seconds; 0 without responses of this status."""
        return percentile([each.seconds for each in self if each.what == status], percent)

    def __str__(self) -> str:
        counts = sorted(self.counts().items(), key=str)
        return "\n".join(f"{what}: {count}" for what, count in counts)


@contextlib.asynccontextmanager
async def clients(
    url: str,
    requests: Sequence[bytes],
    outcomes: Outcomes,
    number: int,
    *,
    think: float = 0.0,
    keep: bool = True,
) -> AsyncIterator[None]:
    """So many clients while the body runs. Each sends the next request when it has its response,
    whatever that is. At the end the last responses are awaited.

    Args:
        think: each waits up to so many seconds before it sends.
        keep: whether a connection carries more than one request.
    """
    until, cycle = asyncio.Event(), itertools.cycle(requests)

    async def client() -> None:
        connection = None
        while not until.is_set():
            if connection is None or not connection.open:
                connection = await _connect(url, outcomes)
            if think:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(until.wait(), random.uniform(0, think))
            if connection is None or not connection.open:
                continue
            outcomes.append(await connection.send(next(cycle)))
            if not keep:
                connection.close()
        if connection is not None:
            connection.close()

    running = asyncio.gather(*(client() for _ in range(number)))
    try:
        yield
    finally:
        until.set()
        await running


async def _connect(url: str, outcomes: Outcomes) -> Witness | None:
    """A connection; None after a pause where the service takes none, which is an outcome too."""
    try:
        return await Witness.connect(url)
    except OSError as error:
        what = RESET if isinstance(error, ConnectionResetError) else REFUSED
        outcomes.append(Outcome(what, now := time.perf_counter(), now))
        await asyncio.sleep(0.02)
        return None


# Workers


async def all_serving(service: Service, workers: int) -> None:
    """Wait until every worker serves: the service is ready with the first one.

    Raises: TimeoutError after PATIENCE.
    """
    async with asyncio.timeout(PATIENCE):
        while service.log.count(" main: serving ") < workers:
            await asyncio.sleep(0.05)


def connections(service: Service) -> dict[int, int]:
    """How many clients' connections each worker holds."""
    rows = [line.split() for line in _lines("/proc/net/tcp", "/proc/net/tcp6")]
    port = f":{service.port:04X}"
    inodes = {row[9] for row in rows if row[3] == _TCP_ESTABLISHED and row[1].endswith(port)}
    held = {}
    for pid in service.workers():
        held[pid] = 0
        with contextlib.suppress(OSError):  # it has ended
            for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
                held[pid] += os.readlink(link)[8:-1] in inodes  # socket:[inode]
    return held


def cpu_seconds(pid: int) -> dict[int, float]:
    """Processor time that each child process of a process has used so far."""
    used = {}
    for child in children(pid):
        for line in _lines(f"/proc/{child}/stat"):
            fields = line.rpartition(")")[2].split()
            used[child] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def _lines(*paths: str) -> Iterator[str]:
    """Lines of files of /proc; none of a file whose process has ended."""
    for path in paths:
        with contextlib.suppress(OSError):
            yield from pathlib.Path(path).read_text().splitlines()
