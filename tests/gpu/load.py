"""Load from several client processes, the texts that they send, and memory while they do."""

import base64
import contextlib
import http.client
import itertools
import json
import multiprocessing
import pathlib
import random
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from loadtest.client import Client, Result, drive, percentile
from loadtest.loads import exact_texts, key
from loadtest.service import children

ANSWER = 300.0  # seconds that `ask` waits
DIFFERENT = 64  # texts made word by word; all others have the words of one of them in another order


class Endpoint(NamedTuple):
    """An OpenAI-compatible endpoint."""

    url: str
    path: str
    model: str

    def request(self, texts: Sequence[str], encoding: str = "base64") -> bytes:
        """A whole HTTP request."""
        content = {"model": self.model, "input": list(texts), "encoding_format": encoding}
        body = json.dumps(content, ensure_ascii=False).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {key()}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def sized_texts(tokenizer: Tokenizer, tokens: int, number: int) -> list[str]:
    """So many different texts of exactly so many tokens, special tokens included.

    Raises: ValueError where this tokenizer makes none.
    """
    source = random.Random(tokens)
    few = exact_texts(lambda text: len(tokenizer.encode(text).ids), tokens, min(number, DIFFERENT))
    found = dict.fromkeys(few)
    while len(found) < number:
        first, *words = source.choice(few).split()
        source.shuffle(words)
        found[" ".join([first, *words])] = None
    counts = {len(each.ids) for each in tokenizer.encode_batch(list(found))}
    if counts != {tokens}:
        raise ValueError(f"texts have {counts} tokens, not {tokens}")
    return list(found)


class Load(NamedTuple):
    """What the client processes got together."""

    rate: float  # texts a second
    p50: float  # ms
    p99: float
    failed: int
    client: float  # share of a core that the busiest client process used
    cores: float  # that the service used

    def row(self) -> dict[str, Any]:
        return self._asdict()


def drive_together(
    url: str,
    requests: Sequence[bytes],
    *,
    texts: int,
    connections: int,
    processes: int,
    warm: float,
    seconds: float,
    pid: int,
) -> Load:
    """Let client processes send `requests` again and again.

    Args:
        texts: in a request.
        connections: of all processes together.
        warm, seconds: of load before the measurement, and of the measurement.
        pid: the service's first process.

    Raises: OSError when the service breaks off.
    """
    processes = min(processes, connections)
    shares = [connections // processes + (at < connections % processes) for at in range(processes)]
    fork = multiprocessing.get_context("spawn")
    barrier = fork.Barrier(processes + 1)
    with ProcessPoolExecutor(processes, fork, _use, (barrier,)) as pool:
        waiting = [
            pool.submit(_client, url, requests[at::processes], texts, share, warm, seconds)
            for at, share in enumerate(shares)
        ]
        try:
            barrier.wait(warm + 120)
            before = cpu_seconds(pid)
            time.sleep(seconds)
            used = cpu_seconds(pid) - before
        except threading.BrokenBarrierError:
            used = 0.0  # a client's error follows
        results = [each.result() for each in waiting]
    latencies = [each for result in results for each in result.latencies]
    return Load(
        rate=sum(each.rate for each in results),
        p50=percentile(latencies, 50),
        p99=percentile(latencies, 99),
        failed=sum(each.failed for each in results),
        client=max(each.cpu / 1e3 * len(each.latencies) / seconds for each in results),
        cores=used / seconds,
    )


_together: Any = None  # the barrier, in a client process


def _use(barrier: Any) -> None:
    global _together
    _together = barrier


def _client(
    url: str, requests: Sequence[bytes], texts: int, connections: int, warm: float, seconds: float
) -> Result:
    client = Client(itertools.cycle(requests), connections, texts)
    try:
        drive(url, [client], warm)
        _together.wait(warm + 120)
    except (OSError, threading.BrokenBarrierError):
        _together.abort()
        raise
    return drive(url, [client], seconds)[0]


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its descendants so far."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / 100
    return own + sum(map(cpu_seconds, children(pid)))


def host_memory(pid: int) -> float:
    """Memory of a process and its descendants, MiB; shared pages count once."""
    try:
        text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^Pss: +(\d+)", text, re.MULTILINE)
    return (int(found[1]) / 1024 if found else 0.0) + sum(map(host_memory, children(pid)))


def gpu() -> tuple[float, float]:
    """Memory that all processes together use on the first GPU, MiB, and its utilisation, percent; 0
    without a GPU.
    """
    query = [
        "nvidia-smi",
        "--query-gpu=memory.used,utilization.gpu",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0.0, 0.0
    used, busy = (float(each) for each in answer.splitlines()[0].split(","))
    return used, busy


@contextlib.contextmanager
def sampling(pid: int, every: float) -> Iterator[list[dict[str, float]]]:
    """A list that grows while the block runs: `seconds`, `gpu` and `host` (MiB), `busy` (percent of
    the time in which the GPU computed).
    """
    samples, over, begun = list[dict[str, float]](), threading.Event(), time.perf_counter()

    def sample() -> None:
        while True:
            used, busy = gpu()
            now = time.perf_counter() - begun
            samples.append({"seconds": now, "gpu": used, "host": host_memory(pid), "busy": busy})
            if over.wait(every):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def vectors(response: bytes) -> npt.NDArray[np.float32]:
    """Of a response in base64, shape (texts, dimensions)."""
    data = sorted(json.loads(response)["data"], key=lambda each: int(each["index"]))
    return np.stack([np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in data])


def ask(
    endpoint: Endpoint, parts: Sequence[Sequence[str]], at_a_time: int
) -> tuple[list[int], npt.NDArray[np.float32] | None]:
    """Status of each request (0 for none), and all vectors if all are 200."""
    address = urllib.parse.urlsplit(endpoint.url)

    def one(part: Sequence[str]) -> tuple[int, bytes]:
        content = {"model": endpoint.model, "input": list(part), "encoding_format": "base64"}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key()}"}
        connection = http.client.HTTPConnection(address.netloc, timeout=ANSWER)
        try:
            connection.request("POST", endpoint.path, json.dumps(content).encode(), headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error).encode()
        finally:
            connection.close()

    with ThreadPoolExecutor(at_a_time) as pool:
        answers = list(pool.map(one, parts))
    statuses = [status for status, _ in answers]
    for status, body in answers:
        if status != 200:
            print(f"status {status}: {body[:300]!r}", flush=True)
    good = all(status == 200 for status in statuses)
    return statuses, np.concatenate([vectors(body) for _, body in answers]) if good else None


def smallest_cosine(expected: Any, actual: Any, centre: bool = False) -> float | None:
    """Of rows. All texts have nearly the same vector from random weights: with `centre`, what they
    have in common is taken off first. None where one of the two is None.
    """
    if expected is None or actual is None:
        return None
    middle = expected.mean(axis=0) if centre else np.float32(0)
    left, right = expected - middle, actual - middle
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / lengths).min())


NEIGHBOUR = """
import sys, torch
held = []
for size in (256 << 20, 32 << 20, 12 << 20):
    while torch.cuda.mem_get_info()[0] > (int(sys.argv[1]) << 20) + size:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def neighbour(left: int) -> Iterator[None]:
    """A process that takes all but so many MiB of the GPU's memory, in plain allocations."""
    process = subprocess.Popen(
        [sys.executable, "-c", NEIGHBOUR, str(left)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    try:
        if process.stdout.readline() != b"ready\n":
            raise SystemExit("the neighbour could not take the memory")
        yield
    finally:
        process.stdin.close()
        process.wait(60)
