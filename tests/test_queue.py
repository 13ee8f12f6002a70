"""engine/queue.py: order, fairness, budgets, and errors that reach only their own requests."""

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from greenlet import getcurrent, greenlet

from engine.errors import (
    CallerGone,
    DeadlineExceeded,
    EmbedderError,
    EngineFailed,
    OverQuota,
    QueueFull,
    ShuttingDown,
)
from engine.protocol import Batch, Engine, InputRefused
from engine.queue import CALL_OVERHEAD_TOKENS, MAX_INLINE_SECONDS, Queue
from engine.quota import Bucket, Quota, QuotaLimits
from engine.tenants import SERVICE
from engine.threads import PythonThreads

NEVER = 1e6
AHEAD_TOKENS = 256  # of a batch that is ahead of its thread


class Echo(Engine):
    """An engine whose vector of an input is (its first value, its length)."""

    name, modality, precision, backend, dimensions = "echo", "text", "fp32", "echo", 2

    def __init__(
        self, fail_on: int | None = None, padding_cost: float = 1.0, min_batch_tokens: int = 64
    ) -> None:
        self.fail_on, self.padding_cost = fail_on, padding_cost
        self.min_batch_tokens = min_batch_tokens
        self.alone: list[bool] = []

    def run(self, inputs: Sequence[Any], *, alone: bool = False) -> Any:
        self.alone.append(alone)
        if any(array[0] == self.fail_on for array in inputs):
            raise RuntimeError("no")
        return np.array([(array[0], len(array)) for array in inputs], np.float32)

    def widen(self) -> None: ...

    def start_threads(self, count: int, wake: int) -> "Own | None":
        return None


ECHO = Echo()


def tokens(marker: int, count: int) -> Any:
    array = np.zeros(count, np.int64)
    array[0] = marker
    return array


class Own:
    """An engine's threads, as the test plays them."""

    def __init__(self) -> None:
        self.count = 0
        self.put_batches: dict[int, tuple[list[Any], Any]] = {}
        self.results: list[tuple[int, float | None]] = []
        self.alone: list[bool] = []
        self.closed = 0
        self.refuses: set[int] = set()
        self.breaks = False

    def room(self) -> float:
        """One batch may be ahead of the threads."""
        free = self.count - len(self.put_batches)
        return math.inf if free > 0 else AHEAD_TOKENS if free == 0 else 0

    def put(self, number: int, engine: Any, inputs: Sequence[Any], alone: bool) -> Any:
        if self.breaks:
            raise RuntimeError("no")
        for index, array in enumerate(inputs):
            if array[0] in self.refuses:
                raise InputRefused("no", index)
        vectors = np.zeros((len(inputs), engine.dimensions), np.float32)
        self.put_batches[number] = [*inputs], vectors
        self.alone.append(alone)
        return vectors

    def end(self, *numbers: int, seconds: float = 0.01, fail: bool = False) -> None:
        """Compute these batches; the first one by default."""
        for number in numbers or [min(self.put_batches)]:
            inputs, vectors = self.put_batches.pop(number)
            vectors[:] = [(array[0], len(array)) for array in inputs]
            self.results.append((number, None if fail else seconds))
            os.eventfd_write(self.wake, 1)

    def ended(self) -> list[tuple[int, float | None]]:
        results, self.results = self.results, []
        return results

    def close(self) -> None:
        self.closed += 1

    @property
    def has(self) -> list[list[int]]:
        """The markers of each batch, in the order in which they were put."""
        return [sorted(int(each[0]) for each in inputs) for inputs, _ in self.put_batches.values()]


class HasOwn(Echo):
    def __init__(self, backend: str = "own", **options: Any) -> None:
        super().__init__(**options)
        self.backend, self.own, self.started = backend, Own(), list[int]()

    def start_threads(self, count: int, wake: int) -> Own:
        self.started.append(count)
        self.own.count, self.own.wake = count, wake
        return self.own


class Played(Own):
    """Threads that have room for a batch only when the test takes one."""

    def __init__(self, wake: int) -> None:
        super().__init__()
        self.wake, self.wanted = wake, 0

    def room(self) -> float:
        return math.inf if self.wanted else 0

    def put(self, number: int, engine: Any, inputs: Sequence[Any], alone: bool) -> Any:
        self.wanted -= 1
        return super().put(number, engine, inputs, alone)


class Bench:
    """A queue whose requests wait in threads of their own; the test computes the batches."""

    def __init__(self, **limits: Any) -> None:
        self.now = 0.0
        defaults = dict(max_batch_size=64, max_batch_tokens=512, max_queue_tokens=10**6, threads=1)
        self.queue = Queue(**{**defaults, **limits}, clock=lambda: self.now, event=event)
        self.pool = ThreadPoolExecutor(64)
        self.played = Played(self.queue.fileno())
        self.queue._threads[ECHO.backend] = self.played
        self.own: list[Own] = [self.played]

    def submit(
        self,
        *inputs: tuple[int, int],
        engine: Any = ECHO,
        deadline: float = NEVER,
        gone: Callable[[], bool] | None = None,
        tenant: str | None = None,
    ) -> "Future[Any]":
        """Queue a request of (marker, token count) inputs; returns once it is queued, refused, or
        with the engine's own threads."""
        arrays = [tokens(marker, count) for marker, count in inputs]
        costs = [count for _, count in inputs]
        arguments = engine, arrays, costs, deadline, gone, tenant
        if isinstance(engine, HasOwn) and engine.own not in self.own:
            self.own.append(engine.own)
        future = self.pool.submit(self.queue.submit, *arguments)
        until(lambda: future.done() or self.has(arrays[0]))
        return future

    def has(self, array: Any) -> bool:
        with self.queue._lock:
            waiting = [each for job in self.queue._jobs for each in job.inputs]
            put = [each for batch, *_ in self.queue._put.values() for each in batch.inputs]
        return any(each is array for each in waiting + put)

    def take(self) -> Batch:
        """Let a thread take the next batch."""
        self.played.wanted += 1
        self.collect()
        assert not self.played.wanted, "nothing waits"
        return self.queue._put[max(self.played.put_batches)][0]

    def collect(self) -> None:
        os.eventfd_write(self.queue.fileno(), 1)
        self.queue.collect()

    def run(
        self, batch: Batch | None = None, *, seconds: float = 0.01, fail: bool = False
    ) -> list[int]:
        """Take (unless given) and finish one call; returns its inputs' markers."""
        batch = batch or self.take()
        number = next(number for number, (each, _) in self.queue._put.items() if each is batch)
        self.played.end(number, seconds=seconds, fail=fail)
        self.collect()
        return markers(batch)


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def markers(batch: Batch) -> list[int]:
    return [int(array[0]) for array in batch.inputs]


@pytest.fixture
def bench() -> Any:
    made: list[Bench] = []

    def make(**limits: Any) -> Bench:
        made.append(Bench(**limits))
        return made[-1]

    yield make
    for one in made:
        one.queue.stop()
        while not one.queue._drained:
            for own in one.own:
                if own.put_batches:
                    own.end(*own.put_batches)
            one.collect()
        one.queue.close()
        one.pool.shutdown()


Make = Callable[..., Bench]


def test_results_return_to_their_requests_in_the_order_sent(bench: Make) -> None:
    b = bench()
    first = b.submit((1, 30), (2, 5), (3, 17))
    second = b.submit((4, 18), (5, 31))
    while b.queue._jobs:
        b.run()
    assert first.result().tolist() == [[1, 30], [2, 5], [3, 17]]
    assert second.result().tolist() == [[4, 18], [5, 31]]


def test_no_inputs_is_no_work(bench: Make) -> None:
    assert bench().queue.submit(ECHO, [], [], NEVER).shape == (0, 2)


def test_inputs_of_like_length_share_a_call_and_unlike_ones_do_not(bench: Make) -> None:
    b = bench()
    b.submit((1, 200), (2, 195), (3, 20), (4, 22))
    assert b.run() == [1, 2]
    assert sorted(b.run()) == [3, 4]


def test_an_input_joins_only_while_padding_costs_less_than_a_call_of_its_own(bench: Make) -> None:
    longest = 100
    fits = longest - CALL_OVERHEAD_TOKENS  # adds 100 padded tokens for 88 of its own
    b = bench()
    b.submit((1, longest), (2, fits))
    assert sorted(b.run()) == [1, 2]
    b.submit((1, longest), (2, fits - 1))
    assert b.run() == [1]


def test_calls_stay_within_the_token_budget_counting_padding(bench: Make) -> None:
    b = bench(max_batch_tokens=100)
    b.submit(*((number, 20 + number % 3) for number in range(20)))
    seen = []
    while len(seen) < 20:
        batch = b.take()
        assert batch.padded_tokens == max(map(len, batch.inputs)) * len(batch.inputs) <= 100
        assert batch.tokens == sum(map(len, batch.inputs))
        seen += b.run(batch)
    assert sorted(seen) == list(range(20))


def test_an_input_over_the_budget_goes_alone(bench: Make) -> None:
    b = bench(max_batch_tokens=100)
    b.submit((1, 300), (2, 300))
    assert [len(b.run()), len(b.run())] == [1, 1]


def test_calls_stay_within_the_size_limit(bench: Make) -> None:
    b = bench(max_batch_size=3)
    b.submit(*((number, 2) for number in range(7)))
    assert [len(b.run()), len(b.run()), len(b.run())] == [3, 3, 1]


def test_a_thread_takes_its_part_and_leaves_one_for_whoever_is_free_next(bench: Make) -> None:
    b = bench(threads=2)
    b.submit(*((number, 16) for number in range(16)))
    first, second = b.take(), b.take()
    assert len(first.entries) == len(second.entries) == 16 // 3
    b.run(first)
    b.submit(*((number, 16) for number in range(100, 105)))
    assert len(b.take().entries) == 16 // 3  # of what waits and what runs
    b.run(second)


@pytest.mark.parametrize(("least", "inputs"), [(16, 1), (32, 2), (48, 3), (64, 4)])
def test_no_batch_is_made_smaller_than_the_engine_says(
    bench: Make, least: int, inputs: int
) -> None:
    b = bench(threads=2)
    b.submit(*((number, 16) for number in range(4)), engine=Echo(min_batch_tokens=least))
    first = b.take()
    assert len(first.entries) == inputs
    b.run(first)


def test_padding_counts_for_what_the_engine_says_it_costs(bench: Make) -> None:
    b, cheap = bench(), Echo(padding_cost=0.1)
    b.submit((1, 100), (2, 20), engine=cheap)
    batch = b.take()
    assert sorted(markers(batch)) == [1, 2]  # 80 places of padding cost 8 tokens
    assert (batch.tokens, batch.padded_tokens) == (120, 128)
    b.run(batch)
    b.submit((1, 300), (2, 20), engine=cheap)
    assert b.run() == [1]  # 280 would cost 28, more than a call


class Task(greenlet):
    """A request that an event loop handles in its thread."""

    waits_for: "LoopEvent"
    vectors: Any = None


class LoopEvent(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        task = getcurrent()
        task.waits_for = self
        if not self.is_set():
            task.parent.switch()
        return self.is_set()


def event() -> threading.Event:
    return LoopEvent() if isinstance(getcurrent(), Task) else threading.Event()


class Loop:
    """An event loop that is attached to a queue, in the test's thread."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.tasks = bench, list[Task]()
        self.soon: list[Callable[[], None]] = []
        bench.queue.attach(self.soon.append)

    def submit(
        self, *inputs: tuple[int, int], engine: Any = ECHO, tenant: str | None = None
    ) -> Task:
        arrays = [tokens(marker, count) for marker, count in inputs]

        def run() -> None:
            costs = [len(array) for array in arrays]
            task.vectors = self.bench.queue.submit(engine, arrays, costs, NEVER, tenant=tenant)

        task = Task(run)
        self.tasks.append(task)
        task.switch()
        return task

    def turn(self) -> int:
        """Call what the queue asked for, and let requests go on that have their vectors. Returns:
        how many calls that were."""
        soon, self.soon[:] = [*self.soon], []
        for call in soon:
            call()
        for task in self.tasks:
            if not task.dead and task.waits_for.is_set():
                task.switch()
        return len(soon)


def test_the_requests_of_a_turn_of_the_loop_share_batches(bench: Make) -> None:
    b = bench()
    loop = Loop(b)
    b.played.wanted = 1
    first, second = loop.submit((1, 20)), loop.submit((2, 20))
    assert not b.played.has
    assert loop.turn() == 1
    assert b.played.has == [[1, 2]]
    collect(b, own=b.played)
    assert loop.turn() == 0
    assert (first.vectors.tolist(), second.vectors.tolist()) == ([[1, 20]], [[2, 20]])
    third = loop.submit((3, 20), (4, 20))
    assert loop.turn() == 1
    b.run()
    loop.turn()
    assert third.vectors.tolist() == [[3, 20], [4, 20]]


def test_what_other_threads_submit_does_not_wait_for_the_loop(bench: Make) -> None:
    b = bench()
    Loop(b)
    b.played.wanted = 1
    answer = b.submit((1, 20))
    assert b.played.has == [[1]]
    collect(b, own=b.played)
    assert answer.result(10).tolist() == [[1, 20]]


SHORT = 100  # tokens, which take 10 ms at 100 us each
assert MAX_INLINE_SECONDS == 0.010


def at_100_us_a_token(bench: Make, **options: Any) -> Bench:
    b = bench(**options)
    answer = b.submit((0, 1000))
    b.run(seconds=0.1)
    answer.result(10)
    return b


def test_a_short_input_that_is_the_only_work_is_computed_in_the_loop(bench: Make) -> None:
    b, engine = at_100_us_a_token(bench), Echo()
    loop = Loop(b)
    task = loop.submit((1, SHORT), engine=engine)
    loop.turn()
    assert task.vectors.tolist() == [[1, SHORT]]
    assert engine.alone == [True]


@pytest.mark.parametrize(
    ("inputs", "others"), [([(1, SHORT + 1)], 0), ([(1, 5), (2, 5)], 0), ([(1, 5)], 1)]
)
def test_what_is_long_or_has_company_is_left_to_the_threads(
    bench: Make, inputs: list[tuple[int, int]], others: int
) -> None:
    b = at_100_us_a_token(bench, others=lambda: others)
    loop = Loop(b)
    task = loop.submit(*inputs)
    loop.turn()
    assert task.vectors is None
    b.run()
    loop.turn()
    assert task.vectors.tolist() == [[*one] for one in inputs]


def test_only_a_lone_client_is_alone(bench: Make) -> None:
    b = bench()

    def alone() -> bool:
        batch = b.take()
        b.run(batch)
        return batch.alone

    b.submit((1, 20)), b.submit((2, 500))
    assert not alone() and not alone()
    shown = []
    for number in range(20):
        answer = b.submit((number, 20))
        shown.append(alone())
        answer.result(10)
    assert not shown[0] and shown[-1]  # it takes a while until nobody else is expected


def test_engines_do_not_mix_in_a_call(bench: Make) -> None:
    b, other = bench(), Echo()
    b.submit((1, 10))
    b.submit((2, 10), engine=other)
    b.submit((3, 10))
    assert sorted([sorted(b.run()), sorted(b.run())]) == [[1, 3], [2]]


def test_a_short_request_goes_ahead_of_the_rest_of_a_long_one(bench: Make) -> None:
    b = bench()
    b.submit(*((number, 490) for number in range(100)))
    b.run(), b.run()
    query = b.submit((1000, 12))
    assert 1000 in b.run() + b.run()
    assert query.result().tolist() == [[1000, 12]]


def test_a_request_that_fits_a_call_is_served_whole_before_those_that_came_later(
    bench: Make,
) -> None:
    b = bench(max_batch_tokens=100, max_batch_size=1)
    b.submit((1, 60), (2, 40))
    b.submit((3, 61), (4, 40), (7, 10))  # more than a call's worth
    for marker in (5, 6):
        b.submit((marker, 10))
    assert sum((b.run() for _ in range(7)), []) == [1, 2, 3, 4, 5, 6, 7]


def test_the_thread_that_was_busy_last_is_woken_first() -> None:
    queue = Queue(max_batch_size=8, max_batch_tokens=64, max_queue_tokens=100, threads=3)
    callers = []

    class Named(Echo):
        def run(self, inputs: Sequence[Any], *, alone: bool = False) -> Any:
            callers.append(threading.current_thread())
            return super().run(inputs, alone=alone)

    queue.start()
    for _ in range(6):
        queue.submit(Named(), [tokens(1, 3)], [3], NEVER)
    queue.close()
    assert len(callers) == 6 and len(set(callers)) == 1


def test_requests_of_equal_size_get_equal_shares(bench: Make) -> None:
    b = bench()
    b.submit(*((number, 490) for number in range(20)))
    b.run(), b.run(), b.run()
    b.submit(*((number, 490) for number in range(100, 120)))
    served = sum((b.run() for _ in range(20)), [])
    assert abs(sum(marker >= 100 for marker in served) - 10) <= 1


def test_a_long_request_is_not_starved_by_a_flood_of_short_ones(bench: Make) -> None:
    """Four clients that send the next query as soon as they have their answer: a fifth of the
    tokens is the long request's."""
    b = bench(max_batch_size=1)
    b.submit(*((number, 200) for number in range(50)))
    long, short, next_marker = 0, 0, 1000
    for _ in range(4):
        b.submit((next_marker, 20))
    while long + short < 10_000:
        marker = b.run()[0]
        if marker >= 1000:
            short += 20
            b.submit((next_marker, 20))
        else:
            long += 200
    assert long / (long + short) == pytest.approx(1 / 5, abs=0.05)


# Tenants


def test_tenants_get_equal_shares_however_many_requests_they_have(bench: Make) -> None:
    b = bench()
    for request in range(9):
        b.submit(*((request, 490) for _ in range(20)), tenant="a")
    b.run(), b.run()
    b.submit(*((100, 490) for _ in range(20)), tenant="b")
    served = sum((b.run() for _ in range(20)), [])
    assert abs(served.count(100) - 10) <= 1
    assert max(served.count(request) for request in range(9)) <= 2  # a's requests share a's half


def test_three_tenants_get_a_third_each_until_one_has_nothing_left(bench: Make) -> None:
    b = bench(max_batch_size=1)
    for number, (name, inputs) in enumerate({"a": 30, "b": 30, "c": 5}.items()):
        b.submit(*((number, 400) for _ in range(inputs)), tenant=name)
    served = sum((b.run() for _ in range(15)), [])
    assert all(4 <= served.count(number) <= 6 for number in range(3))
    served = sum((b.run() for _ in range(20)), [])
    assert abs(served.count(0) - served.count(1)) <= 2 and served.count(2) <= 1


def test_a_tenant_with_little_is_next_whenever_it_comes(bench: Make) -> None:
    """However often, while it uses less than its share."""
    b = bench()
    for request in range(30):
        b.submit(*((request, 400) for _ in range(8)), tenant="batches")
    for marker in range(1000, 1040):
        b.run(), b.run()
        b.submit((marker, 12), tenant="queries")
        assert marker in b.run()


def test_a_tenant_that_had_more_than_its_share_waits(bench: Make) -> None:
    b = bench(max_batch_size=1)
    b.submit(*((1, 100) for _ in range(100)), tenant="steady")
    b.run()
    greedy = 0
    for _ in range(60):  # it comes again at once, so it always has something waiting
        if not any(job.tenant.name == "greedy" for job in b.queue._jobs):
            b.submit((2, 300), tenant="greedy")
        greedy += 300 * b.run().count(2)
    (waiting,) = (job for job in b.queue._jobs if job.tenant.name == "steady")
    steady = 10_000 - sum(waiting.costs)
    assert greedy / (greedy + steady) == pytest.approx(0.5, abs=0.08)


def test_while_one_tenant_keeps_the_queue_full_anothers_queries_are_taken(bench: Make) -> None:
    b = bench(max_queue_tokens=20_000, tenants=2)
    refusals = list[str]()
    for request in range(12):
        batch = b.submit(*((request, 400) for _ in range(5)), tenant="batches")
        if batch.done():
            with pytest.raises(QueueFull) as info:
                batch.result()
            refusals.append(str(info.value))
    assert len(refusals) == 4 and "the limit is 17500 (MAX_QUEUE_TOKENS=20000" in refusals[0]
    assert b.queue.full("batches", 2000)
    queries = [b.submit((marker, 12), tenant="queries") for marker in range(100, 112)]
    assert b.queue.full("queries", 12) is None and b.queue.full("somebody", 12) is None
    assert sorted(b.run())[-12:] == [*range(100, 112)]
    assert all(query.result(10).any() for query in queries)


def test_a_tenant_has_a_quota(bench: Make) -> None:
    b = bench(
        quotas={
            "few": Quota("few", QuotaLimits(concurrent_tokens=100)),
            "slow": Quota("slow", QuotaLimits(tokens_per_minute=100)),
        }
    )
    b.submit((0, 500), tenant="free")
    first = b.submit((1, 60), tenant="few")
    with pytest.raises(OverQuota, match="'few' is 100 tokens at a time"):
        b.submit((2, 60), tenant="few").result(10)
    assert b.queue.waiting_tokens == 560
    b.run(), b.run()
    first.result(10)
    until(lambda: b.queue._in_system == 0)
    again = b.submit((3, 60), tenant="few")
    b.run()
    again.result(10)
    paid = b.submit((4, 100), tenant="slow")
    b.run()
    paid.result(10)
    with pytest.raises(OverQuota, match="'slow' is 100 tokens a minute"):
        b.submit((5, 60), tenant="slow").result(10)


def limited(bench: Make, **limits: float) -> tuple[Bench, Quota]:
    """A queue where the tenant "app" has limits."""
    quota = Quota("app", QuotaLimits(**limits))
    return bench(max_batch_size=1, quotas={"app": quota}), quota


class CannotStart(Echo):
    def __init__(self) -> None:
        super().__init__()
        self.backend = "broken"

    def start_threads(self, count: int, wake: int) -> None:
        raise RuntimeError("no thread")


def test_a_request_that_cannot_be_queued_takes_nothing(bench: Make) -> None:
    b, quota = limited(bench, concurrent_tokens=100, tokens_per_minute=100)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no thread"):
            b.submit((1, 90), engine=CannotStart(), tenant="app").result(10)
    assert quota.left()["tokens"].remaining == 100
    assert (b.queue._in_system, b.queue.waiting_tokens, b.queue.waiting_jobs) == (0, 0, 0)
    answer = b.submit((2, 100), tenant="app")
    assert b.run() == [2] and answer.result(10).tolist() == [[2, 100]]


class Ended(Exception):
    """What ends a task."""


def test_a_request_whose_task_is_ended_leaves_the_queue(bench: Make) -> None:
    b, quota = limited(bench, concurrent_tokens=100, tokens_per_minute=100)
    task = Loop(b).submit((1, 40), (2, 60), tenant="app")
    assert b.run() == [2]
    with pytest.raises(Ended):
        task.throw(Ended)
    assert (b.queue._in_system, b.queue.waiting_tokens, b.queue.waiting_jobs) == (0, 0, 0)
    assert quota.left()["tokens"].remaining in (40, 41)  # the clock goes on
    b.submit((3, 30), tenant="app")
    assert b.run() == [3]


@pytest.mark.parametrize("ends", ["late", "gone", "stopped"])
def test_what_is_not_computed_is_not_paid_for(bench: Make, ends: str) -> None:
    """After the first of two inputs, the request ends; another ends before its first."""
    b, quota = limited(bench, tokens_per_minute=1)
    quota._tokens = Bucket(1000, 0.0, 0.0)  # nothing is added as time passes
    left: list[bool] = []
    first = b.submit((1, 300), (2, 200), deadline=50.0, gone=lambda: bool(left), tenant="app")
    other = b.submit((3, 400), deadline=50.0, gone=lambda: bool(left), tenant="app")
    assert quota._tokens.level(0) == 100
    assert b.run() == [1]
    if ends == "late":
        b.now = 60.0
    elif ends == "gone":
        left.append(True)
    else:
        b.queue.stop()
    b.played.wanted += 1
    b.collect()
    for future in (first, other):
        with pytest.raises((DeadlineExceeded, CallerGone, ShuttingDown)):
            future.result(10)
    assert quota._tokens.level(0) == 700


def test_an_engine_error_reaches_only_the_requests_of_that_call(bench: Make) -> None:
    b = bench(max_batch_size=2)
    fails, shares = b.submit((1, 10), (2, 300)), b.submit((3, 10))
    other = b.submit((4, 100))
    seen: list[list[int]] = []
    while b.queue._jobs:
        batch = b.take()
        seen.append(markers(batch))
        b.run(batch, fail=1 in seen[-1])
    assert [1, 3] in [sorted(call) for call in seen]
    for future in (fails, shares):
        with pytest.raises(EngineFailed):
            future.result()
    assert other.result().tolist() == [[4, 100]]


def test_after_a_failed_call_the_rest_of_its_request_is_not_computed(bench: Make) -> None:
    b = bench()
    failing = b.submit((1, 400), (2, 10))
    b.run(fail=True)
    with pytest.raises(EngineFailed):
        failing.result()
    b.submit((3, 10))
    assert b.run() == [3]
    assert b.queue.waiting_tokens == 0


def test_the_threads_survive_an_engine_that_raises() -> None:
    queue = Queue(max_batch_size=8, max_batch_tokens=64, max_queue_tokens=100, threads=2)
    queue.start()
    bad = Echo(fail_on=7)
    for _ in range(4):
        with pytest.raises(EngineFailed):
            queue.submit(bad, [tokens(7, 3)], [3], NEVER)
        assert queue.submit(bad, [tokens(8, 3)], [3], NEVER).tolist() == [[8, 3]]
    queue.close()


def test_a_full_queue_refuses_and_says_when_to_come_back(bench: Make) -> None:
    b = bench(max_queue_tokens=100)
    b.submit((1, 90))
    with pytest.raises(QueueFull, match="90 tokens are waiting and this request adds 11") as info:
        b.submit((2, 11)).result()
    assert info.value.retry_after in (1, 2)
    b.submit((3, 10))
    b.queue._admission._best_speed = 10.0  # tokens/s
    with pytest.raises(QueueFull) as info:
        b.submit((4, 1)).result()
    assert 5 <= info.value.retry_after <= 11


def test_once_full_a_queue_says_so_until_some_of_it_is_done(bench: Make) -> None:
    b = bench(max_queue_tokens=100, max_batch_size=1)
    for marker in range(5):
        b.submit((marker, 20))
    assert b.queue.full() is None  # as full as may be; nobody was refused
    with pytest.raises(QueueFull):
        b.submit((9, 1)).result()
    assert "100 tokens are waiting and this request adds 1; the limit is 100" in str(b.queue.full())
    b.run()
    assert b.queue.full() is None
    b.submit((5, 20))
    assert b.queue.full() is None


def test_a_short_request_is_one_that_fits_a_batch_of_its_engine(bench: Make) -> None:
    """The last eighth of the queue is for such requests."""
    b, wide = bench(max_batch_tokens=50, max_queue_tokens=800), Echo()
    wide.max_batch_tokens = 200
    b.submit((1, 700))
    with pytest.raises(QueueFull, match="the limit is 700"):
        b.submit((2, 100)).result(10)
    b.submit((3, 100), engine=wide)
    assert b.queue.waiting_tokens == 800


def test_the_services_own_requests_are_never_refused(bench: Make) -> None:
    """A model that loads while another one has all the work it may have."""
    b = bench(max_queue_tokens=100, max_batch_size=1)
    b.submit((1, 90))
    with pytest.raises(QueueFull):
        b.submit((2, 20)).result(10)
    own = b.submit((3, 20), tenant=SERVICE)
    assert sorted(b.run() + b.run()) == [1, 3] and own.result(10).tolist() == [[3, 20]]


def test_a_wait_ends_when_the_first_batch_begins_or_the_request_leaves(bench: Make) -> None:
    b, waits = bench(max_batch_size=1), list[float]()
    b.queue.waited = waits.append
    long, late = b.submit((1, 30), (2, 20), (3, 10)), b.submit((4, 40), deadline=70.0)
    b.now = 3.0
    for _ in range(3):
        batch = b.take()
        assert waits == []
        b.now += 1.0
        b.run(batch, seconds=1.0)
    long.result(10)
    until(lambda: waits)
    b.now = 90.0
    b.played.wanted += 1
    b.collect()
    with pytest.raises(DeadlineExceeded):
        late.result(10)
    until(lambda: len(waits) == 2)
    assert waits == [3.0, 90.0]


def test_a_queue_is_as_long_as_the_clock_says_and_not_the_engine(bench: Make) -> None:
    b = bench(max_queue_tokens=1000, max_queue_seconds=5.0, max_batch_size=1)
    for _ in range(4):
        b.submit((1, 10))
    for _ in range(3):
        batch = b.take()
        b.now += 1.0
        b.run(batch, seconds=0.5)
    # From the end of the first call to that of the third: 20 tokens in 2 s, each call 0.5 s of it.
    b.submit((2, 40))
    with pytest.raises(QueueFull, match="would wait 5.1 s for its turn; the limit is 5 s"):
        b.submit((3, 1)).result()


def test_what_leaves_the_queue_for_want_of_time_leaves_no_time_behind(bench: Make) -> None:
    b = bench(max_batch_size=1)
    b.submit((1, 10))
    running = b.take()
    late = b.submit((2, 10), deadline=b.now + 0.05)
    b.run(running)
    with pytest.raises(DeadlineExceeded):
        late.result()
    b.now += 1000.0  # nothing waits
    b.submit((3, 10), (4, 10), (5, 10))
    b.run(), b.run()
    assert b.queue._admission._queue_speed.seconds == 0.0


def test_an_empty_queue_takes_a_request_of_any_size(bench: Make) -> None:
    b = bench(max_queue_tokens=100)
    future = b.submit((1, 101))
    b.run()
    assert future.result().tolist() == [[1, 101]]


def test_a_request_past_its_deadline_is_dropped_before_the_engine_sees_it(bench: Make) -> None:
    b = bench()
    b.now = 10.0
    late = b.submit((1, 10), deadline=11.0)
    b.submit((2, 10), deadline=13.0)
    b.now = 12.0
    assert b.run() == [2]
    with pytest.raises(DeadlineExceeded):
        late.result()
    assert b.queue.waiting_tokens == 0


def test_a_request_that_gives_up_leaves_the_queue(bench: Make) -> None:
    b = bench()
    with pytest.raises(DeadlineExceeded):
        b.submit((1, 90), deadline=0.0).result(10)
    assert not b.queue._jobs and b.queue.waiting_tokens == 0


def test_what_nobody_waits_for_any_more_is_not_computed(bench: Make) -> None:
    """Before its first call, and between two."""
    b = bench(max_batch_size=1)
    left: set[int] = set()
    asked = b.submit((1, 30), (2, 20), gone=lambda: 1 in left)
    never = b.submit((3, 10), (4, 10), gone=lambda: 3 in left)
    other = b.submit((5, 10), gone=lambda: False)
    left.add(3)
    assert b.run() == [1]
    left.add(1)
    assert b.run() == [5]
    for future in (asked, never):
        with pytest.raises(CallerGone):
            future.result()
    assert other.result().tolist() == [[5, 10]]
    assert b.queue.callers_gone == 2 and b.queue.waiting_tokens == 0


def test_stop_fails_what_waits_and_finishes_what_runs(bench: Make) -> None:
    b = bench(max_batch_size=1)
    running, waiting = b.submit((1, 30)), b.submit((2, 20), (3, 20))
    batch = b.take()
    b.queue.stop()
    with pytest.raises(ShuttingDown):
        waiting.result()
    with pytest.raises(ShuttingDown):
        b.submit((4, 10)).result()
    b.run(batch)
    assert running.result().tolist() == [[1, 30]]
    assert not b.queue._jobs


def test_close_refuses_new_work_and_drains_what_waits(bench: Make) -> None:
    b = bench(max_batch_size=1)
    running, waiting = b.submit((1, 10)), b.submit((2, 10))
    b.played.wanted = 2
    closing = b.pool.submit(b.queue.close)
    until(lambda: len(b.played.has) == 2)
    with pytest.raises(EmbedderError, match="shutting down"):
        b.submit((3, 10)).result()
    assert not closing.done()
    b.played.end(), b.played.end()
    closing.result(10)
    assert (running.result().tolist(), waiting.result().tolist()) == ([[1, 10]], [[2, 10]])


def test_many_threads_get_their_own_answers() -> None:
    queue = Queue(max_batch_size=8, max_batch_tokens=128, max_queue_tokens=10**6, threads=3)
    queue.start()

    def one(number: int) -> bool:
        lengths = [1 + (number * 7 + k * 13) % 60 for k in range(1 + number % 5)]
        arrays = [tokens(number * 10 + k, length) for k, length in enumerate(lengths)]
        vectors = queue.submit(ECHO, arrays, lengths, NEVER)
        expected = [[number * 10 + k, length] for k, length in enumerate(lengths)]
        return bool(vectors.tolist() == expected)

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(one, range(1500)))
    started = [thread for thread in threading.enumerate() if thread.name.startswith("inference-")]
    assert len(started) >= 3
    queue.close()
    assert queue.waiting_tokens == 0
    assert sum(thread.is_alive() for thread in started) == len(started) - 3


# Engines with threads of their own.


def collect(b: Bench, *numbers: int, own: Own, fail: bool = False) -> None:
    own.end(*numbers, fail=fail)
    b.queue.collect()


def test_an_engines_own_threads_get_batches_and_requests_their_vectors(bench: Make) -> None:
    b, engine = bench(threads=2), HasOwn(padding_cost=0.0)
    first = b.submit((1, 30), (2, 5), (3, 17), engine=engine)
    second = b.submit((4, 18), (5, 31), engine=engine)
    assert engine.started == [2] and not b.queue.waiting_tokens
    assert engine.own.has == [[1, 2, 3], [4, 5]]
    collect(b, own=engine.own)
    assert first.result(10).tolist() == [[1, 30], [2, 5], [3, 17]] and not second.done()
    collect(b, own=engine.own)
    assert second.result(10).tolist() == [[4, 18], [5, 31]]


def test_they_get_one_batch_more_than_there_are_threads(bench: Make) -> None:
    b, engine = bench(threads=2, max_batch_size=1), HasOwn()
    b.submit(*((number, 10) for number in range(6)), engine=engine)
    assert engine.own.has == [[5], [4], [3]] and b.queue.waiting_tokens == 30
    collect(b, own=engine.own)
    assert engine.own.has == [[4], [3], [2]] and b.queue.waiting_tokens == 20
    engine.own.end(), engine.own.end()
    b.queue.collect()
    assert engine.own.has == [[2], [1], [0]] and b.queue.waiting_tokens == 0


def test_a_batch_that_is_ahead_of_its_thread_is_small(bench: Make) -> None:
    b, engine = bench(), HasOwn(padding_cost=0.0)
    fits = AHEAD_TOKENS // 32
    b.submit(*((1, 32) for _ in range(40)), engine=engine)
    assert [len(batch) for batch in engine.own.has] == [512 // 32, fits]
    collect(b, own=engine.own)
    assert [len(batch) for batch in engine.own.has] == [fits, fits]
    engine.own.end(), engine.own.end()
    b.queue.collect()  # nothing is computed, so the first is no longer ahead
    assert [len(batch) for batch in engine.own.has] == [40 - 16 - 2 * fits]


def test_engines_of_a_backend_share_threads_and_no_batch(bench: Make) -> None:
    b, one = bench(threads=2), HasOwn(padding_cost=0.0)
    other = HasOwn()
    other.own = one.own
    b.submit((1, 10), engine=one)
    b.submit((2, 10), engine=other)
    assert one.started == [2] and other.started == [] and one.own.has == [[1], [2]]


def test_they_get_the_request_that_has_been_served_least(bench: Make) -> None:
    b, engine = bench(max_batch_tokens=100), HasOwn()
    b.submit(*[(1, 100)] * 5, engine=engine)
    b.submit((2, 10), engine=engine)
    b.submit(*[(3, 100)] * 5, engine=engine)
    served = []
    while engine.own.has:
        served += engine.own.has[0]
        collect(b, own=engine.own)
    assert sorted(served) == [1] * 5 + [2] + [3] * 5
    assert served.index(2) <= 3  # two had been put already, and the third was as urgent
    assert abs(served[:7].count(1) - served[:7].count(3)) <= 2


def test_their_failed_batch_fails_its_own_requests_only(bench: Make) -> None:
    b, engine = bench(max_batch_size=1), HasOwn()
    first, second = b.submit((1, 5), (2, 6), engine=engine), b.submit((3, 9), engine=engine)
    assert engine.own.has == [[2], [1]]
    collect(b, own=engine.own, fail=True)
    with pytest.raises(EngineFailed):
        first.result(10)
    assert engine.own.has == [[1], [3]]  # what they have already is computed
    collect(b, own=engine.own)
    collect(b, own=engine.own)
    assert second.result(10).tolist() == [[3, 9]]
    assert not b.queue._running and not b.queue._running_tokens and not b.queue._put


def test_what_they_refuse_fails_alone(bench: Make) -> None:
    b, engine = bench(), HasOwn(padding_cost=0.0)
    engine.own.refuses = {2}
    busy = [b.submit((number, 5), engine=engine) for number in (10, 11)]
    good, bad = b.submit((1, 60), engine=engine), b.submit((3, 50), (2, 65), engine=engine)
    engine.own.end(), engine.own.end()
    b.queue.collect()
    with pytest.raises(EngineFailed, match="refused"):
        bad.result(10)
    while engine.own.has:
        collect(b, own=engine.own)
    assert good.result(10).tolist() == [[1, 60]] and all(each.result(10).any() for each in busy)
    assert not b.queue._running and not b.queue._running_tokens and not b.queue._jobs


def test_what_they_cannot_take_at_all_fails(bench: Make) -> None:
    b, engine = bench(), HasOwn()
    engine.own.breaks = True
    with pytest.raises(EngineFailed):
        b.submit((1, 5), (2, 5), engine=engine).result(10)
    engine.own.breaks = False
    good = b.submit((3, 5), engine=engine)
    collect(b, own=engine.own)
    assert good.result(10).tolist() == [[3, 5]] and not b.queue._running_tokens


def test_what_nobody_waits_for_is_not_put_to_them(bench: Make) -> None:
    b, engine, left = bench(max_batch_size=1), HasOwn(), False
    first = [b.submit((number, 100), engine=engine) for number in (0, 1)]
    gone = b.submit((2, 30), engine=engine, gone=lambda: left)
    late = b.submit((3, 30), engine=engine, deadline=5.0)
    last = b.submit((4, 30), engine=engine)
    left, b.now = True, 6.0
    collect(b, own=engine.own)
    assert engine.own.has == [[1], [4]]
    collect(b, own=engine.own), collect(b, own=engine.own)
    assert all(each.result(10) is not None for each in (*first, last))
    with pytest.raises(CallerGone):
        gone.result(10)
    with pytest.raises(DeadlineExceeded):
        late.result(10)


def test_they_are_told_which_batch_is_alone(bench: Make) -> None:
    b, engine = bench(max_batch_size=1), HasOwn()

    def alone(*requests: "Future[Any]") -> list[bool]:
        while engine.own.has:
            collect(b, own=engine.own)
        for request in requests:
            request.result(10)
        told, engine.own.alone = engine.own.alone, []
        return told

    assert alone(b.submit((1, 5), engine=engine)) == [True]
    assert alone(b.submit((1, 5), (2, 5), engine=engine)) == [False, False]
    assert alone(b.submit((1, 5), engine=engine), b.submit((2, 5), engine=engine)) == [True, False]


def test_one_backends_threads_do_not_wait_for_anothers(bench: Make) -> None:
    b, full, free = bench(), HasOwn("full"), HasOwn("free")
    for marker in (1, 2, 3):
        b.submit((marker, 5), engine=full)
    b.submit((4, 5), engine=free)
    plain = b.submit((5, 5))
    assert full.own.has == [[1], [2]] and free.own.has == [[4]] and b.run() == [5]
    assert plain.result(10).tolist() == [[5, 5]]
    assert b.queue.waiting_jobs == 1
    collect(b, own=full.own)
    assert full.own.has == [[2], [3]]


@pytest.mark.parametrize("attached", [False, True])
def test_close_waits_for_their_batches(attached: bool) -> None:
    queue = Queue(max_batch_size=1, max_batch_tokens=64, max_queue_tokens=100, threads=1)
    if attached:
        queue.attach(lambda call: None)
        os.set_blocking(queue.fileno(), False)  # as uvloop does
    else:
        queue.start()
    engine = HasOwn()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(queue.submit, engine, [tokens(n, 5)], [5], NEVER) for n in (1, 2, 3)]
        until(lambda: len(engine.own.has) == 2 and queue.waiting_jobs)
        closing = pool.submit(queue.close)
        for _ in range(3):
            until(lambda: engine.own.has)
            assert not engine.own.closed and not closing.done()
            engine.own.end()
        closing.result(10)
        vectors = sorted(call.result(10)[0][0] for call in calls)
    assert vectors == [1, 2, 3] and engine.own.closed == 1


def test_an_engines_own_limit_of_a_batch_takes_the_place_of_the_queues(bench: Make) -> None:
    b, engine = bench(max_batch_size=2, max_batch_tokens=30), Echo(padding_cost=0.0)
    engine.max_batch_tokens = 50
    future = b.submit(*((marker, 10) for marker in range(1, 8)), engine=engine)
    assert sorted(map(len, (b.take().inputs, b.take().inputs))) == [2, 5]
    assert not future.done()


def test_an_input_that_overflows_at_fp16_is_its_own_requests_error(bench: Make) -> None:
    b, engine = bench(), Echo(padding_cost=0.0)
    engine.precision = "fp16"
    futures = [b.submit((marker, 4), engine=engine) for marker in (1, 2)]
    batch = b.take()
    number = next(iter(b.played.put_batches))
    b.played.put_batches.pop(number)
    vectors = b.queue._put[number][1]
    vectors[:] = [(array[0], math.nan if array[0] == 2 else 4) for array in batch.inputs]
    b.played.results.append((number, 0.01))
    b.collect()
    assert futures[0].result().tolist() == [[1, 4]]
    with pytest.raises(EngineFailed, match="overflow on this input; .* PRECISION=bf16"):
        futures[1].result()


def test_an_engine_says_how_many_calls_it_takes_at_a_time() -> None:
    """The queue has one thread for each core; two of them wait for the same GPU."""
    engine, running, most = Echo(), list[int](), list[int]()
    engine.calls, go = 2, threading.Event()
    right = engine.run

    def run(inputs: Sequence[Any], *, alone: bool = False) -> Any:
        running.append(1)
        most.append(len(running))
        assert go.wait(30)
        running.pop()
        return right(inputs)

    engine.run = run  # type: ignore[method-assign]
    queue = Queue(max_batch_size=1, max_batch_tokens=8, max_queue_tokens=100, threads=5)
    queue.start()
    with ThreadPoolExecutor(6) as pool:
        futures = [
            pool.submit(queue.submit, engine, [tokens(marker, 4)], [4], NEVER)
            for marker in range(1, 7)
        ]
        until(lambda: queue.waiting_jobs == 4)
        go.set()
        assert sorted(future.result()[0][0] for future in futures) == [1, 2, 3, 4, 5, 6]
    queue.close()
    assert max(most) == 2


def test_an_idle_thread_keeps_no_engine() -> None:
    """One whose vectors were wrong takes memory, which the next one needs."""
    collected, engine = threading.Event(), Echo()
    threads, gone = PythonThreads(1, collected.set), weakref.ref(engine)
    threads.put(0, engine, [tokens(1, 3)], False)
    del engine
    assert collected.wait(60)
    assert gone() is None
    threads.close()
