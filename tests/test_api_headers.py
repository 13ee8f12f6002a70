"""api/headers.py: what a limited key is told."""

import pytest

from api.headers import duration, quota_headers
from engine.quota import Quota, QuotaLimits


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.0, "0s"),
        (0.0001, "1ms"),
        (0.02, "20ms"),
        (0.9999, "1s"),
        (1.5, "1.5s"),
        (59.9, "59.9s"),
        (60.0, "1m0s"),
        (361.25, "6m1.25s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, written: str) -> None:
    assert duration(seconds) == written


def test_what_is_left_of_each_limit() -> None:
    quota = Quota("app", QuotaLimits(requests_per_second=4, tokens_per_minute=600), lambda: 0.0)
    quota.request()
    quota.take(100)
    assert quota_headers(quota) == {
        "x-ratelimit-limit-requests": "4",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "250ms",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "500",
        "x-ratelimit-reset-tokens": "10s",
    }
    assert quota_headers(Quota("free", QuotaLimits(), lambda: 0.0)) == {}
