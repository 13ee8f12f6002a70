"""What is measured of a service over HTTP, a function each. All return rows of loadtest.report."""

import itertools
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from loadtest.client import Client, Result, drive, get
from loadtest.in_process import Ceiling
from loadtest.loads import IMAGES, LOADS, STREAM, Load, Target, image_requests, key, requests
from loadtest.report import Row, row
from loadtest.rounds import Progress, alternate, combine, ratio
from loadtest.service import serve

STEADY = 3.0  # seconds after the first request; a service reaches its full speed well before


def usual_loads(only: Sequence[str] = ()) -> list[tuple[str, int]]:
    """Load and connections, in the order in which they are measured. `only` names some of them, as
    `query` or as `query-c16`.
    """
    pairs = [(name, number) for name, load in LOADS.items() for number in load.connections]
    return [
        (name, number)
        for name, number in pairs
        if not only or name in only or f"{name}-c{number}" in only
    ]


def http_loads(
    only: Sequence[str], connections: Sequence[int], target: Target
) -> list[tuple[str, int]]:
    """Every load at every number of connections; pictures too, where the service takes them.

    Raises: OSError when the service cannot be reached.
    """
    names = [*LOADS]
    if target.dialect != "tei" and takes_images(target.url):
        names.append(IMAGES)
    return [(name, number) for name in names if not only or name in only for number in connections]


def takes_images(url: str) -> bool:
    """Whether the service's default model takes pictures; False where it does not say.

    Raises: OSError when the service cannot be reached.
    """
    status, body = get(url, "/health/ready")
    try:
        return status == 200 and bool(json.loads(body).get("supports_images"))
    except (ValueError, AttributeError):
        return False


def http(
    targets: Sequence[Target], pairs: Sequence[tuple[str, int]], seconds: float, rounds: int
) -> list[Row]:
    """Texts or pictures a second of each load, at so many connections. With two targets also the
    ratio to the second one.

    Raises: OSError when a service cannot be reached.
    """
    progress, rows = Progress(len(pairs) * (rounds + 1)), []
    for name, connections in pairs:
        progress.doing = f"{name} at {connections} connections, "
        sides = {str(at): partial(one, to, name, connections) for at, to in enumerate(targets)}
        runs = list(alternate(sides, seconds, rounds, progress).values())
        for to, results in zip(targets, runs):
            others = runs[1] if len(runs) > 1 else []
            rows.append(row(to.url, name, connections, results, others))
    progress.close()
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
    """Served ÷ ceiling of each load, round by round; for loads of one text at a time also what the
    engine does with one text a call, one call at a time.
    """
    progress, rows = Progress(len(pairs) * (rounds + 1)), []
    for name, connections in pairs:
        progress.doing = f"{name} at {connections} connections, "
        engine = ceilings[name]
        sides: dict[str, Callable[[int, float], Result]] = {
            "served": partial(one, target, name, connections),
            "ceiling": engine.best,
        }
        if connections == LOADS[name].texts == 1:
            sides["alone"] = engine.alone
        results = alternate(sides, seconds, rounds, progress)
        served, best, alone = results["served"], results["ceiling"], results.get("alone", [])
        whole = combine(served)
        rows.append(
            {
                "load": f"{name}-c{connections}",
                "served": whole.rate,
                "ceiling": combine(best).rate,
                "share": ratio(served, best),
                "batch_size": engine.batch_size,
                "alone": combine(alone).rate if alone else None,
                "share_alone": ratio(served, alone),
                "p50": whole.p50,
                "p99": whole.p99,
                "failed": whole.failed,
                "cpu": whole.cpu,
            }
        )
    progress.close()
    return rows


def padding(target: Target, pairs: Sequence[tuple[str, int]], seconds: float) -> list[Row]:
    """How many of the tokens that the engine computes under a load are padding, by the service's
    own counters.

    Raises: OSError when it has none.
    """
    progress, rows = Progress(len(pairs)), []
    for name, connections in pairs:
        progress(f"{name} at {connections} connections")
        before = _tokens(target)
        result = one(target, name, connections, 1, seconds)
        real, padded = (after - at for after, at in zip(_tokens(target), before))
        rows.append(
            {
                "load": f"{name}-c{connections}",
                "rate": result.rate,
                "real_tokens": real,
                "padded_tokens": padded,
                "wasted": 1 - real / padded,
            }
        )
    progress.close()
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

    def client(load: Load, seed: int) -> Client:
        return Client(requests(target, load, seed), 1, load.texts)

    def queries(seed: int, seconds: float) -> list[Result]:
        return drive(target.url, [client(LOADS["query"], seed)], seconds)

    def batches(seed: int, seconds: float) -> list[Result]:
        longer = seconds * stream.times if seed else seconds  # round 0 warms up
        return drive(target.url, [client(stream, seed)], longer)

    def both(seed: int, seconds: float) -> list[Result]:
        longer = seconds * stream.times if seed else seconds
        clients = [client(stream, seed), client(LOADS["query"], seed)]
        return drive(target.url, clients, longer)

    progress = Progress(rounds + 1)
    sides = {"queries": queries, "batches": batches, "both": both}
    runs = alternate(sides, seconds, rounds, progress)
    progress.close()
    quiet, alone = ([result for (result,) in runs[name]] for name in ("queries", "batches"))
    beside, queried = zip(*runs["both"])
    together = combine(queried)
    return [
        {
            "queries": len(together.latencies),
            "query_p50": together.p50,
            "query_p99": together.p99,
            "query_alone_p50": combine(quiet).p50,
            "stream_alone": combine(alone).rate,
            "stream_beside": combine(beside).rate,
            "kept": ratio(beside, alone),
            "failed": sum(result.failed for result in (*quiet, *alone, *beside, *queried)),
        }
    ]


def start(starts: int) -> list[Row]:
    """From the start of the process to ready, memory after some queries, the first query against
    the later ones, and from SIGTERM to the exit; medians over so many starts.

    Raises: OSError when the service does not start.
    """
    progress, failed = Progress(starts), 0
    figures: list[list[float]] = []
    for number in range(starts):
        progress(f"start {number + 1}")
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
    progress.close()
    names = ("ready", "pss", "rss", "first", "steady", "stop")
    medians = dict(zip(names, map(statistics.median, zip(*figures))))
    return [{"starts": starts, **medians, "ready_worst": max(figures)[0], "failed": failed}]
