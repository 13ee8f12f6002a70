"""What is measured of a service over HTTP, a function each. All return rows of benchmark.report."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmark.in_process import Ceiling
from benchmark.loads import IMAGES, LOADS, STREAM, Load, Target, image_requests, requests
from benchmark.report import Progress, Row, row
from benchmark.service import service
from benchmark.traffic import Client, Result, alternate, drive, middle, takes_images

WARM_UP = 1.0  # seconds of round 0
STEADY = 3.0  # seconds after the first request, in most of which a service is as fast as it gets
Runs = list[list[Result]]


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


def http(
    target: Target,
    against: Target | None,
    pairs: Sequence[tuple[str, int]],
    seconds: float,
    rounds: int,
) -> list[Row]:
    """Texts or pictures a second of each load, at so many connections, and the ratio to another
    service, taken round by round.

    Raises: OSError when a service cannot be reached.
    """
    progress, rows = Progress(len(pairs) * (rounds + 1)), []
    for name, connections in pairs:
        targets = [target, against] if against else [target]
        runs: Runs = [[] for _ in targets]

        def side(to: Target, results: list[Result]) -> Callable[[int], None]:
            def run(number: int) -> None:
                result = one(
                    to, name, connections, seconds if number else min(WARM_UP, seconds), number
                )
                if number:
                    results.append(result)

            return run

        progress.doing = f"{name} at {connections} connections, "
        alternate([*map(side, targets, runs)], rounds, progress)
        for to, results in zip(targets, runs):
            rows.append(row(to.url, name, connections, results, runs[-1] if against else []))
    progress.close()
    return rows


def one(target: Target, name: str, connections: int, seconds: float, seed: int) -> Result:
    """One round of one load."""
    if name == IMAGES:
        return drive([Client(target.url, image_requests(target), connections)], seconds)[0]
    load = LOADS[name]
    client = Client(target.url, requests(target, load, seed), connections, load.texts)
    return drive([client], seconds * load.times)[0]


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
        engine, served = ceilings[name], []
        best: list[float] = []
        alone: list[float] = []

        def serve(number: int) -> None:
            result = one(
                target, name, connections, seconds if number else min(WARM_UP, seconds), number
            )
            if number:
                served.append(result)

        def compute(number: int) -> None:
            if not number:
                if not engine.batch_size:
                    engine.choose(seconds)
                return
            best.append(engine.run(engine.batch_size, seconds))
            if connections == LOADS[name].texts == 1:
                alone.append(engine.run(1, seconds, threads=1))

        progress.doing = f"{name} at {connections} connections, "
        alternate([serve, compute], rounds, progress)
        whole = middle(served)
        shares = [result.rate / top for result, top in zip(served, best)]
        lone = [result.rate / top for result, top in zip(served, alone)]
        rows.append(
            {
                "load": f"{name}-c{connections}",
                "served": whole.rate,
                "ceiling": statistics.median(best),
                "share": None if whole.failed else statistics.median(shares),
                "batch_size": engine.batch_size,
                "alone": statistics.median(alone) if alone else None,
                "share_alone": statistics.median(lone) if lone and not whole.failed else None,
                "p50": whole.p50,
                "p99": whole.p99,
                "failed": whole.failed,
                "cpu": whole.cpu,
            }
        )
    progress.close()
    return rows


def fairness(target: Target, seconds: float, rounds: int, stream: Load = STREAM) -> list[Row]:
    """How a client with one query after another fares while another client sends large batches one
    after another, and what the batches lose by it.
    """
    progress = Progress(rounds + 1)
    long, query = seconds * stream.times, LOADS["query"]
    quiet: list[Result] = []
    alone: list[Result] = []
    beside: list[Result] = []
    lone: list[Result] = []

    def batches(seed: int) -> Client:
        return Client(target.url, requests(target, stream, seed), 1, stream.texts)

    def queries(seed: int) -> Client:
        return Client(target.url, requests(target, query, seed), 1)

    def only_queries(number: int) -> None:
        results = drive([queries(number)], seconds if number else min(WARM_UP, seconds))
        quiet.extend(results if number else [])

    def only_batches(number: int) -> None:
        results = drive([batches(number)], long if number else min(WARM_UP, seconds))
        alone.extend(results if number else [])

    def both(number: int) -> None:
        results = drive(
            [batches(number), queries(number)], long if number else min(WARM_UP, seconds)
        )
        if number:
            beside.append(results[0])
            lone.append(results[1])

    alternate([only_queries, only_batches, both], rounds, progress)
    progress.close()
    queried = middle(lone)
    kept = [there.rate / here.rate for here, there in zip(alone, beside)]
    return [
        {
            "queries": len(queried.latencies),
            "query_p50": queried.p50,
            "query_p99": queried.p99,
            "query_alone_p50": middle(quiet).p50,
            "stream_alone": middle(alone).rate,
            "stream_beside": middle(beside).rate,
            "kept": statistics.median(kept),
            "failed": sum(result.failed for result in (*quiet, *alone, *beside, *lone)),
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
        with service() as running:
            queries = requests(Target(running.url), LOADS["query"], number)
            # The first one is made before its time begins: to begin to make them takes longer.
            client = Client(running.url, itertools.chain([next(queries)], queries), 1)
            (first,) = drive([client], 0.001)
            (later,) = drive([client], STEADY)
            memory = running.memory()
            failed += first.failed + later.failed
        latency = first.latencies[0] if first.latencies else 0.0
        figures.append([running.ready, *memory, latency, later.p50, running.stopped])
    progress.close()
    ready, pss, rss, latency, steady, stop = (statistics.median(column) for column in zip(*figures))
    return [
        {
            "starts": starts,
            "ready": ready,
            "ready_worst": max(figures)[0],
            "pss": pss,
            "rss": rss,
            "first": latency,
            "steady": steady,
            "stop": stop,
            "failed": failed,
        }
    ]
