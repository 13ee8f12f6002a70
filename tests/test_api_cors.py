"""api/cors.py: browsers let pages of the origins in CORS_ORIGINS read every response."""

import pathlib
import socket
from collections.abc import Iterator

import httpx
import pytest
from servers import KEY, Server, serve

from api.cors import Cors
from server.messages import HttpError, Request
from settings import SettingsError, load

ORIGIN, OTHER = "https://app.example.org", "http://localhost:3000"
AUTH = {"Authorization": f"Bearer {KEY}"}
ALLOWED, EXPOSED = "access-control-allow-origin", "access-control-expose-headers"


@pytest.fixture(scope="module")
def server(models_dir: pathlib.Path) -> Iterator[Server]:
    limits = {"MAX_BODY_SIZE": "100000", "REQUEST_THREADS": "1"}
    with serve(models_dir, PRECISION="fp32", CORS_ORIGINS=f"{ORIGIN}, {OTHER}", **limits) as made:
        yield made


def ask(
    server: Server, method: str, path: str, headers: dict[str, str], **more: object
) -> httpx.Response:
    return httpx.request(  # type: ignore[arg-type]
        method, server.url + path, headers=headers, trust_env=False, timeout=30, **more
    )


def preflight(origin: str, method: str, names: str = "") -> dict[str, str]:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    return asked | ({"Access-Control-Request-Headers": names} if names else {})


# S4, and others of its kind: what the browsers of released clients ask.
@pytest.mark.parametrize("origin", [ORIGIN, OTHER])
@pytest.mark.parametrize(
    ("path", "method", "names"),
    [
        ("/embeddings", "POST", "content-type,x-api-key"),
        ("/v1/embeddings", "POST", "authorization,content-type,x-stainless-os,x-stainless-lang"),
        ("/v1/models/all-MiniLM-L6-v2", "GET", "authorization"),
        ("/embeddings/image", "POST", "authorization, content-encoding"),
        ("/nowhere", "DELETE", ""),
    ],
)
def test_a_preflight_needs_no_key(
    server: Server, origin: str, path: str, method: str, names: str
) -> None:
    response = ask(server, "OPTIONS", path, preflight(origin, method, names))
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers[ALLOWED] == origin
    assert response.headers["access-control-allow-methods"] == method
    assert response.headers.get("access-control-allow-headers", "") == names
    assert response.headers["access-control-max-age"] == "7200"
    assert "access-control-allow-credentials" not in response.headers
    assert "Origin" in response.headers["vary"]


@pytest.mark.parametrize(
    ("status", "method", "path", "headers", "body"),
    [
        (200, "POST", "/embeddings", AUTH, b'{"text": "a"}'),
        (200, "POST", "/v1/embeddings", AUTH, b'{"input": "a"}'.ljust(20_000)),
        (200, "GET", "/v1/models/all-MiniLM-L6-v2", AUTH, b""),
        (200, "GET", "/health", {}, b""),
        (200, "GET", "/docs", {}, b""),
        (400, "POST", "/embeddings", AUTH, b"{"),
        (401, "POST", "/embeddings", {}, b'{"text": "a"}'),
        (401, "OPTIONS", "/embeddings", {}, b""),  # no preflight
        (404, "GET", "/nowhere", AUTH, b""),
        (405, "PUT", "/embeddings", AUTH, b"{}"),
        (413, "POST", "/embeddings", AUTH, b" " * 100_001),
        (415, "POST", "/embeddings", AUTH | {"Content-Encoding": "br"}, b"{}"),
    ],
)
def test_every_response_can_be_read(
    server: Server, status: int, method: str, path: str, headers: dict[str, str], body: bytes
) -> None:
    for origin, allowed in ((ORIGIN, ORIGIN), (OTHER, OTHER), ("https://evil.example", None)):
        sent = {"Origin": origin, "Content-Type": "application/json", **headers}
        response = ask(server, method, path, sent, content=body)
        assert response.status_code == status
        assert response.headers.get(ALLOWED) == allowed
        assert "Origin" in response.headers["vary"]
        exposed = response.headers.get(EXPOSED, "").split(", ")
        assert ("X-Request-Id" in exposed) == bool(allowed)
        assert ("WWW-Authenticate" in exposed) == (status == 401 and bool(allowed))


@pytest.mark.parametrize(
    ("status", "head"),
    [
        (400, f"GET /health HTTP/1.1\r\nOrigin: {ORIGIN}\r\n\r\n"),  # no Host
        (400, f"GET http:// HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\n\r\n"),
        (431, f"GET /health HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\nA: {'a' * 9000}\r\n\r\n"),
        (417, f"GET /health HTTP/1.1\r\nHost: x\r\nOrigin: {ORIGIN}\r\nExpect: x\r\n\r\n"),
    ],
)
def test_so_can_what_the_server_refuses_itself(server: Server, status: int, head: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(head.encode())
        response = sock.makefile("rb").read().decode()
    assert response.startswith(f"HTTP/1.1 {status} ")
    assert f"Access-Control-Allow-Origin: {ORIGIN}\r\n" in response


def test_a_page_of_another_origin_is_told_why(server: Server) -> None:
    response = ask(server, "OPTIONS", "/embeddings", preflight("https://evil.example", "POST"))
    assert response.status_code == 403 and "CORS_ORIGINS" in response.json()["error"]
    assert ALLOWED not in response.headers


def test_what_a_429_says_can_be_read() -> None:
    others = [("Retry-After", "3"), ("x-ratelimit-limit-requests", "9"), ("Vary", "a"), ("A", "b")]
    made = dict(Cors(["*"]).headers(Request(headers={"origin": ORIGIN}), others))
    assert made == {
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Expose-Headers": "Retry-After, x-ratelimit-limit-requests, A",
    }


def test_a_refusal_before_the_origin_arrived_goes_to_the_only_one() -> None:
    broken_off = Request()
    assert dict(Cors([ORIGIN]).headers(broken_off, []))["Access-Control-Allow-Origin"] == ORIGIN
    assert dict(Cors([ORIGIN, OTHER]).headers(broken_off, [])) == {"Vary": "Origin"}


def test_all_origins() -> None:
    asked = {name.lower(): value for name, value in preflight("null", "POST").items()}
    request = Request("OPTIONS", headers=asked)
    assert Cors(["*"]).preflight(request)
    with pytest.raises(HttpError):
        Cors([ORIGIN]).preflight(request)


@pytest.mark.parametrize("method", ["OPTIONS", "POST", "GET"])
def test_without_the_setting_nothing_is_said_of_origins(service: Server, method: str) -> None:
    response = ask(service, method, "/embeddings", AUTH | preflight(ORIGIN, "POST"))
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert "vary" not in response.headers


def test_origins_are_those_that_browsers_send() -> None:
    assert load({}).origins == () and load({"CORS_ORIGINS": "*"}).origins == ("*",)
    sent = " https://App.example.org,http://[::1]:80800,capacitor://localhost "
    assert load({"CORS_ORIGINS": sent.replace("80800", "8080")}).origins == (
        *("https://app.example.org", "http://[::1]:8080"),
        "capacitor://localhost",
    )
    for wrong in (
        "app.example.org",
        "https://app.example.org/",
        "https://app.example.org/index.html",
        "https://*.example.org",
        "https://app.example.org:443",
        "http://localhost:port",
        "null",
        f"{ORIGIN},,{OTHER}",
        f"{ORIGIN};{OTHER}",
        f"*,{ORIGIN}",
        "https://bücher.example",
    ):
        with pytest.raises(SettingsError, match="^CORS_ORIGINS=.*; it takes .*https://app.exa"):
            load({"CORS_ORIGINS": wrong})
