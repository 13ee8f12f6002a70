"""From what went wrong to a status and a body: the one place that knows both."""

import logging
from collections.abc import Callable, Mapping

import msgspec
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound

from engine import errors
from engine.admission import spread
from server.messages import HttpError, Request, Response
from server.tasks import Busy

log = logging.getLogger(__name__)

# The OpenAI SDK repeats every 5xx unless `x-should-retry: false` says that it is of no use.
_NOT_WORTH_A_RETRY = (501, 504)
_RETRY = {"Retry-After": "1"}
BUSY_SECONDS = 2.0  # after which to try again for a thread, or a little sooner or later

# domain error: (status, error_type, further headers)
_ANSWERS: dict[type[errors.EmbedderError], tuple[int, str, dict[str, str]]] = {
    errors.InputTooLarge: (413, "too_large", {}),
    errors.InvalidInput: (400, "validation", {}),
    errors.ModelNotFound: (404, "model_not_found", {}),
    errors.ModelNotReady: (503, "not_ready", _RETRY),
    errors.ModalityNotSupported: (501, "not_supported", {}),
    errors.TaskNotSupported: (501, "not_supported", {}),
    errors.OverQuota: (429, "rate_limited", {}),
    errors.QueueFull: (429, "overloaded", {}),
    errors.DeadlineExceeded: (504, "timeout", {}),
    errors.CallerGone: (499, "client_closed", {}),  # nginx's number for it; only logs see it
    errors.ShuttingDown: (503, "shutting_down", _RETRY),
    errors.EngineFailed: (500, "backend", {}),
}


class Error(msgspec.Struct):
    """What went wrong: the service's own form, which is also text-embeddings-inference's."""

    error: str
    error_type: str


class OllamaError(msgspec.Struct):
    """What went wrong, as Ollama's clients read it."""

    error: str


class CohereError(msgspec.Struct):
    """What went wrong, as Cohere's clients read it."""

    message: str


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
    "rate_limited": "rate_limit_exceeded",
}


def _openai(status: int, error_type: str, message: str, field: str | None) -> OpenAIError:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    code = _OPENAI_CODES.get(error_type, error_type)
    return OpenAIError(OpenAIErrorDetail(message, kind, field, code))


def _own(status: int, error_type: str, message: str, field: str | None) -> Error:
    return Error(message, error_type)


def _ollama(status: int, error_type: str, message: str, field: str | None) -> OllamaError:
    return OllamaError(message)


def _cohere(status: int, error_type: str, message: str, field: str | None) -> CohereError:
    return CohereError(message)


def dialect(path: str) -> tuple[Callable[[int, str, str, str | None], object], type]:
    """How errors under a path are written, and the type that describes them."""
    if path in ("/v1/rerank", "/v2/rerank"):
        return _cohere, CohereError
    if (path + "/").startswith("/v1/"):
        return _openai, OpenAIError
    if (path + "/").startswith("/api/"):
        return _ollama, OllamaError
    return _own, Error


def response(error: Exception, request: Request) -> Response:
    """The response to a request that failed, in the form of the dialect that its path belongs to.
    What is unexpected is logged, and tells the client nothing. `request.refused` gets what the
    metrics count where the status does not tell.
    """
    status, error_type, message, field, headers = _describe(error)
    request.refused = error.reason if isinstance(error, HttpError) else None
    if isinstance(error, errors.OverQuota):
        request.refused = "key_limit"
    render, _ = dialect(request.path)
    body = msgspec.json.encode(render(status, error_type, message, field))
    made = Response(body, status, headers=[*headers.items()])
    if status in _NOT_WORTH_A_RETRY:
        made.headers.append(("x-should-retry", "false"))
    return made


def _describe(error: Exception) -> tuple[int, str, str, str | None, Mapping[str, str]]:
    """Returns: status, error_type, message, field of the body, further headers."""
    if isinstance(error, HttpError):
        return error.status, error.error_type, str(error), error.field, error.headers
    if isinstance(error, errors.EmbedderError):
        status, error_type, headers = next(
            answer for kind, answer in _ANSWERS.items() if isinstance(error, kind)
        )
        if isinstance(error, errors.QueueFull):
            headers = {"Retry-After": str(error.retry_after)}
            return status, error_type, str(error), "input", headers  # it is a limit on inputs
        return status, error_type, str(error), error.field, headers
    if isinstance(error, Busy):
        retry = {"Retry-After": str(spread(BUSY_SECONDS))}
        return 429, "overloaded", f"{error}; send this request again later", None, retry
    if isinstance(error, NotFound):
        return 404, "not_found", "no such route; /docs lists those there are", None, {}
    if isinstance(error, MethodNotAllowed):
        methods = ", ".join(sorted(set(error.valid_methods or ()) - {"OPTIONS", "HEAD"}))
        message = f"this route takes {methods}"
        return 405, "method_not_allowed", message, None, {"Allow": methods}
    if isinstance(error, HTTPException):
        return error.code or 500, "validation", error.description or error.name, None, {}
    log.error("unexpected error", exc_info=error)
    return 500, "internal", "internal error; the service's log has the details", None, {}
