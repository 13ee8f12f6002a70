"""The service's own dialect for pictures: POST /embeddings/image and /embeddings/image/batch."""

import base64
import binascii
import io
import re
from collections.abc import Sequence
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, unquote_to_bytes

import msgspec
from flask import Blueprint
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import MultiPartParser
from werkzeug.http import parse_options_header

from api.codec import invalid, read_json, read_query
from api.endpoint import endpoint
from api.fields import read_options
from api.schemas import BatchEmbeddings, Embeddings, EmbedImage, EmbedImages, ImageOptions
from api.service import Service
from engine.errors import InvalidInput
from limits import FORMATS_SENTENCE
from server.messages import HttpError, Request


class Pictures(NamedTuple):
    """What a request sent."""

    files: list[bytes]
    options: ImageOptions


# Bytes, one field of a multipart body beside its files. Werkzeug has one limit for this and for
# what it reads at a time, files too, which is 64 KiB and a rest.
_MAX_FIELD = 262_144
_MAX_PARTS = 1000  # far more than a batch takes; each costs some work before it can be counted
_DATA_URI = re.compile(r"data:([^,]{0,256}?)(;\s*base64\s*)?,", re.IGNORECASE)
_ENCODED_URI = re.compile(r"data%3a", re.IGNORECASE)
_MAX_ESCAPES = 1_000_000  # percent-encoded bytes of a data URI; decoding takes 60 bytes for each
_PICTURE_URI = re.compile(r"\s*data:image/[^,]{0,256},", re.IGNORECASE)
_BLANK = re.compile(r"\S[ \t]+\S")
_PROSE = 256  # characters among which prose has a blank
# Base64 for URLs has other characters in two places; white space and line breaks mean nothing.
_PLAIN_BASE64 = bytes.maketrans(b"-_", b"+/")
_URL = re.compile(r"[a-z][a-z0-9+.-]{1,15}://", re.IGNORECASE)
_FILE = {"type": "string", "format": "binary"}
_MEDIA = {
    "image/*": _FILE,
    "multipart/form-data": {"type": "object", "additionalProperties": _FILE},
}
_KINDS = (
    "application/json with base64 or a data URI, a picture itself as image/*, or "
    "multipart/form-data with files"
)


def blueprint(service: Service) -> Blueprint:
    """The native routes for pictures."""
    routes = Blueprint("images", __name__)

    def embed(sent: Pictures, path: str) -> list[object]:
        model, dimensions = sent.options.model, sent.options.dimensions
        _, embedded = service.embed_images(sent.files, path, model, dimensions)
        return [embedding.vector for embedding in embedded]

    def read(request: Request, path: str, schema: type[EmbedImage | EmbedImages]) -> Pictures:
        if not service.models.take_pictures:
            service.require_images(None)  # where no model takes pictures, none need be read
        kind = request.media_type
        if kind == "multipart/form-data":
            sent = _read_files(request)
        elif kind.startswith("image/"):
            sent = _read_raw(request)
        elif not kind or kind.endswith("json"):
            body = read_json(request, schema)
            uris = body.images if isinstance(body, EmbedImages) else [body.image]
            return Pictures(decode_pictures(uris, path), body)
        else:
            raise _unsupported(kind)
        read_query(request, sent.options, ImageOptions)
        return sent

    @routes.post("/embeddings/image")
    @endpoint(
        Embeddings,
        EmbedImage,
        read=lambda request: read(request, "$.image", EmbedImage),
        media=_MEDIA,
        further={501: None},
    )
    def embed_image(sent: Pictures) -> object:
        """Embed one picture."""
        if len(sent.files) > 1:
            raise HttpError(
                400,
                "validation",
                f"{len(sent.files)} files; this route takes one, /embeddings/image/batch several",
            )
        return {"embeddings": embed(sent, "$.image")}

    @routes.post("/embeddings/image/batch")
    @endpoint(
        BatchEmbeddings,
        EmbedImages,
        read=lambda request: read(request, "$.images[{}]", EmbedImages),
        media=_MEDIA,
        further={501: None},
    )
    def embed_images(sent: Pictures) -> object:
        """Embed several pictures, each alone, in order."""
        return {"embeddings": [[vector] for vector in embed(sent, "$.images[{}]")]}

    return routes


def decode_pictures(sent: Sequence[str], path: str) -> list[bytes]:
    """What JSON strings stand for: base64, or data URIs. Base64 may be url-safe, percent-encoded,
    broken into lines or without its padding.

    Args:
        path: where they stand in the body, `{}` for their index, for errors.

    Raises: InvalidInput for anything else; a URL is never fetched.
    """
    try:
        return [_decode(text, index) for index, text in enumerate(sent)]
    except InvalidInput as error:
        raise error.at(path) from None


def _decode(text: str, index: int) -> bytes:
    text = text.lstrip()
    if text.count("%") > _MAX_ESCAPES:
        raise InvalidInput(f"more than {_MAX_ESCAPES} percent-encoded bytes; send base64", index)
    if _ENCODED_URI.match(text):
        text = unquote(text)
    if _URL.match(text):
        raise InvalidInput(
            "this is a URL; the service fetches nothing: send the picture itself, as base64", index
        )
    in_base64 = True
    if text[:5].lower() == "data:":
        head = _DATA_URI.match(text)
        if head is None:
            raise InvalidInput("a data URI has a comma: data:image/png;base64,…", index)
        text, in_base64 = text[head.end() :], bool(head[2])
    data = unquote_to_bytes(text) if "%" in text or not in_base64 else text.encode()
    if in_base64:
        data = _decode_base64(data, index)
    if not data:
        raise InvalidInput("picture is empty", index)
    return data


def _decode_base64(encoded: bytes, index: int) -> bytes:
    encoded = encoded.translate(_PLAIN_BASE64, b" \t\r\n")
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except binascii.Error as error:
        raise InvalidInput(f"not valid base64: {error}", index) from None


def is_picture(text: str) -> bool:
    """Whether a text is a picture's data URI and nothing else: prose has blanks."""
    head = _PICTURE_URI.match(text)
    return head is not None and not _BLANK.search(text, head.end(), head.end() + _PROSE)


def are_pictures(texts: Sequence[str]) -> bool:
    """Whether texts are data URIs of pictures. Raises: InvalidInput where only some are."""
    found = [is_picture(text) for text in texts]
    if any(found) and not all(found):
        message = "texts and pictures are mixed; send the pictures in a request of their own"
        raise InvalidInput(message, found.index(not found[0]))
    return any(found)


def refuse_pictures(
    service: Service, model: str | None, sent: str | Sequence[str], name: str
) -> None:
    """Refuse pictures among texts: the vector of a data URI's characters is of no use.

    Args:
        name: where they stand in the body, for errors, such as "inputs".

    Raises: InvalidInput that says where to send them; ModalityNotSupported for a model that takes
    texts only.
    """
    texts, path = ([sent], f"$.{name}") if isinstance(sent, str) else (sent, f"$.{name}[{{}}]")
    for index, text in enumerate(texts):
        if is_picture(text):
            service.require_images(model)
            message = "this is a picture; send it to /embeddings/image, or to /v1/embeddings"
            raise InvalidInput(message, index).at(path)


def _unsupported(kind: str) -> HttpError:
    return HttpError(
        415, "unsupported_media_type", f"Content-Type is {kind}; this route takes {_KINDS}"
    )


def _read_raw(request: Request) -> Pictures:
    """A body that is a picture. The format is detected from the content. SVG is refused by its
    Content-Type: it is a document.
    """
    if "svg" in request.media_type:
        raise HttpError(
            415, "unsupported_media_type", f"{request.media_type} is not taken: {FORMATS_SENTENCE}"
        )
    return Pictures([bytes(request.body)], ImageOptions())


def _read_files(request: Request) -> Pictures:
    """The files of a multipart body in the order sent, whatever their fields are called; options
    are its other fields.
    """
    parser = MultiPartParser(
        stream_factory=_in_memory,
        max_form_memory_size=_MAX_FIELD,
        cls=list,  # type: ignore[arg-type]  # a MultiDict would lose the order between fields
        max_form_parts=_MAX_PARTS,
    )
    fields: Any
    files: Any
    try:
        _, parameters = parse_options_header(request.headers.get("content-type"))
        boundary = parameters["boundary"].encode("ascii")
        fields, files = parser.parse(io.BytesIO(request.body), boundary, len(request.body))
    except RequestEntityTooLarge:
        raise HttpError(
            413,
            "too_large",
            f"more than {_MAX_PARTS} parts, or a field of more than {_MAX_FIELD} bytes; send each "
            "picture as a file, with a file name",
        ) from None
    except KeyError:
        raise HttpError(400, "validation", "the multipart Content-Type has no boundary") from None
    except ValueError as error:
        raise HttpError(400, "validation", f"the multipart body is broken: {error}") from None
    try:
        given, _ = read_options(fields, ImageOptions)
    except msgspec.ValidationError as error:
        raise invalid(error, "field: ") from None
    pictures = [file.stream.read() for _, file in files]
    if not pictures:
        raise HttpError(
            400, "validation", "the multipart body has no file; send each picture as a file"
        )
    return Pictures(pictures, msgspec.convert(given, ImageOptions))


def _in_memory(*_: object, **__: object) -> IO[bytes]:
    return io.BytesIO()  # the whole body is in memory already
