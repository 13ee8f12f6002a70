"""API keys: which requests need one, and where it may stand."""

import pathlib
from typing import Any

import httpx
import pytest
from servers import KEY, Server, serve

BEARER = {"Authorization": f"Bearer {KEY}"}


def ask(
    server: Server, headers: dict[str, Any], method: str = "POST", path: str = "/embeddings"
) -> httpx.Response:
    """A request without the key that `server.client` would send."""
    body = {"text": "a key opens"} if method == "POST" else None
    return httpx.request(
        method, server.url + path, headers=headers, json=body, trust_env=False, timeout=30
    )


def refusal(response: httpx.Response) -> str:
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    body = response.json()
    assert body.keys() == {"error", "error_type"} and body["error_type"] == "authentication"
    message: str = body["error"]
    return message


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": KEY},
        {"x-api-key": KEY},
        BEARER,
        {"Authorization": f"bearer {KEY}"},
        {"Authorization": f"BEARER   {KEY}"},
        {"Authorization": KEY},
        {"Authorization": f"Bearer Bearer {KEY}"},
        {"Authorization": f"bearer\tBearer bearer {KEY}"},
        {"X-API-Key": KEY, "Authorization": "Bearer of-cloud-run"},
        {"X-API-Key": "", **BEARER},
        {"X-API-Key": "", "Authorization": KEY},
    ],
    ids=repr,
)
def test_the_key_opens(service: Server, headers: dict[str, str]) -> None:
    response = ask(service, headers)
    assert response.status_code == 200
    assert len(response.json()["embeddings"][0]) == 384


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": "wrong"},
        {"X-API-Key": KEY[:-1]},
        {"X-API-Key": KEY + "x"},
        {"X-API-Key": KEY.upper()},
        {"X-API-Key": f"Bearer {KEY}"},
        {"X-API-Key": f"{KEY},{KEY}"},
        {"X-API-Key": b"\xc3\xa9\xff\xfe\x80"},
        {"Authorization": "wrong"},
        {"Authorization": "Basic"},
        {"Authorization": f"Bearer{KEY}"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"X-API-Key": "wrong", **BEARER},
    ],
    ids=repr,
)
def test_a_wrong_key_does_not(service: Server, headers: dict[str, Any]) -> None:
    assert refusal(ask(service, headers)) == "wrong API key"
    assert ask(service, BEARER).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": ""},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer Bearer"},
        {"X-API-Key": "", "Authorization": "bearer"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer Basic {KEY}"},
        {"Authorization": f"Token {KEY}"},
        {"Authorization": f"{KEY} {KEY}"},
    ],
    ids=repr,
)
def test_without_a_key_the_answer_says_where_to_put_one(
    service: Server, headers: dict[str, str]
) -> None:
    message = refusal(ask(service, headers))
    assert "X-API-Key" in message and "Authorization: Bearer" in message
    assert KEY not in message
    assert ("Basic (user and password) is not taken" in message) == ("Basic" in str(headers))


@pytest.mark.parametrize("size", [10_000, 1_000_000])
@pytest.mark.parametrize("header", ["X-API-Key", "Authorization"])
def test_a_key_too_long_for_a_header_is_refused(service: Server, header: str, size: int) -> None:
    assert ask(service, {header: "Bearer " + "k" * size}).status_code == 431
    assert ask(service, BEARER).status_code == 200


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/health", 200),
        ("HEAD", "/health", 200),
        ("GET", "/health/ready", 200),
        ("POST", "/health", 405),
        ("POST", "/embeddings", 401),
        ("POST", "/embeddings/batch", 401),
        ("GET", "/embeddings", 401),
        ("OPTIONS", "/embeddings", 401),
        ("GET", "/metrics", 401),
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("POST", "/", 401),
        ("PUT", "/", 401),
        ("GET", "/no/such/route", 401),
        ("GET", "/health/", 401),
        ("GET", "/health/../embeddings", 401),
    ],
)
def test_only_probes_are_open_without_a_key(
    service: Server, method: str, path: str, status: int
) -> None:
    assert ask(service, {}, method, path).status_code == status


def test_several_keys_are_valid_at_once(models_dir: pathlib.Path) -> None:
    with serve(models_dir, VECTOR_EMBEDDER_API_KEY="first-key, second-key") as server:
        for key in ("first-key", "second-key"):
            assert ask(server, {"X-API-Key": key}).status_code == 200
            assert ask(server, {"Authorization": f"Bearer {key}"}).status_code == 200
        for key in ("first-key, second-key", "", ",", KEY):
            refusal(ask(server, {"X-API-Key": key}))
