"""A service to put under load, and a load that costs little: asyncio on bare sockets, since it runs
on the cores it measures.
"""

import asyncio
import contextlib
import http.client
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

ROOT = pathlib.Path(__file__).parent.parent
KEY = "stress"
TIMEOUT = 30.0  # seconds a client waits for its answer; more than any promise allows
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY_AFTER = re.compile(rb"\r\nretry-after: *\d+", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)

# What became of a request that got no answer.
REFUSED = "refused"  # no connection: not accepted
CLOSED = "closed before it arrived"  # the server's end came first: not accepted
RESET = "reset"  # it had arrived, and was thrown away: lost
UNANSWERED = "closed without an answer"  # it had been taken: lost
BROKEN = "broken off"  # in the middle of its answer: lost
TIMED_OUT = "timed out"
LOST = (RESET, UNANSWERED, BROKEN, TIMED_OUT)
_TCP_CLOSE_WAIT = 8


class Outcome(NamedTuple):
    what: int | str  # a status, or one of the words above
    sent: float  # time.monotonic()
    seconds: float
    retry_after: bool


def post(body: object, path: str = "/embeddings/batch") -> bytes:
    """A whole request."""
    data = msgspec.json.encode(body)
    return (
        f"POST {path} HTTP/1.1\r\nHost: stress\r\nX-API-Key: {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode() + data


def texts(count: int, words: int, seed: int = 0) -> bytes:
    """A request of `count` different texts, of as many tokens each as words, and two more."""
    chosen = random.Random(seed)
    names = "water house music river mountain history science energy market company".split()
    return post({"texts": [" ".join(chosen.choices(names, k=words)) for _ in range(count)]})


def mixed(count: int = 200) -> list[bytes]:
    """Requests of mixed lengths: queries of 10 words, passages of 100, pages of 400, batches."""
    kinds = [(1, 10)] * 10 + [(1, 100)] * 6 + [(1, 400), (8, 20), (20, 10), (4, 100)]
    chosen = random.Random(1)
    return [texts(*chosen.choice(kinds), seed) for seed in range(count)]


class Connection(asyncio.Protocol):
    """A client's connection, for one request after the other."""

    def __init__(self) -> None:
        self.open = False
        self._received = bytearray()
        self._waiting: asyncio.Future[Outcome] | None = None
        self._ended = False
        self._sent = 0.0

    @classmethod
    async def connect(cls, port: int) -> "Connection":
        """Raises: OSError."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, "127.0.0.1", port)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.open = transport, True

    def alive(self) -> bool:
        """Whether the server has not closed it, as far as this machine's kernel knows."""
        sock = self.transport.get_extra_info("socket")
        if not self.open or sock is None:
            return False
        try:
            # asyncio's own view of a socket cannot receive.
            with socket.socket(fileno=os.dup(sock.fileno())) as copy:
                return bool(copy.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    async def ask(self, request: bytes, timeout: float = TIMEOUT) -> Outcome:
        """Send a whole request and wait for its answer. Never raises."""
        self._waiting = asyncio.get_running_loop().create_future()
        self._received.clear()
        self._sent = time.monotonic()
        timer = asyncio.get_running_loop().call_later(timeout, self._settle, TIMED_OUT)
        self.transport.write(request)
        if not self.open:
            self._settle(CLOSED)
        try:
            return await self._waiting
        finally:
            timer.cancel()

    def _settle(self, what: int | str, retry_after: bool = False) -> None:
        if self._waiting is not None and not self._waiting.done():
            taken = time.monotonic() - self._sent
            self._waiting.set_result(Outcome(what, self._sent, taken, retry_after))
        if not isinstance(what, int):
            self.close()

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self._received, 0, end + 2)
        if not length or len(self._received) < end + 4 + int(length[1]):
            return
        if _CLOSE.search(self._received, 0, end + 2):
            self.close()
        retry_after = bool(_RETRY_AFTER.search(self._received, 0, end + 2))
        self._settle(int(self._received[9:12]), retry_after)

    def eof_received(self) -> None:
        # Bytes that come after its end a kernel answers with a reset; this one has taken them.
        sock = self.transport.get_extra_info("socket")
        (state,) = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        taken = state == _TCP_CLOSE_WAIT
        self._settle(BROKEN if self._received else UNANSWERED if taken else CLOSED)

    def connection_lost(self, error: Exception | None) -> None:
        # The kernel tells a reset after the server's end (EPIPE) from one before it.
        came_first = error is None or isinstance(error, BrokenPipeError)
        self._settle(BROKEN if self._received else CLOSED if came_first else RESET)
        self.open = False

    def close(self) -> None:
        self.open = False
        self.transport.close()


class Tally(list[Outcome]):
    """What became of every request, in the order of the ends."""

    def counts(self) -> Counter[int | str]:
        return Counter(outcome.what for outcome in self)

    def lost(self) -> int:
        return sum(outcome.what in LOST for outcome in self)

    def latency(self, share: float) -> float:
        """The latency, in seconds, that this share of the good answers kept below."""
        good = sorted(outcome.seconds for outcome in self if outcome.what == 200)
        return good[min(len(good) - 1, int(share * len(good)))] if good else float("nan")


async def closed_loop(
    port: int,
    requests: Sequence[bytes],
    tally: Tally,
    until: asyncio.Event,
    *,
    think: float = 0.0,
    keep: bool = True,
    seed: int = 0,
) -> None:
    """One client that sends when it has its answer, after up to `think` seconds; with a new
    connection each time unless `keep`. It tries again where it is refused, until `until` is set.
    """
    chosen, connection = random.Random(seed), None
    while not until.is_set():
        if connection is None or not keep or not connection.alive():
            if connection is not None:
                connection.close()
            connection = None
            try:
                connection = await Connection.connect(port)
            except OSError as error:
                what = RESET if isinstance(error, ConnectionResetError) else REFUSED
                tally.append(Outcome(what, time.monotonic(), 0.0, False))
                await asyncio.sleep(0.02)
                continue
        if think:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(until.wait(), chosen.uniform(0, think))
            if not connection.alive():
                continue
        tally.append(await connection.ask(chosen.choice(requests)))
    if connection is not None:
        connection.close()


async def open_loop(
    port: int,
    requests: Sequence[bytes],
    tally: Tally,
    *,
    rate: float,
    seconds: float,
    connections: int,
) -> int:
    """Send `rate` requests a second whatever comes back, on as many kept connections as that takes.

    Returns: how many were not sent because all `connections` were waiting.
    """
    idle: list[Connection] = []
    busy: set[asyncio.Task[None]] = set()
    unsent = 0

    async def one(request: bytes) -> None:
        connection = None
        while idle and connection is None:
            connection = idle.pop()
            if not connection.open:
                connection = None
        try:
            connection = connection or await Connection.connect(port)
        except OSError:
            tally.append(Outcome(REFUSED, time.monotonic(), 0.0, False))
            return
        tally.append(await connection.ask(request))
        if connection.open:
            idle.append(connection)

    started = time.monotonic()
    sent = 0
    while (now := time.monotonic()) < started + seconds:
        while sent < (now - started) * rate:
            sent += 1
            if len(busy) >= connections:
                unsent += 1
                continue
            task = asyncio.create_task(one(requests[sent % len(requests)]))
            busy.add(task)
            task.add_done_callback(busy.discard)
        await asyncio.sleep(0.004)
    await asyncio.gather(*busy)
    for connection in idle:
        connection.close()
    return unsent


class Service:
    """A gunicorn of our own."""

    def __init__(self, models_dir: str, port: int, log: pathlib.Path, **env: str) -> None:
        self.port, self.log = port, log
        environ = {**os.environ, "VECTOR_EMBEDDER_API_KEY": KEY, "MODELS_DIR": models_dir}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "main:app"],
                cwd=ROOT,
                env={**environ, "PORT": str(port), **env},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def workers(self) -> list[int]:
        """Their process ids."""
        pid = self.process.pid
        return [int(pid) for pid in _read(f"/proc/{pid}/task/{pid}/children").split()]

    def connections(self) -> dict[int, int]:
        """How many clients' connections each worker holds."""
        port, held = f"{self.port:04X}", {}
        rows = [line.split() for line in _read("/proc/net/tcp").splitlines()[1:]]
        ours = {row[9] for row in rows if row[3] == "01" and row[1].endswith(":" + port)}
        for pid in self.workers():
            links = pathlib.Path(f"/proc/{pid}/fd").iterdir()
            held[pid] = sum(os.readlink(link)[8:-1] in ours for link in links)
        return held

    def memory(self) -> float:
        """Resident MB of all workers."""
        pages = [int(_read(f"/proc/{pid}/statm").split()[1]) for pid in self.workers()]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu_seconds(self) -> dict[int, float]:
        """What each worker has computed so far."""
        ticks = {}
        for pid in self.workers():
            fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
            ticks[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return ticks

    def stop(self) -> tuple[int, float]:
        """SIGTERM. Returns: exit code, seconds it took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        return code, time.monotonic() - started

    def wait_ready(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if get(self.port, "/health/ready") == 200:
                    return
            time.sleep(0.02)
        raise RuntimeError(f"the service did not become ready: {self.log.read_text()}")


def get(port: int, path: str, timeout: float = 10.0) -> int:
    """The status of a GET on a connection of its own. Raises: OSError."""
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    ) as connection:
        connection.request("GET", path)
        return connection.getresponse().status


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def serve(models_dir: str, **env: str) -> Iterator[Service]:
    """A service on a free port, ready, stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        service = Service(models_dir, free_port(), pathlib.Path(folder) / "log", **env)
        try:
            service.wait_ready()
            yield service
        finally:
            if service.process.poll() is None:
                service.stop()
