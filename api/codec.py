"""Bytes to bodies and back: msgspec in, orjson out."""

import base64
import functools
from typing import Any, TypeVar

import msgspec
import orjson
from flask import Response

from api.application import current
from api.errors import RequestError
from embeddings import TextEmbedding

T = TypeVar("T")

JSON = "application/json"
_BODY = "embedder.body"  # in an environ

_decoder = functools.cache(
    msgspec.json.Decoder
)  # building one costs more than decoding a small body


def read_body() -> bytes:
    """The whole body, as api/worker.py has received it: chunks decoded."""
    environ = current.get()
    if _BODY not in environ:
        environ[_BODY] = environ["wsgi.input"].read()
    body: bytes = environ[_BODY]
    return body


def read_json(schema: type[T]) -> T:
    """Decode and validate a JSON body in one pass.

    Raises: RequestError: 415 for another content type; 400 for anything that is not JSON of this
    shape, saying where.
    """
    kind = current.get().get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    if kind and kind != JSON and not kind.endswith("+json"):
        raise RequestError(
            415, "unsupported_media_type", f"Content-Type is {kind}; this route takes {JSON}"
        )
    body = read_body()
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
    """What is wrong with the JSON, and where: msgspec calls a lone surrogate a truncated input and
    does not say where UTF-8 breaks.
    """
    try:
        body.decode()
        orjson.loads(body)
    except (UnicodeDecodeError, orjson.JSONDecodeError) as better:
        return str(better)
    return str(error)


def write_json(body: object) -> bytes:
    """Write `body` as JSON; float32 arrays go straight from memory, with the fewest digits that
    read back the same.
    """
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def json_response(body: object) -> Response:
    """The same, for Flask."""
    return Response(write_json(body), content_type=JSON)


def encode_vector(vector: Any, encoding_format: str | None) -> object:
    """A float32 array of shape (dimensions,) as it is, or for "base64" as its little-endian bytes
    in base64.
    """
    if encoding_format != "base64":
        return vector
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def encode_chunks(embedding: TextEmbedding, encoding_format: str | None) -> list[dict[str, object]]:
    """A text's chunks, as api/schemas.py describes them."""
    return [
        {
            "start": chunk.start,
            "end": chunk.end,
            "tokens": chunk.tokens,
            "embedding": encode_vector(vector, encoding_format),
        }
        for chunk, vector in zip(embedding.chunks, embedding.chunk_vectors)
    ]
