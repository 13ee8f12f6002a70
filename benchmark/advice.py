"""What to set Cloud Run to, from curves that were measured, by rules that are stated."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmark.in_process import precisions
from benchmark.loads import Target
from benchmark.measures import WARM_UP, one
from benchmark.report import Progress, Row
from benchmark.service import available, service
from benchmark.traffic import Result, middle
from engine.bundle import Bundle

PARITY = 0.999  # least cosine to sentence-transformers at bake for a precision to be recommended
ENOUGH = 0.95  # of the best rate: more connections than this needs only add waiting
WORTH = 1.1  # what twice the processes must bring, since they take twice the memory
NEAR = 0.9  # of the best rate a core: more cores that keep it answer sooner at the same price
HEADROOM = 1.5  # on the memory that was seen: large requests, fragments
MEMORY = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # MiB
LEAST_MEMORY = ((8, 4096), (6, 4096), (4, 2048), (1, 512))  # cores, MiB: Cloud Run's own rule


class Point(NamedTuple):
    """The service under one number of connections."""

    connections: int
    rate: float  # texts a second
    p50: float  # ms
    p99: float
    failed: int = 0


class Curve(NamedTuple):
    """One setting of the service, under more and more connections."""

    cores: int
    workers: int
    precision: str
    memory: float  # MiB, RSS of all processes, the most that was seen
    points: tuple[Point, ...]

    def best(self, limit: float) -> Point | None:
        """The fewest connections that bring ENOUGH of the best rate, of those that keep p99 within
        `limit` ms and failed nothing; None where none does.
        """
        good = [point for point in self.points if point.p99 <= limit and not point.failed]
        most = max((point.rate for point in good), default=0.0)
        return next((point for point in good if point.rate >= ENOUGH * most), None)


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

    def fields(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {**self._asdict(), "command": self.command, "price": self.price}

    @property
    def command(self) -> str:
        """What to deploy with, but for names and the key."""
        variables = f"PRECISION={self.precision},WEB_CONCURRENCY={self.workers}"
        if self.concurrency > 64:
            variables += f",REQUEST_THREADS={self.concurrency}"
        return (
            f"gcloud run deploy … --cpu {self.cores} --memory {self.memory}Mi "
            f"--concurrency {self.concurrency} --set-env-vars {variables}"
        )

    @property
    def price(self) -> str:
        """Of a million texts from an instance that is busy all the time."""
        return (
            f"a million texts cost 1e6 / {self.rate:.1f} s x ({self.cores} x price of a vCPU-second"
            f" + {self.memory / 1024:g} x price of a GiB-second), of instances that are kept busy"
        )


def choose(parity: Mapping[str, float], rates: Mapping[str, float]) -> str:
    """The precision with the best rate of those that are exact enough; the most exact one where
    none is.

    Args:
        parity: least cosine to sentence-transformers at bake.
        rates: best rate that was measured.
    """
    exact = [name for name in rates if parity.get(name, 0.0) >= PARITY]
    if not exact:
        return max(rates, key=lambda name: parity.get(name, 0.0))
    return max(exact, key=rates.__getitem__)


def recommend(curves: Sequence[Curve], parity: Mapping[str, float], limit: float) -> Advice:
    """Args:
    limit: ms that p99 shall keep.
    """
    best: dict[str, float] = {}
    for curve in curves:
        most = max(point.rate for point in curve.points)
        best[curve.precision] = max(best.get(curve.precision, 0.0), most)
    precision = choose(parity, best)
    reasons = [
        f"PRECISION={precision}: the fastest of those whose least cosine to sentence-transformers "
        f"at bake is {PARITY} or more ("
        + ", ".join(f"{name} {parity.get(name, 0.0):.5f}, {best[name]:.1f}/s" for name in best)
        + ")"
    ]
    ours = [curve for curve in curves if curve.precision == precision]
    kept = any(curve.best(limit) for curve in ours)
    if not kept:
        lowest = min(point.p99 for curve in ours for point in curve.points)
        reasons.append(
            f"no setting kept p99 within {limit:.0f} ms; this is the one with the smallest"
        )
        limit = lowest
    chosen: list[tuple[Curve, Point]] = []
    for cores in sorted({curve.cores for curve in ours}):
        kind = sorted((c for c in ours if c.cores == cores), key=lambda curve: curve.workers)
        found = [(curve, point) for curve in kind if (point := curve.best(limit))]
        if not found:
            continue
        taken = found[0]
        for curve, point in found[1:]:
            gain = point.rate / taken[1].rate
            reasons.append(
                f"WEB_CONCURRENCY={curve.workers} at {cores} CPU: {gain:.2f} times the texts of "
                f"{taken[0].workers}; {WORTH} times are asked for, for the memory it takes"
            )
            if gain >= WORTH:
                taken = curve, point
        chosen.append(taken)
    a_core = max(point.rate / curve.cores for curve, point in chosen)
    near = [pair for pair in chosen if pair[1].rate / pair[0].cores >= NEAR * a_core]
    curve, point = near[-1]
    reasons.append(
        f"{curve.cores} CPU: the most cores that keep {NEAR:.0%} of the best rate a core ("
        + ", ".join(f"{c.cores}: {p.rate / c.cores:.1f}/s a core" for c, p in chosen)
        + ")"
    )
    reasons.append(
        f"concurrency {point.connections}: the fewest connections with {ENOUGH:.0%} of the best "
        f"rate within p99 <= {limit:.0f} ms ({point.rate:.1f}/s, p50 {point.p50:.0f} ms, p99 "
        f"{point.p99:.0f} ms)"
    )
    least = next((mib for cores, mib in LEAST_MEMORY if curve.cores >= cores), MEMORY[0])
    wanted = max(HEADROOM * curve.memory, least)
    memory = next((mib for mib in MEMORY if mib >= wanted), math.ceil(wanted / 1024) * 1024)
    reasons.append(
        f"memory: {curve.memory:.0f} MiB were seen in all processes, times {HEADROOM}, "
        "rounded up to what Cloud Run sells"
    )
    return Advice(
        curve.cores,
        memory,
        point.connections,
        curve.workers,
        precision,
        point.rate,
        point.p99,
        kept,
        reasons,
    )


def measure(
    bundle: Bundle,
    load: str,
    connections: Sequence[int],
    seconds: float,
    rounds: int,
) -> list[Curve]:
    """Every precision on all cores; the one that will be chosen on fewer cores too, and with a
    process a core.

    Raises: OSError when a service does not start.
    """
    cpus = available()
    counts = [count for power in range(12) if (count := 1 << power) < len(cpus)]
    offered = precisions(bundle)
    settings = len(offered) + len(counts) + (len(cpus) > 1)
    progress = Progress(settings * len(connections))

    def curve(cores: int, workers: int, precision: str) -> Curve:
        environ = {"PRECISION": precision, "WEB_CONCURRENCY": str(workers)}
        with service(cpus[:cores], **environ) as running:
            target, points, memory = Target(running.url), [], 0.0
            for number in connections:
                progress(f"{precision}, cores {cores}, workers {workers}, connections {number}")
                one(target, load, number, min(WARM_UP, seconds), 0)
                results: list[Result] = []
                for seed in range(rounds):
                    results.append(one(target, load, number, seconds, seed + 1))
                whole = middle(results)
                points.append(Point(number, whole.rate, whole.p50, whole.p99, whole.failed))
                memory = max(memory, running.memory()[1])
        return Curve(cores, workers, precision, memory, tuple(points))

    curves = [curve(len(cpus), 1, precision) for precision in offered]
    rates = {c.precision: max(point.rate for point in c.points) for c in curves}
    precision = choose(parity(bundle), rates)
    curves += [curve(count, 1, precision) for count in counts]
    if len(cpus) > 1:
        curves.append(curve(len(cpus), len(cpus), precision))
    progress.close()
    return curves


def parity(bundle: Bundle) -> dict[str, float]:
    """Least cosine to sentence-transformers at bake, by precision."""
    return {name: figures.minimum for name, figures in bundle.manifest.parity.items()}


def rows(curves: Sequence[Curve], load: str) -> list[Row]:
    """The curves, a row a point."""
    return [
        {
            "precision": curve.precision,
            "cores": curve.cores,
            "workers": curve.workers,
            "load": load,
            "connections": point.connections,
            "rate": point.rate,
            "p50": point.p50,
            "p99": point.p99,
            "failed": point.failed,
            "rss": curve.memory,
        }
        for curve in curves
        for point in curve.points
    ]


def text(advice: Advice, cores: int) -> str:
    """The advice with its reasons and its limits, to paste."""
    lines = [advice.command, "", *(f"- {reason}" for reason in advice.reasons)]
    lines += [
        f"- price: {advice.price}",
        f"- measured: all of the above, on this machine, up to its {cores} cores; with all of them "
        "the service shares some hundredths of a core with the generator of the load",
        "- not measured, so not advised: more cores than that; another processor (Cloud Run does "
        "not promise which one it gives: measure what you deployed with --url); its network",
    ]
    return "\n".join(lines)
