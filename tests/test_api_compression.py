"""api/compression.py: compressed bodies of requests, and compressed responses."""

import asyncio
import gzip
import json
import socket
import threading
import tracemalloc
import zlib
from collections.abc import Callable

import httpx
import pytest
from servers import KEY, Server

from api.compression import Bodies, Compression, accepted_coding, decode
from server.messages import HttpError, Request, Response
from server.tasks import Tasks, in_thread

BODY = json.dumps({"text": "What is deep learning?"}).encode()
LIMIT = 33_554_432  # MAX_BODY_SIZE


def gz(data: bytes, level: int = 9) -> bytes:
    """gzip without the time of day: tests' names hold these bytes, and must be equal in all of
    pytest's processes.
    """
    return gzip.compress(data, level, mtime=0)


def raw_deflate(data: bytes) -> bytes:
    writer = zlib.compressobj(wbits=-15)
    return writer.compress(data) + writer.flush()


def send(
    service: Server, body: bytes, coding: str | list[str], path: str = "/embeddings"
) -> httpx.Response:
    codings = [coding] if isinstance(coding, str) else coding
    headers = [("Content-Encoding", each) for each in codings]
    headers += [("Content-Type", "application/json"), ("X-API-Key", KEY)]
    return httpx.post(
        service.url + path, content=body, headers=headers, trust_env=False, timeout=60
    )


# Requests: B8, and others of its kind


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (gz(BODY), "gzip"),
        (gz(BODY), "X-GZip"),
        (zlib.compress(BODY), "deflate"),
        (raw_deflate(BODY), "deflate"),
        (raw_deflate(BODY.ljust(100_000)), "deflate"),
        (gz(BODY[:9]) + gz(BODY[9:]), "gzip"),
        (gz(zlib.compress(BODY)), "deflate, gzip"),
        (gz(zlib.compress(BODY)), ["deflate", "gzip"]),
        (gz(BODY), "identity, gzip"),
        (gz(BODY.ljust(3_000_000)), "gzip"),
        (BODY, "identity"),
    ],
    ids=lambda part: str(part)[:20],
)
@pytest.mark.parametrize("path", ["/embeddings", "/embed"])
def test_a_compressed_body_is_the_same_as_another(
    service: Server, path: str, body: bytes, coding: str
) -> None:
    plain = service.post(path, json.loads(BODY))
    compressed = send(service, body, coding, path)
    assert compressed.status_code == 200, compressed.text
    assert compressed.content == plain.content


GZIPPED = gz(BODY)


@pytest.mark.parametrize(
    ("body", "coding", "status", "said"),
    [
        (b"x", "br", 415, "Content-Encoding is br; the service takes gzip, deflate"),
        (b"x", "gzip, zstd", 415, "Content-Encoding is zstd"),
        (GZIPPED, "gzip, gzip, gzip, gzip", 415, "has 4 codings; the service takes up to 3"),
        (BODY, "gzip", 400, "the body is not valid gzip: incorrect header check"),
        (BODY, "deflate", 400, "the body is not valid deflate"),
        (GZIPPED[:-4], "gzip", 400, "the body is cut off"),
        (GZIPPED[:9], "gzip", 400, "the body is cut off"),
        (GZIPPED[:-8] + b"\0" * 8, "gzip", 400, "not valid gzip: incorrect data check"),
        (GZIPPED + b"{}", "gzip", 400, "goes on for 2 bytes behind its end"),
        (zlib.compress(BODY) + b"\0", "deflate", 400, "goes on for 1 bytes behind its end"),
        (gz(GZIPPED), "gzip", 400, "not valid JSON"),
        (gz(b"{"), "gzip", 400, "not valid JSON"),
        (gz(b" " * (LIMIT + 1)), "gzip", 413, f"more than {LIMIT} bytes, the limit"),
        (gz(gz(b" " * (LIMIT + 1))), "gzip, gzip", 413, "(MAX_BODY_SIZE)"),
    ],
    ids=lambda part: str(part)[:20],
)
def test_what_cannot_be_decoded_is_refused_with_the_reason(
    service: Server, body: bytes, coding: str, status: int, said: str
) -> None:
    for path in ("/embeddings", "/v1/embeddings"):
        response = send(service, body, coding, path)
        assert response.status_code == status and said in response.text
        assert response.headers.get("accept-encoding") == (
            "gzip, deflate" if status == 415 else None
        )


def test_nothing_is_decoded_without_a_key_nor_where_there_is_no_body(service: Server) -> None:
    headers = {"Content-Encoding": "br"}
    sent = httpx.post(service.url + "/embeddings", content=b"x", headers=headers, trust_env=False)
    assert sent.status_code == 401
    assert service.client.get("/v1/models", headers=headers).status_code == 200


def test_a_bomb_takes_no_more_memory_than_the_limit() -> None:
    bomb = gz(gz(b" " * 100_000_000, 9), 9)
    tracemalloc.start()
    held: list[int] = []
    inner = decode(bomb, "gzip", 1_000_000, held.append)
    with pytest.raises(HttpError, match="more than 1000000 bytes"):
        decode(inner, "gzip", 1_000_000, held.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000 and sum(held) < 2_000_000


def test_many_small_members_are_no_way_to_take_time() -> None:
    with pytest.raises(HttpError, match="behind its end"):
        decode(gz(b"") * 100_000, "gzip", LIMIT, lambda size: None)


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 131_072, 1_000_001])
@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, raw_deflate])
def test_bodies_of_all_sizes_come_out_whole(size: int, pack: Callable[[bytes], bytes]) -> None:
    body = (b"0123456789" * (size // 10 + 1))[:size]
    coding = "gzip" if pack is gzip.compress else "deflate"
    assert decode(pack(body), coding, size, lambda part: None) == body
    with pytest.raises(HttpError, match="more than"):
        decode(pack(body), coding, size - 1, lambda part: None)


def test_all_bodies_together_have_a_limit_too() -> None:
    def request() -> Request:
        headers = {"content-encoding": "gzip"}
        return Request(headers=headers, body=gz(b" " * 1000), caller="app")

    bodies = Bodies(1000, 2500)
    for _ in range(3):  # what was held is free again, after an error too
        with bodies.decoded(request()), bodies.decoded(request()):
            with pytest.raises(HttpError) as info, bodies.decoded(request()):
                pass
    assert info.value.status == 429 and info.value.headers["Retry-After"] == "1"


# Responses


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("gzip, deflate, br, zstd", "gzip"),
        ("deflate", "deflate"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("GZIP ; Q=1.0", "gzip"),
        ("gzip;q=1.0;x=1", "gzip"),
        ("gzip;x=1;q=0, deflate;x;q=0.5", "deflate"),
        ("*", "gzip"),
        ("gzip;q=0, *", "deflate"),
        ("gzip;q=0", None),
        ("gzip;q=0.5, identity", None),
        ("gzip;q=x", None),
        ("gzip;q=nan", None),
        ("br", None),
        ("*;q=0", None),
        ("identity", None),
        ("", None),
    ],
)
def test_the_coding_is_what_the_client_likes_best(accepted: str, coding: str | None) -> None:
    assert accepted_coding(accepted) == coding


def raw(
    service: Server, method: str, path: str, accepted: str, body: bytes = b""
) -> tuple[str, bytes]:
    """Head and body as they come."""
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\nAccept-Encoding: {accepted}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as sock:
        sock.sendall(request.encode() + body)
        head, _, content = sock.makefile("rb").read().partition(b"\r\n\r\n")
    return head.decode().lower(), content


@pytest.mark.parametrize(("accepted", "wbits"), [("gzip", 31), ("deflate", 15)])
@pytest.mark.parametrize("number", [20, 100])  # the latter is compressed in a thread
def test_a_large_response_is_compressed_for_who_asks(
    service: Server, number: int, accepted: str, wbits: int
) -> None:
    body = json.dumps({"texts": [f"text {at}" for at in range(number)]}).encode()
    plain_head, plain = raw(service, "POST", "/embeddings/batch", "identity", body)
    head, content = raw(service, "POST", "/embeddings/batch", accepted, body)
    assert zlib.decompress(content, wbits) == plain
    assert f"content-encoding: {accepted}\r\n" in head + "\r\n"
    assert f"content-length: {len(content)}\r\n" in head and len(content) < 0.5 * len(plain)
    assert "content-encoding" not in plain_head
    for each in (head, plain_head):
        assert "vary: accept-encoding" in each


def test_a_lone_vector_and_an_error_are_not(service: Server) -> None:
    for path, body in (("/embeddings", BODY), ("/embeddings", b"{"), ("/v1/models", b"")):
        head, content = raw(service, "POST" if body else "GET", path, "gzip", body)
        assert "content-encoding" not in head and "vary" not in head
        assert content.startswith(b"{")


@pytest.mark.parametrize("path", ["/docs/swagger-ui-bundle.js", "/openapi.json", "/docs"])
def test_head_says_what_get_would(service: Server, path: str) -> None:
    for accepted in ("gzip", "identity"):
        got, body = raw(service, "GET", path, accepted)
        said, none = raw(service, "HEAD", path, accepted)
        assert none == b"" and f"content-length: {len(body)}\r\n" in said

        def lines(head: str) -> set[str]:
            return {line for line in head.split("\r\n") if line.startswith("content-")}

        assert lines(got) == lines(said)


def test_what_never_changes_is_compressed_once_and_shared() -> None:
    compression = Compression(10, ["/docs"])

    def get(path: str) -> bytes:
        request = Request("GET", path, path, headers={"accept-encoding": "gzip"})
        return compression.apply(Response(b"a" * 1000, content_type="text/css"), request).body

    assert get("/docs") is get("/docs") and gzip.decompress(get("/docs")) == b"a" * 1000
    assert get("/other") is not get("/other")


def test_never_means_never() -> None:
    request = Request(headers={"accept-encoding": "gzip"})
    response = Compression(0, []).apply(Response(b" " * 1_000_000), request)
    assert response.body == b" " * 1_000_000 and response.headers == []
    picture = Compression(1, []).apply(Response(b" " * 99, content_type="image/png"), request)
    assert picture.body == b" " * 99 and picture.headers == []


@pytest.mark.parametrize(
    ("busy", "compressed"),
    [
        ({"other": 8}, True),
        ({"app": 8}, False),  # of one key, so many may hold the last thread from it
        ({"app": 7, "other": 2}, False),
    ],
    ids=str,
)
def test_a_finished_response_does_not_wait_for_a_thread(
    busy: dict[str, int], compressed: bool
) -> None:
    """One of 9 threads is free, or none."""
    loop = asyncio.new_event_loop()
    tasks, go, results = Tasks(loop, threads=9, max_wait=1e9), threading.Event(), list[Response]()
    for key, calls in busy.items():
        for _ in range(calls):
            tasks.run(lambda key=key: in_thread(go.wait, key), lambda _: None)  # type: ignore[misc]
    request = Request(headers={"accept-encoding": "gzip"}, caller="app")
    response = Response(b" " * 200_000)
    tasks.run(lambda: Compression(1, []).apply(response, request), results.append)

    async def turn() -> None:
        while not results:
            await asyncio.sleep(0.001)

    try:
        loop.run_until_complete(asyncio.wait_for(turn(), 30))
    finally:
        go.set()
        tasks.close()
        loop.close()
    assert (("Content-Encoding", "gzip") in results[0].headers) == compressed
