"""Parts of a request's time, recorded while somebody asks for them (api/traces.py). Times are those
of `time.monotonic`.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from engine.protocol import Batch

T = TypeVar("T")

TOKENISE, DECODE, WAIT, COMPUTE = "tokenise", "decode pictures", "queue wait", "engine call"


class Span(NamedTuple):
    """One part."""

    name: str
    start: float
    end: float
    attributes: dict[str, int | str]


Recording = list[Span]
# Of the request that the calling task or thread works on; None where nobody asks.
recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


def timed(name: str, call: Callable[[], T], inputs: int) -> T:
    """Make a call, which is a part; `inputs` are its texts or pictures."""
    recorded = recording.get()
    if recorded is None:
        return call()
    start = time.monotonic()
    try:
        return call()
    finally:
        recorded.append(Span(name, start, time.monotonic(), {"inputs": inputs}))


def computed(batch: "Batch", seconds: float) -> None:
    """An engine call of so many seconds has ended, which may be a part of several requests."""
    recordings = {id(job.trace): job.trace for job, _, _ in batch.entries if job.trace is not None}
    if recordings:
        end, model = time.monotonic(), batch.engine.name
        size: dict[str, int | str] = {"inputs": len(batch.entries), "tokens": batch.tokens}
        for recorded in recordings.values():
            recorded.append(Span(COMPUTE, end - seconds, end, {**size, "model": model}))


def waited(recorded: Recording, submitted: float) -> None:
    """A request has left the queue: it waited until its first engine call, if there was one."""
    starts = [each.start for each in recorded if each.name == COMPUTE and each.end >= submitted]
    first = max(submitted, min(starts, default=time.monotonic()))
    recorded.append(Span(WAIT, submitted, first, {}))
