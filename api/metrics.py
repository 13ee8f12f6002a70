"""What the service counts, and GET /metrics, where Prometheus reads it.

Numbers stand in memory that gunicorn shares out before it forks: a row of float64 for each worker.
A worker writes its own row; whoever is asked for /metrics adds up all of them. So they are right
whichever worker answers, what a worker counted outlives it (the one that takes its place counts
on), and it needs no file: it works on a read-only file system and leaves nothing behind.

prometheus-client's own multi-process mode needs a writable folder, keeps files of every process
that ever died, and costs 2 to 4 us an update where this costs 0.4; here it only writes the text.
"""

import bisect
import contextlib
import http
import mmap
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from flask import Blueprint
from werkzeug.routing import Map

from api.endpoint import endpoint
from api.service import Embedders
from engine.errors import ModelNotReady
from engine.models import Models
from engine.protocol import Batch
from engine.queue import Queue
from server.messages import Response
from server.tasks import in_thread

if TYPE_CHECKING:
    from prometheus_client import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
UNKNOWN = "unknown"  # the label of unknown paths
PROBES = ("/health", "/health/ready", "/healthcheck")
# Upper bounds of the histograms' buckets.
LATENCIES = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
CALLS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
ITEMS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
TOKENS = (16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)
# 499: the client closed before its answer was there (nginx's number).
_STATUSES = (*(int(status) for status in http.HTTPStatus if status >= 200), 499)
REASONS = ("queue_full", "memory", "deadline", "unavailable", "stalled_client", "client_gone")
_REASON = {429: "queue_full", 499: "client_gone", 503: "unavailable", 504: "deadline"}

_COLUMNS = 65_536  # of a row: 512 KiB, of which the system provides only the pages that are used
_SPARE_ROWS = 16  # for workers that are added by a signal
_PID, _IN_FLIGHT, _WAITING_JOBS, _WAITING_TOKENS, _THREADS, _FIRST_FREE = range(6)

Float64 = npt.NDArray[np.float64]
Labelled = Iterable[tuple[list[str], float]]  # the values of the labels, and the number


class Table:
    """Rows of numbers in memory that this process and those it forks share."""

    def __init__(self, rows: int) -> None:
        self._memory = mmap.mmap(-1, rows * _COLUMNS * 8)
        flat: Float64 = np.frombuffer(self._memory, np.float64)
        self.rows = flat.reshape(rows, _COLUMNS)
        self.mine = 0  # the row that this process writes

    def claim(self) -> int:
        """Make a free row this process's, and so that of a worker it forks next. When there are
        more workers than rows, the last is shared and loses a count now and then.
        """
        free = np.flatnonzero(self.rows[:, _PID] == 0)
        self.mine = int(free[0]) if len(free) else len(self.rows) - 1
        self.rows[self.mine, _PID] = -1  # until the worker knows its own
        return self.mine

    def release(self, row: int) -> None:
        """A worker has ended: what it counted stays, what it was just doing does not."""
        self.rows[row, :_FIRST_FREE] = 0


# gunicorn.conf.py puts one for all workers here; a process alone has its own.
table = Table(1)


def share(workers: int) -> Table:
    """Make the table of a service of `workers` processes, before any is forked."""
    global table
    table = Table(workers + _SPARE_ROWS)
    return table


class Histogram:
    """Where a histogram stands in a row: a count for each bucket, not cumulative, then the sum."""

    def __init__(self, bounds: Sequence[float], start: int) -> None:
        self.bounds, self.start, self.sum = bounds, start, start + len(bounds) + 1

    def observe(self, row: "memoryview[float]", value: float) -> None:
        row[self.start + bisect.bisect_left(self.bounds, value)] += 1.0
        row[self.sum] += value

    def buckets(self, row: Float64) -> list[tuple[str, float]]:
        """As prometheus-client takes them: cumulative, with their bounds as text."""
        counts = np.cumsum(row[self.start : self.sum]).tolist()
        return list(zip([*map(repr, self.bounds), "+Inf"], counts))


class _Route:
    """Where a route's numbers stand."""

    def __init__(self, name: str, start: int) -> None:
        self.name = name
        self.statuses = {status: start + at for at, status in enumerate(_STATUSES)}
        self.seconds = Histogram(LATENCIES, start + len(_STATUSES))

    COLUMNS = len(_STATUSES) + len(LATENCIES) + 2


class _Engine:
    """Where an engine's numbers stand."""

    def __init__(self, model: str, modality: str, start: int) -> None:
        self.model, self.modality = model, modality
        self.items, self.tokens, self.padded, self.failures = range(start, start + 4)
        self.seconds = Histogram(CALLS, start + 4)

    COLUMNS = 4 + len(CALLS) + 2


class Metrics:
    """What this process counts. Safe to call from any number of threads."""

    def __init__(self, models: Models[Embedders], batcher: Queue) -> None:
        """Watch `batcher`. Call `add_routes` before the first request."""
        self.models, self._batcher = models, batcher
        self._table = table
        self._row: memoryview[float] = memoryview(table.rows[table.mine])
        self._lock = threading.Lock()
        self._columns = _FIRST_FREE
        self._row[_PID] = os.getpid()
        self._row[_THREADS] = batcher.threads
        self._rejected = {reason: self._add(1) for reason in REASONS}
        self._cache_hits, self._cache_misses = self._add(1), self._add(1)
        self._wait = Histogram(LATENCIES, self._add(len(LATENCIES) + 2))
        self._items = Histogram(ITEMS, self._add(len(ITEMS) + 2))
        self._tokens = Histogram(TOKENS, self._add(len(TOKENS) + 2))
        self._engines: dict[tuple[str, str], _Engine] = {
            (name, modality): _Engine(name, modality, self._add(_Engine.COLUMNS))
            for name, bundle in sorted(models.bundles.items())
            for modality in sorted(bundle.manifest.modalities)
        }
        self._routes: dict[str, _Route] = {}
        self._prefixes: dict[str, _Route] = {}
        self._unknown = _Route(UNKNOWN, self._add(_Route.COLUMNS))
        batcher.observe = self.batch

    def _add(self, columns: int) -> int:
        """Room for so many numbers, at the same place in every worker. Returns: where it begins."""
        start = self._columns
        self._columns += columns
        if self._columns > _COLUMNS:
            raise ValueError(f"{len(self.models.bundles)} models are too many to count for")
        return start

    def add_routes(self, routes: Map) -> None:
        """Count for each of an application's routes; whatever else is asked for is `unknown`."""
        for rule in sorted({rule.rule for rule in routes.iter_rules()}):
            name = re.sub(r"<(?:[^<>]*:)?(\w+)>", r"{\1}", rule)
            prefix, parameter, _ = rule.partition("<")
            known = self._prefixes if parameter else self._routes
            known[prefix] = _Route(name, self._add(_Route.COLUMNS))

    def _route(self, path: str) -> _Route:
        if route := self._routes.get(path):
            return route
        for prefix, route in self._prefixes.items():
            if path.startswith(prefix):
                return route
        return self._unknown

    # -- what happens

    def begin(self) -> None:
        """The application gets a request."""
        with self._lock:
            self._row[_IN_FLIGHT] += 1.0

    def end(self, path: str, status: int, seconds: float) -> None:
        """A request has been answered."""
        reason = None if path in PROBES else _REASON.get(status)
        self._answered(path, status, seconds, reason, 1.0)

    def dropped(self) -> None:
        """It has ended after it had been refused."""
        with self._lock:
            self._row[_IN_FLIGHT] -= 1.0

    def refused(self, path: str, status: int, reason: str | None = None) -> None:
        """A request was answered before the application saw it; `reason` is one of REASONS."""
        reason = reason or {**_REASON, 408: "stalled_client"}.get(status)
        self._answered(path, status, None, reason, 0.0)

    def _answered(
        self, path: str, status: int, seconds: float | None, reason: str | None, ended: float
    ) -> None:
        route, row = self._route(path), self._row
        column = route.statuses.get(status) or route.statuses[500]
        with self._lock:
            row[_IN_FLIGHT] -= ended
            row[column] += 1.0
            if seconds is not None:
                route.seconds.observe(row, seconds)
            if reason:
                row[self._rejected[reason]] += 1.0

    def batch(self, batch: Batch, seconds: float, failed: bool) -> None:
        """An engine call of so many seconds has ended."""
        engine, row = self._engines[batch.engine.name, batch.engine.modality], self._row
        began = time.monotonic() - seconds
        with self._lock:
            self._items.observe(row, len(batch.entries))
            self._tokens.observe(row, batch.tokens)
            engine.seconds.observe(row, seconds)
            if failed:
                row[engine.failures] += 1.0
            else:
                row[engine.items] += len(batch.entries)
                row[engine.tokens] += batch.tokens
                row[engine.padded] += batch.padded_tokens
            for job in batch.served:
                self._wait.observe(row, max(0.0, began - job.submitted))

    def cached(self, hits: int, misses: int) -> None:
        """A request found so many of its chunks in the cache, and so many not."""
        with self._lock:
            self._row[self._cache_hits] += hits
            self._row[self._cache_misses] += misses

    def sample(self) -> None:
        """Note the queue's length. The worker's event loop calls it, at least each second."""
        self._row[_WAITING_JOBS] = self._batcher.waiting_jobs
        self._row[_WAITING_TOKENS] = self._batcher.waiting_tokens

    # -- what Prometheus reads

    def text(self) -> bytes:
        """Everything, of all workers, in Prometheus' text format."""
        # Here, since it takes 30 ms of a start otherwise.
        from prometheus_client import CollectorRegistry, generate_latest

        self.sample()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> "Iterator[Metric]":
        """For prometheus-client."""
        total: Float64 = self._table.rows[:, : self._columns].sum(axis=0)
        write = _Writer(total)
        yield from self._requests(write)
        yield from self._queue(write)
        yield from self._models(write)
        yield from self._processes(write)

    def _requests(self, write: "_Writer") -> "Iterator[Metric]":
        routes = [self._unknown, *self._routes.values(), *self._prefixes.values()]
        counts = (
            ([route.name, str(status)], write.total[column])
            for route in routes
            for status, column in route.statuses.items()
            if write.total[column]
        )
        help = "Requests answered, by route and status."
        yield write.counters("requests", help, ["route", "status"], counts)
        durations = (
            ([route.name], route.seconds)
            for route in routes
            if route.seconds.buckets(write.total)[-1][1]
        )
        help = "From a request's last byte to its response, without what was refused unread."
        yield write.histograms("request_duration_seconds", help, ["route"], durations)
        help = "Requests being worked on, this one too."
        yield write.gauge("requests_in_flight", help, _IN_FLIGHT)
        help = (
            "Requests answered without their work being done: queue_full and memory (429), "
            "deadline (504), unavailable (503: loading or"
            " shutting down), stalled_client (408), client_gone (499, never sent)."
        )
        rejected = (([reason], write.total[column]) for reason, column in self._rejected.items())
        yield write.counters("requests_rejected", help, ["reason"], rejected)

    def _queue(self, write: "_Writer") -> "Iterator[Metric]":
        yield write.counter("cache_hits", "Chunks of text found in the cache.", self._cache_hits)
        help = "Chunks of text not found in the cache."
        yield write.counter("cache_misses", help, self._cache_misses)
        help = "Requests with inputs waiting for the engine."
        yield write.gauge("queue_requests", help, _WAITING_JOBS)
        yield write.gauge("queue_tokens", "Tokens waiting for the engine.", _WAITING_TOKENS)
        for name, help, histogram in (
            (
                "queue_wait_seconds",
                "From a request's entry into the queue to the start of its last engine call.",
                self._wait,
            ),
            ("batch_items", "Chunks of text, or pictures, in an engine call.", self._items),
            (
                "batch_tokens",
                "Tokens in an engine call, without padding; a picture counts what it costs.",
                self._tokens,
            ),
        ):
            yield write.histograms(name, help, [], [([], histogram)])

    def _models(self, write: "_Writer") -> "Iterator[Metric]":
        engines = list(self._engines.values())
        labels = ["model", "modality"]
        seconds = (([engine.model, engine.modality], engine.seconds) for engine in engines)
        help = "How long an engine call took."
        yield write.histograms("engine_call_seconds", help, labels, seconds)
        failures = (
            ([engine.model, engine.modality], write.total[engine.failures]) for engine in engines
        )
        yield write.counters("engine_failures", "Engine calls that failed.", labels, failures)
        for name, help, modality, column in (
            ("chunks", "Chunks of text embedded; most texts are one.", "text", "items"),
            ("tokens", "Tokens of texts embedded, without padding.", "text", "tokens"),
            (
                "padded_tokens",
                "Tokens of texts computed, with as much of the padding as is.",
                "text",
                "padded",
            ),
            ("images", "Pictures embedded.", "image", "items"),
        ):
            found = (
                ([engine.model], write.total[getattr(engine, column)])
                for engine in engines
                if engine.modality == modality
            )
            yield write.counters(name, help, ["model"], found)
        labels = ["model", "precision", "revision", "dimensions", "max_tokens", "modalities"]
        loaded = ((values, 1.0) for values in self._loaded())
        yield write.gauges("model_info", "Each model that is loaded.", labels, loaded)

    def _processes(self, write: "_Writer") -> "Iterator[Metric]":
        yield write.gauge("inference_threads", "Cores that all workers compute on.", _THREADS)
        running = list(self._workers())
        for make, name, help, at in (
            (write.gauges, "worker_resident_memory_bytes", "Resident memory of a worker.", 0),
            (write.counters, "worker_cpu_seconds", "CPU time of a worker.", 1),
            (write.gauges, "worker_start_time_seconds", "Unix time at which a worker began.", 2),
        ):
            yield make(name, help, ["worker"], (([row], numbers[at]) for row, numbers in running))

    def _loaded(self) -> Iterator[list[str]]:
        for name, bundle in sorted(self.models.bundles.items()):
            manifest = bundle.manifest
            with contextlib.suppress(ModelNotReady):
                precision = self.models.get(name, 0.0).texts.precision
                sizes = [str(manifest.dimensions), str(manifest.max_tokens)]
                kinds = ",".join(manifest.modalities)
                yield [name, precision, manifest.revision or "", *sizes, kinds]

    def _workers(self) -> Iterator[tuple[str, tuple[float, float, float]]]:
        """Of each running worker: its row; resident bytes, CPU seconds, start as Unix time."""
        page, tick = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        for row, pid in enumerate(self._table.rows[:, _PID].astype(int).tolist()):
            with contextlib.suppress(OSError):  # it has just ended, or not yet begun
                with open(f"/proc/{pid}/stat", "rb") as file:
                    # proc_pid_stat(5), from field 3 on: the name before may hold anything.
                    fields = file.read().rpartition(b")")[2].split()
                cpu, began = int(fields[11]) + int(fields[12]), int(fields[19])
                resident = int(fields[21]) * page
                yield str(row), (resident, cpu / tick, booted + began / tick)


class _Writer:
    """Makes prometheus-client's metrics of the numbers of all workers."""

    def __init__(self, total: Float64) -> None:
        # Only now: the import takes 30 ms, which a start would pay for.
        from prometheus_client import core

        self.total, self._core = total, core

    def counter(self, name: str, help: str, column: int) -> "Metric":
        return self._core.CounterMetricFamily(f"embedder_{name}", help, float(self.total[column]))

    def gauge(self, name: str, help: str, column: int) -> "Metric":
        return self._core.GaugeMetricFamily(f"embedder_{name}", help, float(self.total[column]))

    def counters(self, name: str, help: str, labels: list[str], found: Labelled) -> "Metric":
        family = self._core.CounterMetricFamily(f"embedder_{name}", help, labels=labels)
        for values, number in found:
            family.add_metric(values, float(number))
        return family

    def gauges(self, name: str, help: str, labels: list[str], found: Labelled) -> "Metric":
        family = self._core.GaugeMetricFamily(f"embedder_{name}", help, labels=labels)
        for values, number in found:
            family.add_metric(values, float(number))
        return family

    def histograms(
        self,
        name: str,
        help: str,
        labels: list[str],
        found: Iterable[tuple[list[str], Histogram]],
    ) -> "Metric":
        family = self._core.HistogramMetricFamily(f"embedder_{name}", help, labels=labels)
        for values, histogram in found:
            buckets = histogram.buckets(self.total)
            family.add_metric(values, buckets, float(self.total[histogram.sum]))
        return family


def blueprint(metrics: Metrics) -> Blueprint:
    """GET /metrics."""
    routes = Blueprint("metrics", __name__)

    @routes.get("/metrics")
    @endpoint(str, produces=CONTENT_TYPE)
    def read() -> object:
        """What the service counts, of all workers, for Prometheus."""
        # The first takes long: it imports prometheus-client.
        return Response(in_thread(metrics.text), content_type=CONTENT_TYPE)

    return routes
