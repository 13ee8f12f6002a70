"""What the dialects share: the model, found within a request's time, and a route's types, stated
once for decoding and for /openapi.json.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

from flask import Response, current_app, request

from api.application import DIRECT, INPUT_PATH, LOADING, current
from api.codec import json_response, read_json, write_json
from api.connection import GONE_AFTER, Socket
from api.errors import RequestError
from embeddings import TextEmbedder
from engine.errors import ModalityNotSupported
from engine.models import Models
from image_embeddings import ImageEmbedder

VERSION = "1.0.0"  # of the API


class Embedders(NamedTuple):
    """What a loaded model embeds with."""

    texts: TextEmbedder
    images: ImageEmbedder | None


class Waiting(TypedDict):
    """How long a request waits: what every embedder's `embed` takes."""

    deadline: float  # on the clock of `time.monotonic`
    gone: Callable[[], bool]  # whether its client has closed the connection


class Service:
    """The models as a request sees them."""

    def __init__(self, models: Models[Embedders], timeout: float) -> None:
        self.models, self._timeout = models, timeout

    def embedder(self, model: str | None, input_path: str = "") -> tuple[TextEmbedder, Waiting]:
        """Wait for a model.

        Args:
            model: by name, source or alias; None means the default.
            input_path: where the request's inputs stand, `{}` for their index, for errors.

        Returns: the embedder, and how long the request waits for it.
        Raises: ModelNotFound, ModelNotReady.
        """
        embedders, waiting = self._wait(model, input_path)
        return embedders.texts, waiting

    def image_embedder(self, model: str | None, input_path: str) -> tuple[ImageEmbedder, Waiting]:
        """Wait for a model that takes pictures; as `embedder`.

        Raises: ModelNotFound, ModelNotReady, ModalityNotSupported.
        """
        self.require_images(model)
        embedders, waiting = self._wait(model, input_path)
        assert embedders.images  # its manifest says so
        return embedders.images, waiting

    def require_images(self, model: str | None) -> None:
        """Raises: ModelNotFound; ModalityNotSupported for a model that takes texts only."""
        manifest = self.models.bundle(model).manifest
        if "image" not in manifest.modalities:
            raise ModalityNotSupported(
                f"model {manifest.name} takes texts only; for pictures bake and serve a multimodal "
                "one, such as clip-ViT-B-32 (`make run MODEL=clip-ViT-B-32`; the README's section "
                "on pictures has more)"
            )

    def _wait(self, model: str | None, input_path: str) -> tuple[Embedders, Waiting]:
        environ = current.get()
        environ[INPUT_PATH], environ[LOADING] = input_path, not self.models.loaded(model)
        now = time.monotonic()
        deadline, look = now + self._timeout, now + GONE_AFTER
        sock: Socket | None = environ.get("gunicorn.socket")

        def gone() -> bool:
            return sock is not None and time.monotonic() > look and sock.gone()

        return self.models.get(model, deadline), {"deadline": deadline, "gone": gone}


def listed(sent: str | list[str], name: str) -> tuple[list[str], str]:
    """A field that takes a text or several: the texts, and `Service.embedder`'s `input_path`."""
    if isinstance(sent, str):
        return [sent], f"$.{name}"
    return sent, f"$.{name}[{{}}]"


def _refuse_large() -> None:
    """Raises: RequestError: 413 for a body over the limit, of which nothing has been read."""
    limit: int = current_app.config["MAX_BODY_SIZE"]
    if int(request.environ.get("CONTENT_LENGTH") or 0) > limit:
        raise RequestError(
            413, "too_large", f"the body has more than {limit} bytes, the limit (MAX_BODY_SIZE)"
        )


@dataclass(frozen=True)
class Operation:
    """A route, for /openapi.json."""

    answer: Any  # the type of a 200
    bodies: tuple[type, ...]
    further: Mapping[int, Any] = field(default_factory=dict)  # status: type; None for an error
    media: Mapping[str, Any] = field(default_factory=dict)  # schemas of bodies that are no JSON
    produces: str = "application/json"  # the content type of a 200


def endpoint(
    answer: Any,
    *bodies: type,
    choose: Callable[[], type] | None = None,
    read: Callable[[], object] | None = None,
    media: Mapping[str, Any] | None = None,
    further: Mapping[int, Any] | None = None,
    produces: str = "application/json",
) -> Callable[[Callable[..., object]], Callable[..., Response]]:
    """Make a route of a function: its body is decoded as what it is documented to be.

    Args:
        answer: type of what the function returns, which is written as JSON.
        bodies: the types that a request's body may have; the function gets it as its first
            argument.
        choose: which of several `bodies` the request has.
        read: reads a body that need not be JSON; the function gets what it returns.
        media: the JSON Schemas of such bodies, by content type.
        further: statuses that other routes of this kind do not answer, each with its type; None for
            an error in the dialect's form.
        produces: content type of the answer, where the function returns a Response with another.
    """

    def decorate(view: Callable[..., object]) -> Callable[..., Response]:
        def direct() -> bytes:
            return write_json(view(read_json(choose() if choose else bodies[0])))

        @functools.wraps(view)
        def run(**arguments: str) -> Response:
            if bodies:
                _refuse_large()
            if bodies and not read:
                answer_bytes = direct()
                current.get()[DIRECT] = direct
                return Response(answer_bytes, content_type=produces)
            result = view(*([read()] if read else []), **arguments)
            return result if isinstance(result, Response) else json_response(result)

        operation = Operation(answer, bodies, further or {}, media or {}, produces)
        run.operation = operation  # type: ignore[attr-defined]
        return run

    return decorate
