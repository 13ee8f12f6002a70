"""From what went wrong to a status and a body: the one place that knows both."""

import logging
from collections.abc import Mapping

import orjson
from flask import Flask, Response, g
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound

from engine import errors

log = logging.getLogger(__name__)

_NO_RETRY = {"x-should-retry": "false"}  # what the OpenAI SDK looks for before it repeats a 5xx

# domain error: (status, error_type, further headers)
_ANSWERS: dict[type[errors.EmbedderError], tuple[int, str, dict[str, str]]] = {
    errors.InputTooLarge: (413, "too_large", {}),
    errors.InvalidInput: (400, "validation", {}),
    errors.ModelNotFound: (404, "not_found", {}),
    errors.ModelNotReady: (503, "not_ready", {"Retry-After": "1"}),
    errors.QueueFull: (429, "overloaded", {}),
    errors.DeadlineExceeded: (504, "timeout", _NO_RETRY),
    errors.EngineFailed: (500, "backend", {}),
}


class RequestError(Exception):
    """A request that fails in HTTP's own terms, before anything below HTTP sees it."""

    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(message)
        self.status, self.error_type = status, error_type


def respond(
    status: int, error_type: str, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The error JSON: `{"error": …, "error_type": …}`."""
    body = orjson.dumps({"error": message, "error_type": error_type})
    return Response(body, status, headers, content_type="application/json")


def _embedder_error(error: errors.EmbedderError) -> Response:
    status, error_type, headers = next(
        answer for kind, answer in _ANSWERS.items() if isinstance(error, kind)
    )
    message = str(error)
    if isinstance(error, errors.QueueFull):
        headers = {"Retry-After": str(error.retry_after)}
    if isinstance(error, errors.InvalidInput) and error.index is not None:
        message = f"{g.input_path.format(error.index)}: {message}"
    return respond(status, error_type, message, headers)


def _http_error(error: HTTPException) -> Response:
    if isinstance(error, NotFound):
        return respond(404, "not_found", "no such route; the README lists those there are")
    if isinstance(error, MethodNotAllowed):
        methods = ", ".join(sorted(set(error.valid_methods or ()) - {"OPTIONS", "HEAD"}))
        return respond(405, "method_not_allowed", f"this route takes {methods}", {"Allow": methods})
    return respond(error.code or 500, "validation", error.description or error.name)


def _unexpected(error: Exception) -> Response:
    log.error("unexpected error", exc_info=error)
    return respond(500, "internal", "internal error; the service's log has the details")


def register(app: Flask) -> None:
    """Answer every error of the application as JSON."""
    app.register_error_handler(errors.EmbedderError, _embedder_error)
    app.register_error_handler(
        RequestError, lambda error: respond(error.status, error.error_type, str(error))
    )
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected)
