"""Threads that compute batches in Python, for engines that have no threads of their own."""

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import numpy as np

from engine.protocol import Array, Engine, Float32

log = logging.getLogger(__name__)

Work = tuple[int, Engine, Sequence[Array], bool, Float32]


def compute(engine: Engine, inputs: Sequence[Array], alone: bool, out: Float32) -> float | None:
    """Write the vectors of a batch to `out`.

    Returns: seconds; None if the engine failed, which is logged.
    """
    started = time.perf_counter()
    try:
        out[:] = engine.run(inputs, alone=alone)
    except Exception:
        log.exception("the %s engine %s failed", engine.modality, engine.name)
        return None
    return time.perf_counter() - started


class PythonThreads:
    """Threads that call `Engine.run`, as protocol.Threads. They take a batch only when they are
    free, so that a short request never waits for one that was put ahead of it.
    """

    def __init__(self, count: int, collect: Callable[[], None]) -> None:
        """Args:
        collect: has the queue collect what has ended; called in the thread that computed it, which
            then gets its next batch without a wait for another thread.
        """
        self._collect = collect
        self._ended: deque[tuple[int, float | None]] = deque()
        # Each thread takes its batches from a queue of its own. The last to become idle gets the
        # next batch: its caches are warm, and so are those that OpenVINO keeps for each thread.
        self._work: list[SimpleQueue[Work | None]] = [SimpleQueue() for _ in range(count)]
        self._idle = list(self._work)
        self._threads = []
        for number, work in enumerate(self._work):
            name = f"inference-{number}"
            thread = threading.Thread(target=self._serve, args=(work,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, work: "SimpleQueue[Work | None]") -> None:
        with vital():
            while batch := work.get():
                number, engine, inputs, alone, vectors = batch
                self._ended.append((number, compute(engine, inputs, alone, vectors)))
                del batch, engine, inputs, vectors  # an idle thread keeps nothing alive
                self._idle.append(work)
                self._collect()

    def room(self) -> float:
        """See protocol.Threads."""
        return math.inf if self._idle else 0

    def put(self, number: int, engine: Engine, inputs: Sequence[Array], alone: bool) -> Float32:
        """See protocol.Threads."""
        vectors = np.empty((len(inputs), engine.dimensions), np.float32)
        self._idle.pop().put((number, engine, inputs, alone, vectors))
        return vectors

    def ended(self) -> list[tuple[int, float | None]]:
        """See protocol.Threads."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def close(self) -> None:
        """End the threads, once each has computed the batch it is at."""
        for work in self._work:
            work.put(None)
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def vital() -> Iterator[None]:
    """Around a thread's code: if the thread dies, end the process, since a queue that nobody serves
    must not hide behind a green probe. gunicorn starts another process.
    """
    try:
        yield
    except BaseException:
        log.critical("%s died", threading.current_thread().name, exc_info=True)
        logging.shutdown()
        os._exit(1)
