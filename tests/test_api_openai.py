"""OpenAI's dialect, with OpenAI's own client: vectors, models, and its exception types."""

import asyncio
import base64
import json
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conftest import NAME, WIDE
from servers import KEY, Server, held, hold, letters, serve, wait_ready
from test_api_metrics import labelled, scrape_until
from tokenizers import Tokenizer

ALIAS = "text-embedding-3-small"
TEXTS = ["a cat", "quarterly results", "😀 naïve"]
TIMEOUT = 0.7


@contextmanager
def client_of(server: Server, key: str = KEY, retries: int = 0) -> Iterator[tuple[Any, list[str]]]:
    """The client, and the paths of the requests it has sent."""
    sent: list[str] = []
    http = openai.DefaultHttpxClient(
        trust_env=False, event_hooks={"request": [lambda request: sent.append(request.url.path)]}
    )
    with openai.OpenAI(
        api_key=key, base_url=f"{server.url}/v1", max_retries=retries, http_client=http
    ) as client:
        yield client, sent


@pytest.fixture(scope="module")
def aliased(models_dir: pathlib.Path) -> Iterator[Server]:
    options = {"MODEL_ALIASES": f"{ALIAS}={WIDE}, x={NAME}", "OPENAI_TOKEN_IDS": "off"}
    with serve(models_dir, PRECISION="fp32", **options) as server:
        yield server
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def client(aliased: Server) -> Iterator[Any]:
    with client_of(aliased) as (made, _):
        yield made


def refusal(response: httpx.Response, status: int, kind: str, code: str, param: str | None) -> str:
    """The message of an answer that must be this error in OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    message: str = body["error"].pop("message")
    assert body["error"] == {"type": kind, "param": param, "code": code}
    return message


# Good input


def test_one_text_and_several(client: Any, aliased: Server) -> None:
    many = client.embeddings.create(model=NAME, input=TEXTS)  # in base64, as the client likes it
    assert (many.object, many.model) == ("list", NAME)
    assert [(item.object, item.index) for item in many.data] == [
        ("embedding", index) for index in range(len(TEXTS))
    ]
    for text, item in zip(TEXTS, many.data):
        one = client.embeddings.create(model=NAME, input=text, encoding_format="float")
        assert len(one.data) == 1
        assert np.dot(one.data[0].embedding, item.embedding) >= 0.9999
        assert np.dot(aliased.embed(text), item.embedding) >= 0.9999


def test_base64_is_little_endian_float32(client: Any) -> None:
    floats = client.embeddings.create(model=NAME, input="a cat", encoding_format="float")
    packed = client.embeddings.create(model=NAME, input="a cat", encoding_format="base64")
    vector = np.frombuffer(base64.b64decode(packed.data[0].embedding), "<f4")
    assert vector.shape == (384,)
    assert np.array_equal(vector, np.array(floats.data[0].embedding, np.float32))


def test_dimensions_cut_and_normalise_again(client: Any) -> None:
    whole = np.array(client.embeddings.create(model=NAME, input="a cat").data[0].embedding)
    cut = client.embeddings.create(model=NAME, input="a cat", dimensions=64).data[0].embedding
    assert np.allclose(cut, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-6)


def test_usage_counts_the_tokens_that_were_computed(client: Any, real_model: pathlib.Path) -> None:
    tokenizer = Tokenizer.from_file(str(real_model / "tokenizer.json"))
    tokenizer.no_padding()
    usage = client.embeddings.create(model=NAME, input=TEXTS).usage
    tokens = sum(len(tokenizer.encode(text).ids) for text in TEXTS)
    assert usage.prompt_tokens == usage.total_tokens == tokens


def test_the_asynchronous_client(aliased: Server) -> None:
    async def ask() -> Any:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(
            api_key=KEY, base_url=f"{aliased.url}/v1", http_client=http
        ) as client:
            listed = [model.id async for model in client.models.list()]
            calls = [client.embeddings.create(model=NAME, input=text) for text in TEXTS]
            answers = await asyncio.gather(*calls)
            with pytest.raises(openai.NotFoundError):
                await client.embeddings.create(model="nope", input="a")
            return listed, [answer.data[0].embedding for answer in answers]

    listed, vectors = asyncio.run(ask())
    assert listed == [NAME, WIDE, ALIAS, "x"]
    for text, vector in zip(TEXTS, vectors):
        assert np.dot(aliased.embed(text), vector) >= 0.9999


def test_models_are_listed_and_found_by_any_of_their_names(client: Any, aliased: Server) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [NAME, WIDE, ALIAS, "x"]
    wide = aliased.client.get(f"/v1/models/{WIDE}").json()
    assert wide.pop("created") > 1_700_000_000
    certificate = wide.pop("certificate")
    assert certificate.keys() == {
        "minimum",
        "mean",
        "cases",
        "alone",
        "threads",
        "nearest",
        "measured",
    }
    assert 0.9999 <= certificate["minimum"] <= certificate["alone"] <= 1.0001
    assert certificate["mean"] >= 0.9999 and certificate["cases"] > 150  # FEW texts
    whole = aliased.client.get(f"/v1/models/{NAME}").json()["certificate"]
    assert whole["cases"] > 240
    assert certificate["threads"] and certificate["measured"] == "bake"
    assert wide.pop("engine") in ("own engine", "OpenVINO")
    fingerprint = wide.pop("fingerprint")
    assert len(fingerprint) == 12 and fingerprint != models[0].fingerprint
    assert wide.pop("prompts").keys() == {"query", "document"}
    assert wide == {
        "id": WIDE,
        "object": "model",
        "owned_by": "sentence-transformers",
        "alias_of": None,
        "prompt_name": None,
        "task": "embed",
        "labels": None,
        "dimensions": 384,
        "max_dimensions": 384,
        "max_tokens": 512,
        "modalities": ["text"],
        "default_prompt": None,
        "revision": None,
        "precision": "fp32",
    }
    for name in (WIDE, f"sentence-transformers/{WIDE}", ALIAS):
        found = client.models.retrieve(name)
        assert found.alias_of == (WIDE if name == ALIAS else None)
        assert found.to_dict() | {"id": WIDE, "alias_of": None} == models[1].to_dict()
        response = client.embeddings.with_raw_response.create(model=name, input="a")
        assert response.headers["X-Model"] == f"{WIDE}@{fingerprint}"
        assert response.parse().model == name


def test_a_request_without_a_model_gets_the_default(aliased: Server) -> None:
    answer = aliased.post("/v1/embeddings", {"input": "a"}).json()
    assert answer["model"] == NAME


def test_as_many_inputs_as_openai_takes(client: Any) -> None:
    for count in (300, 2048):
        texts = [f"text {number % 7}" for number in range(count)]
        data = client.embeddings.create(model=NAME, input=texts).data
        assert [item.index for item in data] == [*range(count)]
        first, last = data[0].embedding, data[-1].embedding
        assert first == data[7].embedding and last == data[(count - 1) % 7].embedding != first


@pytest.mark.parametrize(
    "text, limit", [("a" * 1_048_577, "MAX_TEXT_SIZE"), ("a " * 300_001, "MAX_REQUEST_TOKENS")]
)
def test_a_text_over_a_limit_names_the_parameter(client: Any, text: str, limit: str) -> None:
    with pytest.raises(openai.APIStatusError, match=rf"^.*\$.input\[1\]: .*{limit}") as info:
        client.embeddings.create(model=NAME, input=["a", text])
    assert (info.value.status_code, info.value.code, info.value.param) == (
        413,
        "too_large",
        "input",
    )


def test_chunks_when_asked_for(client: Any) -> None:
    text = "Größe 😀 cafe\u0301 " * 100
    options = {"chunks": True, "prompt_name": "query"}
    (item,) = client.embeddings.create(
        model=NAME, input=text, encoding_format="float", extra_body=options, user="me"
    ).data
    chunks = item.chunks
    assert len(chunks) > 1
    assert "".join(text[chunk["start"] : chunk["end"]] for chunk in chunks) == text
    mean = np.mean([chunk["embedding"] for chunk in chunks], axis=0)
    assert np.allclose(mean / np.linalg.norm(mean), item.embedding, atol=1e-5)
    assert all(chunk["tokens"] <= 256 for chunk in chunks)
    plain = client.embeddings.create(model=NAME, input="a").data[0]
    assert not hasattr(plain, "chunks")


# Its exception types


def test_a_wrong_key(aliased: Server) -> None:
    with client_of(aliased, key="wrong") as (client, _):
        with pytest.raises(openai.AuthenticationError) as info:
            client.embeddings.create(model=NAME, input="a")
    assert (info.value.code, info.value.type) == ("invalid_api_key", "invalid_request_error")


@pytest.mark.parametrize("call", ["embeddings", "models"])
def test_an_unknown_model(client: Any, call: str) -> None:
    with pytest.raises(openai.NotFoundError, match=f"there is: {NAME}, {WIDE}") as info:
        if call == "models":
            client.models.retrieve("ada")
        else:
            client.embeddings.create(model="ada", input="a")
    assert (info.value.code, info.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    "fields, param, says",
    [
        ({"input": ""}, "input", r"\$.input: text is empty"),
        ({"input": ["a", " "]}, "input", r"\$.input\[1\]: text is empty"),
        ({"input": []}, "input", "send at least one"),
        ({"input": ["a"] * 2049}, "input", r"2049 texts; the limit is 2048 \(MAX_INPUTS\)"),
        ({"input": [1, 2, 3]}, "input", r"\$.input\[0\]: .* token ids .* send the text itself"),
        ({"input": [[1, 2], [3]]}, "input", "token ids .* send the text itself"),
        ({"input": ["a", 2]}, "input", r"\$.input\[1\]: a token id beside a text; send one kind"),
        ({"input": "a", "dimensions": 385}, "dimensions", "1 to 384"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "hex"),
        ({"input": "a", "extra_body": {"prompt_name": "x"}}, "prompt_name", "document, query"),
        ({"input": "a", "extra_body": {"modality": "smell"}}, "modality", "smell"),
    ],
)
def test_a_bad_request(client: Any, fields: dict[str, Any], param: str | None, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as info:
        client.embeddings.create(model=NAME, **fields)
    assert (info.value.code, info.value.param) == ("invalid_value", param)
    assert info.value.type == "invalid_request_error"


def test_a_picture_for_a_model_of_texts_is_not_tried_again(aliased: Server) -> None:
    with client_of(aliased, retries=2) as (client, sent):
        with pytest.raises(openai.InternalServerError, match="takes texts only") as info:
            client.embeddings.create(
                model=NAME, input="data:image/png;base64,", extra_body={"modality": "image"}
            )
    assert (info.value.status_code, info.value.code) == (501, "not_supported")
    assert len(sent) == 1


def test_while_loading_and_too_late(
    models_dir: pathlib.Path, clip_models_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """503 is worth another try, 504 is not."""
    slow = "tiny-clip"
    for folder in (models_dir / NAME, clip_models_dir / slow):
        shutil.copytree(folder, tmp_path / folder.name, copy_function=os.symlink)
    content = hold(tmp_path / slow)
    options = {"EMBEDDING_MODEL": NAME, "REQUEST_TIMEOUT": str(TIMEOUT), "INFERENCE_THREADS": "1"}
    with (
        serve(tmp_path, wait=False, PRECISION="fp32", **options) as server,
        ThreadPoolExecutor(1) as pool,
        held(server, tmp_path / slow) as pipe,
    ):
        with client_of(server) as (client, sent):
            with pytest.raises(openai.InternalServerError, match="still loading") as info:
                client.embeddings.create(model=slow, input="a")
        assert (info.value.status_code, info.value.code) == (503, "not_ready")
        assert "x-should-retry" not in info.value.response.headers
        with client_of(server, retries=20) as (client, sent):  # its own retries bring it through
            answer = pool.submit(client.embeddings.create, model=slow, input="a")
            while len(sent) < 2:
                assert not answer.done() and server.process.poll() is None
                time.sleep(0.01)
            pipe.write(content)
            pipe.close()
            assert answer.result(60).model == slow
        wait_ready(server)
        with client_of(server, retries=2) as (client, sent):
            with pytest.raises(openai.InternalServerError, match="REQUEST_TIMEOUT") as info:
                client.embeddings.create(model=NAME, input=letters(60_000))
        assert (info.value.status_code, info.value.code) == (504, "timeout")
        assert len(sent) == 1
        assert "Traceback" not in server.log


def test_a_full_queue(models_dir: pathlib.Path) -> None:
    # An empty queue takes a request of any size.
    limits = {"MAX_REQUEST_TOKENS": "10000", "MAX_QUEUE_TOKENS": "5000", "MAX_BODY_SIZE": "30000"}
    limits["INFERENCE_THREADS"] = "1"
    with serve(models_dir, PRECISION="fp32", **limits) as server, client_of(server) as (client, _):
        large = {"input": letters(9900)}
        first = threading.Thread(target=server.post, args=("/v1/embeddings", large))
        first.start()
        scrape_until(server, lambda now: now[labelled("queue_tokens")] > 0)
        with pytest.raises(openai.RateLimitError, match="MAX_QUEUE_TOKENS") as info:
            client.embeddings.create(model=NAME, **large)
        assert (info.value.code, info.value.type) == ("rate_limit_exceeded", "rate_limit_error")
        assert info.value.param == "input"
        assert int(info.value.response.headers["Retry-After"]) >= 1
        first.join()
        for size, limit in ((10_100, "MAX_REQUEST_TOKENS"), (20_000, "MAX_BODY_SIZE")):
            with pytest.raises(openai.APIStatusError, match=limit) as large_info:
                client.embeddings.create(model=NAME, input="a " * size)
            assert (large_info.value.status_code, large_info.value.code) == (413, "too_large")


def test_the_largest_request_starves_nobody_and_does_not_hold_up_the_end(
    models_dir: pathlib.Path,
) -> None:
    words = letters(290_000).split()
    texts = [" ".join(words[at::2048]) for at in range(2048)]
    with serve(models_dir, PRECISION="fp32", INFERENCE_THREADS="1") as server:
        with ThreadPoolExecutor(1) as pool:
            large = pool.submit(server.post, "/v1/embeddings", {"input": texts})
            scrape_until(server, lambda now: now[labelled("queue_tokens")] > 0)
            for number in range(20):
                assert len(server.embed(f"a short query, number {number}")) == 384
                assert not large.done(), "the large request was not the last"
            server.process.terminate()
            began = time.monotonic()
            response = large.result(30)
            assert server.process.wait(30) == 0
            assert time.monotonic() - began < 10
        if response.status_code != 200:
            message = refusal(response, 503, "server_error", "shutting_down", None)
            assert "shutting down" in message and response.headers["Retry-After"]
        assert "Traceback" not in server.log


# The form of every other error


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/nope", "/v1/embeddings/x"])
def test_an_unknown_route(aliased: Server, path: str) -> None:
    response = aliased.client.get(path)
    refusal(response, 404, "invalid_request_error", "unknown_url", None)


def test_another_prefix_is_not_this_dialect(aliased: Server) -> None:
    assert aliased.client.get("/v1x").json()["error_type"] == "not_found"


def test_another_method(aliased: Server) -> None:
    response = aliased.client.get("/v1/embeddings")
    message = refusal(response, 405, "invalid_request_error", "method_not_supported", None)
    assert "POST" in message and response.headers["Allow"] == "POST"


def test_another_content_type(aliased: Server) -> None:
    response = aliased.post("/v1/embeddings", content=b"a", headers={"Content-Type": "text/plain"})
    refusal(response, 415, "invalid_request_error", "unsupported_media_type", None)


def test_broken_json(aliased: Server) -> None:
    response = aliased.post("/v1/embeddings", content=b'{"input": ')
    message = refusal(response, 400, "invalid_request_error", "invalid_value", None)
    assert "not valid JSON" in message


def test_a_request_that_breaks_off(aliased: Server) -> None:
    """The worker answers it before the application sees it, in this form too."""
    with aliased.http() as sock:
        sock.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        head, _, body = sock.makefile("rb").read().partition(b"\r\n\r\n")
    assert b" 408 " in head
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "timeout")
