"""What many requests want at once, turned into few full engine calls, fairly: one queue, two verbs.

Requests `submit` and wait; inference threads loop over `next_batch` and run what it gives them. An
engine may have threads of its own: these get their inputs a little before they need them, and
`collect` takes what they have made. Nothing sleeps and nothing waits for a batch to fill: a free
thread takes what is there. An event loop that hands in the requests of one turn brackets it with
`hold` and `release`, so that they go to the engine together.

Which work goes next. Every request carries a tag, the tokens it has been served so far, counted
from a clock that runs at the speed of one request's fair share (generalised processor sharing:
Parekh and Gallager, 1993). The smallest tag leads the next call. So a new short request goes ahead
of the rest of a long one, and the long one still gets its equal share. Tokens count only from one
engine call's worth on: requests up to that are served whole, in the order they came.

What joins it. An input joins a call when that costs no more than a call of its own would: the
padding it adds may cost CALL_OVERHEAD_TOKENS at most.
"""

import bisect
import contextlib
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from engine.errors import (
    CallerGone,
    DeadlineExceeded,
    EmbedderError,
    EngineFailed,
    QueueFull,
    ShuttingDown,
)

log = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

# What an engine call costs beside its tokens, in tokens: 1x16 tokens take 3.4 ms, 16x16 take 30 ms
# (bf16, MiniLM, Zen 4).
CALL_OVERHEAD_TOKENS = 12
# Seconds after which the speed seen in them is believed, and after which older ones begin to count
# less.
SPEED_KNOWN, SPEED_MEMORY = 1.0, 20.0
# A full queue refuses what comes until it is down to this share of its limit, so that under
# overload most is refused before any work was spent on it.
STILL_FULL = 0.9
# The event loop stands still while it computes a short input itself, for no longer than this by the
# speed seen so far: some 40 tokens of MiniLM, few or none of a large model.
MAX_INLINE_SECONDS = 0.010


class Event(Protocol):
    """What a request waits for: a `threading.Event`, or a counterpart of the caller's."""

    def set(self) -> None: ...

    def is_set(self) -> bool: ...

    def wait(self, timeout: float) -> bool: ...


class Engine(Protocol):
    """Anything that turns a list of arrays into one vector each; called from several threads."""

    name: str
    modality: str
    dimensions: int
    padding_cost: float  # what a padded token costs, as a share of a real one
    share: int  # tokens; no call is made smaller to leave other threads their part of what waits

    @property
    def precision(self) -> str: ...

    def run(self, inputs: Sequence[Array], *, alone: bool = False) -> Float32: ...


class Threads(Protocol):
    """An engine's own threads. They make their calls of what they were given, when they are free to
    begin one.
    """

    def takes(self, tokens: int) -> bool:
        """Whether an input of so many tokens should be given now."""

    def give(
        self, ticket: int, ids: Array, vectors: Float32, row: int, tag: float, alone: bool
    ) -> None:
        """Queue an input, by its tag; its vector goes to `vectors[row]`. Raises: whatever says that
        it can't be computed.
        """

    def go(self) -> None:
        """What was given may be begun."""

    def ended(self) -> list[tuple[list[int], float]]:
        """Calls that have ended: their tickets and seconds, less than 0 if the call failed."""

    def close(self) -> None:
        """End them."""


@runtime_checkable
class HasThreads(Protocol):
    """An engine that has them."""

    def start(self, wake: int, *, max_batch_size: int, max_batch_tokens: int) -> Threads:
        """Start threads that write to an eventfd, `wake`, when calls have ended."""


@dataclass(eq=False, slots=True)
class Job:
    """One request's work: its inputs in ascending order of cost, and where their vectors go."""

    engine: Engine
    inputs: list[Array]
    costs: list[int]
    rows: list[int]  # inputs[i] belongs to vectors[rows[i]]
    vectors: Float32
    deadline: float
    done: Event
    submitted: float = 0.0  # on the batcher's clock, as `deadline`
    gone: Callable[[], bool] | None = None
    threads: Threads | None = None  # the engine's own
    began: float = 0.0  # on the clock of shares
    free: int = 0  # how many tokens may be served before they count
    served: int = 0  # tokens, taken for an engine call
    running: int = 0
    error: EmbedderError | None = None

    @property
    def tag(self) -> float:
        return self.began + (self.served if self.served > self.free else 0)

    def take(self, at: int) -> tuple["Job", int, Array]:
        """Move input `at` from waiting to running."""
        cost = self.costs.pop(at)
        self.served += cost
        self.running += 1
        return self, self.rows.pop(at), self.inputs.pop(at)


@dataclass(slots=True)
class Batch:
    """One engine call."""

    engine: Engine
    entries: list[tuple[Job, int, Array]]
    tokens: int  # without padding
    padded_tokens: int  # with it, as much of it as is computed
    alone: bool  # nothing else is computed or waits
    served: list[Job] = field(default_factory=list)  # requests that it was the last call of

    @property
    def inputs(self) -> list[Array]:
        return [array for _, _, array in self.entries]


@dataclass(slots=True)
class Speed:
    """Tokens a second, of late."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds
        if self.seconds > SPEED_MEMORY:
            self.tokens, self.seconds = self.tokens / 2, self.seconds / 2

    @property
    def known(self) -> bool:
        return self.seconds >= SPEED_KNOWN

    def takes(self, tokens: int) -> float:
        """Seconds; 0 when nothing was seen yet."""
        return tokens * self.seconds / max(1.0, self.tokens)


class Batcher:
    """The queue between request threads and inference threads. One a process, shared by all models
    and modalities.
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
    ) -> None:
        """`threads` is how many threads will call `next_batch`, and another, until `take_over`,
        `collect`; `start` makes them, a test may call both itself. `event` makes what a request
        waits for.
        """
        self.max_queue_seconds = max_queue_seconds
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.max_queue_tokens = max_queue_tokens
        self.threads = threads
        self._now, self._event = clock, event
        self._lock = threading.Lock()
        # A lock for each thread that waits for work. The last is released first: its caches are
        # warm, and so are those that OpenVINO keeps for each thread that calls it.
        self._idle: list[threading.Lock] = []
        self._jobs: list[Job] = []  # every job with inputs waiting
        self._waiting_tokens = 0
        self._share_clock = 0.0
        self._started: list[threading.Thread] = []
        # Engines and their own threads, if they have any; what these have, by their tickets.
        self._own: dict[Engine, Threads | None] = {}
        self._tickets = itertools.count()
        self._given: dict[int, tuple[Job, int, Array]] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)  # never closed: these threads write to it
        self._collector: list[threading.Thread] = []
        self._taken_over = False
        self._closed = self._held = self._refusing = False
        # Engine calls, or what engines' own threads have, by the input; and the tokens of both.
        self._running = self._running_tokens = 0
        # Requests being served, and the most of them lately: 1 means that one client calls alone.
        self._in_system, self._lately = 0, 0.0
        # How fast a thread's calls are, and the fastest of them (tokens a second); and all together
        # by the clock, since there is a queue: what sends and answers takes cores too.
        self._call_speed, self._best_speed, self._queue_speed = Speed(), 0.0, Speed()
        self._counted: float | None = None  # until when the clock was
        self.callers_gone = 0  # requests left out because nobody waited for them any more
        # Told of every engine call when it has ended: the batch, its seconds, whether it failed.
        self.observe: Callable[[Batch, float, bool], None] = lambda *_: None

    @property
    def waiting_jobs(self) -> int:
        return len(self._jobs)

    @property
    def waiting_tokens(self) -> int:
        return self._waiting_tokens

    def full(self) -> QueueFull | None:
        """The refusal of whatever comes now: a request was refused, and little has left the queue
        since. For callers that have not yet read what they would submit.
        """
        if not self._refusing:
            return None
        waiting, limit = self._waiting_tokens, self._queue_limit()
        if waiting <= limit * STILL_FULL:
            self._refusing = False
            return None
        return QueueFull(
            f"{waiting} tokens are waiting; the limit is {limit} (MAX_QUEUE_TOKENS, "
            "MAX_QUEUE_SECONDS)",
            self._seconds_to_serve(waiting),
        )

    # -- the first verb
    # ------------------------------------------------------------------------------------------

    def submit(
        self,
        engine: Engine,
        inputs: Sequence[Array],
        costs: Sequence[int],
        deadline: float,
        gone: Callable[[], bool] | None = None,
    ) -> Float32:
        """Compute all inputs and wait for them.

        Args:
            costs: tokens of each input, in the same order; a picture states its cost in the same
                unit.
            deadline: on this batcher's clock (`time.monotonic` unless told otherwise).
            gone: whether nobody waits for the vectors any more; asked, from any thread and quick to
                answer, before every engine call that finds inputs of this request waiting.

        Returns: float32 of shape (len(inputs), engine.dimensions), in the order of `inputs`.
        Raises: QueueFull at once; DeadlineExceeded; CallerGone; ShuttingDown; EngineFailed when a
        call that held one of the inputs failed.
        """
        order = sorted(range(len(inputs)), key=costs.__getitem__)
        job = Job(
            engine,
            [inputs[i] for i in order],
            [costs[i] for i in order],
            order,
            np.empty((len(inputs), engine.dimensions), np.float32),
            deadline,
            self._event(),
            self._now(),
            gone,
        )
        if not order:
            return job.vectors
        total = sum(costs)
        with self._lock:
            if self._closed:
                raise _shutting_down()
            limit = self._queue_limit() if self._waiting_tokens else math.inf
            if self._waiting_tokens + total > limit:
                self._refusing = True
                raise QueueFull(
                    f"{self._waiting_tokens} tokens are waiting and this request adds {total}; "
                    f"the limit is {limit} (MAX_QUEUE_TOKENS, MAX_QUEUE_SECONDS)",
                    self._seconds_to_serve(self._waiting_tokens),
                )
            if engine not in self._own:
                self._own[engine] = self._start_own(engine)
            job.threads = self._own[engine]
            self._in_system += 1
            self._lately = max(self._in_system, self._lately * 0.9)
            job.began, job.free = self._share_clock, self.max_batch_tokens
            self._jobs.append(job)
            self._waiting_tokens += total
            if not self._held:
                self._announce()
        if not job.done.wait(max(0.0, deadline - self._now())):
            with self._lock:
                self._end(
                    job,
                    DeadlineExceeded(
                        "the request waited longer than REQUEST_TIMEOUT for the engine"
                    ),
                )
        with self._lock:
            self._in_system -= 1
        if job.error:
            raise job.error
        return job.vectors

    def hold(self) -> None:
        """Wake no inference thread until `release`: several requests are on their way."""
        self._held = True

    def release(self, company: int = 0) -> None:
        """End `hold`. A short input that is all there is to do is computed in the calling thread:
        to wake another takes longer than it saves.

        Args:
            company: requests that others are at work on, which may not have come here yet.
        """
        self._held = False
        if not self._jobs:
            return
        with self._lock:
            self._lately = max(self._lately, 1.0 + company)
            if not (
                self._running == 0
                and self._lately < 1.5
                and len(self._jobs) == 1
                and len(self._jobs[0].costs) == 1
                and self._call_speed.takes(self._waiting_tokens) <= MAX_INLINE_SECONDS
            ):
                self._announce()
                return
            batch = self._take_batch(self._jobs[0])
        self._run(batch)

    def _announce(self) -> None:
        """Wake as many inference threads as there is work for."""
        self._give()
        if not any([job.threads is None for job in self._jobs]):
            return
        share = self._jobs[0].engine.share
        for _ in range(min(len(self._idle), max(1, self._waiting_tokens // share))):
            self._idle.pop().release()

    # -- the second verb
    # -----------------------------------------------------------------------------------------

    def next_batch(self) -> Batch | None:
        """Wait for work and take the next engine call's worth of it. None: the batcher is closed
        and drained.
        """
        with self._lock:
            while True:
                self._leave_out()
                jobs = [job for job in self._jobs if job.threads is None]
                if jobs:
                    return self._take_batch(min(jobs, key=_tag))
                if self._closed:
                    return None
                self._wait()

    def _leave_out(self) -> None:
        """End what nobody waits for any more."""
        now = self._now()
        for job in [job for job in self._jobs if job.deadline <= now]:
            self._end(
                job,
                DeadlineExceeded("the request waited longer than REQUEST_TIMEOUT for the engine"),
            )
        for job in [job for job in self._jobs if job.gone and job.gone()]:
            log.debug("a caller has gone: %d tokens are left out", sum(job.costs))
            self.callers_gone += 1
            self._end(job, CallerGone("the client closed before its answer was there"))

    def _wait(self) -> None:
        """Let go of the lock until there may be work."""
        woken = threading.Lock()
        woken.acquire()
        self._idle.append(woken)
        self._lock.release()
        woken.acquire()
        self._lock.acquire()

    def _take_batch(self, lead: Job) -> Batch:
        """The next engine call, which `lead` leads."""
        self._jobs.sort(key=_tag)
        longest = lead.costs[-1]
        entries, tokens, padded = [lead.take(len(lead.costs) - 1)], longest, longest
        # A part for each thread, and one that is left for whoever is free next: callers send their
        # next requests only when they have their answers, and meanwhile this one would stand still.
        # (With one thread the answers take its core anyway.)
        in_hand = self._waiting_tokens + self._running_tokens
        parts = self.threads + 1 if self.threads > 1 else 1
        share = max(lead.engine.share, -(-in_hand // parts))
        active = len(self._jobs)
        for job in (lead, *self._jobs):
            if job.engine is not lead.engine:
                continue
            while job.costs and len(entries) < self.max_batch_size:
                at = _nearest(job.costs, longest)
                cost = job.costs[at]
                with_it = max(longest, cost) * (len(entries) + 1)
                padding = (with_it - tokens - cost) * lead.engine.padding_cost
                more_padding = padding - (padded - tokens) * lead.engine.padding_cost
                if (
                    tokens + cost + padding > self.max_batch_tokens
                    or more_padding > CALL_OVERHEAD_TOKENS
                    or tokens + cost > share
                ):
                    break
                entries.append(job.take(at))
                longest, tokens, padded = max(longest, cost), tokens + cost, with_it
        self._waiting_tokens -= tokens
        self._share_clock += tokens / active
        self._jobs = [job for job in self._jobs if job.costs]
        self._forget_queue()
        alone = len(entries) == 1 and not self._jobs and not self._running and self._lately < 1.5
        self._running += 1
        self._running_tokens += tokens
        padding = (padded - tokens) * lead.engine.padding_cost
        return Batch(lead.engine, entries, tokens, tokens + round(padding), alone)

    def finish(self, batch: Batch, vectors: Float32 | None, seconds: float) -> None:
        """Hand a call's vectors, shape (len(batch.entries), dimensions), to their requests; None
        means it failed.
        """
        if vectors is not None:
            for number, (job, row, _) in enumerate(batch.entries):
                job.vectors[row] = vectors[number]
        self._finished(batch, 1, seconds, failed=vectors is None)

    def _finished(self, batch: Batch, running: int, seconds: float, *, failed: bool) -> None:
        """A call's vectors are where they belong, or there are none. `running` is what it counted
        for in `_running`.
        """
        with self._lock:
            self._running -= running
            self._running_tokens -= batch.tokens
            self._call_speed.add(batch.tokens, seconds)
            self._best_speed = max(self._best_speed, batch.tokens / max(seconds, 1e-6))
            if self._jobs:
                now = self._now()
                if self._counted is not None:
                    self._queue_speed.add(batch.tokens, now - self._counted)
                self._counted = now
            for job, _, _ in batch.entries:
                job.running -= 1
                if failed:
                    self._end(
                        job, EngineFailed("the engine failed on the batch that held this input")
                    )
                elif not (job.running or job.costs or job.error):
                    batch.served.append(job)
                    job.done.set()
        self.observe(batch, seconds, failed)

    # -- engines with threads of their own
    # ---------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when `collect` has something to do."""
        return self._wake

    def collect(self) -> None:
        """Hand the vectors that have been made to their requests, and to the threads what waits.
        Waits until there is something to do; to be called by one thread only.
        """
        os.eventfd_read(self._wake)
        for engine, threads in list(self._own.items()):
            for tickets, seconds in threads.ended() if threads else ():
                entries = [self._given.pop(ticket) for ticket in tickets]
                tokens = sum([len(ids) for _, _, ids in entries])
                batch = Batch(engine, entries, tokens, tokens, alone=False)
                if seconds < 0:
                    log.error(
                        "%s engine %s failed on a batch of %d inputs",
                        engine.modality,
                        engine.name,
                        len(entries),
                    )
                self._finished(batch, len(entries), max(0.0, seconds), failed=seconds < 0)
        with self._lock:
            self._give()

    def _start_own(self, engine: Engine) -> Threads | None:
        if not isinstance(engine, HasThreads):
            return None
        sizes = {"max_batch_size": self.max_batch_size, "max_batch_tokens": self.max_batch_tokens}
        return engine.start(self._wake, **sizes)

    def take_over(self) -> None:
        """From now on the caller is who calls `collect`."""
        self._taken_over = True
        os.eventfd_write(self._wake, 1)
        for thread in self._collector:
            thread.join()

    def _give(self) -> None:
        """Give the engines' own threads what waits, the smallest tag first, as far as they take it.
        Tokens count as served from here on.
        """
        if not self._jobs or not any([job.threads for job in self._jobs]):
            return
        self._leave_out()
        active, given = len(self._jobs), set()
        jobs = sorted([job for job in self._jobs if job.threads], key=_tag)
        while jobs:
            job, threads = jobs[0], jobs[0].threads
            assert threads
            if not threads.takes(job.costs[-1]):
                jobs = [other for other in jobs if other.threads is not threads]
                continue
            given.add(threads)
            tag, ticket, cost = job.tag, next(self._tickets), job.costs[-1]
            _, row, ids = self._given[ticket] = job.take(len(job.costs) - 1)
            alone = active == 1 and not job.costs and not self._running and self._lately < 1.5
            self._waiting_tokens -= cost
            self._share_clock += cost / active
            self._running += 1
            self._running_tokens += cost
            try:
                threads.give(ticket, ids, job.vectors, row, tag, alone)
            except Exception:
                log.exception("%s engine %s refused an input", job.engine.modality, job.engine.name)
                del self._given[ticket]
                self._running -= 1
                self._running_tokens -= cost
                job.running -= 1
                self._end(job, EngineFailed("the engine refused this input"))
            if not job.costs:
                del jobs[0]
            elif len(jobs) > 1 and job.tag > jobs[1].tag:
                jobs.sort(key=_tag)
        self._jobs = [job for job in self._jobs if job.costs]
        self._forget_queue()
        for threads in given:
            threads.go()

    def _end(self, job: Job, error: EmbedderError) -> None:
        """Fail a job: what of it still waits leaves the queue, what is running is computed and
        thrown away.
        """
        if job.done.is_set():
            return
        if job in self._jobs:
            self._jobs.remove(job)
            self._waiting_tokens -= sum(job.costs)
            self._forget_queue()
        job.inputs, job.costs, job.rows, job.error = [], [], [], error
        job.done.set()

    def _forget_queue(self) -> None:
        """Forget the speed of a queue that is empty: the next may be of quite other requests, or
        beside other work on these cores.
        """
        if not self._jobs:
            self._queue_speed, self._counted = Speed(), None

    def _queue_limit(self) -> int:
        """Tokens that may wait: max_queue_tokens, or fewer if they take max_queue_seconds."""
        if not self._call_speed.known or self.max_queue_seconds == math.inf:
            return self.max_queue_tokens
        seconds = self._takes(self.max_queue_tokens)
        return int(self.max_queue_tokens * min(1.0, self.max_queue_seconds / seconds))

    def _takes(self, tokens: int) -> float:
        """Seconds that `tokens` wait: by the clock, or for a new queue at best. Calls of short
        inputs, or beside other work, say little of how fast long ones are.
        """
        if self._queue_speed.known or not self._best_speed:
            return self._queue_speed.takes(tokens)
        return tokens / self._best_speed / self.threads

    def _seconds_to_serve(self, tokens: int) -> int:
        """Whole seconds, at least 1."""
        return max(1, math.ceil(self._takes(tokens)))

    # -- the threads
    # ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the inference threads, and one that collects what engines' own have made."""
        for number in range(self.threads):
            thread = threading.Thread(target=self._loop, name=f"inference-{number}", daemon=True)
            self._started.append(thread)
        self._collector.append(
            threading.Thread(target=self._collect, name="collector", daemon=True)
        )
        for thread in (*self._started, *self._collector):
            thread.start()

    def _loop(self) -> None:
        with _vital():
            while batch := self.next_batch():
                self._run(batch)

    def _collect(self) -> None:
        with _vital():
            while not self._taken_over and not (self._closed and self._drained):
                self.collect()

    @property
    def _drained(self) -> bool:
        """Whether engines' own threads have nothing more to do."""
        return not self._given and not any(job.threads for job in self._jobs)

    def _run(self, batch: Batch) -> None:
        started = time.perf_counter()
        vectors: Float32 | None = None
        try:
            vectors = batch.engine.run(batch.inputs, alone=batch.alone)
        except Exception:
            log.exception(
                "%s engine %s failed on a batch of %d inputs",
                batch.engine.modality,
                batch.engine.name,
                len(batch.entries),
            )
        self.finish(batch, vectors, time.perf_counter() - started)

    def close(self) -> None:
        """Refuse new work, compute what waits and end the inference threads. Before a process
        exits: Python ends those that are left, and in the middle of C++ that ends in an abort.
        """
        self._refuse()
        for thread in (*self._started, *self._collector):
            thread.join()
        while self._taken_over and not self._drained:
            self.collect()
        for threads in self._own.values():
            if threads:
                threads.close()

    def stop(self) -> None:
        """Refuse new work and fail what waits with ShuttingDown; what runs is still computed."""
        self._refuse()
        with self._lock:
            for job in list(self._jobs):
                self._end(job, _shutting_down())

    def _refuse(self) -> None:
        with self._lock:
            self._closed = True
            while self._idle:
                self._idle.pop().release()
        os.eventfd_write(self._wake, 1)


@contextlib.contextmanager
def _vital() -> Iterator[None]:
    """Around a thread's whole life: if it dies, end the process, as a queue that nobody serves must
    not hide behind a green probe. gunicorn starts another.
    """
    try:
        yield
    except BaseException:
        log.critical("%s died", threading.current_thread().name, exc_info=True)
        logging.shutdown()
        os._exit(1)


def _tag(job: Job) -> float:
    return job.tag


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the service is shutting down; send the request again, to another instance")


def _nearest(costs: list[int], target: int) -> int:
    """Index of the cost nearest to `target` in an ascending list; of two as near, the larger."""
    at = bisect.bisect_right(costs, target)
    if at == len(costs) or (at and target - costs[at - 1] < costs[at] - target):
        at -= 1
    return at
