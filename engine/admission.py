"""Decides when the queue is full (429), and when a refused request should come back. Two more
limits end in 429: server/tasks.py has the threads, server/worker.py the memory.

The queue is limited in tokens and in seconds. For the seconds, the speed has to be known: it is
measured from the batches that end.
"""

import math
from dataclasses import dataclass

from engine.errors import QueueFull

# An estimate is used once it rests on so many seconds of work. After SPEED_MEMORY seconds, older
# work counts less.
SPEED_KNOWN, SPEED_MEMORY = 1.0, 20.0
# Once it was full, the queue refuses until it is down to this share of its limit. Under overload
# most requests are then refused before any work was done for them.
STILL_FULL = 0.9


@dataclass(slots=True)
class Speed:
    """Tokens a second, lately."""

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
        """Seconds; 0 when nothing was measured yet."""
        return tokens * self.seconds / max(1.0, self.tokens)


class Admission:
    """Not thread-safe: the queue calls it under its lock."""

    def __init__(self, max_queue_tokens: int, max_queue_seconds: float, threads: int) -> None:
        self.max_queue_tokens, self.max_queue_seconds = max_queue_tokens, max_queue_seconds
        self._threads = threads
        self._refusing = False
        self.batch_speed = Speed()  # of one thread
        self._best_speed = 0.0  # of one thread, tokens a second
        # Of all threads together, by the clock, while requests wait: serving requests takes time of
        # the same cores.
        self._queue_speed = Speed()
        self._counted_until: float | None = None

    def admit(self, waiting: int, added: int) -> None:
        """Whether a request of `added` tokens may join `waiting` ones. An empty queue takes a
        request of any size.

        Raises: QueueFull.
        """
        limit = self.limit() if waiting else math.inf
        if waiting + added > limit:
            self._refusing = True
            raise self._refusal(waiting, f" and this request adds {added}", limit)

    def full(self, waiting: int) -> QueueFull | None:
        """The refusal that a request of any size gets: one was refused, and the queue has hardly
        become shorter since.
        """
        if not self._refusing:
            return None
        limit = self.limit()
        if waiting <= limit * STILL_FULL:
            self._refusing = False
            return None
        return self._refusal(waiting, "", limit)

    def _refusal(self, waiting: int, and_this: str, limit: float) -> QueueFull:
        return QueueFull(
            f"{waiting} tokens are waiting{and_this}; the limit is {limit} (MAX_QUEUE_TOKENS, "
            "MAX_QUEUE_SECONDS)",
            max(1, math.ceil(self._wait(waiting))),
        )

    def limit(self) -> int:
        """Tokens that may wait: max_queue_tokens, or fewer if they would take longer than
        max_queue_seconds.
        """
        if not self.batch_speed.known or self.max_queue_seconds == math.inf:
            return self.max_queue_tokens
        seconds = self._wait(self.max_queue_tokens)
        return int(self.max_queue_tokens * min(1.0, self.max_queue_seconds / seconds))

    def _wait(self, tokens: int) -> float:
        """Seconds until `tokens` waiting tokens are computed. A queue that has just begun is taken
        to be as fast as the fastest batch: batches of short inputs, or beside other work, say
        little about long ones.
        """
        if self._queue_speed.known or not self._best_speed:
            return self._queue_speed.takes(tokens)
        return tokens / self._best_speed / self._threads

    def batch_ended(self, tokens: int, seconds: float, now: float, *, queued: bool) -> None:
        """A thread has computed a batch. `queued`: requests wait."""
        self.batch_speed.add(tokens, seconds)
        self._best_speed = max(self._best_speed, tokens / max(seconds, 1e-6))
        if queued:
            if self._counted_until is not None:
                self._queue_speed.add(tokens, now - self._counted_until)
            self._counted_until = now

    def queue_emptied(self) -> None:
        """Forget the queue's speed: the next queue may be of other requests, or beside other
        work.
        """
        self._queue_speed, self._counted_until = Speed(), None
