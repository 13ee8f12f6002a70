"""How many connections each worker holds, in memory they share, so that none holds more than its
part.

Kept-alive connections are the load of their worker for as long as they last, and the kernel hands
new ones to whichever worker wakes first: 32 could all sit in one of two (305 instead of 560
requests/s).
"""

import mmap

_ABSENT = 0xFFFF_FFFF


class Spread:
    """One count of connections for each worker, by the worker's age (gunicorn's running number)."""

    def __init__(self, workers: int) -> None:
        """To be made before workers are forked; there is room for those of a reload too."""
        slots = 4 * workers
        self._counts = memoryview(mmap.mmap(-1, 4 * slots)).cast("I")
        for slot in range(slots):
            self._counts[slot] = _ABSENT

    def hold(self, age: int, connections: int) -> None:
        """State how many connections a worker holds."""
        self._counts[age % len(self._counts)] = connections

    def leave(self, age: int) -> None:
        """State that a worker takes no more connections."""
        self._counts[age % len(self._counts)] = _ABSENT

    def excess(self, age: int) -> int:
        """How many connections a worker holds beyond 9/8 of the smallest count of any worker; 0 or
        less when it may take the next.
        """
        fewest = min(self._counts)
        return self._counts[age % len(self._counts)] - fewest - fewest // 8
