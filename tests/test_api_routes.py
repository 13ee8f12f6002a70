"""api/routes.py: one way for every request, with and without code that was added to Flask."""

import gzip
import json
import pathlib
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any

import flask
import pytest
from conftest import NAME
from servers import KEY
from werkzeug.test import Client

import main
from api import ollama, openai
from api.endpoint import endpoint
from api.routes import CheckedFlask, direct_views, has_hooks
from api.wsgi import environ_of, request_of
from api.service import Embedders, Service
from engine.models import Models
from limits import TextLimits
from server.limits import Limits
from server.messages import Request, current

AUTH = {"X-API-Key": KEY}
ORIGIN = "https://example.org"


class WithCORS(main.Application):
    """The service with what flask-cors adds: fields for every response."""

    def make_flask(self) -> CheckedFlask:
        app = super().make_flask()

        @app.after_request
        def allow(response: flask.Response) -> flask.Response:
            response.headers["Access-Control-Allow-Origin"] = ORIGIN
            return response

        return app


def started(application: main.Application) -> Iterator[main.Application]:
    application.start()
    client = Client(application)
    while client.get("/health/ready").status_code != 200:
        pass
    yield application
    application.close()


@pytest.fixture(scope="module")
def environ(models_dir: pathlib.Path) -> dict[str, str]:
    return {
        "MODELS_DIR": str(models_dir),
        "VECTOR_EMBEDDER_API_KEY": KEY,
        "PRECISION": "fp32",
        "MAX_BODY_SIZE": "100000",
    }


@pytest.fixture(scope="module")
def plain(environ: dict[str, str]) -> Iterator[main.Application]:
    yield from started(main.Application(environ))


@pytest.fixture(scope="module")
def hooked(environ: dict[str, str]) -> Iterator[main.Application]:
    yield from started(WithCORS(environ))


# method, path, headers, body
REQUESTS: list[tuple[str, str, dict[str, str], bytes]] = [
    ("POST", "/embeddings", AUTH, b'{"text": "hello"}'),
    ("POST", "/embeddings", AUTH, b'{"text": " "}'),
    ("POST", "/embeddings", AUTH, b"{"),
    ("POST", "/embeddings", {}, b'{"text": "hello"}'),
    ("POST", "/embeddings", {"X-API-Key": "wrong"}, b'{"text": "hello"}'),
    ("POST", "/embeddings", AUTH, b" " * 100_001),
    ("POST", "/embeddings", AUTH, b'{"text": "hello"}'.ljust(20_000)),
    ("POST", "/embeddings?chunks=true", AUTH, b'{"text": "hello"}'),
    ("POST", "/v1/embeddings", AUTH, b'{"input": ["hello", "world"]}'),
    ("POST", "/v1/embeddings", AUTH, b'{"input": [1]}'),
    ("POST", "/embeddings/image", AUTH, b'{"image": "AAAA"}'),
    ("PUT", "/embeddings", AUTH, b""),
    ("GET", "/v1/models", AUTH, b""),
    ("GET", "/v1/models/none", AUTH, b""),
    ("GET", "/nowhere", AUTH, b""),
    ("GET", "/nowhere", {}, b""),
    ("GET", "/health", {}, b""),
    ("GET", "/health/ready", {}, b""),
    ("GET", "/docs", {}, b""),
    ("OPTIONS", "/embeddings", {}, b""),
]


@pytest.mark.parametrize("method, path, headers, body", REQUESTS, ids=lambda part: str(part)[:30])
def test_code_added_to_flask_works_on_every_route_and_changes_nothing_else(
    plain: main.Application,
    hooked: main.Application,
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes,
) -> None:
    first, second = (
        Client(application).open(
            path,
            method=method,
            headers={**headers, "X-Request-Id": "one"},
            data=body,
            content_type="application/json",
        )
        for application in (plain, hooked)
    )
    assert second.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "Access-Control-Allow-Origin" not in first.headers
    assert first.status_code == second.status_code
    assert first.data == second.data
    assert first.content_type == second.content_type
    assert second.headers["X-Request-Id"] == first.headers["X-Request-Id"] == "one"


def test_a_browser_may_ask_before_it_sends_a_key(hooked: main.Application) -> None:
    asked = Client(hooked).options(
        "/embeddings", headers={"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    )
    assert asked.status_code == 200 and "POST" in asked.headers["Allow"]
    assert asked.headers["Access-Control-Allow-Origin"] == ORIGIN


def test_hot_routes_do_not_pass_flask_unless_something_was_added(
    plain: main.Application, hooked: main.Application
) -> None:
    assert not has_hooks(plain.flask) and has_hooks(hooked.flask)
    views = direct_views(plain.flask)
    for route in ("/embeddings", "/v1/embeddings", "/embed", "/"):
        assert ("POST", route) in views
    assert ("GET", "/v1/models/<path:model>") not in views


def wrap(app: flask.Flask) -> None:
    app.wsgi_app = app.wsgi_app  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "add",
    [
        lambda app: app.before_request(lambda: None),
        lambda app: app.after_request(lambda response: response),
        lambda app: app.teardown_request(lambda error: None),
        wrap,
    ],
)
def test_every_kind_of_added_code_is_seen(add: Any) -> None:
    app = flask.Flask(__name__)
    assert not has_hooks(app)
    add(app)
    assert has_hooks(app)


def test_head_is_answered_like_get(plain: main.Application) -> None:
    response = Client(plain).head("/health")
    assert response.status_code == 200
    assert int(response.headers["Content-Length"]) == len(Client(plain).get("/health").data)


def test_what_added_code_may_do_by_wsgi_arrives(environ: dict[str, str]) -> None:
    """A header twice, a body by `write`, and an end of its own."""
    ended = []

    class Parts(list[bytes]):
        def close(self) -> None:
            ended.append(self)

    def middleware(_: Any, start_response: Any) -> Parts:
        cookies = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]
        write = start_response("201 CREATED", [("Content-Type", "text/plain"), *cookies])
        write(b"by write, ")
        return Parts([b"and by the list"])

    class Wrapped(main.Application):
        def make_flask(self) -> CheckedFlask:
            app = super().make_flask()
            app.wsgi_app = middleware  # type: ignore[method-assign,assignment]
            return app

    application = Wrapped(environ)
    answer = Client(application).post("/embeddings", json={"text": "a"}, headers=AUTH)
    application.close()
    assert (answer.status_code, answer.text) == (201, "by write, and by the list")
    assert answer.content_type == "text/plain"
    assert answer.headers.getlist("Set-Cookie") == ["a=1", "b=2"]
    assert len(ended) == 1


def test_threads_of_another_server_start_the_service_once(environ: dict[str, str]) -> None:
    class Counted(main.Application):
        started = 0

        def start(self, *arguments: Any) -> None:
            type(self).started += 1
            time.sleep(0.1)
            super().start(*arguments)

    application = Counted(environ)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(Client(application).get, "/health") for _ in range(4)]
        assert [one.result().status_code for one in asked] == [200] * 4
    application.close()
    assert Counted.started == 1


def test_a_request_survives_wsgis_environ() -> None:
    request = Request(
        "POST",
        "/a%20b/%C3%A9?c=d%20e",
        "/a b/é",
        headers={"host": "h:81", "x-request-id": "1", "content-type": "a/b", "x_api_key": "no"},
        body=b"body",
        length=4,
        client="10.0.0.1",
    )
    environ = environ_of(request)
    assert environ["PATH_INFO"] == "/a b/\xc3\xa9" and environ["QUERY_STRING"] == "c=d%20e"
    assert environ["HTTP_HOST"] == "h:81"
    # A name with an underscore would pass for one with a dash.
    assert "HTTP_X_API_KEY" not in environ
    again = request_of(environ)
    assert again.headers == {"host": "h:81", "x-request-id": "1", "content-type": "a/b"} | {
        "content-length": "4"
    }
    assert (again.method, again.path, again.target) == ("POST", request.path, request.target)
    assert (again.body, again.client) == (b"body", "10.0.0.1")


def test_the_openapi_document_is_made_once(plain: main.Application) -> None:
    client = Client(plain)
    document = client.get("/openapi.json").data
    assert json.loads(document)["openapi"] == "3.1.0"
    response = plain.respond(Request("GET", "/openapi.json", "/openapi.json"))
    assert response.body == document


@pytest.mark.parametrize(
    ("method", "path", "more"),
    [
        ("GET", "/", {}),
        ("HEAD", "/", {}),
        ("GET", "/health", {}),
        ("GET", "/health/ready", AUTH),
        ("GET", "/docs", {}),
        ("OPTIONS", "/embeddings", {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}),
        ("OPTIONS", "/v1/models/a", {"Access-Control-Request-Method": "GET"}),
    ],
)
@pytest.mark.parametrize("coding", ["gzip", "br"])
def test_a_body_is_decoded_only_where_its_key_was_checked(
    plain: main.Application,
    hooked: main.Application,
    method: str,
    path: str,
    more: dict[str, str],
    coding: str,
) -> None:
    """What cannot be decoded shows that nobody tries."""
    headers = {"Content-Encoding": coding}
    for application in (plain, hooked):
        client = Client(application)
        answer = client.open(path, method=method, headers=headers | more, data=b"broken")
        assert answer.status_code == 200, answer.text
        for wrong in ({}, {"X-API-Key": "wrong"}):
            answer = client.get("/v1/models/a", headers=headers | wrong, data=b"broken")
            assert answer.status_code == 401


def test_a_hook_sees_a_body_only_with_its_key(environ: dict[str, str]) -> None:
    seen = list[bytes]()

    class Watching(main.Application):
        def make_flask(self) -> CheckedFlask:
            app = super().make_flask()
            app.before_request(lambda: seen.append(flask.request.get_data()))
            return app

    application, body = Watching(environ), b'{"text": "hello"}'
    for sent in (body, body.ljust(50_000)):
        for headers, status, expected in (
            (AUTH, 200, sent),
            ({}, 401, b""),
            ({"X-API-Key": "wrong"}, 401, b""),
        ):
            answer = Client(application).post("/embeddings", headers=headers, data=sent)
            assert (answer.status_code, seen.pop()) == (status, expected)
    application.close()


def counted(application: main.Application, reason: str) -> float:
    text = Client(application).get("/metrics", headers=AUTH).text
    found = re.search(rf'^embedder_requests_rejected_total{{reason="{reason}"}} (.+)', text, re.M)
    assert found
    return float(found[1])


def test_no_memory_for_a_body_is_counted_as_that(
    plain: main.Application, hooked: main.Application
) -> None:
    headers, body = {"content-encoding": "gzip"}, gzip.compress(b" " * 100_000)
    for application in (plain, hooked):
        before = {reason: counted(application, reason) for reason in ("memory", "queue_full")}
        with ExitStack() as held:
            for _ in range(Limits().held_bodies):
                request = Request(headers=headers, body=body, caller="app")
                held.enter_context(application.flask.decoded(request))
            answer = Client(application).post("/embeddings", headers=headers | AUTH, data=body)
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
        assert counted(application, "memory") == before["memory"] + 1
        assert counted(application, "queue_full") == before["queue_full"]


def test_what_is_logged_of_a_large_request_names_it(
    environ: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken(main.Application):
        def make_flask(self) -> CheckedFlask:
            app = super().make_flask()

            @app.post("/broken")
            @endpoint(str, read=lambda request: request.body)
            def broken(body: bytes) -> object:
                raise ValueError("a fault")

            return app

    application = Broken(environ)
    for size, name in ((1, "small-one"), (20_000, "large-one")):
        headers = {**AUTH, "X-Request-Id": name}
        answer = Client(application).post("/broken", headers=headers, data=b" " * size)
        assert answer.status_code == 500
        assert f"a fault (request {name})\n" in capfd.readouterr().err
    application.close()


ASKED = {
    "/embeddings": {"text": "a"},
    "/v1/embeddings": {"input": "a"},
    "/embed": {"inputs": "a"},
    "/tokenize": {"inputs": "a"},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
    "/api/embed": {"input": "a"},
    "/api/embeddings": {"prompt": "a"},
}


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("model", [None, NAME])
def test_a_models_name_is_looked_up_once_a_request(
    plain: main.Application, monkeypatch: pytest.MonkeyPatch, path: str, model: str | None
) -> None:
    looked_up, resolve = [], plain.models.resolve

    def counting(name: str | None = None) -> object:
        looked_up.append(name)
        return resolve(name)

    monkeypatch.setattr(plain.models, "resolve", counting)
    answer = Client(plain).post(path, headers=AUTH, json={**ASKED[path], "model": model})
    assert answer.status_code == 200, answer.text
    assert looked_up == [model]


@pytest.mark.parametrize(
    ("view", "method", "path", "body"),
    [
        ("ollama.embed", "POST", "/api/embed", b'{"input": "a"}'),
        ("ollama.embed_prompt", "POST", "/api/embeddings", b'{"prompt": "a"}'),
        ("ollama.list_models", "GET", "/api/tags", b""),
        ("openai.list_models", "GET", "/v1/models", b""),
    ],
)
def test_all_that_a_request_waits_for_has_one_deadline(
    plain: main.Application,
    monkeypatch: pytest.MonkeyPatch,
    view: str,
    method: str,
    path: str,
    body: bytes,
) -> None:
    """Each model takes 5 s to load while the request waits."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=time.monotonic())
    monkeypatch.setattr("api.service.time", clock)
    monkeypatch.setattr("engine.models.time", clock)
    deadlines, loaded = list[float](), 0
    embedders = plain.models.get(None, 0)
    embed = embedders.texts.embed

    class Loading(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal loaded
            assert timeout is not None
            deadlines.append(clock.now + timeout)
            clock.now += 5
            loaded += 1
            ready = iter([embedders] * loaded)
            with suppress(StopIteration):  # the next model is not loaded yet
                models.load(lambda bundle: next(ready))
            return True

    def recording(*texts: Any, deadline: float, **options: Any) -> Any:
        deadlines.append(deadline)
        return embed(*texts, deadline=deadline, **options)

    monkeypatch.setattr(embedders.texts, "embed", recording)
    models = Models[Embedders]([*plain.models.bundles.values()], event=Loading)
    service = Service(models, 60)
    app = flask.Flask(__name__)
    app.register_blueprint(ollama.blueprint(service))
    app.register_blueprint(openai.blueprint(service, None, 0, TextLimits()))
    request = Request(method, path, path, body=body, length=len(body))
    before = current.set(request)
    try:
        assert app.view_functions[view].direct(request).status == 200  # type: ignore[attr-defined]
    finally:
        current.reset(before)
    assert loaded >= 1 and len(deadlines) == 2
    assert deadlines[0] == pytest.approx(deadlines[1], abs=0.001)
