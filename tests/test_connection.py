"""api/connection.py: which heads say the same. That they are answered alike is in
test_api_worker.py.
"""

import pytest

from api.connection import head_key

HEAD = (
    b"POST /embeddings HTTP/1.1\r\nHost: one\r\nX-API-Key: abc123\r\n"
    b"Content-Type: application/json\r\nContent-Length: 17\r\n\r\n"
)
KEY, _ = head_key(HEAD, "10.0.0.1")


def with_field(field: bytes) -> bytes:
    return HEAD[:-2] + field + b"\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"Host: one", b"Host: two"),
        HEAD.replace(b"Host: one\r\n", b""),
        HEAD.replace(b" 17", b" 18"),
        HEAD.replace(b"X-API-Key", b"x-api-key"),
        HEAD.replace(b"X-API-Key: ", b"X-API-Key:\t "),
        HEAD.replace(b"Host: one\r\n", b"").replace(b"\r\n\r\n", b"\r\nHost: one\r\n\r\n"),
        with_field(b"User-Agent: curl/8"),
        with_field(b"Accept: */*"),
        with_field(b"Connection: Keep-Alive"),
        with_field(b"X-Request-Id: 7"),
        with_field(b"X-B3-TraceId: 80f198ee56343ba864fe8b2a57d3eff7"),
        with_field(b"Authorization: Bearer of somebody else"),  # X-API-Key decides
        with_field(b"X-Forwarded-For: 10.0.0.9"),
    ],
)
def test_what_nobody_asks_for_makes_no_difference(head: bytes) -> None:
    assert KEY and head_key(head, "10.0.0.2")[0] == KEY


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"POST", b"PUT"),
        HEAD.replace(b"/embeddings", b"/embed"),
        HEAD.replace(b"/embeddings", b"/embeddings?a"),
        HEAD.replace(b"abc123", b"abc124"),
        HEAD.replace(b"abc123", b""),
        HEAD.replace(b"X-API-Key: abc123\r\n", b""),
        HEAD.replace(b"X-API-Key: abc123", b"Authorization: Bearer abc123"),
        HEAD.replace(b"/json", b"/xml"),
        HEAD.replace(b"Content-Type: application/json\r\n", b""),
        with_field(b"Connection: close"),
        with_field(b"X-Forwarded-Proto: https"),
        with_field(b"X-Forwarded-Protocol: ssl"),
        with_field(b"X-Forwarded-SSL: on"),
    ],
)
def test_what_somebody_asks_for_makes_one(head: bytes) -> None:
    key, _ = head_key(head, "10.0.0.1")
    assert key and key != KEY


def test_an_address_makes_one_where_gunicorn_believes_it() -> None:
    head = with_field(b"X-Forwarded-Proto: https")
    assert head_key(head, "10.0.0.1") != head_key(head, "10.0.0.2")


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"),
        HEAD.replace(b"POST", b"post"),
        HEAD.replace(b" /embeddings", b" http://one/embeddings"),
        HEAD.replace(b" /embeddings", b" /embedd\xe9ngs"),
        HEAD.replace(b" /embeddings", b"  /embeddings"),
        HEAD.replace(b"X-API-Key", b"X_API_Key"),  # gunicorn leaves it out
        HEAD.replace(b"X-API-Key:", b"X-API-Key :"),
        HEAD.replace(b"X-API-Key:", b" X-API-Key:"),
        with_field(b"X-API-Key: abc123"),
        with_field(b"x-api-key: other"),
        with_field(b"Accept: a\r\nAccept: b"),
        with_field(b"Host: two"),
        with_field(b"Expect: 100-continue"),
        with_field(b"Transfer-Encoding: chunked"),
        with_field(b"X-Folded: a\r\n b"),
        with_field(b"X-Bare: a\nX-API-Key: other"),
        with_field(b"X-Bare: a\rb"),
        with_field(b"X-Null: \0"),
        with_field(b"X-Obs: \xe9"),
        with_field(b"No colon"),
        with_field(b": no name"),
        with_field(b"X-Long: " + b"y" * 8190),
        with_field(b"\r\n".join(b"X-%d: y" % number for number in range(61))),
        HEAD[:-2],
        HEAD + b"\r\n",
        b"POST /embeddings HTTP/1.1\r\n\r\n",
    ],
)
def test_gunicorn_sees_each_head_that_is_not_plain(head: bytes) -> None:
    assert head_key(head, "10.0.0.1") == ((), {})


def test_the_fields_that_vary_are_for_an_environ() -> None:
    _, varying = head_key(with_field(b"User-Agent: \t me/1 \r\ntraceparent: 00-1-2-01"), "10.0.0.1")
    assert varying == {
        "CONTENT_LENGTH": "17",
        "HTTP_USER_AGENT": "me/1",
        "HTTP_TRACEPARENT": "00-1-2-01",
    }
