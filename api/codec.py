"""Bytes to bodies and back: msgspec in, orjson out. Bodies of errors are made in api/errors.py."""

import base64
import functools
import gc
import re
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
import orjson

from api.fields import field_types, fill, read_options, strict, struct_in
from api.headers import IGNORED
from api.schemas import INPUTS, OPTIONS
from embeddings import TextEmbedding
from server.messages import HttpError, Request

T = TypeVar("T", bound=msgspec.Struct)

JSON = "application/json"
# Bounds of a header that names fields: a client may send any number of them, of any length.
_MAX_NAMES, _MAX_NAME = 16, 64
# Colons of a body, and so at most as many fields, that are worth a search for names: it holds up
# the event loop for 0.1 s. A body of 32 MB could have two million.
_MAX_COLONS = 200_000
_NOT_IN_A_HEADER = re.compile(r"[^!-+\--~]")  # all but visible ASCII without the comma
_FIELD = re.compile(r"\$\.(\w+)|field `(\w+)`")  # in msgspec's messages
_Names = dict[str, msgspec.Raw]  # an object whose values are not looked at

_decoder = functools.cache(
    msgspec.json.Decoder
)  # building one costs more than decoding a small body


@functools.cache
def _strict_decoder(schema: type[msgspec.Struct]) -> Any:
    return msgspec.json.Decoder(strict(schema))


def _decoded(decoder: Any, body: bytes | bytearray | memoryview) -> Any:
    """Decode without garbage collections. JSON has no cycles, and a collection looks at all that is
    decoded so far: with them 9 million empty lists take 4 s instead of 0.6, in which no other
    thread runs. Afterwards they are on, whatever they were before.
    """
    gc.disable()
    try:
        return decoder.decode(body)
    finally:
        gc.enable()


def read_json(request: Request, schema: type[T], *, any_type: bool = False) -> T:
    """Decode and validate a JSON body and the options in the query. Unknown fields are refused, or
    ignored and named in the response, as `schema` says (see api/fields.py).

    Args:
        any_type: do not look at the content type.

    Raises: HttpError: 415 for another content type; 400 for anything that is not JSON of this
    shape, with the place and the field.
    """
    if not any_type:
        _require_json(request)
    ignored: list[str] = []
    try:
        body: T = _decoded(_strict_decoder(schema), request.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Either it is wrong, and raises again, or it has unknown fields that `schema` ignores.
        body = decode(request.body, schema)
        few = request.body.count(b":") <= _MAX_COLONS
        ignored = _unknown(request.body, schema) if few else ["(unnamed)"]
    if request.query:
        ignored += read_query(request, body, schema)
    if ignored:
        _ignore(request, ignored)
    return body


def peek(request: Request, schema: type[T]) -> T:
    """Decode what `schema` has of a JSON body. Raises: HttpError 415 and 400."""
    _require_json(request)
    body: T = decode(request.body, schema)
    return body


def _require_json(request: Request) -> None:
    kind = request.media_type
    if kind and kind != JSON and not kind.endswith("+json"):
        raise HttpError(
            415, "unsupported_media_type", f"Content-Type is {kind}; this route takes {JSON}"
        )


def read_query(request: Request, body: msgspec.Struct, schema: type[msgspec.Struct]) -> list[str]:
    """Set the options of `body` that stand in the query.

    Returns: the names of unknown ones, where `schema` ignores them. Raises: HttpError 400.
    """
    pairs = parse_qsl(request.query, keep_blank_values=True)
    try:
        given, unknown = read_options(pairs, schema)
        fill(body, given, "the query's ")
    except msgspec.ValidationError as error:
        raise invalid(error, "query parameter: ") from None
    return unknown


def refuse_options(request: Request) -> None:
    """Refuse options in the query of a route that has none. Raises: HttpError 400."""
    for name, _ in parse_qsl(request.query, keep_blank_values=True):
        if name in OPTIONS:
            message = f"query parameter: this route takes no `{name}`"
            raise HttpError(400, "validation", message, field=name)


def decode(body: bytes | bytearray | memoryview, schema: Any) -> Any:
    """Decode and validate JSON. Raises: HttpError 400."""
    try:
        return _decoded(_decoder(schema), body)
    except msgspec.ValidationError as error:
        raise invalid(error, after=_elsewhere(body, schema)) from None
    except RecursionError:
        raise HttpError(400, "validation", "the JSON is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HttpError(
            400, "validation", f"the body is not valid JSON: {_reason(bytes(body), error)}"
        ) from None


def invalid(error: msgspec.ValidationError, before: str = "", after: str = "") -> HttpError:
    """The error for JSON of another shape. msgspec states the field in its message only."""
    message = str(error)
    found = _FIELD.search(message)
    field = found and next(filter(None, found.groups()))
    return HttpError(400, "validation", before + message + after, field=field)


def _unknown(
    body: bytes | bytearray | memoryview, schema: type[msgspec.Struct], path: str = ""
) -> list[str]:
    """The fields that `schema` does not have. One that is null counts as absent."""
    known, found = field_types(schema), []
    names: _Names = decode(body, _Names)
    for name, value in names.items():
        if name not in known:
            if begins(value, 5) != b"null":
                found.append(path + name)
        elif (nested := struct_in(known[name])) and begins(value, 1) == b"{":
            found += _unknown(memoryview(value), nested, f"{path}{name}.")
    return found


def begins(value: msgspec.Raw, count: int) -> bytes:
    """The first bytes of a value, which may be long."""
    return bytes(memoryview(value)[:count])


def _elsewhere(body: bytes | bytearray | memoryview, schema: Any) -> str:
    """Which routes take the inputs that this one does not."""
    try:
        names: _Names = _decoded(_decoder(_Names), body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    known = getattr(schema, "__struct_fields__", ())
    return "".join(
        f"; `{name}` is what {route} takes"
        for name, route in INPUTS.items()
        if name in names and name not in known
    )


def _ignore(request: Request, names: Sequence[str]) -> None:
    """Say in the response, and to whoever logs and counts it, that these fields had no effect."""
    shown = [_NOT_IN_A_HEADER.sub("?", name[:_MAX_NAME]) or "?" for name in names[:_MAX_NAMES]]
    if len(names) > len(shown):
        shown.append(f"({len(names) - len(shown)} more)")
    request.notes[IGNORED] = ", ".join(shown)


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
