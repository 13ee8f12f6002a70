"""engine/admission.py: what may join the queue, and when to come back."""

import math

import pytest

from engine.admission import SPEED_KNOWN, SPEED_MEMORY, Admission, Speed
from engine.errors import QueueFull


def admission(tokens: int = 1000, seconds: float = 5.0, threads: int = 2) -> Admission:
    return Admission(tokens, seconds, threads)


def measured(made: Admission, tokens: int, seconds: float, now: float = 0.0) -> Admission:
    """With one batch that ended; nothing waited behind it."""
    made.batch_ended(tokens, seconds, now, queued=False)
    return made


def test_an_empty_queue_takes_a_request_of_any_size() -> None:
    admission(tokens=100).admit(0, 101)


def test_a_queue_takes_as_many_tokens_as_its_limit() -> None:
    made = admission(tokens=100)
    made.admit(90, 10)
    with pytest.raises(QueueFull, match="90 tokens are waiting and this request adds 11") as info:
        made.admit(90, 11)
    assert "limit is 100 (MAX_QUEUE_TOKENS" in str(info.value) and info.value.retry_after == 1


def test_a_queue_without_a_limit_in_seconds() -> None:
    assert measured(admission(seconds=math.inf), 1, 100.0).limit() == 1000


def test_the_limit_in_seconds_counts_once_the_speed_is_known() -> None:
    """The fastest batch had 12 tokens a second, and there are two threads."""
    made = measured(admission(), 9, SPEED_KNOWN * 0.75)
    assert made.limit() == 1000
    made = measured(made, 60, 10.0)
    assert made.limit() == 120
    with pytest.raises(QueueFull, match="120 tokens are waiting .* adds 1; the limit is 120 ") as e:
        made.admit(120, 1)
    assert e.value.retry_after == 5


def test_a_queue_is_as_fast_as_the_clock_says() -> None:
    made = measured(admission(), 1000, 1.0)
    for now in (1.0, 2.0, 3.0):
        made.batch_ended(10, 0.1, now, queued=True)
    assert made.limit() == 50  # 10 tokens a second for 5 seconds
    made.queue_emptied()
    assert made.limit() == 1000


def test_once_full_a_queue_says_so_until_a_tenth_of_it_is_done() -> None:
    made = admission(tokens=100)
    assert made.full(100) is None  # nobody was refused
    with pytest.raises(QueueFull):
        made.admit(100, 1)
    refusal = made.full(91)
    assert refusal and str(refusal).startswith("91 tokens are waiting; the limit is 100 ")
    assert made.full(90) is None
    assert made.full(100) is None


def test_a_speed_is_that_of_late() -> None:
    speed = Speed()
    assert speed.takes(10) == 0.0 and not speed.known
    for tokens, seconds in ((10, 3 * SPEED_MEMORY), (1000, 4 * SPEED_MEMORY)):
        for _ in range(int(seconds)):
            speed.add(tokens, 1.0)
    assert speed.known and 1 / speed.takes(1) == pytest.approx(1000, rel=0.05)
