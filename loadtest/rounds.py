"""Measurements in rounds: every side runs once a round, and the rounds' results are combined. Calls
from several threads, measured as the load client measures requests.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loadtest.client import Result

WARM_UP = 1.0  # seconds of the round that does not count
T = TypeVar("T")


class Progress:
    """Says on stderr which of how many measurements runs."""

    def __init__(self, total: int) -> None:
        self.done, self.total, self.doing = 0, total, ""

    def __call__(self, step: str) -> None:
        self.done += 1
        line, wipe = f"[{self.done}/{self.total}] {self.doing}{step}", sys.stderr.isatty()
        print(f"\r\x1b[K{line}" if wipe else line, end="" if wipe else "\n", file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)


def in_threads(work: Callable[[], T], number: int) -> list[T]:
    """Run `work` in so many threads at the same time. Raises: the first error of any."""
    with ThreadPoolExecutor(number) as pool:
        return [future.result() for future in [pool.submit(work) for _ in range(number)]]


def call_repeatedly(call: Callable[[int], None], threads: int, seconds: float) -> Result:
    """Call it with 0, 1, 2 … from so many threads at once for some seconds, each at least once.

    Returns: calls a second. A thread's rate is taken over the time until its own last call ended.
    """
    numbers, deadline = itertools.count(), time.perf_counter() + seconds

    def caller() -> tuple[float, list[float]]:
        begun = done = time.perf_counter()
        latencies: list[float] = []
        while not latencies or done < deadline:
            sent = done
            call(next(numbers))
            done = time.perf_counter()
            latencies.append((done - sent) * 1e3)
        return len(latencies) / (done - begun), latencies

    callers = in_threads(caller, threads)
    latencies = itertools.chain(*(latencies for _, latencies in callers))
    return Result(sum(rate for rate, _ in callers), tuple(latencies))


def alternate(
    sides: Mapping[str, Callable[[int, float], T]],
    seconds: float,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, list[T]]:
    """Call every side once a round, with the round's number and its seconds. The order is reversed
    each round, so that a machine whose speed drifts affects all sides alike. Round 0 warms up: its
    results are dropped. `say` is told of each round.

    Returns: each side's results, one a round.
    """
    results: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        say(f"round {number}" if number else "warming up")
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            result = sides[name](number, seconds if number else min(WARM_UP, seconds))
            if number:
                results[name].append(result)
    return results


def combine(results: Sequence[Result]) -> Result:
    """Rate and processor time as medians over rounds, the latencies of all, failures summed."""
    return Result(
        statistics.median(result.rate for result in results),
        tuple(latency for result in results for latency in result.latencies),
        sum(result.failed for result in results),
        statistics.median(result.cpu for result in results),
    )


def ratio(results: Sequence[Result], others: Sequence[Result]) -> float | None:
    """The median of the rates' ratios, round by round; None where a request failed on either side,
    or there is no other side.
    """
    failed = any(result.failed for result in (*results, *others))
    ratios = [one.rate / other.rate for one, other in zip(results, others) if other.rate]
    return statistics.median(ratios) if ratios and not failed else None
