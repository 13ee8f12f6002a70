"""The queue between requests and engines: it turns many requests into few engine calls, fairly.

Requests `submit` and wait. The threads of each backend (protocol.Threads) get a batch of what waits
whenever they have room; no batch waits to fill. `collect` takes their results. For every engine,
`_take_batch` alone decides what goes into a batch.

Which request is next. Tenants (API keys) share first, see tenants.py, then the requests of each.
Every request has a tag: the tokens it was served so far, counted from a clock that advances at the
speed of one request's fair share (generalised processor sharing: Parekh and Gallager, 1993). The
smallest tag is next. So a new short request overtakes the rest of a long one, and the long one
still gets its equal share. The first max_batch_tokens of a request do not count, so requests up to
that size are served whole, in the order they came.

What joins it. An input joins a batch when that costs no more than a batch of its own: the padding
it adds may cost CALL_OVERHEAD_TOKENS at most.

Event loops. A loop that is attached calls `collect`, and `flush` puts what is submitted in its
thread, once a turn, so that the requests of one turn share batches.
"""

import bisect
import itertools
import logging
import math
import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from engine import spans
from engine.admission import Admission
from engine.errors import (
    CallerGone,
    DeadlineExceeded,
    EmbedderError,
    EngineFailed,
    QueueFull,
    ShuttingDown,
)
from engine.protocol import Array, Batch, Engine, Event, Float32, InputRefused, Job, Threads
from engine.quota import Quota
from engine.tenants import Tenants
from engine.threads import PythonThreads, compute, vital

log = logging.getLogger(__name__)

# What an engine call costs beside its tokens, in tokens: 1x16 tokens take 3.4 ms, 16x16 take 30 ms
# (bf16, MiniLM, Zen 4).
CALL_OVERHEAD_TOKENS = 12
# The event loop computes a short input itself if that takes no longer than this many seconds: about
# 40 tokens of MiniLM, few or none of a large model.
MAX_INLINE_SECONDS = 0.010
OVERFLOW = (
    "at fp16 the model's values overflow on this input; the service needs PRECISION=bf16 or fp32"
)


class Queue:
    """One a process, shared by all models and modalities. Safe to call from any number of
    threads.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_batch_tokens: int,
        max_queue_tokens: int,
        threads: int,
        max_queue_seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        event: Callable[[], Event] = threading.Event,
        others: Callable[[], int] = lambda: 0,
        tenants: int = 1,
        quotas: Mapping[str | None, Quota] | None = None,
    ) -> None:
        """Args:
        threads: how many threads compute, for each backend.
        event: makes what a request waits for.
        others: how many requests other threads prepare that may still submit.
        tenants: how many there may be. With several, none can fill the queue alone.
        quotas: what tenants may use at most, by name.
        """
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.threads = threads
        self._now, self._event, self.others = clock, event, others
        self._admission = Admission(max_queue_tokens, max_queue_seconds, threads, tenants=tenants)
        self._lock = threading.Lock()
        self._jobs: list[Job] = []  # those with inputs that wait
        self.waiting_tokens = 0  # read-only for others
        self._tenants = Tenants(quotas or {})
        # Threads by backend, and the batches that they have, by number.
        self._threads: dict[str, Threads] = {}
        self._numbers = itertools.count()
        self._put: dict[int, tuple[Batch, Float32]] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)  # never closed: these threads write to it
        self._loop_thread: int | None = None
        self._call_soon: Callable[[Callable[[], None]], object] = lambda _: None
        self._flush_due = self._closed = False
        self._collector = threading.Thread(target=self._collect, name="collector", daemon=True)
        self._running = self._running_tokens = 0  # batches that were made and have not ended
        # Requests in the queue or in batches, and the most of them lately: 1 means that one client
        # calls alone.
        self._in_system, self._lately = 0, 0.0
        self.callers_gone = 0  # requests that were dropped because their callers had gone
        # Called when a batch has ended, with its seconds and whether it failed.
        self.observe: Callable[[Batch, float, bool], None] = lambda *_: None
        # Called when a request has left, with the seconds until its first batch began; if there was
        # none, until it left.
        self.waited: Callable[[float], None] = lambda _: None

    @property
    def waiting_jobs(self) -> int:
        return len(self._jobs)

    def full(self, tenant: str | None = None, tokens: int = 1) -> QueueFull | None:
        """The refusal that a request of at least so many tokens gets now, for callers that have
        not read yet what they would submit; None if the queue may take it.
        """
        asking = self._tenants.find(tenant)
        if asking is None or asking.relief is None:
            return None
        with self._lock:
            return self._admission.full(self.waiting_tokens, tokens, asking, self._tenants.active)

    # -- requests

    def submit(
        self,
        engine: Engine,
        inputs: Sequence[Array],
        costs: Sequence[int],
        deadline: float,
        gone: Callable[[], bool] | None = None,
        tenant: str | None = None,
    ) -> Float32:
        """Compute all inputs and wait for them.

        Args:
            costs: tokens of each input, in the same order; a picture's cost is in the same unit.
            deadline: on this queue's clock (`time.monotonic` by default).
            gone: whether the caller has gone. It is called from any thread, before every batch that
                finds inputs of this request waiting, so it has to be quick.
            tenant: with whose requests it shares. There may be only so many names: each is kept.
                SERVICE's are never refused for what waits.

        Returns: float32 of shape (len(inputs), engine.dimensions), in the order of `inputs`.
        Raises: QueueFull and OverQuota at once; DeadlineExceeded; CallerGone; ShuttingDown;
            EngineFailed when a batch with one of the inputs failed.
        """
        order = sorted(range(len(inputs)), key=costs.__getitem__)
        vectors = np.empty((len(inputs), engine.dimensions), np.float32)
        if not order:
            return vectors
        tokens, whose = sum(costs), self._tenants.get(tenant)
        job = Job(
            whose,
            engine,
            [inputs[i] for i in order],
            [costs[i] for i in order],
            order,
            vectors,
            deadline,
            self._event(),
            self._now(),
            gone,
            trace=spans.recording.get(),
        )
        with self._lock:
            self._enqueue(job, tokens)
        try:
            self._put_soon()
            if not job.done.wait(max(0.0, deadline - self._now())):
                with self._lock:
                    self._end(job, _too_late())
        finally:
            self._leave(job, tokens)
        if job.trace is not None:
            spans.waited(job.trace, job.submitted)
        if job.error:
            raise job.error
        return job.vectors

    def _enqueue(self, job: Job, tokens: int) -> None:
        """Queue a request of so many tokens, until `_leave`.

        Raises: QueueFull, OverQuota, ShuttingDown, and what the engine raises when its threads
            start. Then nothing has been taken.
        """
        if self._closed:
            raise _shutting_down()
        tenant, job.free = job.tenant, self._limits(job.engine)[1]
        if not tenant.never_refused:
            active = self._tenants.active
            self._admission.admit(self.waiting_tokens, tokens, tenant, active, job.free)
        backend = job.engine.backend
        if backend not in self._threads:
            own = job.engine.start_threads(self.threads, self._wake)
            count = job.engine.calls or self.threads
            self._threads[backend] = own or PythonThreads(count, self._collect_ended)
        job.threads = self._threads[backend]
        if tenant.quota:
            tenant.quota.take(tokens)
        self._in_system += 1
        self._lately = max(self._in_system, self._lately * 0.9)
        job.began = tenant.clock
        self._tenants.enter(tenant, tokens, job.free)
        self._jobs.append(job)
        self.waiting_tokens += tokens

    def _put_soon(self) -> None:
        """Put batches now, or in the loop's thread with what else is submitted in this turn."""
        if threading.get_ident() != self._loop_thread:
            with self._lock:
                self._put_batches()
        elif not self._flush_due:
            self._flush_due = True
            self._call_soon(self.flush)

    def _leave(self, job: Job, tokens: int) -> None:
        """A request of so many tokens is over: it has its vectors or an error, or an exception
        ended the wait for it. Then what is left of it is not computed.
        """
        with self._lock:
            self._end(job, CallerGone("the request was given up"))
            self._in_system -= 1
        if job.tenant.quota:
            job.tenant.quota.release(tokens, job.served)
        self.waited(max(0.0, min(job.first, self._now()) - job.submitted))

    def attach(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        """Let the calling thread's event loop collect, in place of `start`: it calls `collect`
        whenever `fileno` is readable.

        Args:
            call_soon: has the loop call a function in its next turn.
        """
        self._loop_thread, self._call_soon = threading.get_ident(), call_soon

    def flush(self) -> None:
        """Put what was submitted in the event loop's thread. A short input that is the
        only work is computed here: to wake another thread takes longer than that saves.
        """
        self._flush_due = False
        with self._lock:
            self._lately = max(self._lately, 1.0 + self.others())
            if not (
                self._running == 0
                and self._lately < 1.5
                and len(self._jobs) == 1
                and len(self._jobs[0].costs) == 1
                and self._admission.batch_speed.takes(self.waiting_tokens) <= MAX_INLINE_SECONDS
            ):
                self._put_batches()
                return
            batch = self._take_batch(self._jobs[0])
        vectors = np.empty((1, batch.engine.dimensions), np.float32)
        seconds = compute(batch.engine, batch.inputs, batch.alone, vectors)
        self._finish(batch, vectors, seconds)

    # -- batches

    def _drop_abandoned(self) -> None:
        """End requests that are too late, or whose callers have gone."""
        now = self._now()
        for job in [job for job in self._jobs if job.deadline <= now]:
            self._end(job, _too_late())
        for job in [job for job in self._jobs if job.gone and job.gone()]:
            log.debug("a caller has gone: %d tokens are not computed", sum(job.costs))
            self.callers_gone += 1
            self._end(job, CallerGone("the client closed before its answer was there"))

    def _take_batch(self, lead: Job, most_tokens: float = math.inf) -> Batch:
        """The next batch, of `lead`'s largest input and what joins it, up to `most_tokens`."""
        self._jobs.sort(key=self._tenants.rank)
        longest = lead.costs[-1]
        entries, tokens, padded = [lead.take(len(lead.costs) - 1)], longest, longest
        # Split what waits and runs into threads + 1 shares, so that the first thread to finish
        # finds work: callers send their next requests only when they have their answers. One
        # thread shares its core with the answers anyway.
        in_hand = self.waiting_tokens + self._running_tokens
        threads = lead.engine.calls or self.threads
        shares = threads + 1 if threads > 1 else 1
        share = min(most_tokens, max(lead.engine.min_batch_tokens, -(-in_hand // shares)))
        max_size, max_tokens = self._limits(lead.engine)
        counted = 0  # of `tokens`, those that were counted for their tenants
        for job in (lead, *self._jobs):
            if job.engine is not lead.engine:
                continue
            while job.costs and len(entries) < max_size:
                at = _nearest(job.costs, longest)
                cost = job.costs[at]
                with_it = max(longest, cost) * (len(entries) + 1)
                padding = (with_it - tokens - cost) * lead.engine.padding_cost
                more_padding = padding - (padded - tokens) * lead.engine.padding_cost
                if (
                    tokens + cost + padding > max_tokens
                    or more_padding > CALL_OVERHEAD_TOKENS
                    or tokens + cost > share
                ):
                    break
                entries.append(job.take(at))
                longest, tokens, padded = max(longest, cost), tokens + cost, with_it
            if tokens > counted:
                job.tenant.serve(tokens - counted)
                counted = tokens
        self.waiting_tokens -= tokens
        self._tenants.served(tokens)
        before, self._jobs = self._jobs, [job for job in self._jobs if job.costs]
        self._tenants.leave(job.tenant for job in before if not job.costs)
        if not self._jobs:
            self._admission.queue_emptied()
        alone = len(entries) == 1 and not self._jobs and not self._running and self._lately < 1.5
        self._running += 1
        self._running_tokens += tokens
        padding = (padded - tokens) * lead.engine.padding_cost
        return Batch(lead.engine, entries, tokens, tokens + round(padding), alone)

    def _limits(self, engine: Engine) -> tuple[float, int]:
        """Most inputs and tokens of a batch."""
        if engine.max_batch_tokens is None:
            return self.max_batch_size, self.max_batch_tokens
        return math.inf, engine.max_batch_tokens

    def _finish(self, batch: Batch, vectors: Float32, seconds: float | None) -> None:
        """Give a batch's vectors, shape (len(batch.entries), dimensions), to its requests; with
        None as `seconds`, it failed.
        """
        spans.computed(batch, seconds or 0.0)
        overflowed: list[bool] = [False] * len(batch.entries)
        now = self._now()
        if seconds is not None:
            for number, (job, row, _) in enumerate(batch.entries):
                job.vectors[row] = vectors[number]
            if batch.engine.precision == "fp16":
                finite: Any = np.isfinite(vectors).all(axis=1)
                overflowed = [not row for row in finite]
        with self._lock:
            self._running -= 1
            self._running_tokens -= batch.tokens
            if seconds is not None:
                queued = bool(self._jobs)
                self._admission.batch_ended(batch.tokens, seconds, now, queued=queued)
            for (job, _, _), too_large in zip(batch.entries, overflowed):
                job.running -= 1
                job.first = min(job.first, now - (seconds or 0.0))
                if too_large:
                    self._end(job, EngineFailed(OVERFLOW))
                elif seconds is None:
                    self._end(job, EngineFailed("the engine failed on the batch of this input"))
                elif not (job.running or job.costs or job.error):
                    batch.served.append(job)
                    job.done.set()
        self.observe(batch, seconds or 0.0, seconds is None)

    def _end(self, job: Job, error: EmbedderError) -> None:
        """Fail a request: what waits leaves the queue, what runs is computed and thrown away."""
        if job.done.is_set():
            return
        if job in self._jobs:
            self._jobs.remove(job)
            self.waiting_tokens -= sum(job.costs)
            job.tenant.tokens -= sum(job.costs)
            self._tenants.leave([job.tenant])
            if not self._jobs:
                self._admission.queue_emptied()
        job.inputs, job.costs, job.rows, job.error = [], [], [], error
        job.done.set()

    # -- threads

    def fileno(self) -> int:
        """An eventfd, readable when `collect` has something to do."""
        return self._wake

    def collect(self) -> None:
        """Give the vectors that were computed to their requests, and the threads their next
        batches. Waits until there is something to do.
        """
        os.eventfd_read(self._wake)
        self._collect_ended()

    def _collect_ended(self) -> None:
        with self._lock:
            ended = [
                (*self._put.pop(number), seconds)
                for threads in self._threads.values()
                for number, seconds in threads.ended()
            ]
        for batch, vectors, seconds in ended:
            if seconds is None:
                log.error("%s failed", _described(batch))
            self._finish(batch, vectors, seconds)
        with self._lock:
            self._put_batches()
            if self._closed and self._drained:
                os.eventfd_write(self._wake, 1)  # `close` waits for it

    def _put_batches(self) -> None:
        """Put batches to all threads that have room."""
        for threads in self._threads.values():
            while room := threads.room():
                self._drop_abandoned()
                jobs = [job for job in self._jobs if job.threads is threads]
                if not jobs:
                    break
                self._put_batch(threads, self._take_batch(min(jobs, key=self._tenants.rank), room))

    def _put_batch(self, threads: Threads, batch: Batch) -> None:
        """Put a batch, without the inputs that the engine refuses."""
        number = next(self._numbers)
        while batch.entries:
            try:
                vectors = threads.put(number, batch.engine, batch.inputs, batch.alone)
            except Exception as error:
                log.exception("%s was refused", _described(batch))
                refused = slice(None)
                if isinstance(error, InputRefused):
                    refused = slice(error.index, error.index + 1)
                for job, _, _ in batch.entries[refused]:
                    job.running -= 1
                    self._end(job, EngineFailed("the engine refused this input"))
                del batch.entries[refused]
            else:
                self._put[number] = batch, vectors
                return
        self._running -= 1
        self._running_tokens -= batch.tokens

    def start(self) -> None:
        """Start a thread that collects. For callers without an event loop."""
        self._collector.start()

    def _collect(self) -> None:
        with vital():
            while not (self._closed and self._is_drained()):
                self.collect()

    @property
    def _drained(self) -> bool:
        """With the lock only: a batch that is taken is for a moment in neither of these."""
        return not self._jobs and not self._running

    def _is_drained(self) -> bool:
        with self._lock:
            return self._drained

    def close(self) -> None:
        """Refuse new requests, compute what waits and end the threads. To be called before a
        process exits: Python would end them in the middle of C++ code, which aborts.
        """
        self._refuse()
        if self._collector.is_alive():
            self._collector.join()
        while not self._is_drained():
            select.select([self._wake], [], [])  # an event loop may have made it non-blocking
            self.collect()
        for threads in self._threads.values():
            threads.close()

    def stop(self) -> None:
        """Refuse new requests and fail those that wait with ShuttingDown; what runs is still
        computed.
        """
        self._refuse()
        with self._lock:
            for job in list(self._jobs):
                self._end(job, _shutting_down())

    def _refuse(self) -> None:
        with self._lock:
            self._closed = True
        os.eventfd_write(self._wake, 1)


def _described(batch: Batch) -> str:
    """For the log."""
    engine = batch.engine
    return f"a batch of {len(batch.entries)} for the {engine.modality} engine {engine.name}"


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the request waited longer than REQUEST_TIMEOUT for the engine")


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the service is shutting down; send the request again, to another instance")


def _nearest(costs: list[int], target: int) -> int:
    """Index of the cost nearest to `target` in an ascending list; of two as near, the larger."""
    at = bisect.bisect_right(costs, target)
    if at == len(costs) or (at and target - costs[at - 1] < costs[at] - target):
        at -= 1
    return at
