"""What to set Cloud Run to: settings of the service are measured, and stated rules choose one."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from engine.bundle import Bundle
from engine.choice import precisions
from loadtest.client import get
from loadtest.loads import LOADS, Target, key
from loadtest.measures import one
from loadtest.rounds import alternate, combine
from loadtest.service import available, serve

PARITY = 0.999  # smallest cosine to sentence-transformers for a precision to be recommended
ENOUGH = 0.95  # of the best rate; more connections than this takes only add waiting
WORTH = 1.1  # factor on the rate that makes twice the processes worth twice the memory
NEAR = 0.9  # of the best rate a core; with more cores at this price responses come sooner
HEADROOM = 1.5  # factor on the memory that was measured, for large requests and fragmentation
MEMORY = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # MiB
LEAST_MEMORY = ((8, 4096), (6, 4096), (4, 2048), (1, 512))  # cores, MiB: Cloud Run's own minimum
MOST_MEMORY = ((1, 4096), (2, 8192), (4, 16384), (6, 24576), (8, 32768))  # cores, MiB: its maximum
CORES = (1, 2, 4, 6, 8)  # that Cloud Run offers


class Prices(NamedTuple):
    """US dollars. Cloud Run's for tier 1 with request-based billing, as a copy of
    https://cloud.google.com/run/pricing had them that was read on 2026-11-27.
    """

    vcpu_second: float = 0.000_024
    gib_second: float = 0.000_002_5
    million_requests: float = 0.40


class Point(NamedTuple):
    """What was measured of a setting of the service at one number of connections."""

    precision: str
    cores: int
    workers: int
    load: str
    connections: int
    rate: float  # texts a second
    p50: float  # ms
    p99: float
    failed: int  # requests
    rss: float  # MiB, of all processes


class Advice(NamedTuple):
    cores: int
    memory: int  # MiB
    concurrency: int
    workers: int
    precision: str
    rate: float
    p99: float
    kept: bool  # whether p99 is within the limit
    reasons: list[str]
    command: str  # that deploys it, without names and key
    cost: float  # US dollars for a million texts
    measured_cores: int  # the most; fewer than the machine's where Cloud Run offers no more


def choose(parity: Mapping[str, float], rates: Mapping[str, float]) -> str:
    """The precision with the best rate among the exact ones; without an exact one, the most exact.

    Args:
        parity: smallest cosine to sentence-transformers.
        rates: best rate that was measured.
    """
    exact = [name for name in rates if parity.get(name, 0.0) >= PARITY]
    if not exact:
        return max(rates, key=lambda name: parity.get(name, 0.0))
    return max(exact, key=rates.__getitem__)


def starts_anywhere(precision: str) -> str:
    """The PRECISION to deploy with for a precision that was measured. One that some CPU does not
    have would stop the instance there; `auto` takes it where it can, and fp32 elsewhere.
    """
    return precision if precision in ("fp32", "int8") else "auto"


def cost(point: Point, memory: int, cores: int, prices: Prices) -> float:
    """US dollars for a million texts from an instance that is always busy."""
    second = cores * prices.vcpu_second + memory / 1024 * prices.gib_second
    return 1e6 / point.rate * second + prices.million_requests / LOADS[point.load].texts


def recommend(
    points: Sequence[Point],
    parity: Mapping[str, float],
    limit: float,
    prices: Prices = Prices(),
) -> Advice:
    """Choose the precision, the connections of each setting, the workers for each number of cores,
    and then the cores.

    Args:
        points: by setting at a rising number of connections.
        parity: smallest cosine to sentence-transformers, by precision.
        limit: ms that p99 should not exceed.
        prices: of the platform.

    Raises: ValueError when requests failed at every setting.
    """
    rates = _highest_rates(points)
    precision = choose(parity, rates)
    reasons = _precision_reasons(precision, parity, rates)
    good = [point for point in points if point.precision == precision and not point.failed]
    if not good:
        raise ValueError("no setting answered every request")
    least = min(point.p99 for point in good)
    kept = least <= limit
    if not kept:
        reasons.append(f"no setting kept p99 within {limit:.0f} ms; this is the smallest p99")
        limit = least
    within = [point for point in good if point.p99 <= limit]
    settings = map(_fewest_connections, _groups(within, lambda point: (point.cores, point.workers)))
    by_cores = _groups(settings, lambda point: point.cores)
    chosen = _choose_cores([_choose_workers(each, reasons) for each in by_cores], reasons)
    reasons.append(
        f"concurrency {chosen.connections}: the fewest connections with {ENOUGH:.0%} of the best "
        f"rate within p99 <= {limit:.0f} ms ({chosen.rate:.1f}/s, p50 {chosen.p50:.0f} ms, p99 "
        f"{chosen.p99:.0f} ms)"
    )
    reasons.append(
        f"memory: {chosen.rss:.0f} MiB measured over all processes, times {HEADROOM}, rounded up "
        "to a size that Cloud Run offers"
    )
    memory = _memory(chosen)
    cores = _least_cores(chosen, memory)
    if cores > chosen.cores:
        reasons.append(f"{cores} CPU: Cloud Run gives {memory} MiB to no fewer")
    dollars = cost(chosen, memory, cores, prices)
    reasons.append(
        f"cost: {dollars:.2f} US dollars for a million texts of this load while the instance is "
        f"busy, more where it is not: 1,000,000 / {chosen.rate:.1f} s x ({cores} vCPU x "
        f"{prices.vcpu_second:.7f} + {memory / 1024:g} GiB x {prices.gib_second:.7f}), and "
        f"{prices.million_requests:.2f} for a million requests, of {LOADS[chosen.load].texts} "
        "texts each. Unless given, prices are Cloud Run's of tier 1 for request-based billing, "
        "read on 2026-11-27"
    )
    shape = cores, memory, chosen.connections, chosen.workers, precision
    measured = chosen.rate, chosen.p99, kept
    command = _command(chosen, cores, memory)
    most = max(point.cores for point in points)
    return Advice(*shape, *measured, reasons, command, dollars, most)


def _precision_reasons(
    precision: str, parity: Mapping[str, float], rates: Mapping[str, float]
) -> list[str]:
    figures = (f"{name} {parity.get(name, 0.0):.5f}, {rate:.1f}/s" for name, rate in rates.items())
    reasons = [
        f"{precision}: the fastest of those whose smallest cosine to sentence-transformers is "
        f"{PARITY} or more ({', '.join(figures)})"
    ]
    if starts_anywhere(precision) == "auto":
        reasons.append(
            f"PRECISION=auto: {precision} where the CPU has it, else fp32; PRECISION={precision} "
            "would stop the instance on a CPU without it"
        )
    return reasons


def _least_cores(chosen: Point, memory: int) -> int:
    """The cores that were measured, or as many as Cloud Run wants with so much memory."""
    most = MOST_MEMORY[-1][0]
    enough = (cores for cores, mib in MOST_MEMORY if cores >= chosen.cores and mib >= memory)
    return next(enough, max(most, chosen.cores))


def _command(chosen: Point, cores: int, memory: int) -> str:
    precision = starts_anywhere(chosen.precision)
    variables = f"PRECISION={precision},WEB_CONCURRENCY={chosen.workers}"
    if chosen.connections > 64:
        variables += f",REQUEST_THREADS={chosen.connections}"
    return (
        f"gcloud run deploy … --cpu {cores} --memory {memory}Mi "
        f"--concurrency {chosen.connections} --set-env-vars {variables}"
    )


def _highest_rates(points: Iterable[Point]) -> dict[str, float]:
    """By precision."""
    groups = _groups(points, lambda point: point.precision)
    return {group[0].precision: max(point.rate for point in group) for group in groups}


def _groups(points: Iterable[Point], key: Callable[[Point], Any]) -> list[list[Point]]:
    """Points of equal `key` together, the smallest first."""
    return [list(group) for _, group in itertools.groupby(sorted(points, key=key), key)]


def _fewest_connections(setting: Sequence[Point]) -> Point:
    """The fewest connections with ENOUGH of the best rate."""
    most = max(point.rate for point in setting)
    return next(point for point in setting if point.rate >= ENOUGH * most)


def _choose_workers(points: Sequence[Point], reasons: list[str]) -> Point:
    """The fewest workers unless more are WORTH it."""
    taken = points[0]
    for point in points[1:]:
        gain = point.rate / taken.rate
        reasons.append(
            f"WEB_CONCURRENCY={point.workers} at {point.cores} CPU: {gain:.2f} times the texts "
            f"of {taken.workers}; it takes {WORTH} times to be worth the memory"
        )
        if gain >= WORTH:
            taken = point
    return taken


def _choose_cores(points: Sequence[Point], reasons: list[str]) -> Point:
    """The most cores that keep NEAR of the best rate a core."""
    each = {point.cores: point.rate / point.cores for point in points}
    near = [point for point in points if each[point.cores] >= NEAR * max(each.values())]
    figures = ", ".join(f"{cores}: {rate:.1f}/s" for cores, rate in each.items())
    reasons.append(
        f"{near[-1].cores} CPU: the most cores that keep {NEAR:.0%} of the best rate a core "
        f"({figures} a core)"
    )
    return near[-1]


def _memory(point: Point) -> int:
    """MiB, of what Cloud Run offers."""
    least = next((mib for cores, mib in LEAST_MEMORY if point.cores >= cores), MEMORY[0])
    wanted = max(HEADROOM * point.rss, least)
    return next((mib for mib in MEMORY if mib >= wanted), math.ceil(wanted / 1024) * 1024)


def measure(
    bundle: Bundle, load: str, connections: Sequence[int], seconds: float, rounds: int
) -> tuple[list[Point], dict[str, float]]:
    """Every precision on all cores, or as many as Cloud Run offers; the one that will be chosen
    also on fewer cores, and with a worker for each core.

    Returns: the points; the smallest cosine to sentence-transformers at each precision, of the
        engine that served it.
    Raises: OSError when a service does not start.
    """
    sizes = [cores for cores in CORES if cores <= len(available())]
    cpus = available()[: sizes[-1]]
    points, parity = list[Point](), dict[str, float]()

    def setting(cores: int, workers: int, precision: str) -> None:
        environ = {"PRECISION": precision, "WEB_CONCURRENCY": str(workers)}
        with serve(environ, cpus[:cores]) as running:
            parity[precision] = smallest_cosine(running.url, bundle.manifest.name)
            for at in sorted(connections):
                title = f"{precision}, cores {cores}, workers {workers}, connections {at}"
                side = partial(one, Target(running.url), load, at)
                (results,) = alternate(title, [side], seconds, rounds)
                whole = combine(results)
                figures = whole.rate, whole.p50, whole.p99, whole.failed, running.memory()[1]
                points.append(Point(precision, cores, workers, load, at, *figures))

    for precision in precisions(bundle):
        setting(len(cpus), 1, precision)
    chosen = choose(parity, _highest_rates(points))
    for cores in sizes[:-1]:
        setting(cores, 1, chosen)
    if len(cpus) > 1:
        setting(len(cpus), len(cpus), chosen)
    return points, parity


def smallest_cosine(url: str, model: str) -> float:
    """Of a model's certificate, as the service at `url` has it for the engine that serves. Raises:
    OSError.
    """
    status, body = get(url, "/v1/models", headers={"X-API-Key": key()})
    if status != 200:
        raise OSError(f"{url}/v1/models answered {status}")
    (found,) = [each for each in json.loads(body)["data"] if each["id"] == model]
    return float(found["certificate"]["minimum"])


def text(advice: Advice) -> str:
    """The advice with its reasons and its limits, to paste."""
    lines = [advice.command, "", *(f"- {reason}" for reason in advice.reasons)]
    lines += [
        f"- measured: all of the above, on up to {advice.measured_cores} cores of this machine; "
        "with all that it has the service shares some hundredths of a core with the load client",
        "- not measured, so not advised: more cores than that; another processor (Cloud Run does "
        "not promise which one it gives: measure what you deployed with --url); its network",
    ]
    return "\n".join(lines)
