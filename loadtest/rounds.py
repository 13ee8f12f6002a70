"""Measurements in rounds: every side runs once a round, and the rounds' results are combined. Calls
from several threads, measured as the load client measures requests.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loadtest.client import Result

WARM_UP = 1.0  # seconds of the round that does not count
# Largest ratio of a measurement to its smallest, over the rounds, for it to be believed.
BELIEVED = 1.25
Side = Callable[[int, float], Result]  # the round's number, seconds
T = TypeVar("T")


def alternate(
    what: str, sides: Sequence[Callable[[int, float], T]], seconds: float, rounds: int
) -> list[list[T]]:
    """Call every side once a round, with the round's number and its seconds. The order is reversed
    each round, so that a machine whose speed drifts affects all sides alike. Round 0 warms up: its
    results are dropped. Each round is announced on stderr.

    Returns: each side's results, one a round.
    """
    runs = [(side, list[T]()) for side in sides]
    for number in range(rounds + 1):
        step = f"round {number} of {rounds}" if number else "warming up"
        print(f"{what}: {step}", file=sys.stderr, flush=True)
        for side, results in runs if number % 2 else reversed(runs):
            result = side(number, seconds if number else min(WARM_UP, seconds))
            if number:
                results.append(result)
    return [results for _, results in runs]


def call_repeatedly(call: Callable[[int], int], threads: int, seconds: float) -> Result:
    """Call it with 0, 1, 2 … from so many threads at once for some seconds, each at least once. It
    returns how many texts or pictures it did. A thread's rate is taken over the time until its own
    last call ended.

    Raises: what a call raised.
    """
    numbers, deadline = itertools.count(), time.perf_counter() + seconds

    def caller() -> tuple[float, list[float]]:
        begun = done = time.perf_counter()
        latencies: list[float] = []
        units = 0
        while not latencies or done < deadline:
            sent = done
            units += call(next(numbers))
            done = time.perf_counter()
            latencies.append((done - sent) * 1e3)
        return units / (done - begun), latencies

    with ThreadPoolExecutor(threads) as pool:
        callers = [future.result() for future in [pool.submit(caller) for _ in range(threads)]]
    latencies = itertools.chain(*(latencies for _, latencies in callers))
    return Result(sum(rate for rate, _ in callers), tuple(latencies))


def combine(results: Sequence[Result]) -> Result:
    """Rate and processor time as medians over rounds, the latencies of all, failures summed."""
    return Result(
        statistics.median(result.rate for result in results),
        tuple(latency for result in results for latency in result.latencies),
        sum(result.failed for result in results),
        statistics.median(result.cpu for result in results),
    )


def ratios(results: Sequence[Result], others: Sequence[Result]) -> list[float]:
    """The ratio of the rates in each round."""
    return [one.rate / other.rate for one, other in zip(results, others) if other.rate]


def ratio(results: Sequence[Result], others: Sequence[Result]) -> float | None:
    """The median of the rates' ratios, round by round; None where there is no other side, or
    `doubt` says why it is not to be believed.
    """
    found = ratios(results, others)
    return statistics.median(found) if found and not doubt(results, others) else None


def doubt(results: Sequence[Result], others: Sequence[Result]) -> str | None:
    """Why the ratio of these rounds means nothing; None where it does, or where there is none."""
    if not others:
        return None
    if any(result.failed for result in (*results, *others)):
        return "no ratio: requests failed"
    found = ratios(results, others)
    if found and max(found) > BELIEVED * min(found):
        return (
            f"no ratio: {min(found):.2f} to {max(found):.2f} in {len(found)} rounds; use a quieter "
            "machine, or longer rounds (--seconds)"
        )
    return None
