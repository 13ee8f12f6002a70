"""What is measured of a service over HTTP, a function each. All return rows of loadtest.report."""

import contextlib
import itertools
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial

from loadtest.client import Client, Result, drive, get
from loadtest.in_process import Ceiling
from loadtest.loads import IMAGES, LOADS, STREAM, Load, Target, image_requests, key, requests
from loadtest.report import Row, compare
from loadtest.rounds import Side, alternate, combine, doubt, ratio
from loadtest.service import serve

STEADY = 3.0  # seconds after the first request; a service reaches its full speed well before


def takes_images(target: Target) -> bool:
    """Whether the service says that its default model takes pictures, as ours does.

    Raises: OSError when the service cannot be reached.
    """
    _, body = get(target.url, "/health/ready")
    return target.dialect != "tei" and b'"supports_images":true' in body


def model(target: Target) -> str:
    """What the service says that its default model is, as ours does; else its address."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        said = json.loads(get(target.url, "/health/ready")[1]).get("model")
        if said:
            return str(said)
    return target.url


def http(
    targets: Sequence[Target], pairs: Sequence[tuple[str, int]], seconds: float, rounds: int
) -> list[Row]:
    """Texts or pictures a second of each load, at so many connections. With two targets also the
    ratio to the second one.

    Raises: OSError when a service cannot be reached.
    """
    rows = []
    for name, number in pairs:
        sides = [(target.url, partial(one, target, name, number)) for target in targets]
        rows += compare(name, number, sides, len(targets) > 1, seconds, rounds)
    return rows


def one(target: Target, name: str, connections: int, seed: int, seconds: float) -> Result:
    """One round of one load."""
    if name == IMAGES:
        return drive(target.url, [Client(image_requests(target), connections)], seconds)[0]
    load = LOADS[name]
    client = Client(requests(target, load, seed), connections, load.texts)
    return drive(target.url, [client], seconds * load.times)[0]


def ceiling(
    target: Target,
    ceilings: Mapping[str, Ceiling],
    pairs: Sequence[tuple[str, int]],
    seconds: float,
    rounds: int,
) -> list[Row]:
    """Served ÷ ceiling of each load, round by round."""
    rows = []
    for name, connections in pairs:
        sides: list[Side] = [partial(one, target, name, connections), ceilings[name].best]
        title = f"{name}, {connections} at a time"
        served, best = alternate(title, sides, seconds, rounds)
        whole = combine(served)
        rows.append(
            {
                "load": f"{name}-c{connections}",
                "served": whole.rate,
                "ceiling": combine(best).rate,
                "share": ratio(served, best),
                "batch_size": ceilings[name].batch_size,
                "p50": whole.p50,
                "p99": whole.p99,
                "failed": whole.failed,
                "cpu": whole.cpu,
                "note": doubt(served, best),
            }
        )
    return rows


def padding(target: Target, pairs: Sequence[tuple[str, int]], seconds: float) -> list[Row]:
    """How many of the tokens that the engine computes under a load are padding, by the service's
    own counters.

    Raises: OSError when it has none.
    """
    rows = []
    for name, connections in pairs:
        print(f"{name}, {connections} at a time", file=sys.stderr, flush=True)
        before = _tokens(target)
        result = one(target, name, connections, 1, seconds)
        real, padded = (after - at for after, at in zip(_tokens(target), before))
        rows.append(
            {
                "load": f"{name}-c{connections}",
                "rate": result.rate,
                "real_tokens": real,
                "padded_tokens": padded,
                "wasted": 1 - real / padded if padded else 0.0,
            }
        )
    return rows


def _tokens(target: Target) -> tuple[int, int]:
    """The tokens that all models have computed so far, without and with padding."""
    status, body = get(target.url, "/metrics", headers={"X-API-Key": key()})
    if status != 200:
        raise OSError(f"{target.url}: /metrics answers {status}")
    counters = re.findall(rb"^embedder_(tokens|padded_tokens)_total{.*} (\S+)$", body, re.MULTILINE)
    real, padded = (
        sum(int(float(value)) for name, value in counters if name == wanted)
        for wanted in (b"tokens", b"padded_tokens")
    )
    return real, padded


def fairness(target: Target, seconds: float, rounds: int, stream: Load = STREAM) -> list[Row]:
    """The latency of one client's single queries while another client sends large batches, and how
    much slower the batches are for it.
    """

    def run(loads: Sequence[Load], seed: int, seconds: float) -> list[Result]:
        clients = [Client(requests(target, load, seed), 1, load.texts) for load in loads]
        return drive(target.url, clients, seconds * stream.times if seed else seconds)

    sides = [partial(run, [stream]), partial(run, [stream, LOADS["query"]])]
    title = "a stream of batches, alone and beside queries"
    streamed, both = alternate(title, sides, seconds, rounds)
    alone = [result for (result,) in streamed]
    beside, queried = zip(*both)
    together = combine(queried)
    return [
        {
            "queries": len(together.latencies),
            "query_p50": together.p50,
            "query_p99": together.p99,
            "stream_alone": combine(alone).rate,
            "stream_beside": combine(beside).rate,
            "kept": ratio(beside, alone),
            "failed": sum(result.failed for result in (*alone, *beside, *queried)),
            "note": doubt(beside, alone),
        }
    ]


def start(starts: int) -> list[Row]:
    """From the start of the process to ready, memory after some queries, the first query against
    the later ones, and from SIGTERM to the exit; medians over so many starts.

    Raises: OSError when the service does not start.
    """
    figures, failed = list[list[float]](), 0
    for number in range(starts):
        print(f"start {number + 1} of {starts}", file=sys.stderr, flush=True)
        with serve() as running:
            queries = requests(Target(running.url), LOADS["query"], number)
            # The first text is made before its time begins: the generator's own start is slow.
            client = Client(itertools.chain([next(queries)], queries), 1)
            (first,) = drive(running.url, [client], 0.001)
            (later,) = drive(running.url, [client], STEADY)
            memory = running.memory()
            failed += first.failed + later.failed
        latency = first.latencies[0] if first.latencies else 0.0
        figures.append([running.ready_seconds, *memory, latency, later.p50, running.stop_seconds])
    names = ("ready", "pss", "rss", "first", "steady", "stop")
    medians = dict(zip(names, map(statistics.median, zip(*figures))))
    return [{"starts": starts, **medians, "ready_worst": max(figures)[0], "failed": failed}]
