"""What to set Cloud Run to: settings of the service are measured, and stated rules choose one."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from engine.bundle import Bundle
from loadtest.in_process import precisions
from loadtest.loads import Target
from loadtest.measures import one
from loadtest.report import Row
from loadtest.rounds import Progress, alternate, combine
from loadtest.service import available, serve

PARITY = 0.999  # smallest cosine to sentence-transformers for a precision to be recommended
ENOUGH = 0.95  # of the best rate; more connections than this takes only add waiting
WORTH = 1.1  # factor on the rate that makes twice the processes worth twice the memory
NEAR = 0.9  # of the best rate a core; with more cores at this price responses come sooner
HEADROOM = 1.5  # factor on the memory that was measured, for large requests and fragmentation
MEMORY = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # MiB
LEAST_MEMORY = ((8, 4096), (6, 4096), (4, 2048), (1, 512))  # cores, MiB: Cloud Run's own minimum


class Point(NamedTuple):
    """A setting of the service at one number of connections."""

    connections: int
    rate: float  # texts a second
    p50: float  # ms
    p99: float
    failed: int = 0


class Setting(NamedTuple):
    """A setting of the service, measured at a rising number of connections."""

    cores: int
    workers: int
    precision: str
    memory: float  # MiB, the largest RSS of all processes
    points: tuple[Point, ...]

    def highest(self) -> float:
        """The best rate at any number of connections."""
        return max(point.rate for point in self.points)

    def best(self, limit: float) -> Point | None:
        """The fewest connections with ENOUGH of the best rate, among the points with p99 within
        `limit` ms and no failure; None without such points.
        """
        good = [point for point in self.points if point.p99 <= limit and not point.failed]
        most = max((point.rate for point in good), default=0.0)
        return next((point for point in good if point.rate >= ENOUGH * most), None)


Choice = tuple[Setting, Point]


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
        """All of it, for JSON."""
        return {**self._asdict(), "command": self.command, "price": self.price}

    @property
    def command(self) -> str:
        """The command that deploys it, without names and key."""
        variables = f"PRECISION={self.precision},WEB_CONCURRENCY={self.workers}"
        if self.concurrency > 64:
            variables += f",REQUEST_THREADS={self.concurrency}"
        return (
            f"gcloud run deploy … --cpu {self.cores} --memory {self.memory}Mi "
            f"--concurrency {self.concurrency} --set-env-vars {variables}"
        )

    @property
    def price(self) -> str:
        """The price of a million texts as a formula."""
        return (
            f"a million texts cost 1e6 / {self.rate:.1f} s x ({self.cores} x price of a vCPU-second"
            f" + {self.memory / 1024:g} x price of a GiB-second) on instances that are always busy"
        )


def choose(parity: Mapping[str, float], rates: Mapping[str, float]) -> str:
    """The precision with the best rate among the exact ones; without an exact one, the most exact.

    Args:
        parity: smallest cosine to sentence-transformers at bake.
        rates: best rate that was measured.
    """
    exact = [name for name in rates if parity.get(name, 0.0) >= PARITY]
    if not exact:
        return max(rates, key=lambda name: parity.get(name, 0.0))
    return max(exact, key=rates.__getitem__)


def recommend(settings: Sequence[Setting], parity: Mapping[str, float], limit: float) -> Advice:
    """Choose the precision, then the workers for each number of cores, then the cores.

    Args:
        parity: smallest cosine to sentence-transformers at bake, by precision.
        limit: ms that p99 should not exceed.

    Raises: ValueError when requests failed at every setting.
    """
    best: dict[str, float] = {}
    for setting in settings:
        best[setting.precision] = max(best.get(setting.precision, 0.0), setting.highest())
    precision = choose(parity, best)
    figures = (f"{name} {parity.get(name, 0.0):.5f}, {best[name]:.1f}/s" for name in best)
    reasons = [
        f"PRECISION={precision}: the fastest of those whose smallest cosine to "
        f"sentence-transformers at bake is {PARITY} or more ({', '.join(figures)})"
    ]
    ours = [setting for setting in settings if setting.precision == precision]
    kept = any(setting.best(limit) for setting in ours)
    if not kept:
        reasons.append(f"no setting kept p99 within {limit:.0f} ms; this is the smallest p99")
        good = [point.p99 for setting in ours for point in setting.points if not point.failed]
        if not good:
            raise ValueError("no setting answered every request")
        limit = min(good)
    setting, point = _choose_cores(ours, limit, reasons)
    reasons.append(
        f"concurrency {point.connections}: the fewest connections with {ENOUGH:.0%} of the best "
        f"rate within p99 <= {limit:.0f} ms ({point.rate:.1f}/s, p50 {point.p50:.0f} ms, p99 "
        f"{point.p99:.0f} ms)"
    )
    least = next((mib for cores, mib in LEAST_MEMORY if setting.cores >= cores), MEMORY[0])
    wanted = max(HEADROOM * setting.memory, least)
    memory = next((mib for mib in MEMORY if mib >= wanted), math.ceil(wanted / 1024) * 1024)
    reasons.append(
        f"memory: {setting.memory:.0f} MiB measured over all processes, times {HEADROOM}, "
        "rounded up to a size that Cloud Run offers"
    )
    shape = setting.cores, memory, point.connections, setting.workers
    return Advice(*shape, precision, point.rate, point.p99, kept, reasons)


def _choose_cores(settings: Sequence[Setting], limit: float, reasons: list[str]) -> Choice:
    """The most cores that keep NEAR of the best rate a core."""
    by_cores = [
        choice
        for cores in sorted({setting.cores for setting in settings})
        if (choice := _choose_workers([s for s in settings if s.cores == cores], limit, reasons))
    ]
    most = max(point.rate / setting.cores for setting, point in by_cores)
    near = [choice for choice in by_cores if choice[1].rate / choice[0].cores >= NEAR * most]
    each = (f"{setting.cores}: {point.rate / setting.cores:.1f}/s" for setting, point in by_cores)
    reasons.append(
        f"{near[-1][0].cores} CPU: the most cores that keep {NEAR:.0%} of the best rate a core "
        f"({', '.join(each)} a core)"
    )
    return near[-1]


def _choose_workers(settings: Sequence[Setting], limit: float, reasons: list[str]) -> Choice | None:
    """The fewest workers unless more are WORTH it; None where none is within the limit."""
    ordered = sorted(settings, key=lambda setting: setting.workers)
    found = [(setting, point) for setting in ordered if (point := setting.best(limit))]
    taken = found[0] if found else None
    for setting, point in found[1:]:
        assert taken
        gain = point.rate / taken[1].rate
        reasons.append(
            f"WEB_CONCURRENCY={setting.workers} at {setting.cores} CPU: {gain:.2f} times the texts "
            f"of {taken[0].workers}; it takes {WORTH} times to be worth the memory"
        )
        if gain >= WORTH:
            taken = setting, point
    return taken


def measure(
    bundle: Bundle, load: str, connections: Sequence[int], seconds: float, rounds: int
) -> list[Setting]:
    """Every precision on all cores; the one that will be chosen also on fewer cores, and with a
    worker for each core.

    Raises: OSError when a service does not start.
    """
    cpus = available()
    counts = [count for power in range(12) if (count := 1 << power) < len(cpus)]
    offered = precisions(bundle)
    number = len(offered) + len(counts) + (len(cpus) > 1)
    progress = Progress(number * len(connections) * (rounds + 1))

    def setting(cores: int, workers: int, precision: str) -> Setting:
        environ = {"PRECISION": precision, "WEB_CONCURRENCY": str(workers)}
        with serve(environ, cpus[:cores]) as running:
            target, points, memory = Target(running.url), [], 0.0
            for at in connections:
                progress.doing = (
                    f"{precision}, cores {cores}, workers {workers}, connections {at}, "
                )
                side = {"": partial(one, target, load, at)}
                whole = combine(alternate(side, seconds, rounds, progress)[""])
                points.append(Point(at, whole.rate, whole.p50, whole.p99, whole.failed))
                memory = max(memory, running.memory()[1])
        return Setting(cores, workers, precision, memory, tuple(points))

    measured = [setting(len(cpus), 1, precision) for precision in offered]
    rates = {each.precision: each.highest() for each in measured}
    precision = choose(parity(bundle), rates)
    measured += [setting(count, 1, precision) for count in counts]
    if len(cpus) > 1:
        measured.append(setting(len(cpus), len(cpus), precision))
    progress.close()
    return measured


def parity(bundle: Bundle) -> dict[str, float]:
    """Smallest cosine to sentence-transformers at bake, by precision."""
    return {name: figures.minimum for name, figures in bundle.manifest.parity.items()}


def rows(settings: Sequence[Setting], load: str) -> list[Row]:
    """A row for each point."""
    return [
        {
            "precision": setting.precision,
            "cores": setting.cores,
            "workers": setting.workers,
            "load": load,
            **point._asdict(),
            "rss": setting.memory,
        }
        for setting in settings
        for point in setting.points
    ]


def text(advice: Advice, cores: int) -> str:
    """The advice with its reasons and its limits, to paste."""
    lines = [advice.command, "", *(f"- {reason}" for reason in advice.reasons)]
    lines += [
        f"- price: {advice.price}",
        f"- measured: all of the above, on this machine, up to its {cores} cores; with all of them "
        "the service shares some hundredths of a core with the load client",
        "- not measured, so not advised: more cores than that; another processor (Cloud Run does "
        "not promise which one it gives: measure what you deployed with --url); its network",
    ]
    return "\n".join(lines)
