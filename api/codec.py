"""Bytes to bodies and back: bounded reading, msgspec in, orjson out."""

import functools
from typing import Any, TypeVar

import msgspec
import orjson
from flask import Request, Response, current_app
from gunicorn.http.errors import ParseException

from api.errors import RequestError

T = TypeVar("T")

_decoder = functools.cache(
    msgspec.json.Decoder
)  # building one costs more than decoding a small body


def read_body(request: Request) -> bytes:
    """The whole body, at most MAX_BODY_SIZE; never reads more than the limit and a byte.

    Flask's own MAX_CONTENT_LENGTH would silently cut a chunked body at the limit instead of
    refusing it.

    Raises: RequestError: 413 over the limit; 408 when the client stops sending; 400 when it breaks
    off or breaks HTTP.
    """
    limit: int = current_app.config["MAX_BODY_SIZE"]
    length = request.content_length
    if length is not None and length > limit:
        raise RequestError(
            413, "too_large", f"body has {length} bytes; the limit is {limit} (MAX_BODY_SIZE)"
        )
    try:
        body: bytes = request.environ["wsgi.input"].read(limit + 1)
    except (ParseException, EOFError) as error:
        raise RequestError(
            400, "validation", f"the body's transfer encoding is broken: {error}"
        ) from None
    except (OSError, StopIteration) as error:
        raise RequestError(408, "timeout", "the body stopped arriving") from error
    if len(body) > limit:
        raise RequestError(413, "too_large", f"body has more than {limit} bytes (MAX_BODY_SIZE)")
    if length is not None and len(body) < length:
        raise RequestError(400, "validation", f"the body ended after {len(body)} of {length} bytes")
    return body


def read_json(request: Request, schema: type[T]) -> T:
    """Decode and validate a JSON body in one pass.

    Raises: RequestError: 415 for another content type, and what `read_body` raises; 400 for
    anything that is not JSON of this shape, saying where.
    """
    kind = request.mimetype
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise RequestError(
            415,
            "unsupported_media_type",
            f"Content-Type is {kind}; this route takes application/json",
        )
    body = read_body(request)
    if not body:
        raise RequestError(400, "validation", "the body is empty; send JSON")
    try:
        decoded: T = _decoder(schema).decode(body)  # type: ignore[arg-type]  # types are hashable
        return decoded
    except msgspec.ValidationError as error:
        raise RequestError(400, "validation", str(error)) from None
    except RecursionError:
        raise RequestError(400, "validation", "the JSON is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(
            400, "validation", f"the body is not valid JSON: {_reason(body, error)}"
        ) from None


def _reason(body: bytes, error: Exception) -> str:
    """orjson names what is wrong and where; msgspec calls a lone surrogate a truncated input."""
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError as better:
        return str(better)
    return str(error)


def json_response(body: object) -> Response:
    """Write `body` as JSON; float32 arrays go straight from memory, with the fewest digits that
    read back the same.
    """
    return Response(
        orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), content_type="application/json"
    )


def array(value: Any) -> Any:
    """A vector as orjson takes it: C-contiguous (a cut one is not)."""
    return value if value.flags.c_contiguous else value.copy()
