"""api/errors.py: every error there is, in the form of the dialect it answers."""

import json
from typing import Any

import pytest
from werkzeug.exceptions import MethodNotAllowed, NotFound

from api import errors as api_errors
from engine import errors
from server.messages import HttpError, Request, Response
from server.tasks import Busy

CASES: list[tuple[Exception, int, str, str, str]] = [
    (errors.InvalidInput("m"), 400, "validation", "invalid_request_error", "invalid_value"),
    (errors.InputTooLarge("m"), 413, "too_large", "invalid_request_error", "too_large"),
    (
        errors.ModelNotFound("m"),
        404,
        *("model_not_found", "invalid_request_error"),
        "model_not_found",
    ),
    (errors.ModelNotReady("m"), 503, "not_ready", "server_error", "not_ready"),
    (errors.ModalityNotSupported("m"), 501, "not_supported", "server_error", "not_supported"),
    (errors.QueueFull("m", 7), 429, "overloaded", "rate_limit_error", "rate_limit_exceeded"),
    (errors.OverQuota("m", 7), 429, "rate_limited", "rate_limit_error", "rate_limit_exceeded"),
    (errors.DeadlineExceeded("m"), 504, "timeout", "server_error", "timeout"),
    (errors.EngineFailed("m"), 500, "backend", "server_error", "backend"),
    (
        HttpError(415, "unsupported_media_type", "m"),
        415,
        "unsupported_media_type",
        "invalid_request_error",
        "unsupported_media_type",
    ),
]


def written(error: Exception, path: str) -> tuple[Response, Any]:
    """The response to a request for `path` that failed with `error`, and its decoded body."""
    response = api_errors.response(error, Request("POST", path, path))
    assert response.content_type == "application/json"
    return response, json.loads(response.body)


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case[0]).__name__)
def test_every_error_in_both_forms(case: tuple[Exception, int, str, str, str]) -> None:
    error, status, error_type, kind, code = case
    own, own_body = written(error, "/embeddings")
    openai, openai_body = written(error, "/v1/embeddings")
    assert own.status == openai.status == status
    assert own_body == {"error": "m", "error_type": error_type}
    param = "input" if isinstance(error, errors.QueueFull) else None  # a limit on inputs
    assert openai_body == {"error": {"message": "m", "type": kind, "param": param, "code": code}}
    for response in (own, openai):
        headers = dict(response.headers)
        assert headers.get("x-should-retry") == ("false" if status in (501, 504) else None)
        assert headers.get("Retry-After") == {429: "7", 503: "1"}.get(status)


def test_openais_form_names_the_field_that_the_error_carries() -> None:
    of_an_option = errors.InvalidInput("dimensions is 9", field="dimensions").at("$.input[{}]")
    of_an_input = errors.InvalidInput("is empty", 2).at("$.input[{}]")
    of_all_inputs = errors.InvalidInput("9 texts; the limit is 8").at("$.input[{}]")
    of_the_body = HttpError(400, "validation", "wrong type", field="user")
    fields = [
        written(error, "/v1/embeddings")[1]["error"]["param"]
        for error in (of_an_option, of_an_input, of_all_inputs, of_the_body)
    ]
    assert fields == ["dimensions", "input", "input", "user"]
    assert str(of_an_input) == "$.input[2]: is empty"


@pytest.mark.parametrize("error, status", [(NotFound(), 404), (MethodNotAllowed(["POST"]), 405)])
def test_errors_of_flasks_routing(error: Exception, status: int) -> None:
    response, body = written(error, "/nowhere")
    assert response.status == status and body.keys() == {"error", "error_type"}
    assert dict(response.headers).get("Allow") == ("POST" if status == 405 else None)


def test_no_free_thread_is_worth_another_try() -> None:
    after = set()
    for _ in range(100):
        response, body = written(Busy("all 4 threads are busy"), "/embeddings")
        assert response.status == 429 and body["error_type"] == "overloaded"
        after.add(dict(response.headers)["Retry-After"])
    assert after == {"1", "2", "3"}  # so that not all come at once


def test_ollamas_errors_are_a_message_alone() -> None:
    for error, status in (
        (HttpError(401, "authentication", "no API key"), 401),
        (errors.ModelNotFound("no model 'x' here"), 404),
        (errors.QueueFull("the queue is full", retry_after=3), 429),
        (Busy("all 4 threads are busy"), 429),
        (errors.DeadlineExceeded("waited for 60 s"), 504),
        (NotFound(), 404),
    ):
        for path in ("/api/embed", "/api/nowhere", "/api"):
            response, body = written(error, path)
            assert response.status == status and body.keys() == {"error"}
        assert written(error, "/apiary")[1].keys() == {"error", "error_type"}
    assert body["error"] == "no such route; /docs lists those there are"


def test_the_unexpected_leaks_nothing() -> None:
    for path in ("/embeddings", "/v1/embeddings", "/api/embed"):
        response, _ = written(KeyError("a secret"), path)
        assert response.status == 500
        assert b"internal" in response.body and b"secret" not in response.body
