"""From what went wrong to a status and a body: the one place that knows both."""

import logging
import re
from collections.abc import Callable, Mapping

import msgspec
from flask import Flask, Response, has_request_context, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound

from api.application import INPUT_PATH, LOADING
from engine import errors

log = logging.getLogger(__name__)

# The OpenAI SDK repeats every 5xx unless `x-should-retry: false` says that it is of no use.
_NOT_WORTH_A_RETRY = (501, 504)

# domain error: (status, error_type, further headers)
_ANSWERS: dict[type[errors.EmbedderError], tuple[int, str, dict[str, str]]] = {
    errors.InputTooLarge: (413, "too_large", {}),
    errors.InvalidInput: (400, "validation", {}),
    errors.ModelNotFound: (404, "model_not_found", {}),
    errors.ModelNotReady: (503, "not_ready", {"Retry-After": "1"}),
    errors.ModalityNotSupported: (501, "not_supported", {}),
    errors.QueueFull: (429, "overloaded", {}),
    errors.DeadlineExceeded: (504, "timeout", {}),
    errors.CallerGone: (499, "client_closed", {}),  # nginx's number for it; only logs see it
    errors.ShuttingDown: (503, "shutting_down", {"Retry-After": "1"}),
    errors.EngineFailed: (500, "backend", {}),
}


class RequestError(Exception):
    """A request that fails in HTTP's own terms, before anything below HTTP sees it."""

    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(message)
        self.status, self.error_type = status, error_type


class Error(msgspec.Struct):
    """What went wrong: the service's own form, which is also text-embeddings-inference's."""

    error: str
    error_type: str


class OpenAIErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(msgspec.Struct):
    """What went wrong, as OpenAI's clients read it."""

    error: OpenAIErrorDetail


# OpenAI's own words, where they have one for our error_type.
_OPENAI_CODES = {
    "authentication": "invalid_api_key",
    "validation": "invalid_value",
    "not_found": "unknown_url",
    "method_not_allowed": "method_not_supported",
    "overloaded": "rate_limit_exceeded",
}
_FIELD = re.compile(r"\$\.(\w+)|field `(\w+)`|^(\w+) is .*; this model|^no (model) ")


def _openai(status: int, error_type: str, message: str) -> OpenAIError:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    field = _FIELD.search(message) if status in (400, 404, 413) else None
    param = field and next(filter(None, field.groups()))
    code = _OPENAI_CODES.get(error_type, error_type)
    if status == 429:
        kind = "rate_limit_error"
    return OpenAIError(OpenAIErrorDetail(message, kind, param, code))


def _own(status: int, error_type: str, message: str) -> Error:
    return Error(message, error_type)


def dialect(path: str) -> tuple[Callable[[int, str, str], object], type]:
    """How errors under a path are written, and the type that describes them."""
    openai = (path + "/").startswith("/v1/")
    return (_openai, OpenAIError) if openai else (_own, Error)


def respond(
    status: int,
    error_type: str,
    message: str,
    headers: Mapping[str, str] | None = None,
    path: str | None = None,
) -> Response:
    """An error as JSON, in the form of the dialect that `path` (default: the request's) belongs
    to.
    """
    if path is None:
        path = request.path if has_request_context() else ""
    render, _ = dialect(path)
    body = msgspec.json.encode(render(status, error_type, message))
    response = Response(body, status, headers, content_type="application/json")
    if status in _NOT_WORTH_A_RETRY:
        response.headers["x-should-retry"] = "false"
    return response


def _embedder_error(error: errors.EmbedderError) -> Response:
    if isinstance(error, errors.DeadlineExceeded) and request.environ.get(LOADING):
        # Its time went by while it waited for the model: that is worth another try.
        error = errors.ModelNotReady("the model was still loading when this request came")
    status, error_type, headers = next(
        answer for kind, answer in _ANSWERS.items() if isinstance(error, kind)
    )
    message = str(error)
    if isinstance(error, errors.QueueFull):
        headers = {"Retry-After": str(error.retry_after)}
    if isinstance(error, errors.InvalidInput) and error.index is not None:
        message = f"{request.environ[INPUT_PATH].format(error.index)}: {message}"
    return respond(status, error_type, message, headers)


def _http_error(error: HTTPException) -> Response:
    if isinstance(error, NotFound):
        return respond(404, "not_found", "no such route; /docs lists those there are")
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
