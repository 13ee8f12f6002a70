"""Requests handled in the event loop's own thread, as tasks that step aside while they wait.

A thread for each request costs more than the request: every hand-over between threads wakes a core
and finds its caches cold. A task runs until it has to wait for the engine, gives the thread back to
the event loop, and goes on when the loop comes round to it.
"""

import collections
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")


# How many tasks are kept for the next calls: for a new one Python maps 16 KB of memory and gives it
# back, which on several cores costs as much as all else of a task.
_KEPT_TASKS = 64


class Task(greenlet):  # type: ignore[misc]
    """Runs calls, one after the other, in a loop's thread; they may wait for an `Event`."""

    def __init__(self, loop: "Loop") -> None:
        super().__init__(parent=loop.hub)
        self.loop = loop

    def run(self) -> None:
        """What the first `switch` starts; the next ones bring calls."""
        while len(self.loop.idle) < _KEPT_TASKS:
            self.loop.idle.append(self)
            call, then = self.parent.switch()
            self.loop.ended(call(), then)
            del call, then  # an idle task keeps nothing alive


class Loop:
    """What an event loop needs to run tasks. All but `wake` belongs to the loop's thread."""

    def __init__(self, executor: Executor) -> None:
        """`executor` is where tasks send what must not hold up the loop."""
        self.executor = executor
        self.hub = getcurrent()
        self._thread = threading.get_ident()
        self.waiting: dict[Event, float] = {}  # with the time at which each gives up
        self.idle: list[Task] = []
        self._ready: collections.deque[Event] = collections.deque()
        self._ended: collections.deque[tuple[Callable[[Any], None], Any]] = collections.deque()
        self._woken = False
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Readable when another thread has made an event happen."""
        return self._read_fd

    def heard(self) -> None:
        """Make it readable no more; `go_on` has to come next."""
        os.read(self._read_fd, 16)
        self._woken = False

    def wake(self, event: "Event") -> None:
        """Let the task that waits for `event` go on. May be called from any thread."""
        self._ready.append(event)
        if not self._woken and threading.get_ident() != self._thread:
            self._woken = True
            os.write(self._write_fd, b"\0")

    def run(self, call: Callable[[], T], then: Callable[[T], None]) -> None:
        """Run a call as a task until it ends or waits; not to be called from a task.

        Args:
            then: what `go_on` does with the call's result.
        """
        if not self.idle:
            Task(self).switch()
        self.idle.pop().switch(call, then)

    def ended(self, result: T, then: Callable[[T], None]) -> None:
        """A task's call has ended."""
        self._ended.append((then, result))

    def go_on(self) -> None:
        """Let tasks go on whose events have happened, and do what was to be done with the results
        of those that have ended. Once a turn of the loop at least.
        """
        while self._ready:
            event = self._ready.popleft()
            if self.waiting.pop(event, None) is not None:
                event.task.switch()
        while self._ended:
            then, result = self._ended.popleft()
            then(result)

    def give_up(self) -> None:
        """Let tasks go on that have waited for too long."""
        now = time.monotonic()
        for event, until in list(self.waiting.items()):
            if until <= now and self.waiting.pop(event, None) is not None:
                event.task.switch()


class Event:
    """A `threading.Event` for one task that waits."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._set = False

    def set(self) -> None:
        """May be called from any thread."""
        self._set = True
        self.task.loop.wake(self)

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float) -> bool:
        """Returns: whether it was set. It gives up once a turn of the loop, not to the instant."""
        if not self._set:
            self.task.loop.waiting[self] = time.monotonic() + timeout
            self.task.parent.switch()
        return self._set


def event() -> "Event | threading.Event":
    """What the calling task or thread can wait for."""
    current = getcurrent()
    return Event(current) if isinstance(current, Task) else threading.Event()


def in_thread(call: Callable[[], T]) -> T:
    """Make a call that takes long without holding up the loop; in a thread, just make it."""
    current = getcurrent()
    if not isinstance(current, Task):
        return call()
    done = Event(current)
    future = current.loop.executor.submit(call)
    future.add_done_callback(lambda _: done.set())
    done.wait(float("inf"))
    return future.result()
