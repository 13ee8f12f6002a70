"""engine/batching.py: order, fairness, budget, and errors that reach only their own. No sleeps."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from engine.batching import CALL_OVERHEAD_TOKENS, MAX_INLINE_SECONDS, Batch, Batcher, Speed
from engine.errors import (
    CallerGone,
    DeadlineExceeded,
    EmbedderError,
    EngineFailed,
    QueueFull,
    ShuttingDown,
)

NEVER = 1e6


class Echo:
    """An engine whose vector of an input is (its first value, its length)."""

    name, modality, dimensions = "echo", "text", 2

    def __init__(
        self, fail_on: int | None = None, padding_cost: float = 1.0, share: int = 64
    ) -> None:
        self.fail_on, self.padding_cost, self.share = fail_on, padding_cost, share
        self.alone: list[bool] = []

    def run(self, inputs: Sequence[Any], *, alone: bool = False) -> Any:
        self.alone.append(alone)
        if any(array[0] == self.fail_on for array in inputs):
            raise RuntimeError("no")
        return np.array([(array[0], len(array)) for array in inputs], np.float32)


ECHO = Echo()


def tokens(marker: int, count: int) -> Any:
    array = np.zeros(count, np.int64)
    array[0] = marker
    return array


class Bench:
    """A batcher whose requests wait in threads of their own; the test makes the engine calls."""

    def __init__(self, **limits: Any) -> None:
        self.now = 0.0
        defaults = dict(max_batch_size=64, max_batch_tokens=512, max_queue_tokens=10**6, threads=1)
        self.batcher = Batcher(**{**defaults, **limits}, clock=lambda: self.now)
        self.pool = ThreadPoolExecutor(64)
        self.own_engines: list[Own] = []

    def submit(
        self,
        *inputs: tuple[int, int],
        engine: Any = ECHO,
        deadline: float = NEVER,
        gone: Callable[[], bool] | None = None,
    ) -> "Future[Any]":
        """Queue a request of (marker, token count) inputs; returns once it is queued or refused."""
        before = len(self.batcher._jobs)
        arrays = [tokens(marker, count) for marker, count in inputs]
        costs = [count for _, count in inputs]
        future = self.pool.submit(self.batcher.submit, engine, arrays, costs, deadline, gone)
        while len(self.batcher._jobs) == before and not future.done():
            threading.Event().wait(0.0005)
        return future

    def own(self, engine: "Own", *inputs: tuple[int, int], **options: Any) -> "Future[Any]":
        """`submit` to an engine with threads of its own."""
        self.own_engines.append(engine)
        arrays = [tokens(marker, count) for marker, count in inputs]
        costs = [count for _, count in inputs]
        arguments = engine, arrays, costs, options.pop("deadline", NEVER)
        future = self.pool.submit(self.batcher.submit, *arguments, **options)
        while not future.done():
            with self.batcher._lock:
                queued = [ids for job in self.batcher._jobs for ids in job.inputs]
                if any(ids is arrays[0] for ids in (*queued, *(text[1] for text in engine.given))):
                    break
        return future

    def take(self) -> Batch:
        batch = self.batcher.next_batch()
        assert batch is not None
        return batch

    def run(self, batch: Batch | None = None) -> list[int]:
        """Take (unless given) and finish one call; returns its inputs' markers."""
        batch = batch or self.take()
        self.batcher.finish(batch, batch.engine.run(batch.inputs), 0.01)
        return markers(batch)


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
        one.batcher.close()
        while (batch := one.batcher.next_batch()) is not None:
            one.batcher.finish(batch, None, 0.0)
        while not one.batcher._drained:
            for engine in one.own_engines:
                engine.room = 10**6
                engine.call()
            one.batcher.collect()
        one.pool.shutdown()


Make = Callable[..., Bench]


def test_results_return_to_their_requests_in_the_order_sent(bench: Make) -> None:
    b = bench()
    first = b.submit((1, 30), (2, 5), (3, 17))
    second = b.submit((4, 18), (5, 31))
    while b.batcher._jobs:
        b.run()
    assert first.result().tolist() == [[1, 30], [2, 5], [3, 17]]
    assert second.result().tolist() == [[4, 18], [5, 31]]


def test_no_inputs_is_no_work(bench: Make) -> None:
    assert bench().batcher.submit(ECHO, [], [], NEVER).shape == (0, 2)


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


@pytest.mark.parametrize(("share", "in_a_call"), [(16, 1), (32, 2), (48, 3), (64, 4)])
def test_no_call_is_made_smaller_than_the_engines_share(
    bench: Make, share: int, in_a_call: int
) -> None:
    b = bench(threads=2)
    b.submit(*((number, 16) for number in range(4)), engine=Echo(share=share))
    first = b.take()
    assert len(first.entries) == in_a_call
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


def test_held_requests_go_to_the_engine_together(bench: Make) -> None:
    b = bench()
    b.batcher.hold()
    threads = ThreadPoolExecutor(1)
    taken = threads.submit(b.take)
    b.submit((1, 20))
    b.submit((2, 20))
    assert not taken.done()
    b.batcher.release()
    assert sorted(markers(taken.result(10))) == [1, 2]
    b.run(taken.result())
    threads.shutdown()


SHORT = 100  # tokens, which take 10 ms at 100 us each
assert MAX_INLINE_SECONDS == 0.010


def at_100_us_a_token(bench: Make) -> Bench:
    b = bench()
    answer = b.submit((0, 1000))
    batch = b.take()
    b.batcher.finish(batch, batch.engine.run(batch.inputs), 0.1)
    answer.result(10)
    return b


def test_a_short_input_that_is_all_there_is_is_computed_by_whoever_releases(bench: Make) -> None:
    b, engine = at_100_us_a_token(bench), Echo()
    b.batcher.hold()
    answer = b.submit((1, SHORT), engine=engine)
    b.batcher.release()
    assert answer.result(10).tolist() == [[1, SHORT]]
    assert engine.alone == [True]


def test_what_is_long_or_has_company_is_left_to_the_inference_threads(bench: Make) -> None:
    b = at_100_us_a_token(bench)
    for inputs, company in (([(1, SHORT + 1)], 0), ([(1, 5), (2, 5)], 0), ([(1, 5)], 1)):
        b.batcher.hold()
        answer = b.submit(*inputs)
        b.batcher.release(company)
        assert not answer.done()
        b.run()
        answer.result(10)


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
    batcher = Batcher(max_batch_size=8, max_batch_tokens=64, max_queue_tokens=100, threads=3)
    callers = []

    class Named(Echo):
        def run(self, inputs: Sequence[Any], *, alone: bool = False) -> Any:
            callers.append(threading.current_thread())
            return super().run(inputs, alone=alone)

    batcher.start()
    for _ in range(6):
        while len(batcher._idle) < 3:
            threading.Event().wait(0.0005)
        batcher.submit(Named(), [tokens(1, 3)], [3], NEVER)
    batcher.close()
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


def test_an_engine_error_reaches_only_the_requests_of_that_call(bench: Make) -> None:
    b = bench(max_batch_size=2)
    fails, shares = b.submit((1, 10), (2, 300)), b.submit((3, 10))
    other = b.submit((4, 100))
    seen: list[list[int]] = []
    while b.batcher._jobs:
        batch = b.take()
        seen.append(markers(batch))
        failed = 1 in seen[-1]
        b.batcher.finish(batch, None if failed else batch.engine.run(batch.inputs), 0.01)
    assert [1, 3] in [sorted(call) for call in seen]
    for future in (fails, shares):
        with pytest.raises(EngineFailed):
            future.result()
    assert other.result().tolist() == [[4, 100]]


def test_after_a_failed_call_the_rest_of_its_request_is_not_computed(bench: Make) -> None:
    b = bench()
    failing = b.submit((1, 400), (2, 10))
    b.batcher.finish(b.take(), None, 0.01)
    with pytest.raises(EngineFailed):
        failing.result()
    b.submit((3, 10))
    assert b.run() == [3]
    assert b.batcher._waiting_tokens == 0


def test_the_threads_survive_an_engine_that_raises() -> None:
    batcher = Batcher(max_batch_size=8, max_batch_tokens=64, max_queue_tokens=100, threads=2)
    batcher.start()
    bad = Echo(fail_on=7)
    for _ in range(4):
        with pytest.raises(EngineFailed):
            batcher.submit(bad, [tokens(7, 3)], [3], NEVER)
        assert batcher.submit(bad, [tokens(8, 3)], [3], NEVER).tolist() == [[8, 3]]
    batcher.close()


def test_a_full_queue_refuses_and_says_when_to_come_back(bench: Make) -> None:
    b = bench(max_queue_tokens=100)
    b.submit((1, 90))
    with pytest.raises(QueueFull, match="90 tokens are waiting and this request adds 11") as info:
        b.submit((2, 11)).result()
    assert info.value.retry_after == 1
    b.submit((3, 10))
    b.batcher._best_speed = 10.0  # tokens/s
    with pytest.raises(QueueFull) as info:
        b.submit((4, 1)).result()
    assert info.value.retry_after == 10


def test_once_full_a_queue_says_so_until_some_of_it_is_done(bench: Make) -> None:
    b = bench(max_queue_tokens=100, max_batch_size=1)
    for marker in range(5):
        b.submit((marker, 20))
    assert b.batcher.full() is None  # as full as may be; nobody was refused
    with pytest.raises(QueueFull):
        b.submit((9, 1)).result()
    assert "100 tokens are waiting; the limit is 100 (MAX_QUEUE" in str(b.batcher.full())
    b.run()
    assert b.batcher.full() is None
    b.submit((5, 20))
    assert b.batcher.full() is None


def test_a_queue_is_full_when_it_would_take_too_long(bench: Make) -> None:
    b = bench(max_queue_tokens=1000, max_queue_seconds=5.0, threads=2)
    b.submit((1, 90))
    b.batcher._call_speed = Speed(9, 0.9)  # too little to know the speed by
    b.submit((2, 20))
    b.batcher._call_speed, b.batcher._best_speed = Speed(60, 10.0), 12.0  # on each of two threads
    b.submit((3, 10))
    with pytest.raises(QueueFull, match="120 tokens are waiting .* adds 1; the limit is 120 ") as e:
        b.submit((4, 1)).result()
    assert e.value.retry_after == 5


def test_the_speed_is_that_of_late(bench: Make) -> None:
    b = bench(max_batch_size=1)
    for speed, count in ((10, 60), (1000, 80)):
        for _ in range(count):
            b.submit((1, speed))
            batch = b.take()
            b.batcher.finish(batch, batch.engine.run(batch.inputs), 1.0)
    assert 1 / b.batcher._call_speed.takes(1) == pytest.approx(1000, rel=0.05)


def test_a_queue_is_as_long_as_the_clock_says_and_not_the_engine(bench: Make) -> None:
    b = bench(max_queue_tokens=1000, max_queue_seconds=5.0, max_batch_size=1)
    for _ in range(4):
        b.submit((1, 10))
    for _ in range(3):
        batch = b.take()
        b.now += 1.0
        b.batcher.finish(batch, batch.engine.run(batch.inputs), 0.5)
    # From the end of the first call to that of the third: 20 tokens in 2 s, each call 0.5 s of it.
    b.submit((2, 40))
    with pytest.raises(QueueFull, match="50 tokens are waiting .* adds 1; the limit is 50 ") as e:
        b.submit((3, 1)).result()
    assert e.value.retry_after == 5


def test_a_queue_that_was_empty_says_nothing_of_the_next(bench: Make) -> None:
    b = bench(max_queue_tokens=1000, max_queue_seconds=5.0, max_batch_size=1)

    def slow_call() -> None:
        batch = b.take()
        b.now += 2.0
        b.batcher.finish(batch, batch.engine.run(batch.inputs), 0.1)

    b.batcher._call_speed, b.batcher._best_speed = Speed(9, 2.0), 1000.0  # and 5 by the clock
    b.submit((1, 100), (1, 10), (1, 10), (1, 10))
    slow_call(), slow_call()
    with pytest.raises(QueueFull, match="the limit is 25 "):
        b.submit((2, 100)).result()
    slow_call(), slow_call()
    b.submit((3, 900)), b.submit((4, 90))
    assert b.batcher.waiting_tokens == 990


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
    assert b.batcher._queue_speed.seconds == 0.0


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
    assert b.batcher._waiting_tokens == 0


def test_a_request_that_gives_up_leaves_the_queue() -> None:
    batcher = Batcher(max_batch_size=8, max_batch_tokens=64, max_queue_tokens=100, threads=1)
    with pytest.raises(DeadlineExceeded):
        batcher.submit(ECHO, [tokens(1, 90)], [90], 0.0)
    assert not batcher._jobs and batcher._waiting_tokens == 0


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
    assert b.batcher.callers_gone == 2 and b.batcher._waiting_tokens == 0


def test_stop_fails_what_waits_and_finishes_what_runs(bench: Make) -> None:
    b = bench(max_batch_size=1)
    running, waiting = b.submit((1, 30)), b.submit((2, 20), (3, 20))
    batch = b.take()
    b.batcher.stop()
    with pytest.raises(ShuttingDown):
        waiting.result()
    with pytest.raises(ShuttingDown):
        b.submit((4, 10)).result()
    b.run(batch)
    assert running.result().tolist() == [[1, 30]]
    assert b.batcher.next_batch() is None


def test_close_refuses_new_work_and_drains_what_waits(bench: Make) -> None:
    b = bench()
    waiting = b.submit((1, 10))
    b.batcher.close()
    with pytest.raises(EmbedderError, match="shutting down"):
        b.submit((2, 10)).result()
    b.run()
    assert waiting.result().tolist() == [[1, 10]]
    assert b.batcher.next_batch() is None


def test_many_threads_get_their_own_answers() -> None:
    batcher = Batcher(max_batch_size=8, max_batch_tokens=128, max_queue_tokens=10**6, threads=3)
    batcher.start()

    def one(number: int) -> bool:
        lengths = [1 + (number * 7 + k * 13) % 60 for k in range(1 + number % 5)]
        arrays = [tokens(number * 10 + k, length) for k, length in enumerate(lengths)]
        vectors = batcher.submit(ECHO, arrays, lengths, NEVER)
        expected = [[number * 10 + k, length] for k, length in enumerate(lengths)]
        return bool(vectors.tolist() == expected)

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(one, range(1500)))
    started = [thread for thread in threading.enumerate() if thread.name.startswith("inference-")]
    assert len(started) >= 3
    batcher.close()
    assert batcher._waiting_tokens == 0
    assert sum(thread.is_alive() for thread in started) == len(started) - 3


# Engines with threads of their own.


class Own(Echo):
    """An engine whose own threads the test is."""

    def __init__(self, room: int = 10**6, refuses: int | None = None) -> None:
        super().__init__()
        self.room, self.refuses = room, refuses  # room: tokens that it takes before it calls
        self.given: list[tuple[int, Any, Any, int, float, bool]] = []
        self.calls: list[tuple[list[int], float]] = []
        self.told = self.closed = 0

    def start(self, wake: int, *, max_batch_size: int, max_batch_tokens: int) -> "Own":
        self.wake, self.limits = wake, (max_batch_size, max_batch_tokens)
        return self

    def takes(self, tokens: int) -> bool:
        return sum(len(ids) for _, ids, *_ in self.given) + tokens <= self.room

    def give(self, ticket: int, ids: Any, vectors: Any, row: int, tag: float, alone: bool) -> None:
        if ids[0] == self.refuses:
            raise ValueError("no")
        self.given.append((ticket, ids, vectors, row, tag, alone))

    def go(self) -> None:
        self.told += 1

    def call(self, texts: int = 10**6, *, fail: bool = False) -> list[int]:
        """Compute what was given first, or some of it; returns the inputs' markers."""
        call = sorted(self.given, key=lambda text: text[4])[:texts]
        for text in call:
            self.given.remove(text)
            _, ids, vectors, row, _, _ = text
            if not fail:
                vectors[row] = ids[0], len(ids)
        self.calls.append(([ticket for ticket, *_ in call], -1.0 if fail else 0.01))
        os.eventfd_write(self.wake, 1)
        return [int(ids[0]) for _, ids, *_ in call]

    def ended(self) -> list[tuple[list[int], float]]:
        calls, self.calls = self.calls, []
        return calls

    def close(self) -> None:
        self.closed += 1

    @property
    def has(self) -> list[int]:
        return [int(ids[0]) for _, ids, *_ in self.given]


def test_an_engines_own_threads_get_the_inputs_and_requests_their_vectors(bench: Make) -> None:
    b, engine = bench(max_batch_size=9, max_batch_tokens=99), Own()
    first, second = (
        b.own(engine, (1, 30), (2, 5), (3, 17)),
        b.own(engine, (4, 18), (5, 31)),
    )
    assert engine.limits == (9, 99) and engine.told == 2
    assert sorted(engine.has) == [1, 2, 3, 4, 5] and not b.batcher.waiting_tokens
    engine.call(4)
    b.batcher.collect()
    assert first.result().tolist() == [[1, 30], [2, 5], [3, 17]]
    assert engine.has == [4] and [job.done.is_set() for job, *_ in b.batcher._given.values()] == [
        False
    ]
    engine.call()
    b.batcher.collect()
    assert second.result().tolist() == [[4, 18], [5, 31]]


def test_they_get_no_more_than_they_take_and_the_rest_later(bench: Make) -> None:
    b, engine = bench(), Own(room=100)
    b.own(engine, (1, 60), (2, 50), (3, 40))
    b.own(engine, (4, 70))
    assert engine.has == [1] and b.batcher.waiting_tokens == 160
    engine.call()
    b.batcher.collect()
    assert engine.has == [2, 3] and b.batcher.waiting_tokens == 70


def test_they_get_the_request_that_has_been_served_least(bench: Make) -> None:
    b, engine = bench(max_batch_tokens=100), Own(room=100)
    b.own(engine, *[(1, 100)] * 5)
    b.own(engine, (2, 10))
    b.own(engine, *[(3, 100)] * 5)
    served = []
    while engine.given:
        served += engine.call()
        b.batcher.collect()
    assert sorted(served) == [1] * 5 + [2] + [3] * 5
    assert served.index(2) == 2 and abs(served[:7].count(1) - served[:7].count(3)) <= 2


def test_their_failed_call_fails_its_own_requests_only(bench: Make) -> None:
    b, engine = bench(), Own()
    first, second = b.own(engine, (1, 5), (2, 6)), b.own(engine, (3, 9))
    assert engine.call(1, fail=True) == [2]
    b.batcher.collect()
    with pytest.raises(EngineFailed):
        first.result()
    assert set(engine.call()) == {1, 3}
    b.batcher.collect()
    assert second.result().tolist() == [[3, 9]]
    assert not b.batcher._running and not b.batcher._running_tokens and not b.batcher._given


def test_what_they_refuse_fails_alone(bench: Make) -> None:
    b, engine = bench(), Own(room=150, refuses=2)
    good = b.own(engine, (1, 60))
    bad = b.own(engine, (3, 50), (2, 70))
    with pytest.raises(EngineFailed):
        bad.result()
    engine.call()
    b.batcher.collect()
    assert good.result().tolist() == [[1, 60]]
    assert not b.batcher._running and not b.batcher._running_tokens and not b.batcher._jobs


def test_what_nobody_waits_for_is_not_given_to_them(bench: Make) -> None:
    b, engine, left = bench(), Own(room=100), False
    first = b.own(engine, (1, 100))
    gone = b.own(engine, (2, 30), gone=lambda: left)
    late = b.own(engine, (3, 30), deadline=5.0)
    last = b.own(engine, (4, 30))
    assert engine.call() == [1]
    left, b.now = True, 6.0
    b.batcher.collect()
    assert engine.call() == [4]
    b.batcher.collect()
    assert first.result() is not None and last.result() is not None
    with pytest.raises(CallerGone):
        gone.result()
    with pytest.raises(DeadlineExceeded):
        late.result()


def test_they_are_told_which_input_is_alone(bench: Make) -> None:
    b, engine = bench(), Own()

    def alone(*requests: "Future[Any]") -> list[bool]:
        flags = [text[-1] for text in engine.given]
        engine.call()
        b.batcher.collect()
        for request in requests:
            request.result()
        return flags

    assert alone(b.own(engine, (1, 5))) == [True]
    assert alone(b.own(engine, (1, 5), (2, 5))) == [False, False]
    assert alone(b.own(engine, (1, 5)), b.own(engine, (2, 5))) == [True, False]


def test_one_engines_threads_do_not_wait_for_anothers(bench: Make) -> None:
    b, full, free = bench(), Own(room=0), Own()
    b.own(full, (1, 5))
    b.own(free, (2, 5))
    plain = b.submit((3, 5))
    assert full.has == [] and free.has == [2] and b.run() == [3]
    assert plain.result().tolist() == [[3, 5]]
    assert b.batcher.waiting_jobs == 1
    full.room = 5
    free.call()
    b.batcher.collect()
    assert full.has == [1]


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline


@pytest.mark.parametrize("taken_over", [False, True])
def test_close_waits_for_their_calls(taken_over: bool) -> None:
    batcher = Batcher(max_batch_size=8, max_batch_tokens=64, max_queue_tokens=100, threads=1)
    batcher.start()
    if taken_over:
        batcher.take_over()
    engine = Own(room=5)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(batcher.submit, engine, [tokens(n, 5)], [5], NEVER) for n in (1, 2)]
        until(lambda: engine.given and batcher.waiting_jobs)
        closing = pool.submit(batcher.close)
        engine.call()
        until(lambda: engine.given)
        assert not engine.closed
        engine.call()
        closing.result(10)
        assert sorted(call.result()[0][0] for call in calls) == [1, 2] and engine.closed == 1
