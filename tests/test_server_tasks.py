"""server/tasks.py: synchronous code that waits inside the event loop."""

import asyncio
import contextvars
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop
from greenlet import getcurrent

from server import tasks
from server.tasks import KEPT_TASKS, QUEUED_PER_THREAD, Busy, Event, Tasks

LONG = 60.0


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = uvloop.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def running(loop: asyncio.AbstractEventLoop) -> Iterator[Tasks]:
    """The tasks of a loop, with two threads."""
    running = Tasks(loop, threads=2, max_wait=LONG)
    yield running
    running.close()


def turn_until(running: Tasks, done: Callable[[], bool]) -> None:
    """Run the loop until something has happened, for two turns at least."""

    async def wait() -> None:
        deadline = time.monotonic() + 30
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        while not done():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)

    running.loop.run_until_complete(wait())


def turn(running: Tasks) -> None:
    """Run the loop for two turns."""
    turn_until(running, lambda: True)


def waiting(running: Tasks, results: list[Any], timeout: float = LONG) -> Event:
    """Start a task that waits for an event; whether it came goes to `results`."""
    events: list[Any] = []

    def call() -> bool:
        events.append(tasks.event())
        return bool(events[0].wait(timeout))

    running.run(call, results.append)
    assert isinstance(events[0], Event)
    return events[0]


def test_the_results_of_a_turn_are_used_together(running: Tasks) -> None:
    results: list[str] = []
    running.run(lambda: "first", results.append)
    running.run(lambda: "second", results.append)
    assert results == []
    turn(running)
    assert results == ["first", "second"]


def test_tasks_wait_and_go_on_in_the_order_of_their_events(running: Tasks) -> None:
    results: list[Any] = []
    events: dict[str, Any] = {}

    def wait(name: str) -> str:
        events[name] = tasks.event()
        events[name].wait(LONG)
        return name

    for name in ("first", "second"):
        running.run(lambda name=name: wait(name), results.append)  # type: ignore[misc]
    running.run(lambda: "third", results.append)
    turn(running)
    assert results == ["third"]
    first, second = events["first"], events["second"]
    threading.Thread(target=lambda: [event.set() for event in (second, first)]).start()
    turn_until(running, lambda: len(results) == 3)
    assert results == ["third", "second", "first"]
    assert first.is_set() and second.is_set() and not running.waiting


def test_a_finished_task_runs_the_next_call_and_keeps_nothing_of_the_last(running: Tasks) -> None:
    class Body:
        pass

    results: list[int] = []
    body = Body()
    gone = weakref.ref(body)
    running.run(lambda body=body: id(getcurrent()), results.append)  # type: ignore[misc]
    del body
    turn(running)
    assert gone() is None
    running.run(lambda: id(getcurrent()), results.append)
    turn(running)
    assert results[0] == results[1]


def test_few_tasks_are_kept(running: Tasks) -> None:
    results: list[bool] = []
    for event in [waiting(running, results) for _ in range(KEPT_TASKS + 36)]:
        event.set()
    turn_until(running, lambda: len(results) == KEPT_TASKS + 36)
    assert all(results) and len(running.idle) == KEPT_TASKS


def test_an_event_that_is_set_is_not_waited_for(running: Tasks) -> None:
    results: list[bool] = []

    def call() -> bool:
        event = tasks.event()
        event.set()
        return event.wait(LONG)

    running.run(call, results.append)
    turn(running)
    assert results == [True]


def test_a_task_gives_up_when_its_time_is_over(running: Tasks) -> None:
    results: list[bool] = []
    late = waiting(running, results, timeout=0)
    patient = waiting(running, results)
    running.expire()
    turn(running)
    assert results == [False] and list(running.waiting) == [patient]
    late.set()  # too late, and harmless
    patient.set()
    turn_until(running, lambda: len(results) == 2)
    assert results == [False, True]


def test_many_threads_wake_many_tasks(running: Tasks) -> None:
    results: list[bool] = []
    events = [waiting(running, results) for _ in range(200)]
    for part in (events[at::4] for at in range(4)):
        threading.Thread(target=lambda part=part: [event.set() for event in part]).start()
    turn_until(running, lambda: len(results) == 200)
    assert all(results)


def test_every_task_has_its_own_context(running: Tasks) -> None:
    """Flask's request is a context variable."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("number")
    results: list[int] = []
    events: list[Any] = []

    def call(number: int) -> int:
        variable.set(number)
        events.append(tasks.event())
        events[-1].wait(LONG)
        return variable.get()

    for number in range(3):
        running.run(lambda number=number: call(number), results.append)  # type: ignore[misc]
    for event in events:
        event.set()
    turn_until(running, lambda: len(results) == 3)
    assert results == [0, 1, 2]
    assert variable.get(None) is None


def test_outside_of_a_task_an_event_is_a_threads_own() -> None:
    assert isinstance(tasks.event(), threading.Event)
    assert tasks.in_thread(threading.get_ident) == threading.get_ident()


def test_a_long_call_runs_in_a_thread_and_its_error_comes_back(running: Tasks) -> None:
    results: list[Any] = []
    go = threading.Event()

    def slow() -> int:
        go.wait(10)
        return threading.get_ident()

    def failing() -> None:
        raise KeyError("no")

    def task(call: Callable[[], Any]) -> Any:
        try:
            return tasks.in_thread(call)
        except KeyError as error:
            return error.args

    running.run(lambda: task(slow), results.append)
    running.run(lambda: task(failing), results.append)
    turn_until(running, lambda: len(results) == 1)
    assert running.busy_threads == 1
    assert results == [("no",)]  # the loop did not stand still for the slow one
    go.set()
    turn_until(running, lambda: len(results) == 2)
    assert results[1] != threading.get_ident() and running.busy_threads == 0


def occupy(
    running: Tasks, results: list[Any], calls: int, whose: str | None = None
) -> threading.Event:
    """Start long calls in threads, which end when the event is set."""
    go = threading.Event()

    def task() -> str:
        try:
            tasks.in_thread(lambda: go.wait(30), whose)
            return whose or "done"
        except Busy as error:
            return str(error)

    for _ in range(calls):
        running.run(task, results.append)
    return go


def test_calls_wait_for_a_thread_in_turn_up_to_a_limit(running: Tasks) -> None:
    results: list[str] = []
    most = 2 + QUEUED_PER_THREAD * 2
    go = occupy(running, results, most + 1)
    turn(running)
    assert results == [f"all 2 threads are busy, and {most - 2} requests wait"]
    go.set()
    turn_until(running, lambda: len(results) == most + 1)
    assert results[1:] == ["done"] * most and running.busy_threads == 0


def test_one_keys_calls_leave_threads_to_anothers(loop: asyncio.AbstractEventLoop) -> None:
    running, results = Tasks(loop, threads=20, max_wait=LONG), list[str]()
    large = occupy(running, results, 20 * (1 + QUEUED_PER_THREAD), "large")
    turn(running)
    assert running.busy_threads == 18 and len(results) == 2  # for those there is no place to wait
    small = occupy(running, results, 2, "small")
    small.set()
    turn_until(running, lambda: results.count("small") == 2)
    assert running.busy_threads == 18 and "large" not in results
    large.set()
    turn_until(running, lambda: results.count("large") == 20 * (1 + QUEUED_PER_THREAD) - 2)
    assert running.busy_threads == 0
    running.close()


def test_a_thread_that_is_given_back_may_let_another_keys_call_begin_too(
    loop: asyncio.AbstractEventLoop,
) -> None:
    """With one thread free, `small` may hold 7 and `large` 15. When one of `small`'s calls ends,
    both keys may start one.
    """
    running, results = Tasks(loop, threads=20, max_wait=LONG), list[str]()
    large = occupy(running, results, 11, "large")
    small = occupy(running, results, 7, "small")
    last = occupy(running, results, 1, "small")
    later = [occupy(running, results, 1, name) for name in ("large", "small")]
    turn(running)
    assert running.busy_threads == 19 and results == []
    last.set()
    turn_until(running, lambda: results == ["small"])
    turn(running)
    assert running.busy_threads == 20
    for go in (large, small, *later):
        go.set()
    turn_until(running, lambda: len(results) == 21)
    running.close()


def test_a_call_does_not_wait_for_a_thread_for_ever(loop: asyncio.AbstractEventLoop) -> None:
    running = Tasks(loop, threads=1, max_wait=0)
    results: list[str] = []
    go = occupy(running, results, 2)
    running.expire()
    turn(running)
    assert results == ["no thread was free for 0 s"]
    go.set()
    turn_until(running, lambda: len(results) == 2)
    assert results[1] == "done" and running.busy_threads == 0
    running.close()


def test_what_a_call_wakes_goes_on_at_once(running: Tasks) -> None:
    """As the engine's results do, which come with one event of the loop."""
    results: list[bool] = []
    events = [waiting(running, results) for _ in range(3)]
    running.after(lambda: [event.set() for event in events])  # type: ignore[arg-type, return-value]
    assert results == [True] * 3
