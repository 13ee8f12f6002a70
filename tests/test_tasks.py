"""api/tasks.py: tasks that step aside while they wait, and go on when they may."""

import os
import selectors
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from greenlet import getcurrent

from api import tasks
from api.tasks import Event, Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    with ThreadPoolExecutor(2) as executor:
        yield Loop(executor)


def turn(loop: Loop) -> None:
    """A turn of an event loop that has nothing else to do."""
    if not (loop._ready or loop._ended):
        with selectors.DefaultSelector() as poller:
            poller.register(loop, selectors.EVENT_READ)
            assert poller.select(10)
        loop.heard()
    loop.go_on()


def waiting(loop: Loop, results: list[Any], timeout: float = 60) -> Event:
    """Start a task that waits for an event; whether it came goes to `results`."""
    events: list[Any] = []

    def call() -> bool:
        events.append(tasks.event())
        return bool(events[0].wait(timeout))

    loop.run(call, results.append)
    assert isinstance(events[0], Event)
    return events[0]


def test_a_task_that_need_not_wait_ends_at_once_and_its_result_is_used_later(loop: Loop) -> None:
    results: list[str] = []
    loop.run(lambda: "done", results.append)
    assert results == []
    loop.go_on()
    assert results == ["done"]


def test_tasks_step_aside_and_go_on_in_the_order_of_their_events(loop: Loop) -> None:
    results: list[Any] = []
    first, second = waiting(loop, results), waiting(loop, results)
    loop.run(lambda: "third", results.append)
    loop.go_on()
    assert results == ["third"]
    threading.Thread(target=lambda: [event.set() for event in (second, first)]).start()
    while len(results) < 3:
        turn(loop)
    assert results == ["third", True, True]
    assert first.is_set() and second.is_set() and not loop.waiting


def test_a_task_that_has_ended_runs_the_next_call_and_keeps_nothing_of_the_last(
    loop: Loop,
) -> None:
    class Body:
        pass

    results: list[int] = []
    body = Body()
    gone = weakref.ref(body)
    loop.run(lambda body=body: id(getcurrent()), results.append)  # type: ignore[misc]
    del body
    loop.go_on()
    assert gone() is None
    loop.run(lambda: id(getcurrent()), results.append)
    loop.go_on()
    assert results[0] == results[1]


def test_few_tasks_are_kept(loop: Loop) -> None:
    results: list[bool] = []
    for event in [waiting(loop, results) for _ in range(100)]:
        event.set()
    loop.go_on()
    assert results == [True] * 100 and len(loop.idle) == 64


def test_an_event_that_has_happened_is_not_waited_for(loop: Loop) -> None:
    results: list[bool] = []

    def call() -> bool:
        event = tasks.event()
        event.set()
        return event.wait(60)

    loop.run(call, results.append)
    loop.go_on()
    assert results == [True]


def test_a_task_gives_up_when_its_time_is_over(loop: Loop) -> None:
    results: list[bool] = []
    late = waiting(loop, results, timeout=0)
    patient = waiting(loop, results, timeout=60)
    loop.give_up()
    loop.go_on()
    assert results == [False] and list(loop.waiting) == [patient]
    late.set()  # too late, and harmless
    patient.set()
    loop.go_on()
    assert results == [False, True]


def test_many_threads_wake_many_tasks(loop: Loop) -> None:
    results: list[bool] = []
    events = [waiting(loop, results) for _ in range(200)]
    threads = [
        threading.Thread(target=lambda part: [event.set() for event in part], args=(events[at::4],))
        for at in range(4)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(results) < 200 and time.monotonic() < deadline:
        turn(loop)
    assert results == [True] * 200


def test_a_wake_that_comes_late_does_not_keep_the_loop_awake(loop: Loop) -> None:
    """Two threads may both find that none has woken it; the second writes after the first was
    served.
    """
    results: list[bool] = []
    threading.Thread(target=waiting(loop, results).set).start()
    turn(loop)
    os.write(loop._write_fd, b"\0")
    turn(loop)
    with selectors.DefaultSelector() as poller:
        poller.register(loop, selectors.EVENT_READ)
        assert poller.select(0) == []


def test_outside_a_task_an_event_is_a_threads_own() -> None:
    assert isinstance(tasks.event(), threading.Event)
    assert tasks.in_thread(threading.get_ident) == threading.get_ident()


def test_a_long_call_runs_in_a_thread_and_its_error_comes_back(loop: Loop) -> None:
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

    loop.run(lambda: task(slow), results.append)
    loop.run(lambda: task(failing), results.append)
    turn(loop)
    assert results == [("no",)]  # the loop did not stand still for the slow one
    go.set()
    turn(loop)
    assert results[1] != threading.get_ident()


def test_in_a_task_every_thing_of_the_context_is_its_own(loop: Loop) -> None:
    """As Flask's request is: it stands in a context variable."""
    import contextvars

    variable: contextvars.ContextVar[int] = contextvars.ContextVar("number")
    results: list[int] = []
    events: list[Any] = []

    def call(number: int) -> int:
        variable.set(number)
        events.append(tasks.event())
        events[-1].wait(60)
        return variable.get()

    for number in range(3):
        loop.run(lambda number=number: call(number), results.append)  # type: ignore[misc]
    for event in events:
        event.set()
    turn(loop)
    assert results == [0, 1, 2]
    assert variable.get(None) is None
