"""engine/quota.py: what a key may use."""

from typing import Any

import pytest

from engine.errors import OverQuota
from engine.quota import Left, Quota, QuotaLimits


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def quota(clock: Clock, **limits: Any) -> Quota:
    return Quota("app", QuotaLimits(**limits), clock)


def refused(call: Any, *arguments: int) -> tuple[str, int]:
    with pytest.raises(OverQuota) as info:
        call(*arguments)
    return str(info.value), info.value.retry_after


def test_without_limits_everything_is_taken_and_nothing_told(clock: Clock) -> None:
    free = quota(clock)
    for _ in range(100):
        free.request()
        free.take(10**9)
    assert free.left() == {}


def test_requests_of_a_second(clock: Clock) -> None:
    five = quota(clock, requests_per_second=5)
    for left in (4, 3, 2, 1, 0):
        five.request()
        assert five.left()["requests"].remaining == left
    assert five.left()["requests"].reset == pytest.approx(1.0)
    assert refused(five.request) == (
        "the limit of key 'app' is 5 requests a second (KEY_LIMITS)",
        1,
    )
    clock.now = 0.2
    five.request()
    refused(five.request)
    clock.now = 100.0
    assert five.left() == {"requests": Left(limit=5, remaining=5, reset=0.0)}


def test_a_request_in_many_seconds(clock: Clock) -> None:
    slow = quota(clock, requests_per_second=0.1)
    slow.request()
    clock.now = 2.5
    assert refused(slow.request)[1] == 8
    clock.now = 10.0
    slow.request()


def test_tokens_of_a_minute(clock: Clock) -> None:
    some = quota(clock, tokens_per_minute=6000)
    some.take(5900)
    some.take(100)
    message, seconds = refused(some.take, 250)
    assert message == "the limit of key 'app' is 6000 tokens a minute (KEY_LIMITS)"
    assert seconds == 3
    clock.now = 2.5
    some.take(250)
    assert (some.left()["tokens"].remaining, some.left()["tokens"].reset) == (0, 60.0)
    assert set(some.left()) == {"tokens"}


def test_a_request_larger_than_a_minutes_tokens_is_taken_and_paid_for(clock: Clock) -> None:
    some = quota(clock, tokens_per_minute=6000)
    some.take(9000)
    assert some.left()["tokens"].remaining == 0
    assert refused(some.take, 1)[1] == 31
    clock.now = 31.0
    some.take(100)


def test_tokens_at_a_time(clock: Clock) -> None:
    some = quota(clock, concurrent_tokens=1000)
    some.take(600)
    some.take(400)
    message, seconds = refused(some.take, 1)
    assert message == "the limit of key 'app' is 1000 tokens at a time (KEY_LIMITS)"
    assert seconds == 1
    some.release(400)
    some.take(400)
    some.release(400), some.release(600)
    some.take(5000)  # alone
    refused(some.take, 1)
    assert some.left() == {}


def test_what_is_not_computed_is_given_back(clock: Clock) -> None:
    some = quota(clock, concurrent_tokens=1000, tokens_per_minute=2000)
    some.take(900)
    some.release(900, 300)
    assert some.left()["tokens"].remaining == 1700
    some.take(1000)
    some.release(1000, 0)
    assert some.left()["tokens"].remaining == 1700


def test_a_worker_keeps_its_part_and_says_the_whole_limit(clock: Clock) -> None:
    limits = QuotaLimits(8, 6000, 1000)
    some = Quota("app", limits, clock, workers=4)
    assert {kind: left.limit for kind, left in some.left().items()} == {
        "requests": 2,
        "tokens": 1500,
    }
    some.request(), some.request()
    some.take(240)
    said = [refused(some.request), refused(some.take, 11)]
    some.release(240)
    some.take(1260)
    some.release(1260)
    said.append(refused(some.take, 50))
    shared = "(KEY_LIMITS), shared by 4 workers"
    assert said == [
        (f"the limit of key 'app' is 8 requests a second {shared}", 1),
        (f"the limit of key 'app' is 1000 tokens at a time {shared}", 1),
        (f"the limit of key 'app' is 6000 tokens a minute {shared}", 2),
    ]


def test_what_is_refused_is_not_paid_for(clock: Clock) -> None:
    some = quota(clock, concurrent_tokens=1000, tokens_per_minute=2000)
    some.take(900)
    refused(some.take, 200)
    assert some.left()["tokens"].remaining == 1100
    some.release(900)
    some.take(1000)
    some.release(1000)
    refused(some.take, 200)
    clock.now = 3.0
    some.take(200)
    refused(some.take, 900)  # 200 are inside
