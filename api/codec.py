"""Bytes to bodies and back: msgspec in, orjson out. Bodies of errors are made in api/errors.py."""

import base64
import functools
import re
from typing import Any, TypeVar

import msgspec
import orjson

from embeddings import TextEmbedding
from server.messages import HttpError, Request

T = TypeVar("T")

JSON = "application/json"
_FIELD = re.compile(r"\$\.(\w+)|field `(\w+)`")  # in msgspec's messages

_decoder = functools.cache(
    msgspec.json.Decoder
)  # building one costs more than decoding a small body


def read_json(request: Request, schema: type[T]) -> T:
    """Decode and validate a JSON body in one pass.

    Raises: HttpError: 415 for another content type; 400 for anything that is not JSON of this
    shape, with the place and the field.
    """
    kind = request.media_type
    if kind and kind != JSON and not kind.endswith("+json"):
        raise HttpError(
            415, "unsupported_media_type", f"Content-Type is {kind}; this route takes {JSON}"
        )
    return decode(request.body, schema)


def decode(body: bytes | bytearray, schema: type[T]) -> T:
    """Decode and validate JSON. Raises: HttpError 400."""
    try:
        decoded: T = _decoder(schema).decode(body)  # type: ignore[arg-type]  # types are hashable
        return decoded
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except RecursionError:
        raise HttpError(400, "validation", "the JSON is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HttpError(
            400, "validation", f"the body is not valid JSON: {_reason(body, error)}"
        ) from None


def invalid(error: msgspec.ValidationError, where: str = "") -> HttpError:
    """The error for JSON of another shape. msgspec states the field in its message only."""
    message = str(error)
    found = _FIELD.search(message)
    field = found and next(filter(None, found.groups()))
    return HttpError(400, "validation", where + message, field=field)


def _reason(body: bytes | bytearray, error: Exception) -> str:
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


def encode_vector(vector: Any, encoding_format: str | None) -> object:
    """A float32 array of shape (dimensions,) as a list of numbers, or for "base64" as its
    little-endian bytes in base64.
    """
    if encoding_format != "base64":
        # Written one by one: no other thread runs while orjson writes, and 2,048 vectors of 1,024
        # numbers take it 0.1 s.
        return orjson.Fragment(write_json(vector))
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
