"""text-embeddings-inference's dialect, with huggingface_hub's client where it has one, and the
plain dialect beside it.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import NAME, WIDE
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from servers import KEY, Server, serve
from test_api_metrics import labelled, scrape

from engine.encoder import cpu

LONG = "the river rose " * 200
PAIR = {"source_sentence": "A cat sleeps.", "sentences": ["A kitten naps.", "Taxes are due."]}


@pytest.fixture(scope="module")
def client(service: Server) -> InferenceClient:
    return InferenceClient(base_url=service.url, token=KEY)


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def refusal(response: httpx.Response, status: int, error_type: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error", "error_type"} and body["error_type"] == error_type
    message: str = body["error"]
    return message


# huggingface_hub's client


def test_feature_extraction(client: InferenceClient, service: Server) -> None:
    one = client.feature_extraction("a cat")
    assert one.shape == (1, 384) and one.dtype == np.float32
    assert one[0] @ np.array(service.embed("a cat")) >= 0.9999
    many = client.feature_extraction(["a cat", "a dog"])
    assert many.shape == (2, 384) and many[0] @ one[0] >= 0.9999


def test_its_options(client: InferenceClient) -> None:
    raw = client.feature_extraction("a cat", normalize=False)
    assert np.linalg.norm(raw) != pytest.approx(1, abs=0.01)
    assert np.allclose(unit(raw), client.feature_extraction("a cat"), atol=1e-5)
    cut = client.feature_extraction("a cat", dimensions=8, prompt_name="query")
    assert cut.shape == (1, 8) and np.linalg.norm(cut) == pytest.approx(1, abs=1e-5)
    with pytest.raises(HfHubHTTPError, match="prompt_name is 'nope'"):
        client.feature_extraction("a cat", prompt_name="nope")


def test_truncation_on_either_side(client: InferenceClient, service: Server) -> None:
    """What is kept is embedded as if it alone had been sent: 254 tokens, a word each."""
    words = [f"{'river' if number % 2 else 'bridge'}" for number in range(600)]
    words[:40], words[-40:] = ["winter"] * 40, ["summer"] * 40
    text = " ".join(words)
    for direction, kept in (("right", words[:254]), ("left", words[-254:])):
        cut = client.feature_extraction(text, truncate=True, truncation_direction=direction)
        assert cut[0] @ np.array(service.embed(" ".join(kept))) >= 0.9999
    assert np.array_equal(
        client.feature_extraction(text, truncate=True),
        client.feature_extraction(text, truncate=True, truncation_direction="right"),
    )
    whole = client.feature_extraction(text)
    assert whole[0] @ np.array(service.embed(text)) >= 0.9999
    response = service.post(
        "/embed", {"inputs": text, "truncate": True, "truncation_direction": "Left"}
    )
    assert np.array(response.json()[0]) @ np.array(service.embed(" ".join(words[-254:]))) >= 0.9999


def test_what_is_cut_is_said_and_counted(service: Server) -> None:
    long, short = "river " * 300, "a cat"
    counted = labelled("truncated_texts_total")
    for path, inputs, truncate, cut in (
        ("/embed", [long, short, long], True, "2"),
        ("/", long, True, "1"),
        ("/similarity", {"source_sentence": long, "sentences": [short, long]}, True, "2"),
        ("/embed", [short], True, None),
        ("/embed", [long], False, None),
    ):
        body: dict[str, Any] = {"inputs": inputs, "truncate": truncate}
        if path == "/similarity":
            body = {"inputs": inputs, "parameters": {"truncate": truncate}}
        before = scrape(service)[counted]
        response = service.post(path, body)
        assert response.status_code == 200
        assert response.headers.get("X-Truncated") == cut
        assert scrape(service)[counted] - before == int(cut or 0)


def test_sentence_similarity(client: InferenceClient, service: Server) -> None:
    close, far = client.sentence_similarity(PAIR["source_sentence"], PAIR["sentences"])
    assert close > 0.5 > far
    source, *others = (
        np.array(service.embed(text)) for text in ["A cat sleeps.", *PAIR["sentences"]]
    )
    assert np.allclose([close, far], [source @ other for other in others], atol=1e-4)


# What it has no call for


def test_similarity_has_a_route_of_its_own(service: Server) -> None:
    root = service.post("/", {"inputs": PAIR}).json()
    assert np.allclose(service.post("/similarity", {"inputs": PAIR}).json(), root, atol=1e-5)
    prompted = {"inputs": PAIR, "parameters": {"prompt_name": "query", "truncate": True}}
    assert len(service.post("/similarity", prompted).json()) == 2


def test_tokens_with_the_code_points_they_stand_for(service: Server) -> None:
    (tokens,) = service.post("/tokenize", {"inputs": "Ünaffable 😀 cat"}).json()
    assert [token["text"] for token in tokens] == [
        "[CLS]",
        "Una",
        "ffa",
        "ble",
        "😀",
        "cat",
        "[SEP]",
    ] or ([token["text"] for token in tokens][0] == "[CLS]")
    assert tokens[0] == {"id": 101, "text": "[CLS]", "special": True, "start": None, "stop": None}
    for token in tokens[1:-1]:
        assert not token["special"]
        assert "Ünaffable 😀 cat"[token["start"] : token["stop"]] == token["text"]
    bare = service.post("/tokenize", {"inputs": ["a", "b c"], "add_special_tokens": False}).json()
    assert [[token["text"] for token in tokens] for tokens in bare] == [["a"], ["b", "c"]]


def test_info(service: Server) -> None:
    info = service.client.get("/info").json()
    family = cpu.fastest("fp32")
    engine = (info.pop("engine"), info.pop("instruction_set"))
    assert engine == (("own engine", family.name) if family else ("OpenVINO", None))
    assert len(info.pop("fingerprint")) == 12
    assert info == {
        "model_id": f"sentence-transformers/{NAME}",
        "model_sha": None,
        "model_dtype": "float32",
        "model_type": {"embedding": {"pooling": "in the model's graph"}},
        "max_concurrent_requests": 64,
        "max_input_length": 256,
        "max_batch_tokens": 512,
        "max_batch_requests": 64,
        "max_client_batch_size": 2048,
        "auto_truncate": False,
        "tokenization_workers": 64,
        "version": "1.0.0",
    }


def test_model_chooses_here_too(service: Server) -> None:
    wide = service.embed(LONG, model=WIDE)
    (chosen,) = service.post("/embed", {"inputs": LONG, "model": WIDE}).json()
    (default,) = service.post("/embed", {"inputs": LONG}).json()
    assert np.dot(chosen, wide) >= 0.9999 > np.dot(default, wide)


# Plain


def test_plain(service: Server) -> None:
    vector = service.post("/embed", {"text": "a cat"}).json()
    assert np.dot(vector, service.embed("a cat")) >= 0.9999
    cut = service.post("/embed", {"text": "a cat", "dimensions": 5, "model": WIDE}).json()
    assert len(cut) == 5
    assert httpx.get(f"{service.url}/healthcheck", trust_env=False).json() == {"status": "ok"}


# Errors


@pytest.mark.parametrize(
    "path, body, says",
    [
        ("/embed", {}, "required field `inputs`"),
        ("/embed", {"inputs": 3}, "$.inputs"),
        ("/embed", {"inputs": {"source_sentence": "a"}}, "$.inputs"),
        ("/embed", {"inputs": [1, 2]}, "$.inputs["),
        ("/embed", {"inputs": ""}, "$.inputs: text is empty"),
        ("/embed", {"inputs": ["a", ""]}, "$.inputs[1]: text is empty"),
        ("/embed", {"inputs": ["a"] * 2049}, "2049 texts; the limit is 2048 (MAX_INPUTS)"),
        ("/embed", {"inputs": "a", "truncation_direction": "up"}, "$.truncation_direction"),
        ("/embed", {"inputs": "a", "text": "b"}, "`inputs` or `text`, not both"),
        ("/embed", {"text": ""}, "$.text: text is empty"),
        ("/embed", {"text": ["a"]}, "$.text"),
        ("/embed", {"text": "a", "normalize": True}, "unknown field `normalize`"),
        ("/", {"inputs": 3}, "$.inputs"),
        ("/", {"inputs": {"sentences": ["a"]}}, "required field `source_sentence`"),
        ("/similarity", {"inputs": "a"}, "$.inputs"),
        ("/similarity", {"inputs": PAIR | {"sentences": []}}, "send at least one"),
        ("/similarity", {"inputs": PAIR | {"sentences": ["a", " "]}}, "$.inputs.sentences[1]: "),
        (
            "/similarity",
            {"inputs": PAIR | {"source_sentence": ""}},
            "source_sentence: text is empty",
        ),
        ("/tokenize", {"inputs": "a", "prompt_name": "x"}, "prompt_name is 'x'"),
        ("/tokenize", {"inputs": ["a", ""]}, "$.inputs[1]: text is empty"),
    ],
)
def test_a_bad_request(service: Server, path: str, body: Any, says: str) -> None:
    assert says in refusal(service.post(path, body), 400, "validation")


ROUTES = ["/embed", "/", "/similarity", "/tokenize"]


@pytest.mark.parametrize("path", ROUTES)
def test_the_form_of_every_other_error(service: Server, path: str) -> None:
    good = {"inputs": PAIR if path == "/similarity" else "a"}
    assert NAME in refusal(service.post(path, good | {"model": "x"}), 404, "model_not_found")
    assert "POST" in refusal(service.client.put(path), 405, "method_not_allowed")
    plain = service.post(path, content=b"{}", headers={"Content-Type": "text/plain"})
    assert "application/json" in refusal(plain, 415, "unsupported_media_type")
    assert "not valid JSON" in refusal(service.post(path, content=b"{"), 400, "validation")
    assert "object" in refusal(service.post(path, content=b"[]"), 400, "validation")
    keyless = httpx.post(service.url + path, json=good, trust_env=False)
    assert "X-API-Key" in refusal(keyless, 401, "authentication")


@pytest.fixture(scope="module")
def small(models_dir: Any) -> Iterator[Server]:
    limits = {"MAX_TEXT_SIZE": "100", "MAX_REQUEST_TOKENS": "30", "MAX_BODY_SIZE": "1000"}
    with serve(models_dir, PRECISION="fp32", **limits) as server:
        yield server


@pytest.mark.parametrize("path", ROUTES)
def test_limits(small: Server, path: str) -> None:
    def send(text: str) -> httpx.Response:
        inputs = {"source_sentence": text, "sentences": ["a"]} if path == "/similarity" else text
        return small.post(path, {"inputs": inputs})

    assert send("a " * 20).status_code == 200
    assert "MAX_REQUEST_TOKENS" in refusal(send("a " * 40), 413, "too_large")
    assert "MAX_TEXT_SIZE" in refusal(send("a " * 60), 413, "too_large")
    assert "MAX_BODY_SIZE" in refusal(send("a " * 600), 413, "too_large")
    assert json.loads(send("a").content)
