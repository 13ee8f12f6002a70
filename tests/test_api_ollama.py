"""Ollama's dialect, with its own client where that has a call."""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import ollama
import pytest
from conftest import NAME, WIDE
from servers import KEY, Server

from api.ollama import OLLAMA_VERSION, finder
from engine.bundle import discover
from engine.errors import ModelNotFound
from engine.models import Models

WORDS = ["river", "bridge", "winter"] * 200
LONG = " ".join(WORDS)  # 600 tokens, in a window of 256
SOURCE = f"sentence-transformers/{NAME}"


@pytest.fixture(scope="module")
def client(service: Server) -> Iterator[ollama.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with ollama.Client(host=service.url, headers=headers, trust_env=False) as client:
        yield client


def refusal(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    message: str = body["error"]
    return message


def embed(service: Server, **body: Any) -> Any:
    response = service.post("/api/embed", body)
    assert response.status_code == 200, response.text
    return response.json()


def cosine(one: Any, other: Any) -> float:
    return float(np.dot(one, other))


# Embedding


def test_a_text_and_several(client: ollama.Client, service: Server) -> None:
    one = client.embed(NAME, "a cat")
    assert one.model == NAME and one.prompt_eval_count == 4
    assert one.total_duration is not None and one.load_duration is not None
    assert 0 <= one.load_duration <= one.total_duration
    assert 10_000 < one.total_duration < 60e9  # nanoseconds
    assert cosine(one.embeddings[0], service.embed("a cat")) >= 0.9999
    many = client.embed(NAME, ["a dog", "a cat"])
    assert many.prompt_eval_count == 8 and len(many.embeddings) == 2
    assert cosine(many.embeddings[1], one.embeddings[0]) >= 0.9999
    assert client.embed(NAME, "a cat").embeddings == one.embeddings


def test_the_older_call(client: ollama.Client, service: Server) -> None:
    vector = client.embeddings(NAME, "a cat").embedding
    assert cosine(vector, service.embed("a cat")) >= 0.9999
    assert client.embeddings(NAME, "").embedding == []
    assert service.post("/api/embeddings", {"prompt": None}).json() == {"embedding": []}


def test_dimensions(client: ollama.Client, service: Server) -> None:
    cut = client.embed(WIDE, "a cat", dimensions=8).embeddings[0]
    assert len(cut) == 8 and np.linalg.norm(cut) == pytest.approx(1, abs=1e-5)
    assert len(embed(service, input="a cat", dimensions=0)["embeddings"][0]) == 384


@pytest.mark.parametrize("sent", [{}, {"input": None}, {"input": ""}, {"input": []}])
def test_no_input_loads_the_model(service: Server, sent: dict[str, Any]) -> None:
    answer = embed(service, model=f"{NAME}:latest", **sent)
    assert answer["model"] == f"{NAME}:latest" and answer["embeddings"] == []
    assert answer["prompt_eval_count"] == 0
    assert NAME in refusal(service.post("/api/embed", {"model": "nope", **sent}), 404)


@pytest.mark.parametrize(
    "name",
    [NAME, f"{NAME}:latest", NAME.upper(), f"{NAME.lower()}:latest", SOURCE, f"{SOURCE}:latest"],
)
def test_a_models_names(service: Server, name: str) -> None:
    for path, given, field in (("embed", "input", "embeddings"), ("embeddings", "prompt", "")):
        answer = service.post(f"/api/{path}", {"model": name, given: "a cat"}).json()
        vector = answer[field][0] if field else answer["embedding"]
        assert cosine(vector, service.embed("a cat")) >= 0.9999
        assert answer.get("model", name) == name
    assert service.post("/api/show", {"model": name}).status_code == 200
    assert service.post("/api/show", {"name": name}).status_code == 200


@pytest.mark.parametrize("name", [None, ""])
def test_the_default_model(service: Server, name: str | None) -> None:
    assert embed(service, model=name, input="a cat")["model"] == NAME
    shown = service.post("/api/show", {"model": name}).json()
    assert shown["model_info"]["general.basename"] == NAME


def test_the_model_that_is_named_answers(service: Server) -> None:
    """They differ in their window, which shows where texts are cut."""
    for model, window in ((NAME, 254), (WIDE, 510)):
        answer = embed(service, model=f"{model}:latest", input=LONG)
        expected = service.embed(" ".join(WORDS[:window]), model=model)
        assert cosine(answer["embeddings"][0], expected) >= 0.9999


@pytest.mark.parametrize(
    "sent, cuts",
    [({}, True), ({"truncate": None}, True), ({"truncate": True}, True), ({"truncate": False}, 0)],
)
def test_a_text_longer_than_the_window(service: Server, sent: Any, cuts: bool) -> None:
    """Cut by default, as Ollama does; with `false` averaged over its chunks, as elsewhere here."""
    cut, whole = service.embed(" ".join(WORDS[:254])), service.embed(LONG)
    expected, other = (cut, whole) if cuts else (whole, cut)
    (vector,) = embed(service, input=LONG, **sent)["embeddings"]
    old = service.post("/api/embeddings", {"prompt": LONG, **sent}).json()["embedding"]
    for found in (vector, old):
        assert cosine(found, expected) >= 0.9999 > cosine(found, other)


@pytest.mark.parametrize(
    "field, values",
    [
        ("keep_alive", [0, -1, 1.5, "5m", "-1", None]),
        ("options", [{}, {"num_ctx": 8, "temperature": 0.5, "stop": ["a"]}, None]),
    ],
)
def test_fields_without_effect(service: Server, field: str, values: list[Any]) -> None:
    plain = embed(service, input=LONG)["embeddings"]
    for value in values:
        assert embed(service, input=LONG, **{field: value})["embeddings"] == plain


def test_unknown_fields_are_ignored_and_named(service: Server) -> None:
    for path, body in (("embed", {"input": "a"}), ("embeddings", {"prompt": "a"}), ("show", {})):
        more = {"options": {}} if path == "show" else {"options": {}, "keep_alive": "5m"}
        response = service.post(f"/api/{path}", {**body, **more})
        assert response.status_code == 200, response.text
        assert "X-Ignored-Fields" not in response.headers
        unknown = {"user": "x", "stream": False, "raw": None}
        response = service.post(f"/api/{path}", {**body, **more, **unknown})
        assert response.status_code == 200, response.text
        assert response.headers["X-Ignored-Fields"] == "user, stream"


def test_which_model_and_how_many_texts_were_cut(service: Server, client: ollama.Client) -> None:
    response = service.post("/api/embed", {"input": [LONG, "a", LONG]})
    assert response.headers["X-Truncated"] == "2"
    assert response.headers["X-Model"] == f"{NAME}@{client.list().models[0].digest}"
    for sent in ({"input": [LONG], "truncate": False}, {"input": "a"}):
        assert "X-Truncated" not in service.post("/api/embed", sent).headers


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_any_content_type(service: Server, kind: str | None) -> None:
    """`curl -d` says that it sends a form."""
    headers = {} if kind is None else {"Content-Type": kind}
    for path, body in (("embed", b'{"input":"a"}'), ("embeddings", b'{"prompt":"a"}')):
        response = service.post(f"/api/{path}", content=body, headers=headers)
        assert response.status_code == 200, response.text
    assert service.post("/api/show", content=b"{}", headers=headers).status_code == 200


# What clients ask before they embed


def test_tags(client: ollama.Client) -> None:
    models = client.list().models
    assert [model.model for model in models] == [f"{NAME}:latest", f"{WIDE}:latest"]
    for model in models:
        assert model.details and model.details.family == "bert" and model.modified_at
        assert model.details.quantization_level == "F32"
        assert model.size and model.size > 10_000_000
        assert model.digest and re.fullmatch("[0-9a-f]{12}", model.digest)
        assert client.embed(model.model, "a").embeddings  # type: ignore[arg-type]  # not None
    assert models[0].digest != models[1].digest


def test_show(client: ollama.Client, service: Server) -> None:
    shown = client.show(f"{WIDE}:latest")
    assert shown.capabilities == ["embedding"] and shown.modelinfo
    family = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{family}.embedding_length"] == 384
    assert shown.modelinfo[f"{family}.context_length"] == 512
    assert shown.details and shown.details.family == family
    body = {"model": WIDE, "verbose": True, "system": "a", "template": "b", "options": {}}
    assert service.post("/api/show", body).status_code == 200


def test_ps(client: ollama.Client) -> None:
    running, listed = client.ps().models, client.list().models
    assert [model.digest for model in running] == [model.digest for model in listed]
    assert [model.context_length for model in running] == [256, 512]
    assert all(model.expires_at and model.expires_at.year == 9999 for model in running)


def test_version(service: Server) -> None:
    assert service.client.get("/api/version").json() == {"version": OLLAMA_VERSION}
    assert all(part.isdigit() for part in OLLAMA_VERSION.split("."))


def test_clients_see_that_a_server_is_there(service: Server) -> None:
    """Without a key: AnythingLLM sends none when it looks."""
    with httpx.Client(base_url=service.url, trust_env=False) as keyless:
        answer, head = keyless.get("/"), keyless.head("/")
        assert (answer.status_code, answer.text) == (200, "Ollama is running")
        assert (head.status_code, head.content) == (200, b"")
        assert keyless.post("/", json={"inputs": "a"}).status_code == 401
        assert keyless.put("/").status_code == 401
    assert service.client.head("/api/tags").status_code == 200
    assert service.client.head("/api/version").status_code == 200


# Errors


@pytest.mark.parametrize(
    "path, body, says",
    [
        ("embed", {"input": 3}, "$.input"),
        ("embed", {"input": ["a", 3]}, "$.input"),
        ("embed", {"input": ["a", ""]}, "$.input[1]: text is empty"),
        ("embed", {"input": " "}, "$.input: text is empty"),
        ("embed", {"input": "a", "dimensions": 385}, "1 to 384"),
        ("embed", {"input": "a", "dimensions": -1}, "1 to 384"),
        ("embed", {"input": "a", "truncate": "yes"}, "$.truncate"),
        ("embed", {"input": "a", "keep_alive": []}, "$.keep_alive"),
        ("embed", {"input": "a", "options": []}, "$.options"),
        ("embed", {"input": "a", "prompt_name": "nope"}, "prompt_name is 'nope'"),
        ("embeddings", {"prompt": ["a"]}, "$.prompt"),
        ("embeddings", {"prompt": "\n"}, "$.prompt: text is empty"),
        ("show", {"model": 3}, "$.model"),
        ("show", [], "object"),
    ],
)
def test_a_bad_request(service: Server, path: str, body: Any, says: str) -> None:
    assert says in refusal(service.post(f"/api/{path}", body), 400)


@pytest.mark.parametrize("path", ["embed", "embeddings", "show"])
def test_the_form_of_every_other_error(service: Server, path: str) -> None:
    for name in ("nope", f"{NAME}:v2", f"{NAME}:latest:latest", ":latest"):
        body = {"model": name, "input": "a", "prompt": "a"}
        assert NAME in refusal(service.post(f"/api/{path}", body), 404)
    assert "POST" in refusal(service.client.get(f"/api/{path}"), 405)
    assert "not valid JSON" in refusal(service.post(f"/api/{path}", content=b"{"), 400)
    assert "not valid JSON" in refusal(service.post(f"/api/{path}", content=b""), 400)
    keyless = httpx.post(f"{service.url}/api/{path}", json={}, trust_env=False)
    assert "X-API-Key" in refusal(keyless, 401)
    assert "no such route" in refusal(service.post(f"/api/{path}/x", {}), 404)


@pytest.mark.parametrize(
    "method, path",
    [
        *(("POST", name) for name in ("generate", "chat", "pull", "push", "create", "copy")),
        ("DELETE", "delete"),
        ("POST", "blobs/sha256:00"),
        ("HEAD", "blobs/sha256:00"),
    ],
)
def test_what_is_not_served(service: Server, method: str, path: str) -> None:
    response = service.client.request(method, f"/api/{path}", json={"model": NAME})
    assert response.headers["x-should-retry"] == "false"
    if method == "HEAD":
        assert response.status_code == 501
    else:
        assert f"/api/{path} is not served" in refusal(response, 501)


URI = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    "path, body, place",
    [
        ("embed", {"input": URI}, "$.input"),
        ("embed", {"input": ["a", URI]}, "$.input[1]"),
        ("embeddings", {"prompt": URI}, "$.prompt"),
    ],
)
def test_a_picture_among_texts(
    service: Server, clip_service: Server, path: str, body: dict[str, Any], place: str
) -> None:
    """The vector of a data URI's characters is of no use."""
    assert "takes texts only" in refusal(service.post(f"/api/{path}", body), 501)
    message = refusal(clip_service.post(f"/api/{path}", body), 400)
    assert message.startswith(f"{place}: ") and "/embeddings/image" in message


def test_its_client_reads_errors(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="no model 'nope' here") as caught:
        client.embed("nope", "a")
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="does not generate") as caught:
        client.generate(NAME, "a")
    assert caught.value.status_code == 501


def test_limits(service: Server) -> None:
    assert "MAX_TEXT_SIZE" in refusal(service.post("/api/embed", {"input": "a" * 1_048_577}), 413)
    response = service.post("/api/embeddings", content=b" " * 33_554_433)
    assert "MAX_BODY_SIZE" in refusal(response, 413)


def test_an_alias_may_have_a_tag(models_dir: pathlib.Path) -> None:
    aliases = {"nomic-embed-text:v1.5": WIDE, "Small": NAME, "small": WIDE, "mine:latest": WIDE}
    models: Models[Any] = Models(discover(models_dir), aliases=aliases)
    find = finder(models)
    for asked, name in (
        ("nomic-embed-text:v1.5", WIDE),
        ("NOMIC-embed-text:v1.5", WIDE),
        ("Small:latest", NAME),
        ("small", WIDE),
        ("Small", NAME),
        ("mine:latest", WIDE),
        ("mine", WIDE),
        (f"{WIDE.upper()}:latest", WIDE),
    ):
        assert models.bundle(find(asked)).manifest.name == name
    for asked in ("nomic-embed-text", "nomic-embed-text:latest", "small:v1"):
        with pytest.raises(ModelNotFound):
            models.bundle(find(asked))


def test_every_name_may_be_served(models_dir: pathlib.Path) -> None:
    models: Models[Any] = Models(discover(models_dir), aliases={"*": WIDE})
    find = finder(models)
    assert models.bundle(find("nomic-embed-text:latest")).manifest.name == WIDE
    assert models.bundle(find(f"{NAME.upper()}:latest")).manifest.name == NAME
