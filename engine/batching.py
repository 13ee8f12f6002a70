"""What many requests want at once, turned into few full engine calls, fairly: one queue, two verbs.

Requests `submit` and wait; inference threads loop over `next_batch` and run what it gives them.
Nothing sleeps and nothing waits for a batch to fill: a free thread takes what is there. An event
loop that hands in the requests of one turn brackets it with `hold` and `release`, so that they go
to the engine together.

Which work goes next. Every request carries a tag, the tokens it has been served so far, counted
from a clock that runs at the speed of one request's fair share (generalised processor sharing:
Parekh and Gallager, 1993). The smallest tag leads the next call. So a new short request goes ahead
of the rest of a long one, and the long one still gets its equal share. Tokens count only from one
engine call's worth on: requests up to that are served whole, in the order they came.

What joins it. An input joins a call when that costs no more than a call of its own would: the
padding it adds may cost CALL_OVERHEAD_TOKENS at most.
"""

import bisect
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
        """`threads` is how many threads will call `next_batch`; `start` makes them, a test may call
        it itself. `event` makes what a request waits for.
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
        self._closed = self._held = self._refusing = False
        self._running = self._running_tokens = 0  # engine calls, and tokens in them
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
            gone: whether nobody waits for the vectors any more; asked, from an inference thread and
                quick to answer, before every engine call that finds inputs of this request waiting.

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
            limit = self._queue_limit()
            if self._waiting_tokens and self._waiting_tokens + total > limit:
                self._refusing = True
                raise QueueFull(
                    f"{self._waiting_tokens} tokens are waiting and this request adds {total}; "
                    f"the limit is {limit} (MAX_QUEUE_TOKENS, MAX_QUEUE_SECONDS)",
                    self._seconds_to_serve(self._waiting_tokens),
                )
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

    def release(self) -> None:
        """End `hold`. A short input that is all there is to do is computed in the calling thread:
        to wake another takes longer than it saves.
        """
        self._held = False
        if not self._jobs:
            return
        with self._lock:
            if not (
                self._running == 0
                and self._lately < 1.5
                and len(self._jobs) == 1
                and len(self._jobs[0].costs) == 1
                and self._call_speed.takes(self._waiting_tokens) <= MAX_INLINE_SECONDS
            ):
                self._announce()
                return
            batch = self._take_batch()
        self._run(batch)

    def _announce(self) -> None:
        """Wake as many inference threads as there is work for."""
        share = self._jobs[0].engine.share if self._jobs else 1
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
                now = self._now()
                for job in [job for job in self._jobs if job.deadline <= now]:
                    self._end(
                        job,
                        DeadlineExceeded(
                            "the request waited longer than REQUEST_TIMEOUT for the engine"
                        ),
                    )
                for job in [job for job in self._jobs if job.gone and job.gone()]:
                    log.debug("a caller has gone: %d tokens are left out", sum(job.costs))
                    self.callers_gone += 1
                    self._end(job, CallerGone("the client closed before its answer was there"))
                if self._jobs:
                    return self._take_batch()
                if self._closed:
                    return None
                self._wait()

    def _wait(self) -> None:
        """Let go of the lock until there may be work."""
        woken = threading.Lock()
        woken.acquire()
        self._idle.append(woken)
        self._lock.release()
        woken.acquire()
        self._lock.acquire()

    def _take_batch(self) -> Batch:
        self._jobs.sort(key=lambda job: job.tag)
        lead = self._jobs[0]
        longest = lead.costs[-1]
        entries, tokens, padded = [lead.take(len(lead.costs) - 1)], longest, longest
        # A part for each thread, and one that is left for whoever is free next: callers send their
        # next requests only when they have their answers, and meanwhile this one would stand still.
        # (With one thread the answers take its core anyway.)
        in_hand = self._waiting_tokens + self._running_tokens
        parts = self.threads + 1 if self.threads > 1 else 1
        share = max(lead.engine.share, -(-in_hand // parts))
        active = len(self._jobs)
        for job in self._jobs:
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
        with self._lock:
            self._running -= 1
            self._running_tokens -= batch.tokens
            self._call_speed.add(batch.tokens, seconds)
            self._best_speed = max(self._best_speed, batch.tokens / max(seconds, 1e-6))
            if self._jobs:
                now = self._now()
                if self._counted is not None:
                    self._queue_speed.add(batch.tokens, now - self._counted)
                self._counted = now
            for number, (job, row, _) in enumerate(batch.entries):
                job.running -= 1
                if vectors is None:
                    self._end(
                        job, EngineFailed("the engine failed on the batch that held this input")
                    )
                    continue
                job.vectors[row] = vectors[number]
                if not job.running and not job.costs:
                    job.done.set()
        self.observe(batch, seconds, vectors is None)

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
        """Start the inference threads."""
        for number in range(self.threads):
            thread = threading.Thread(target=self._loop, name=f"inference-{number}", daemon=True)
            thread.start()
            self._started.append(thread)

    def _loop(self) -> None:
        try:
            while batch := self.next_batch():
                self._run(batch)
        except BaseException:
            # A queue nobody serves must not hide behind a green probe: end the process, gunicorn
            # starts another.
            log.critical("inference thread died", exc_info=True)
            logging.shutdown()
            os._exit(1)

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
        for thread in self._started:
            thread.join()

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


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the service is shutting down; send the request again, to another instance")


def _nearest(costs: list[int], target: int) -> int:
    """Index of the cost nearest to `target` in an ascending list; of two as near, the larger."""
    at = bisect.bisect_right(costs, target)
    if at == len(costs) or (at and target - costs[at - 1] < costs[at] - target):
        at -= 1
    return at
