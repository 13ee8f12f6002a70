"""What the dialects share: the model, found within a request's time, and a route's types, stated
once for decoding and for /openapi.json.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flask import Response, g, request

from api.codec import json_response, read_json
from embeddings import TextEmbedder
from engine.models import Models

VERSION = "1.0.0"  # of the API


class Service:
    """The models as a request sees them."""

    def __init__(self, models: Models[TextEmbedder], timeout: float) -> None:
        self.models, self._timeout = models, timeout

    def embedder(self, model: str | None, input_path: str = "") -> tuple[TextEmbedder, float]:
        """Wait for a model.

        Args:
            model: by name, source or alias; None means the default.
            input_path: where the request's inputs stand, `{}` for their index, for errors.

        Returns: the embedder, and the request's deadline on the clock of `time.monotonic`.
        Raises: ModelNotFound, ModelNotReady.
        """
        g.input_path = input_path
        deadline = time.monotonic() + self._timeout
        return self.models.get(model, deadline), deadline


def listed(sent: str | list[str], name: str) -> tuple[list[str], str]:
    """A field that takes a text or several: the texts, and `Service.embedder`'s `input_path`."""
    if isinstance(sent, str):
        return [sent], f"$.{name}"
    return sent, f"$.{name}[{{}}]"


@dataclass(frozen=True)
class Operation:
    """A route, for /openapi.json."""

    answer: Any  # the type of a 200
    bodies: tuple[type, ...]
    further: Mapping[int, Any] = field(default_factory=dict)  # status: type; None for an error


def endpoint(
    answer: Any,
    *bodies: type,
    choose: Callable[[], type] | None = None,
    further: Mapping[int, Any] | None = None,
) -> Callable[[Callable[..., object]], Callable[..., Response]]:
    """Make a route of a function: its body is decoded as what it is documented to be.

    Args:
        answer: type of what the function returns, which is written as JSON.
        bodies: the types that a request's body may have; the function gets it as its first
            argument.
        choose: which of several `bodies` the request has.
        further: statuses that other routes of this kind do not answer, each with its type; None for
            an error in the dialect's form.
    """

    def decorate(view: Callable[..., object]) -> Callable[..., Response]:
        @functools.wraps(view)
        def run(**arguments: str) -> Response:
            sent: list[object] = []
            if bodies:
                sent.append(read_json(request, choose() if choose else bodies[0]))
            result = view(*sent, **arguments)
            return result if isinstance(result, Response) else json_response(result)

        run.operation = Operation(answer, bodies, further or {})  # type: ignore[attr-defined]
        return run

    return decorate
