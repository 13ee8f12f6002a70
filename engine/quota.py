"""What a tenant (an API key) may use: requests a second, tokens a minute, tokens at a time."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import OverQuota


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """None is no limit."""

    requests_per_second: float | None = None
    tokens_per_minute: float | None = None
    concurrent_tokens: float | None = None


class Bucket:
    """A token bucket: holds up to `size` units and gets `rate` of them a second."""

    def __init__(self, size: float, rate: float, now: float) -> None:
        self.size, self.rate = size, rate
        self._level, self._at = size, now

    def level(self, now: float) -> float:
        """Units in it; less than 0 after more was taken than there was."""
        self._level = min(self.size, self._level + (now - self._at) * self.rate)
        self._at = now
        return self._level

    def lacks(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; 0 for now. From a full one any amount may."""
        missing = min(amount, self.size) - self.level(now)
        return missing / self.rate if missing > 1e-9 else 0.0

    def take(self, amount: float) -> None:
        self._level -= amount


@dataclass(frozen=True, slots=True)
class Left:
    """What is left of a limit."""

    limit: int
    remaining: int
    reset: float  # seconds until all of it is there again


class Quota:
    """The limits of one tenant and what it has used. Safe to call from any number of threads."""

    def __init__(
        self,
        name: str,
        limits: QuotaLimits,
        clock: Callable[[], float] = time.monotonic,
        *,
        workers: int = 1,
    ) -> None:
        """Args:
        name: the tenant's, for messages.
        workers: processes that share the limits; each has its part.
        """
        self._name, self._limits, self._now = name, limits, clock
        self._workers = workers
        self._lock = threading.Lock()
        self._inside = 0  # tokens of requests that have not ended
        self._requests = self._tokens = None
        if rate := limits.requests_per_second:
            self._requests = Bucket(max(1.0, rate / workers), rate / workers, clock())
        if tokens := limits.tokens_per_minute:
            self._tokens = Bucket(tokens / workers, tokens / workers / 60, clock())

    def request(self) -> None:
        """A request has come.

        Raises: OverQuota.
        """
        with self._lock:
            if bucket := self._requests:
                limit = f"{self._limits.requests_per_second:g} requests a second"
                self._check(limit, bucket.lacks(1, self._now()))
                bucket.take(1)

    def take(self, tokens: int) -> None:
        """It wants so many tokens computed. To be called with `release` once they are.

        Raises: OverQuota.
        """
        with self._lock:
            most = self._limits.concurrent_tokens
            if most and self._inside and self._inside + tokens > most / self._workers:
                self._check(f"{most:g} tokens at a time", 1.0)
            if bucket := self._tokens:
                limit = f"{self._limits.tokens_per_minute:g} tokens a minute"
                self._check(limit, bucket.lacks(tokens, self._now()))
                bucket.take(tokens)
            self._inside += tokens

    def release(self, tokens: int, computed: int | None = None) -> None:
        """The request that took them has ended. `computed`: how many of them were; None: all. The
        others are given back.
        """
        with self._lock:
            self._inside -= tokens
            if computed is not None and (bucket := self._tokens):
                bucket.take(computed - tokens)

    def _check(self, limit: str, seconds: float) -> None:
        if seconds:
            shared = f", shared by {self._workers} workers" if self._workers > 1 else ""
            raise OverQuota(
                f"the limit of key {self._name!r} is {limit} (KEY_LIMITS){shared}",
                max(1, math.ceil(seconds)),
            )

    def left(self) -> dict[str, Left]:
        """What is left of "requests" and of "tokens", those of them that are limited; of this
        process's part of them.
        """
        buckets = {"requests": self._requests, "tokens": self._tokens}
        with self._lock:
            now = self._now()
            return {
                kind: Left(
                    int(bucket.size), max(0, int(level)), (bucket.size - level) / bucket.rate
                )
                for kind, bucket in buckets.items()
                if bucket
                for level in [bucket.level(now)]
            }
