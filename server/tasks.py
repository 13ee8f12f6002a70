"""Synchronous code that waits inside the event loop, without a thread of its own.

A request runs as a task: a greenlet in the event loop's thread. When it has to wait, for the engine
or for a thread, it switches back to the loop, and the loop switches to it again when its event is
set. A thread for each request would cost more than a short request does.

Calls that take long (pictures, large bodies) run in a bounded pool of threads: see `in_thread`.
"""

import asyncio
import collections
import contextvars
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

log = logging.getLogger(__name__)

T = TypeVar("T")

# Finished greenlets are kept for the next calls: a new one maps 16 kB of memory, which on several
# cores costs as much as everything else of a task.
KEPT_TASKS = 64
QUEUED_PER_THREAD = 3  # calls of one key that may wait for a thread, for each thread
# One key's calls may have so many times the threads that are free, so that some are left to others:
# 57 of 64.
TIMES_FREE = 8


class Busy(Exception):
    """No thread is free, and too many calls wait already, or this one has waited too long."""


class Task(greenlet):  # type: ignore[misc]
    """Runs calls, one after the other, in a loop's thread. They may wait for an `Event`."""

    def __init__(self, tasks: "Tasks") -> None:
        super().__init__(parent=tasks.hub)
        self.tasks = tasks

    def run(self) -> None:
        """Started by the first `switch`; each later one brings a call."""
        while len(self.tasks.idle) < KEPT_TASKS:
            self.tasks.idle.append(self)
            call, then = self.parent.switch()
            self.tasks.finish(call(), then)
            del call, then  # an idle task keeps nothing alive


class Event:
    """A `threading.Event` for one task that waits."""

    __slots__ = ("_set", "_task")

    def __init__(self, task: Task) -> None:
        self._task, self._set = task, False

    def set(self) -> None:
        """May be called from any thread."""
        self._set = True
        self._task.tasks.wake(self)

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float) -> bool:
        """Returns: whether it was set within `timeout` seconds, which are checked at `expire`."""
        if not self._set:
            self._task.tasks.waiting[self] = time.monotonic() + timeout
            self._task.parent.switch()
        return self._set

    def resume(self) -> None:
        """Let the task go on, if it still waits."""
        if self._task.tasks.waiting.pop(self, None) is not None:
            self._task.switch()


class Tasks:
    """The tasks of one event loop. Used in the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, threads: int, max_wait: float) -> None:
        """Args:
        threads: calls of `in_thread` that run at a time.
        max_wait: seconds that a call may wait for a thread.
        """
        self.loop, self.hub, self.thread = loop, getcurrent(), threading.get_ident()
        self.waiting: dict[Event, float] = {}  # with the time at which each gives up
        self.idle: list[Task] = []
        self._threads = self._free = threads
        self._max_wait = max_wait
        self._pool = ThreadPoolExecutor(threads, "request")
        self._held = collections.Counter[str | None]()  # threads, by whose calls they make
        self._queue: collections.deque[tuple[Event, str | None]] = collections.deque()
        self._ready: collections.deque[Event] = collections.deque()  # set, and not yet resumed
        self._finished: collections.deque[tuple[Callable[[Any], None], Any]] = collections.deque()
        self._turn_due = False

    def run(self, call: Callable[[], T], then: Callable[[T], None]) -> None:
        """Run a call as a task until it ends or waits. Its result goes to `then`, a little later:
        the results of one turn of the loop together, so that a client which gets several responses
        is woken once (2 % at 16 connections).
        """
        if not self.idle:
            Task(self).switch()
        self.idle.pop().switch(call, then)

    def wake(self, event: Event) -> None:
        """Let the task that waits for `event` go on. May be called from any thread."""
        self._ready.append(event)
        if not self._turn_due:  # two threads may both see this; the second call does nothing
            self._turn_due = True
            if threading.get_ident() == self.thread:
                self.loop.call_soon(self._turn)
            else:
                self.loop.call_soon_threadsafe(self._turn)

    def finish(self, result: T, then: Callable[[T], None]) -> None:
        """A task's call has ended."""
        self._finished.append((then, result))
        if not self._turn_due:
            self._turn_due = True
            self.loop.call_soon(self._turn)

    def after(self, call: Callable[[], None]) -> None:
        """Make a call in the loop's thread, and then resume the tasks that it woke."""
        self._turn_due = True
        try:
            call()
        finally:
            self._turn()

    def _turn(self) -> None:
        self._turn_due = False  # before the events are taken: a later one needs another call
        while self._ready:
            self._ready.popleft().resume()
        while self._finished:
            then, result = self._finished.popleft()
            try:
                then(result)
            except Exception:  # one connection's fault must not stop the others
                log.exception("a response could not be sent")

    def expire(self) -> None:
        """Let tasks go on that have waited for too long. The worker calls it every 0.1 s."""
        now = time.monotonic()
        for event in [event for event, until in self.waiting.items() if until <= now]:
            event.resume()

    @property
    def busy_threads(self) -> int:
        return self._threads - self._free

    def take_thread(self, task: Task, whose: str | None, wait: bool) -> None:
        """Reserve a thread: in turn, or with `wait` False only if one is free now. Raises: Busy."""
        if self._reserve(whose):
            return
        if not wait:
            raise Busy("no thread is free")
        waiting = sum(name == whose for _, name in self._queue)
        if waiting >= QUEUED_PER_THREAD * self._threads:
            raise Busy(f"all {self._threads} threads are busy, and {waiting} requests wait")
        turn = Event(task), whose
        self._queue.append(turn)
        if not turn[0].wait(self._max_wait):
            self._queue.remove(turn)
            raise Busy(f"no thread was free for {self._max_wait:g} s")

    def _reserve(self, whose: str | None) -> bool:
        may = self._held[whose] < TIMES_FREE * self._free
        self._held[whose] += may
        self._free -= may
        return may

    def free_thread(self, whose: str | None) -> None:
        """Release a thread, and start every queued call that may now run. Several may: this key's
        share has shrunk too.
        """
        self._held[whose] -= 1
        self._free += 1
        for turn in [*self._queue]:
            if self._reserve(turn[1]):
                self._queue.remove(turn)
                turn[0].set()

    def submit(self, call: Callable[[], Any], event: Event) -> Any:
        """Start a call in a reserved thread; `event` is set when it has ended."""
        future = self._pool.submit(call)
        future.add_done_callback(lambda _: event.set())
        return future

    def close(self) -> None:
        """End the threads without waiting for their calls."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def event() -> "Event | threading.Event":
    """What the calling task or thread can wait for."""
    current = getcurrent()
    return Event(current) if isinstance(current, Task) else threading.Event()


def in_thread(call: Callable[[], T], whose: str | None = None, *, wait: bool = True) -> T:
    """Make a call that takes long without holding up the loop; outside of a task, just make it.

    Args:
        whose: the name of the key that it works for.
        wait: whether it may wait for a thread.

    Raises: Busy, and what the call raises.
    """
    task = getcurrent()
    if not isinstance(task, Task):
        return call()
    task.tasks.take_thread(task, whose, wait)
    done = Event(task)
    # With the task's context variables: they say what it works on.
    future = task.tasks.submit(partial(contextvars.copy_context().run, call), done)
    try:
        done.wait(float("inf"))
        return future.result()  # type: ignore[no-any-return]
    finally:
        del future  # an error would keep it alive, and it the error
        task.tasks.free_thread(whose)
