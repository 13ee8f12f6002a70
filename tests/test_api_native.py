"""The native routes over HTTP: good input gives vectors, bad input a clear error and nothing
else."""

import json
import os
import pathlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import httpx
import numpy as np
import pytest
from conftest import NAME, WIDE
from servers import Server, letters, serve

import main
import settings
from engine.bundle import discover
from engine.queue import Queue

MIB = 1 << 20
DEEP = b"[" * 10_000 + b"]" * 10_000


@pytest.fixture(scope="module")
def small(models_dir: pathlib.Path) -> Iterator[Server]:
    """The service with limits that are easy to reach."""
    limits = {"MAX_TEXT_SIZE": "1000", "MAX_REQUEST_TOKENS": "400", "MAX_TEXTS_PER_BATCH": "3"}
    with serve(models_dir, PRECISION="fp32", MAX_BODY_SIZE="5000", **limits) as server:
        yield server


@pytest.fixture(autouse=True)
def unharmed(service: Server, small: Server) -> Iterator[None]:
    """After every test a good request succeeds, and no log has a traceback."""
    yield
    for server in (service, small):
        assert server.embed("still here")
        assert "Traceback" not in server.log


def send(server: Server, path: str, body: bytes, kind: str = "application/json") -> httpx.Response:
    return server.post(path, content=body, headers={"Content-Type": kind})


def refusal(response: httpx.Response, status: int, error_type: str) -> str:
    """The message of an answer that must be an error of this kind."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error", "error_type"} and body["error_type"] == error_type
    message: str = body["error"]
    return message


def mentions(message: str, *parts: str) -> None:
    assert all(part in message for part in parts), message


# Good input


def test_one_text_gives_one_vector_of_float32(service: Server, models_dir: pathlib.Path) -> None:
    """Digit for digit what the embedder computes."""
    text = "The quick brown fox jumps over the lazy dog."
    response = service.post("/embeddings", {"text": text})
    assert response.headers["Content-Type"] == "application/json"
    assert response.json().keys() == {"embeddings"}
    ((*vector,),) = response.json()["embeddings"]
    assert len(vector) == 384

    configuration = settings.load({"MODELS_DIR": str(models_dir), "PRECISION": "fp32"})
    batcher = Queue(max_batch_size=1, max_batch_tokens=512, max_queue_tokens=512, threads=1)
    batcher.start()
    bundle = next(bundle for bundle in discover(models_dir) if bundle.manifest.name == NAME)
    embedder = main.load_embedder(bundle, configuration, batcher)
    (expected,) = embedder.embed([text], deadline=time.monotonic() + 60)
    batcher.close()
    assert np.array_equal(np.array(vector, np.float32), expected.vector)
    written = [str(np.float32(value)) for value in vector]
    assert sum(len(digits.lstrip("-0.").replace(".", "")) >= 8 for digits in written) > 192


def test_a_batch_keeps_its_order(service: Server) -> None:
    texts = ["A cat.", "Quarterly results were published.", "Grüße", "def f(x): return x"]
    response = service.post("/embeddings/batch", {"texts": texts})
    assert response.status_code == 200 and response.json().keys() == {"embeddings"}
    rows = np.array(response.json()["embeddings"])
    assert rows.shape == (len(texts), 1, 384)
    alone = np.array([service.embed(text) for text in texts])
    cosines = rows[:, 0] @ alone.T
    assert np.diag(cosines).min() > 0.9999
    assert cosines.argmax(axis=1).tolist() == list(range(len(texts)))


@pytest.mark.parametrize(
    "text",
    [
        "\0",
        "a\0b",
        "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪",
        "\U0010ffff",
        "שלום עולם",
        "السلام عليكم",
        "\u202eabc",
        "\u200b",
        "e\u0301",
    ],
    ids=ascii,
)
def test_any_unicode_is_embedded(service: Server, text: str) -> None:
    """As itself and as \\u escapes, with the same vector."""
    raw = send(service, "/embeddings", json.dumps({"text": text}, ensure_ascii=True).encode())
    assert raw.status_code == 200, raw.text
    assert np.isclose(np.linalg.norm(raw.json()["embeddings"][0]), 1, atol=1e-5)
    if "\0" not in text:
        direct = json.dumps({"text": text}, ensure_ascii=False).encode()
        assert send(service, "/embeddings", direct).json() == raw.json()


def test_a_megabyte_without_a_space_is_embedded_and_a_byte_more_is_not(service: Server) -> None:
    """A word over 100 characters is one token for this tokenizer, so tokens are no limit here."""
    assert len(service.embed("x" * MIB)) == 384
    response = service.post("/embeddings", {"text": "x" * (MIB + 1)})
    message = refusal(response, 413, "too_large")
    mentions(message, "$.text", str(MIB + 1), str(MIB), "MAX_TEXT_SIZE")


@pytest.mark.parametrize("unit", ["a", "é", "猫", "😀"])
def test_the_text_limit_counts_bytes(small: Server, unit: str) -> None:
    fits = unit * (1000 // len(unit.encode()))
    fits += "." * (1000 - len(fits.encode()))
    assert len(small.embed(fits)) == 384
    response = small.post("/embeddings/batch", {"texts": ["ok", fits + "."]})
    message = refusal(response, 413, "too_large")
    mentions(message, "$.texts[1]", "1001 bytes", "1000", "MAX_TEXT_SIZE")


def test_the_token_limit_counts_tokens_of_the_whole_request(small: Server) -> None:
    """400, with [CLS] and [SEP] for each chunk of at most 256."""
    assert small.embed("a " * 396)
    response = small.post("/embeddings", {"text": "a " * 397})
    message = refusal(response, 413, "too_large")
    mentions(message, "$.text:", "401 tokens", "400", "MAX_REQUEST_TOKENS")
    texts = ["a " * 131, "a " * 131, "a " * 132]
    assert small.post("/embeddings/batch", {"texts": texts}).status_code == 200
    texts[2] += "a"
    message = refusal(small.post("/embeddings/batch", {"texts": texts}), 413, "too_large")
    mentions(message, "$.texts[2]", "401 tokens", "400", "MAX_REQUEST_TOKENS")


def test_a_hundred_texts_are_a_batch_and_one_more_is_not(service: Server) -> None:
    response = service.post("/embeddings/batch", {"texts": ["a"] * 100})
    assert response.status_code == 200 and len(response.json()["embeddings"]) == 100
    response = service.post("/embeddings/batch", {"texts": ["a"] * 101})
    mentions(refusal(response, 400, "validation"), "101", "100", "MAX_TEXTS_PER_BATCH")


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", ""])
def test_json_is_taken_under_its_names_and_under_none(service: Server, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    request = service.client.build_request(
        "POST", "/embeddings", content=b'{"text": "a"}', headers=headers
    )
    assert ("content-type" in request.headers) == bool(kind)
    assert service.client.send(request).status_code == 200


def test_a_model_goes_by_its_name_and_by_its_source(service: Server) -> None:
    text = "word " * 400
    default = service.embed(text)
    wide = service.embed(text, model=WIDE)
    assert service.embed(text, model=NAME) == default
    assert service.embed(text, model=f"sentence-transformers/{WIDE}") == wide
    assert np.dot(default, wide) < 0.9999


def test_dimensions_cut_and_normalise_again(service: Server) -> None:
    whole = np.array(service.embed("cut me"))
    cut = np.array(service.embed("cut me", dimensions=64))
    assert cut.shape == (64,)
    assert np.isclose(np.linalg.norm(cut), 1, atol=1e-6)
    assert np.allclose(cut, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-6)
    assert np.array(service.embed("cut me", dimensions=384)) @ whole > 0.99999
    assert service.embed("cut me", dimensions=1) in ([1.0], [-1.0])


def test_null_options_are_absent_options(service: Server) -> None:
    plain = service.embed("a")
    assert service.embed("a", model=None, prompt_name=None, dimensions=None) == plain


# Bad input


@pytest.mark.parametrize(
    "body, parts",
    [
        (b"", ["empty"]),
        (b"{", ["not valid JSON", "line 1"]),
        (b'{"text": "a"', ["not valid JSON"]),
        (b"{'text': 'a'}", ["not valid JSON"]),
        (b'{"text": "a",}', ["not valid JSON"]),
        (b'{"text": "a"} {}', ["not valid JSON"]),
        (b'{"text": "a\nb"}', ["not valid JSON", "control character"]),
        (b'{"text": NaN}', ["not valid JSON"]),
        (b'\xef\xbb\xbf{"text": "a"}', ["not valid JSON", "BOM"]),
        ('{"text": "a"}'.encode("utf-16"), ["not valid JSON", "position 0"]),
        (b"[]", ["Expected `object`", "array"]),
        (b'["a"]', ["Expected `object`", "array"]),
        (b"3", ["Expected `object`", "int"]),
        (b'"a"', ["Expected `object`", "str"]),
        (b"null", ["Expected `object`", "null"]),
        (DEEP, ["Expected `object`"]),
        (b'{"text": %s}' % DEEP, ["$.text"]),
        (b'{"nested": %s, "text": "a"}' % DEEP, ["nested"]),
        (b'{"text": "a", "nested": %s}' % DEEP, ["nested"]),
        (b"{}", ["text"]),
        (b'{"texts": ["a"]}', ["texts"]),
        (b'{"text": null}', ["$.text", "null"]),
        (b'{"text": 3}', ["$.text", "int"]),
        (b'{"text": ["a"]}', ["$.text", "array"]),
        (b'{"text": ""}', ["$.text", "empty"]),
        (b'{"text": " \\t\\r\\n"}', ["$.text", "white space"]),
        (b'{"text": "\\u2003\\u00a0\\u3000\\u0085"}', ["$.text", "white space"]),
        (b'{"text": "a", "txet": "b"}', ["unknown field", "txet"]),
        (b'{"text": "\\ud800"}', ["not valid JSON", "surrogate", "char"]),
        (b'{"text": "a\\udc00b"}', ["not valid JSON", "surrogate", "char"]),
        (b'{"text": "a", "model": "\\ud83d"}', ["not valid JSON", "surrogate"]),
        (b'{"\\ud800": 1, "text": "a"}', ["not valid JSON", "surrogate"]),
        (b'{"text": "\xff"}', ["not valid JSON", "utf-8", "0xff in position 10"]),
        (b'{"text": "\xed\xa0\x80"}', ["not valid JSON", "utf-8"]),
        (b'{"text": "\xf0\x9f\x98"}', ["not valid JSON", "utf-8"]),
        (b'{"text": "a", "x": "\xff"}', ["unknown field", "x"]),
        (b'{"text": "a", "\xff": "x"}', ["not valid JSON", "utf-8"]),
        (b'{"text": "a", "model": "\xff"}', ["not valid JSON", "utf-8"]),
        (b'{"text": "a", "dimensions": 0}', ["dimensions is 0", "1 to 384"]),
        (b'{"text": "a", "dimensions": 385}', ["dimensions is 385", "1 to 384"]),
        (b'{"text": "a", "dimensions": -1}', ["dimensions is -1", "1 to 384"]),
        (b'{"text": "a", "dimensions": 123456789012345678901234567890}', ["1 to 384"]),
        (b'{"text": "a", "dimensions": "64"}', ["$.dimensions", "str"]),
        (b'{"text": "a", "dimensions": 64.0}', ["$.dimensions", "float"]),
        (b'{"text": "a", "dimensions": 1e999}', ["$.dimensions"]),
        (b'{"text": "a", "dimensions": true}', ["$.dimensions", "bool"]),
        (b'{"text": "a", "prompt_name": "nope"}', ["'nope'", "document, query"]),
        (b'{"text": "a", "prompt_name": 1}', ["$.prompt_name"]),
        (b'{"text": "a", "model": 1}', ["$.model"]),
    ],
    ids=lambda value: ascii(value[:40]) if isinstance(value, bytes) else "",
)
def test_a_bad_body_is_refused_with_what_is_wrong_and_where(
    service: Server, body: bytes, parts: list[str]
) -> None:
    mentions(refusal(send(service, "/embeddings", body), 400, "validation"), *parts)


@pytest.mark.parametrize(
    "body, parts",
    [
        (b"{}", ["texts"]),
        (b'{"text": "a"}', ["text"]),
        (b'{"texts": "a"}', ["$.texts", "str"]),
        (b'{"texts": null}', ["$.texts", "null"]),
        (b'{"texts": []}', ["at least one"]),
        (b'{"texts": ["a", null]}', ["$.texts[1]", "null"]),
        (b'{"texts": ["a", "b", 3, null]}', ["$.texts[2]", "int"]),
        (b'{"texts": [["b"]]}', ["$.texts[0]", "array"]),
        (b'{"texts": ["a", %s]}' % DEEP, ["$.texts[1]", "array"]),
        (b'{"texts": ["a", "\xff"]}', ["not valid JSON", "position 17"]),
        (b'{"texts": ["a", 3], "x": "\xff"}', ["$.texts[1]", "int"]),
        (b'{"texts": ["a", "b", ""]}', ["$.texts[2]", "empty"]),
        (b'{"texts": ["a", "\\u2003 ", "b"]}', ["$.texts[1]", "white space"]),
        (b'{"texts": ["a"], "text": "b"}', ["unknown field", "text"]),
    ],
    ids=lambda value: ascii(value[:40]) if isinstance(value, bytes) else "",
)
def test_a_bad_batch_is_refused_with_what_is_wrong_and_where(
    service: Server, body: bytes, parts: list[str]
) -> None:
    mentions(refusal(send(service, "/embeddings/batch", body), 400, "validation"), *parts)


def test_an_unknown_model_is_answered_with_those_there_are(service: Server) -> None:
    response = service.post("/embeddings", {"text": "a", "model": "gpt"})
    mentions(refusal(response, 404, "model_not_found"), "'gpt'", f"{NAME}, {WIDE}")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "image/png"])
def test_another_content_type_is_refused(service: Server, kind: str) -> None:
    response = send(service, "/embeddings", b'{"text": "a"}', kind)
    mentions(refusal(response, 415, "unsupported_media_type"), kind, "application/json")


@pytest.mark.parametrize("path", ["/embeddings", "/embeddings/batch"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
def test_another_method_is_refused(service: Server, method: str, path: str) -> None:
    response = service.client.request(method, path)
    assert response.status_code == 405 and "POST" in response.headers["Allow"]
    if method == "HEAD":
        assert not response.content
    else:
        mentions(refusal(response, 405, "method_not_allowed"), "POST")


def test_options_and_head_are_answered(service: Server) -> None:
    options = service.client.options("/embeddings")
    assert options.status_code == 200 and "POST" in options.headers["Allow"]
    head = service.client.head("/health")
    assert head.status_code == 200 and not head.content


@pytest.mark.parametrize("path", ["/nope", "/embeddings/", "/embeddings//batch", "/%ff%00"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_route_is_refused(service: Server, method: str, path: str) -> None:
    refusal(service.client.request(method, path), 404, "not_found")


# Limits of the whole


def body_of(size: int) -> bytes:
    return b'{"text": "a"}'.ljust(size)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_the_body_limit_is_exact(small: Server, chunked: bool) -> None:
    def post(body: bytes) -> httpx.Response:
        pieces = (body[at : at + 999] for at in range(0, len(body), 999))
        return small.post(
            "/embeddings",
            content=pieces if chunked else body,
            headers={"Content-Type": "application/json"},
        )

    assert post(body_of(5000)).status_code == 200
    mentions(refusal(post(body_of(5001)), 413, "too_large"), "5000", "MAX_BODY_SIZE")
    mentions(refusal(post(body_of(100_000)), 413, "too_large"), "5000", "MAX_BODY_SIZE")


def test_a_full_queue_is_said_so_and_lets_small_requests_through(
    models_dir: pathlib.Path,
) -> None:
    limits = {"MAX_REQUEST_TOKENS": "6000", "MAX_QUEUE_TOKENS": "6000", "INFERENCE_THREADS": "1"}
    with serve(models_dir, PRECISION="fp32", **limits) as server, ThreadPoolExecutor(3) as pool:
        large = {"text": letters(5900)}
        pending = [pool.submit(server.post, "/embeddings", large) for _ in range(3)]
        finished = as_completed(pending)
        for future in (next(finished), next(finished)):
            response = future.result()
            mentions(refusal(response, 429, "overloaded"), "6000", "MAX_QUEUE_TOKENS")
            assert 1 <= int(response.headers["Retry-After"]) <= 60
        assert server.embed("a small one")
        (first,) = (future for future in pending if not future.done())
        assert first.result().status_code == 200
        assert server.post("/embeddings", large).status_code == 200
        assert "Traceback" not in server.log


def test_a_request_that_waits_too_long_is_given_up(models_dir: pathlib.Path) -> None:
    slow = {"PRECISION": "fp32", "INFERENCE_THREADS": "1"}
    with serve(models_dir, REQUEST_TIMEOUT="0.5", **slow) as server:
        started = time.monotonic()
        response = server.post("/embeddings", {"text": letters(60_000)})
        mentions(refusal(response, 504, "timeout"), "REQUEST_TIMEOUT")
        assert response.headers["x-should-retry"] == "false"
        assert time.monotonic() - started < 20  # and not the minute that is the default
        assert server.embed("the next one")
        assert "Traceback" not in server.log


def test_random_bodies_are_the_callers_fault(service: Server) -> None:
    """Mutations of a good body: never a 5xx."""
    random = np.random.default_rng(int(os.environ.get("FUZZ_SEED", "7")))
    good = json.dumps(
        {"texts": ["a", "é 😀", "b" * 50], "model": NAME, "dimensions": 64, "prompt_name": None},
        ensure_ascii=False,
    ).encode()
    statuses = set()
    for _ in range(300):
        body = bytearray(good)
        for _ in range(random.integers(1, 4)):
            at, end = sorted(random.integers(0, len(body) + 1, 2))
            end = min(end, at + int(random.integers(0, 6)))
            body[at:end] = random.bytes(int(random.integers(0, 4)))
        response = send(service, "/embeddings/batch", bytes(body))
        statuses.add(response.status_code)
        if response.status_code != 200:
            assert response.json().keys() == {"error", "error_type"}
    assert statuses <= {200, 400, 404}, statuses
