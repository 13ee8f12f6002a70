"""The service's own dialect for pictures: POST /embeddings/image and /embeddings/image/batch."""

import base64
import binascii
import io
import re
from collections.abc import Sequence
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import msgspec
from flask import Blueprint
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import MultiPartParser
from werkzeug.http import parse_options_header

from api.codec import invalid, read_json
from api.endpoint import endpoint
from api.schemas import BatchEmbeddings, Embeddings, EmbedImage, EmbedImages, ImageOptions
from api.service import Service
from engine.errors import InvalidInput
from limits import FORMATS_SENTENCE
from server.messages import HttpError, Request

Options = TypeVar("Options", bound=ImageOptions)


class Pictures(NamedTuple):
    """What a request sent."""

    files: list[bytes]
    options: ImageOptions


# Bytes, one field of a multipart body beside its files. Werkzeug has one limit for this and for
# what it reads at a time, files too, which is 64 KiB and a rest.
_MAX_FIELD = 262_144
_MAX_PARTS = 1000  # far more than a batch takes; each costs some work before it can be counted
_DATA_URI = re.compile(r"data:([^,]{0,256}?)(;base64)?,", re.IGNORECASE)
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
        if not any(
            "image" in bundle.manifest.modalities for bundle in service.models.bundles.values()
        ):
            service.require_images(None)  # where no model takes pictures, none need be read
        kind = request.media_type
        if kind == "multipart/form-data":
            return _read_files(request)
        if kind.startswith("image/"):
            return _read_raw(request)
        if kind and not kind.endswith("json"):
            raise _unsupported(kind)
        body = read_json(request, schema)
        sent = body.images if isinstance(body, EmbedImages) else [body.image]
        return Pictures(decode_pictures(sent, path), body)

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
    """What JSON strings stand for: base64 (line breaks are allowed) or data URIs with base64.

    Args:
        path: where they stand in the body, `{}` for their index, for errors.

    Raises: InvalidInput for anything else; a URL is never fetched.
    """
    try:
        return [_decode(text, index) for index, text in enumerate(sent)]
    except InvalidInput as error:
        raise error.at(path) from None


def _decode(text: str, index: int) -> bytes:
    if _URL.match(text):
        raise InvalidInput(
            "this is a URL; the service fetches nothing: send the picture itself, as base64", index
        )
    if text[:5].lower() == "data:":
        head = _DATA_URI.match(text)
        if head is None or not head[2]:
            raise InvalidInput("a data URI must be base64: data:image/png;base64,…", index)
        text = text[head.end() :]
    try:
        encoded = text.encode("ascii").translate(None, b" \t\r\n")
        data = base64.b64decode(encoded, validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        reason = "it has other characters" if isinstance(error, UnicodeEncodeError) else error
        raise InvalidInput(f"not valid base64: {reason}", index) from None
    if not data:
        raise InvalidInput("picture is empty", index)
    return data


def _unsupported(kind: str) -> HttpError:
    return HttpError(
        415, "unsupported_media_type", f"Content-Type is {kind}; this route takes {_KINDS}"
    )


def _read_raw(request: Request) -> Pictures:
    """A body that is a picture; options come in the query. The format is detected from the
    content. SVG is refused by its Content-Type: it is a document.
    """
    if "svg" in request.media_type:
        raise HttpError(
            415, "unsupported_media_type", f"{request.media_type} is not taken: {FORMATS_SENTENCE}"
        )
    pairs = parse_qsl(request.query, keep_blank_values=True)
    return Pictures([bytes(request.body)], _options(pairs, "query parameter"))


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
    options = _options(fields, "field")
    pictures = [file.stream.read() for _, file in files]
    if not pictures:
        raise HttpError(
            400, "validation", "the multipart body has no file; send each picture as a file"
        )
    return Pictures(pictures, options)


def _in_memory(*_: object, **__: object) -> IO[bytes]:
    return io.BytesIO()  # the whole body is in memory already


def _options(pairs: Any, kind: str) -> ImageOptions:
    """Options from text fields, checked as those of a JSON body are."""
    try:
        return msgspec.convert(dict(pairs), ImageOptions, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(error, f"{kind}: ") from None
