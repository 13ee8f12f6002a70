"""engine/admission.py: what may join the queue, and when to come back."""

import math
from typing import Any

import pytest

from engine.admission import SPEED_KNOWN, SPEED_MEMORY, Admission, Speed, spread
from engine.errors import QueueFull
from engine.tenants import Tenant

BATCH = 512  # the most tokens of one


def admission(
    tokens: int = 1000, seconds: float = 5.0, threads: int = 2, **options: Any
) -> Admission:
    return Admission(tokens, seconds, threads, **options)


def measured(made: Admission, tokens: int, seconds: float, now: float = 0.0) -> Admission:
    """With one batch that ended; nothing waited behind it."""
    made.batch_ended(tokens, seconds, now, queued=False)
    return made


def tenant(tokens: int = 0, jobs: int = 1) -> Tenant:
    return Tenant(jobs=jobs if tokens else 0, tokens=tokens)


def admit(
    made: Admission, added: int, asks: Tenant, *others: Tenant, batch: int = BATCH
) -> str | None:
    """What a request is told; None if it may join."""
    active = [each for each in (asks, *others) if each.tokens]
    try:
        made.admit(sum(each.tokens for each in active), added, asks, active, batch)
    except QueueFull as refusal:
        return str(refusal)
    return None


def test_an_empty_queue_takes_a_request_of_any_size() -> None:
    assert admit(admission(tokens=100), 10_000, tenant()) is None


def test_a_queue_takes_as_many_tokens_as_its_limit() -> None:
    made = admission(tokens=100)
    assert admit(made, 10, tenant(90)) is None
    assert admit(made, 11, tenant(90)) == (
        "90 tokens are waiting and this request adds 11; the limit is 100 (MAX_QUEUE_TOKENS)"
    )


def test_the_last_eighth_is_for_requests_of_one_batch() -> None:
    made = admission(tokens=8000)
    assert admit(made, 1000, tenant(6000), batch=100) is None
    assert "the limit is 7000 " in str(admit(made, 1000, tenant(6001), batch=100))
    assert admit(made, 100, tenant(7900), batch=100) is None
    assert "the limit is 8000 " in str(admit(made, 100, tenant(7901), batch=100))


def test_no_tenant_of_several_fills_the_queue_alone() -> None:
    made = admission(tokens=900, tenants=2)
    full, other = tenant(800), tenant()
    assert admit(made, 0, full) is None
    assert admit(made, 1, full) == (
        "800 tokens of this key are waiting and this request adds 1; the limit is 800 "
        "(MAX_QUEUE_TOKENS=900, of which a part is kept for others)"
    )
    assert admit(made, 100, other, full) is None
    assert "the limit is 900 " in str(admit(made, 101, other, full))


def test_there_is_always_room_for_one_more_tenant() -> None:
    made, full = admission(tokens=100_000, tenants=9), list[Tenant]()
    for _ in range(4):
        new = tenant()
        while admit(made, 10, new, *full) is None:
            new.tokens, new.jobs = new.tokens + 10, new.jobs + 1
        full.append(new)
    assert [new.tokens for new in full] == [88_890, 9_880, 1_100, 120]


@pytest.mark.parametrize(
    ("asks", "others", "added", "ahead"),
    [
        (tenant(), [], 30, 30),
        (tenant(5000), [], 30, 542),  # one batch of the long request, and itself
        (tenant(5000), [], 2000, 4000),  # as much of it as of itself
        (tenant(5000, jobs=4), [], 2000, 7000),
        (tenant(5000, jobs=100), [], 30, 5030),
        (tenant(), [tenant(5000, jobs=9)], 30, 60),  # half of the speed
        (tenant(), [tenant(5000), tenant(20), tenant(900)], 600, 1820),
        (tenant(100), [tenant(5000)], 30, 260),
    ],
)
def test_what_is_ahead_of_a_request(
    asks: Tenant, others: list[Tenant], added: int, ahead: int
) -> None:
    assert admission().ahead(added, asks, [asks, *others], BATCH) == ahead


def test_a_request_is_refused_for_its_own_wait_and_no_others() -> None:
    """At 1000 tokens a second, 5 seconds."""
    made = measured(admission(tokens=10**6, tenants=2), 1000, 2.0)
    long = tenant(40_000, jobs=10)
    assert admit(made, 4000, long) == (
        "this request would wait 44.0 s for its turn; the limit is 5 s (MAX_QUEUE_SECONDS)"
    )
    assert "would wait 5.2 s" in str(admit(made, 30, long))  # a batch of each of the ten
    assert admit(made, 30, tenant(40_000, jobs=9)) is None
    for added, refused in ((15, False), (2500, False), (2501, True)):
        assert bool(admit(made, added, tenant(), long)) == refused


def test_a_queue_without_a_limit_in_seconds() -> None:
    made = measured(admission(seconds=math.inf, tokens=10**6), 1, 100.0)
    assert admit(made, 1000, tenant(10**5)) is None


def test_the_limit_in_seconds_counts_once_the_speed_is_known() -> None:
    """The fastest batch had 12 tokens a second, and there are two threads."""
    made = measured(admission(), 9, SPEED_KNOWN * 0.75)
    assert admit(made, 1, tenant(120)) is None
    made = measured(made, 60, 10.0)
    assert admit(made, 0, tenant(120)) is None
    assert "would wait 5.0 s for its turn; the limit is 5 s" in str(admit(made, 1, tenant(120)))


def test_a_queue_is_as_fast_as_the_clock_says() -> None:
    made = measured(admission(), 1000, 1.0)
    for now in (1.0, 2.0, 3.0):
        made.batch_ended(10, 0.1, now, queued=True)
    assert "would wait 5.1 s" in str(admit(made, 1, tenant(50)))  # 10 tokens a second
    made.queue_emptied()
    assert admit(made, 1, tenant(50)) is None


def test_a_refused_tenant_is_refused_early_until_a_tenth_is_done() -> None:
    made, asks, other = admission(tokens=800), tenant(700), tenant()
    assert made.full(700, 20, asks, [asks]) is None  # nobody was refused
    assert admit(made, 20, asks, batch=10)
    refusal = str(made.full(631, 20, asks, [asks]))
    assert "631 tokens are waiting and this request adds 20; the limit is 630 (MAX_QUEUE" in refusal
    assert made.full(631, 20, other, [asks]) is None
    assert made.full(630, 20, asks, [asks]) is None
    assert made.full(700, 20, asks, [asks]) is None


def test_its_short_requests_are_not_refused_with_its_long_ones() -> None:
    made, asks = admission(tokens=10_000), tenant(7000)
    assert admit(made, 2000, asks)
    assert made.full(7000, 2000, asks, [asks])
    assert made.full(7000, 20, asks, [asks]) is None
    assert made.full(7000, 2000, asks, [asks])


def test_what_is_a_short_request_is_its_engines_own() -> None:
    """One of 2000 tokens is short for an engine whose batches have 4096, and is refused for the
    whole queue's sake only.
    """
    made, asks = admission(tokens=10_000), tenant(7000)
    assert admit(made, 2000, asks, batch=4096) is None
    assert admit(made, 2000, asks, batch=512)
    assert made.full(7000, 2000, asks, [asks])
    other = tenant(8500)
    assert admit(made, 2000, other, batch=4096)
    assert made.full(8500, 1000, other, [other]) is None
    assert made.full(8500, 2000, other, [other])


@pytest.mark.parametrize(
    ("seconds", "low", "high"), [(0, 1, 2), (0.9, 1, 2), (1.5, 1, 3), (10, 5, 11), (30.2, 16, 32)]
)
def test_those_sent_away_come_back_one_after_the_other(seconds: float, low: int, high: int) -> None:
    told = {spread(seconds) for _ in range(1000)}
    assert (min(told), max(told), len(told)) == (low, high, high - low + 1)


def test_a_refusal_says_when() -> None:
    made, asks = measured(admission(tokens=1000), 100, 20.0), tenant(200)  # 10 tokens a second
    with pytest.raises(QueueFull) as info:
        made.admit(200, 0, asks, [asks], BATCH)
    assert 10 <= info.value.retry_after <= 21


def test_a_speed_is_that_of_late() -> None:
    speed = Speed()
    assert speed.takes(10) == 0.0 and not speed.known
    for tokens, seconds in ((10, 3 * SPEED_MEMORY), (1000, 4 * SPEED_MEMORY)):
        for _ in range(int(seconds)):
            speed.add(tokens, 1.0)
    assert speed.known and 1 / speed.takes(1) == pytest.approx(1000, rel=0.05)
