"""api/errors.py: every error there is, in the form of the dialect it answers."""

from typing import Any

import pytest
from flask import Flask

from api import errors as api_errors
from api.application import LOADING
from api.errors import RequestError
from engine import errors

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
    (errors.DeadlineExceeded("m"), 504, "timeout", "server_error", "timeout"),
    (errors.EngineFailed("m"), 500, "backend", "server_error", "backend"),
    (
        RequestError(415, "unsupported_media_type", "m"),
        415,
        "unsupported_media_type",
        "invalid_request_error",
        "unsupported_media_type",
    ),
]


@pytest.fixture(scope="module")
def failing() -> Any:
    """An application that raises what it is told to."""
    app = Flask(__name__)
    api_errors.register(app)

    def fail(number: int) -> str:
        raise CASES[number][0] if number < len(CASES) else KeyError("a secret")

    app.add_url_rule("/<int:number>", "own", fail)
    app.add_url_rule("/v1/<int:number>", "openai", fail)
    return app.test_client()


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: type(CASES[n][0]).__name__)
def test_every_error_in_both_forms(failing: Any, number: int) -> None:
    error, status, error_type, kind, code = CASES[number]
    own, openai = failing.get(f"/{number}"), failing.get(f"/v1/{number}")
    assert own.status_code == openai.status_code == status
    assert own.json == {"error": "m", "error_type": error_type}
    assert openai.json == {"error": {"message": "m", "type": kind, "param": None, "code": code}}
    for answer in (own, openai):
        assert answer.content_type == "application/json"
        assert answer.headers.get("x-should-retry") == ("false" if status in (501, 504) else None)
        retry = {429: "7", 503: "1"}.get(status)
        assert answer.headers.get("Retry-After") == retry


def test_time_that_went_by_while_the_model_was_loading_is_worth_another_try(failing: Any) -> None:
    number = [type(case[0]) for case in CASES].index(errors.DeadlineExceeded)
    answer = failing.get(f"/{number}", environ_overrides={LOADING: True})
    assert (answer.status_code, answer.json["error_type"]) == (503, "not_ready")
    assert answer.headers["Retry-After"] == "1" and "x-should-retry" not in answer.headers


def test_the_unexpected_leaks_nothing(failing: Any) -> None:
    own, openai = failing.get(f"/{len(CASES)}"), failing.get(f"/v1/{len(CASES)}")
    assert own.status_code == openai.status_code == 500
    assert own.json["error_type"] == openai.json["error"]["code"] == "internal"
    assert "secret" not in own.text + openai.text
