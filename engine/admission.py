"""Decides which requests may join the queue, and when a refused one should come back (429). Further
limits end in 429: quota.py has a key's own, server/tasks.py the threads, server/worker.py the
memory.

Time. A request may join if it would be computed within max_queue_seconds, by the order in which the
queue serves: what others have waiting counts only as far as it is served before this request ends.
So a short request is taken although long ones have filled the queue, and a tenant with little
waiting is taken although another has much. The speed is measured from the batches that end.

Memory. max_queue_tokens limits what waits in all. The last eighth is for requests that fit a batch,
and with several tenants each may have eight times what it leaves free, so that there is always room
for one that comes.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import QueueFull
from engine.tenants import Tenant

# An estimate is used once it rests on so many seconds of work. After SPEED_MEMORY seconds, older
# work counts less.
SPEED_KNOWN, SPEED_MEMORY = 1.0, 20.0
# Once a tenant was refused, its requests are refused before any work was done for them, until the
# queue is down to this share of what it was. Long ones must fit this share of the limits then.
STILL_FULL = 0.9
# The share of max_queue_tokens that is kept for requests of one batch. What a tenant may have
# waiting, as a multiple of the tokens that are free.
RESERVE, TIMES_FREE = 1 / 8, 8


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

    def takes(self, tokens: float) -> float:
        """Seconds; 0 when nothing was measured yet."""
        return tokens * self.seconds / max(1.0, self.tokens)


class Admission:
    """Not thread-safe: the queue calls it under its lock."""

    def __init__(
        self,
        max_queue_tokens: int,
        max_queue_seconds: float,
        threads: int,
        *,
        tenants: int = 1,
    ) -> None:
        """`tenants`: how many there may be."""
        self.max_queue_tokens, self.max_queue_seconds = max_queue_tokens, max_queue_seconds
        self._threads, self._tenants = threads, tenants
        self.batch_speed = Speed()  # of one thread
        self._best_speed = 0.0  # of one thread, tokens a second
        # Of all threads together, by the clock, while requests wait: serving requests takes time of
        # the same cores.
        self._queue_speed = Speed()
        self._counted_until: float | None = None
        self._easy = self._sure()

    def admit(
        self, waiting: int, added: int, tenant: Tenant, active: Iterable[Tenant], batch: int
    ) -> None:
        """Whether a request of `added` tokens may join `waiting` ones. An empty queue takes a
        request of any size.

        Args:
            active: the tenants that have something waiting.
            batch: the most tokens of a batch of its engine. A request up to that size is served
                whole, before later ones.

        Raises: QueueFull.
        """
        if not waiting or waiting + added <= self._easy:
            return
        if refusal := self._refusal(waiting, added, tenant, active, batch, 1.0):
            tenant.relief, tenant.batch = waiting * STILL_FULL, batch
            raise refusal

    def full(
        self, waiting: int, added: int, tenant: Tenant, active: Iterable[Tenant]
    ) -> QueueFull | None:
        """The refusal that a request of at least `added` tokens gets: one of its tenant was
        refused, and the queue has hardly become shorter since.
        """
        if tenant.relief is None or waiting <= tenant.relief:
            tenant.relief = None
            return None
        part = STILL_FULL if added > tenant.batch else 1.0
        return self._refusal(waiting, added, tenant, active, tenant.batch, part)

    def _refusal(
        self,
        waiting: int,
        added: int,
        tenant: Tenant,
        active: Iterable[Tenant],
        batch: int,
        part: float,
    ) -> QueueFull | None:
        """With `part` of the limits."""
        if not waiting:
            return None
        most = part * self.max_queue_tokens
        if added > batch:
            most *= 1 - RESERVE
        if waiting + added > most:
            return self._over(f"{waiting} tokens are waiting", added, most, waiting)
        if self._tenants > 1:
            most = TIMES_FREE * (part * self.max_queue_tokens - waiting)
            if tenant.tokens + added > most:
                what = f"{tenant.tokens} tokens of this key are waiting"
                return self._over(what, added, most, waiting)
        if not self.batch_speed.known:
            return None
        seconds = self._wait(self.ahead(added, tenant, active, batch))
        if seconds <= part * self.max_queue_seconds:
            return None
        return QueueFull(
            f"this request would wait {seconds:.1f} s for its turn; the limit is "
            f"{self.max_queue_seconds:g} s (MAX_QUEUE_SECONDS)",
            spread(seconds),
        )

    def _over(self, what: str, added: int, most: float, waiting: int) -> QueueFull:
        limit = f"{int(most)} (MAX_QUEUE_TOKENS"
        if most < self.max_queue_tokens:
            limit += f"={self.max_queue_tokens}, of which a part is kept for others"
        return QueueFull(
            f"{what} and this request adds {added}; the limit is {limit})",
            spread(self._wait(waiting)),
        )

    def ahead(self, added: int, tenant: Tenant, active: Iterable[Tenant], batch: int) -> int:
        """Tokens that are computed until a request of `added` ones is, itself included. Before it
        ends, each request of its tenant is served at most as much as it, or a batch; and each other
        tenant at most as much as its own.
        """
        own = added + min(tenant.tokens, tenant.jobs * max(added, batch))
        return own + sum([min(each.tokens, own) for each in active if each is not tenant])

    def _wait(self, tokens: float) -> float:
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
        self._easy = self._sure()

    def queue_emptied(self) -> None:
        """Forget the queue's speed: the next queue may be of other requests, or beside other
        work.
        """
        self._queue_speed, self._counted_until = Speed(), None
        self._easy = self._sure()

    def _sure(self) -> float:
        """Waiting tokens up to which no request is refused."""
        most = self.max_queue_tokens * (1 - RESERVE)
        if self.batch_speed.known and (seconds := self._wait(most)):
            most *= min(1.0, self.max_queue_seconds / seconds)
        return most


def spread(seconds: float) -> int:
    """When to come back to a queue that is computed in so many seconds: whole seconds from half of
    that to 1 s more than that, and at least 1, at random, so that not all come at once.
    """
    low, high = max(1, math.ceil(seconds / 2)), math.ceil(seconds) + 1
    return random.randint(low, max(2, high))
