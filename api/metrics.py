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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from flask import Blueprint
from werkzeug.routing import Map

from api import health
from api.endpoint import endpoint
from api.service import Embedders
from engine.errors import ModelNotReady
from engine.models import Models
from engine.protocol import Batch
from engine.queue import Queue
from server.messages import Response, current
from server.tasks import in_thread

if TYPE_CHECKING:
    from prometheus_client import Metric as Family

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
UNKNOWN = "unknown"  # the label of unknown paths
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
REASONS = (
    *("queue_full", "memory", "key_limit", "deadline", "unavailable"),
    *("stalled_client", "client_gone"),
)
_REASON = {429: "queue_full", 499: "client_gone", 503: "unavailable", 504: "deadline"}


class Metric(NamedTuple):
    """What Prometheus is told of a metric."""

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    help: str
    labels: tuple[str, ...] = ()
    bounds: Sequence[float] = ()  # of a histogram's buckets


METRICS = (
    Metric("requests", "counter", "Requests answered, by route and status.", ("route", "status")),
    Metric(
        "request_duration_seconds",
        "histogram",
        "From a request's last byte to its response, without what was refused unread.",
        ("route",),
        LATENCIES,
    ),
    Metric(
        "requests_with_ignored_fields",
        "counter",
        "Requests answered with X-Ignored-Fields: they had fields that have no meaning here.",
        ("route",),
    ),
    Metric("requests_in_flight", "gauge", "Requests being worked on, this one too."),
    Metric(
        "requests_rejected",
        "counter",
        "Requests answered without their work being done: queue_full, memory and key_limit (429), "
        "deadline (504), unavailable (503: loading or shutting down), stalled_client (408), "
        "client_gone (499, never sent).",
        ("reason",),
    ),
    Metric(
        "key_requests", "counter", "Requests answered, by the name of their key.", ("key_name",)
    ),
    Metric("key_refused", "counter", "Of those, the ones answered with 429.", ("key_name",)),
    Metric("key_tokens", "counter", "Tokens computed for those answered 200.", ("key_name",)),
    Metric("cache_hits", "counter", "Chunks of text found in the cache."),
    Metric("cache_misses", "counter", "Chunks of text not found in the cache."),
    Metric("truncated_texts", "counter", "Texts cut because their request asked for it."),
    Metric("queue_requests", "gauge", "Requests with inputs waiting for the engine."),
    Metric("queue_tokens", "gauge", "Tokens waiting for the engine."),
    Metric(
        "queue_wait_seconds",
        "histogram",
        "From a request's entry into the queue to the start of its first engine call, or until it "
        "left without one.",
        bounds=LATENCIES,
    ),
    Metric(
        "batch_items", "histogram", "Chunks of text, or pictures, in an engine call.", bounds=ITEMS
    ),
    Metric(
        "batch_tokens",
        "histogram",
        "Tokens in an engine call, without padding; a picture counts what it costs.",
        bounds=TOKENS,
    ),
    Metric(
        "engine_call_seconds",
        "histogram",
        "How long an engine call took.",
        ("model", "modality"),
        CALLS,
    ),
    Metric("engine_failures", "counter", "Engine calls that failed.", ("model", "modality")),
    Metric("chunks", "counter", "Chunks of text embedded; most texts are one.", ("model",)),
    Metric("tokens", "counter", "Tokens of texts embedded, without padding.", ("model",)),
    Metric(
        "padded_tokens",
        "counter",
        "Tokens of texts computed, with as much of the padding as is.",
        ("model",),
    ),
    Metric("images", "counter", "Pictures embedded.", ("model",)),
    Metric(
        "model_info",
        "gauge",
        "Each model that is loaded.",
        ("model", "precision", "revision", "dimensions", "max_tokens", "modalities"),
    ),
    Metric("inference_threads", "gauge", "Cores that all workers compute on."),
    Metric("worker_resident_memory_bytes", "gauge", "Resident memory of a worker.", ("worker",)),
    Metric("worker_cpu_seconds", "counter", "CPU time of a worker.", ("worker",)),
    Metric("worker_start_time_seconds", "gauge", "Unix time at which a worker began.", ("worker",)),
)
_BOUNDS = {metric.name: metric.bounds for metric in METRICS}
# Listed once there is something to tell of a route.
_SPARSE = ("requests", "request_duration_seconds", "requests_with_ignored_fields")

_COLUMNS = 65_536  # of a row: 512 KiB, of which the system provides only the pages that are used
_SPARE_ROWS = 16  # for workers that are added by a signal
_PID = 0
# What a worker is just doing; the columns after these outlive it.
_GAUGES = ("requests_in_flight", "queue_requests", "queue_tokens", "inference_threads")
_FIRST_FREE = 1 + len(_GAUGES)

Float64 = npt.NDArray[np.float64]
Labelled = Iterable[tuple[tuple[str, ...], float]]  # the values of the labels, and the number


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


# Of all keys since the master process began, so that each keeps its columns: SIGHUP may bring
# others.
_key_names: list[str] = []


def name_keys(names: Iterable[str]) -> None:
    """Count for keys of these names too."""
    _key_names.extend(name for name in dict.fromkeys(names) if name not in _key_names)


class _Route(NamedTuple):
    """A route's name, and where its numbers begin."""

    name: str
    statuses: dict[int, int]
    seconds: int
    ignored: int


class Metrics:
    """What this process counts. Safe to call from any number of threads."""

    def __init__(self, models: Models[Embedders], batcher: Queue) -> None:
        """Watch `batcher`. Call `add_routes` before the first request."""
        self.models, self._batcher = models, batcher
        self._table = table
        self._row: memoryview[float] = memoryview(table.rows[table.mine])
        self._lock = threading.Lock()
        self._columns = 1  # that are taken; the first is _PID
        # Where the numbers of each metric begin, by the values of its labels.
        self._places: dict[str, dict[tuple[str, ...], int]] = {name: {} for name in _BOUNDS}
        for name in (*_GAUGES, "cache_hits", "cache_misses", "truncated_texts"):
            self._add(name)
        for name in ("queue_wait_seconds", "batch_items", "batch_tokens"):
            self._add(name)
        for reason in REASONS:
            self._add("requests_rejected", reason)
        for model, bundle in sorted(models.bundles.items()):
            for modality in sorted(bundle.manifest.modalities):
                self._add("engine_call_seconds", model, modality)
                self._add("engine_failures", model, modality)
                texts = ("chunks", "tokens", "padded_tokens")
                for name in texts if modality == "text" else ("images",):
                    self._add(name, model)
        self._in_flight = self._places["requests_in_flight"][()]
        self._routes: dict[str, _Route] = {}
        self._prefixes: dict[str, _Route] = {}
        self._unknown = self._add_route(UNKNOWN)
        self._row[_PID] = os.getpid()
        self._set("inference_threads", batcher.threads)
        batcher.observe, batcher.waited = self.batch, self.waited

    def _add(self, name: str, *labels: str) -> int:
        """Make room for a metric's numbers, at the same place in every worker. A histogram has a
        count for each bucket, not cumulative, then the sum. Returns: where they begin.
        """
        start = self._places[name][labels] = self._columns
        bounds = _BOUNDS[name]
        self._columns += len(bounds) + 2 if bounds else 1
        if self._columns > _COLUMNS:
            raise ValueError(
                f"{len(self.models.bundles)} models and {len(_key_names)} keys are too many to "
                "count for"
            )
        return start

    def _add_route(self, route: str) -> _Route:
        statuses = {status: self._add("requests", route, str(status)) for status in _STATUSES}
        seconds = self._add("request_duration_seconds", route)
        return _Route(route, statuses, seconds, self._add("requests_with_ignored_fields", route))

    def add_routes(self, routes: Map) -> None:
        """Count for each of an application's routes; whatever else is asked for is `unknown`."""
        for rule in sorted({rule.rule for rule in routes.iter_rules()}):
            name = re.sub(r"<(?:[^<>]*:)?(\w+)>", r"{\1}", rule)
            prefix, parameter, _ = rule.partition("<")
            known = self._prefixes if parameter else self._routes
            known[prefix] = self._add_route(name)

    def add_keys(self) -> None:
        """Count for each key. To be called last: later there may be more of them."""
        for name in _key_names:
            for metric in ("key_requests", "key_refused", "key_tokens"):
                self._add(metric, name)

    def route(self, path: str) -> str | None:
        """The route that a path belongs to, such as /v1/models/{model}; None for no route."""
        route = self._route(path)
        return None if route is self._unknown else route.name

    def _route(self, path: str) -> _Route:
        if route := self._routes.get(path):
            return route
        for prefix, route in self._prefixes.items():
            if path.startswith(prefix):
                return route
        return self._unknown

    # -- one number; all but `_set` with the lock held

    def _set(self, name: str, value: float) -> None:
        self._row[self._places[name][()]] = value

    def _count(self, name: str, amount: float, *labels: str) -> None:
        self._row[self._places[name][labels]] += amount

    def _observe(self, name: str, value: float, *labels: str) -> None:
        self._observe_at(self._places[name][labels], _BOUNDS[name], value)

    def _observe_at(self, start: int, bounds: Sequence[float], value: float) -> None:
        self._row[start + bisect.bisect_left(bounds, value)] += 1.0
        self._row[start + len(bounds) + 1] += value

    # -- what happens

    def begin(self) -> None:
        """The application gets a request."""
        with self._lock:
            self._row[self._in_flight] += 1.0

    def end(
        self,
        path: str,
        status: int,
        seconds: float,
        key_name: str | None,
        reason: str | None,
        *,
        ignored: bool = False,
    ) -> None:
        """A request has been answered. `reason`: one of REASONS, where the status does not tell;
        `ignored`: it had fields without a meaning.
        """
        route = self._route(path)
        if path not in health.PATHS:
            reason = reason or _REASON.get(status)
        with self._lock:
            self._row[self._in_flight] -= 1.0
            self._observe_at(route.seconds, LATENCIES, seconds)
            if ignored:
                self._row[route.ignored] += 1.0
            self._answered(route, status, reason)
            if key_name is not None:
                self._count("key_requests", 1.0, key_name)
                if status == 429:
                    self._count("key_refused", 1.0, key_name)

    def dropped(self) -> None:
        """It has ended after it had been refused."""
        with self._lock:
            self._row[self._in_flight] -= 1.0

    def refused(self, path: str, status: int, reason: str | None = None) -> None:
        """A request was answered before the application saw it; `reason` is one of REASONS."""
        reason = reason or {**_REASON, 408: "stalled_client"}.get(status)
        with self._lock:
            self._answered(self._route(path), status, reason)

    def _answered(self, route: _Route, status: int, reason: str | None) -> None:
        self._row[route.statuses.get(status) or route.statuses[500]] += 1.0
        if reason:
            self._count("requests_rejected", 1.0, reason)

    def batch(self, batch: Batch, seconds: float, failed: bool) -> None:
        """An engine call of so many seconds has ended."""
        model, modality = batch.engine.name, batch.engine.modality
        items = len(batch.entries)
        with self._lock:
            self._observe("batch_items", items)
            self._observe("batch_tokens", batch.tokens)
            self._observe("engine_call_seconds", seconds, model, modality)
            if failed:
                self._count("engine_failures", 1.0, model, modality)
            elif modality == "image":
                self._count("images", items, model)
            else:
                self._count("chunks", items, model)
                self._count("tokens", batch.tokens, model)
                self._count("padded_tokens", batch.padded_tokens, model)
            for job in batch.served:
                if (name := job.tenant.name) is not None:
                    self._count("key_tokens", job.served, name)

    def waited(self, seconds: float) -> None:
        """A request has left the queue."""
        with self._lock:
            self._observe("queue_wait_seconds", seconds)

    def cached(self, hits: int, misses: int) -> None:
        """A request found so many of its chunks in the cache, and so many not."""
        with self._lock:
            self._count("cache_hits", hits)
            self._count("cache_misses", misses)

    def truncated(self, texts: int) -> None:
        """So many texts of a request were cut."""
        with self._lock:
            self._count("truncated_texts", texts)

    def sample(self) -> None:
        """Note the queue's length. The worker's event loop calls it, at least each second."""
        self._set("queue_requests", self._batcher.waiting_jobs)
        self._set("queue_tokens", self._batcher.waiting_tokens)

    # -- what Prometheus reads

    def text(self) -> bytes:
        """Everything, of all workers, in Prometheus' text format."""
        # Here, since it takes 30 ms of a start otherwise.
        from prometheus_client import CollectorRegistry, generate_latest

        self.sample()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> "Iterator[Family]":
        """For prometheus-client."""
        from prometheus_client import core

        total: Float64 = self._table.rows[:, : self._columns].sum(axis=0)
        at_read = {"model_info": list(self._loaded()), **self._workers()}
        for name, kind, help, labels, bounds in METRICS:
            full = f"embedder_{name}"
            if bounds:
                histogram = core.HistogramMetricFamily(full, help, labels=labels)
                for values, start in self._places[name].items():
                    *counts, summed = total[start : start + len(bounds) + 2].tolist()
                    counts = np.cumsum(counts).tolist()
                    if counts[-1] or name not in _SPARSE:
                        buckets = list(zip([*map(repr, bounds), "+Inf"], counts))
                        histogram.add_metric(values, buckets, summed)
                yield histogram
                continue
            make = core.CounterMetricFamily if kind == "counter" else core.GaugeMetricFamily
            family = make(full, help, labels=labels)
            counted = ((values, float(total[at])) for values, at in self._places[name].items())
            for values, number in at_read.get(name, counted):
                if number or name not in _SPARSE:
                    family.add_metric(values, number)
            yield family

    def _loaded(self) -> Labelled:
        for name, bundle in sorted(self.models.bundles.items()):
            manifest = bundle.manifest
            with contextlib.suppress(ModelNotReady):
                precision = self.models.get(name, 0.0).model.precision
                sizes = [str(manifest.size), str(manifest.max_tokens)]
                kinds = ",".join(manifest.modalities)
                yield (name, precision, manifest.revision or "", *sizes, kinds), 1.0

    def _workers(self) -> dict[str, Labelled]:
        """The metrics of running workers; a worker is named by its row."""
        page, tick = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        resident, cpu, began = [], [], []
        for row, pid in enumerate(self._table.rows[:, _PID].astype(int).tolist()):
            with contextlib.suppress(OSError):  # it has just ended, or not yet begun
                with open(f"/proc/{pid}/stat", "rb") as file:
                    # proc_pid_stat(5), from field 3 on: the name before may hold anything.
                    fields = file.read().rpartition(b")")[2].split()
                worker = (str(row),)
                resident.append((worker, int(fields[21]) * page))
                cpu.append((worker, (int(fields[11]) + int(fields[12])) / tick))
                began.append((worker, booted + int(fields[19]) / tick))
        return {
            "worker_resident_memory_bytes": resident,
            "worker_cpu_seconds": cpu,
            "worker_start_time_seconds": began,
        }


def blueprint(metrics: Metrics) -> Blueprint:
    """GET /metrics."""
    routes = Blueprint("metrics", __name__)

    @routes.get("/metrics")
    @endpoint(str, produces=CONTENT_TYPE)
    def read() -> object:
        """What the service counts, of all workers, for Prometheus."""
        # The first takes long: it imports prometheus-client.
        text = in_thread(metrics.text, current.get().caller)
        return Response(text, content_type=CONTENT_TYPE)

    return routes
