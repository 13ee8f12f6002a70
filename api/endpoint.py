"""A route's types, stated once: for decoding, for writing, and for /openapi.json."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flask
import msgspec

from api.codec import read_json, refuse_options, write_json
from server.messages import Request, Response, current

VERSION = "1.0.0"  # of the API


@dataclass(frozen=True)
class Operation:
    """A route, for /openapi.json."""

    answer: Any  # the type of a 200
    bodies: tuple[type[msgspec.Struct], ...]
    further: Mapping[int, Any] = field(default_factory=dict)  # status: type; None for an error
    media: Mapping[str, Any] = field(default_factory=dict)  # schemas of bodies that are no JSON
    produces: str = "application/json"  # the content type of a 200


def endpoint(
    answer: Any,
    *bodies: type[msgspec.Struct],
    choose: Callable[[Request], type[msgspec.Struct]] | None = None,
    read: Callable[[Request], object] | None = None,
    media: Mapping[str, Any] | None = None,
    further: Mapping[int, Any] | None = None,
    produces: str = "application/json",
) -> Callable[[Callable[..., object]], Callable[..., flask.Response]]:
    """Make a route of a function: its body is decoded as what it is documented to be.

    The function that is returned is Flask's view. Its attribute `direct` does the same without
    Flask: see api/routes.py.

    Args:
        answer: type of what the function returns, which is written as JSON.
        bodies: the types that a request's body may have; the function gets it as its first
            argument.
        choose: which of several `bodies` the request has.
        read: reads a body that need not be JSON; the function gets what it returns.
        media: the JSON Schemas of such bodies, by content type.
        further: statuses that other routes of this kind do not answer, each with its type; None for
            an error in the dialect's form.
        produces: content type of the response, where the function returns one with another.
    """

    def decorate(view: Callable[..., object]) -> Callable[..., flask.Response]:
        def direct(request: Request, **arguments: str) -> Response:
            if read:
                result = view(read(request), **arguments)
            elif bodies:
                schema = choose(request) if choose else bodies[0]
                result = view(read_json(request, schema), **arguments)
            else:
                if request.query:
                    refuse_options(request)
                result = view(**arguments)
            return result if isinstance(result, Response) else Response(write_json(result))

        @functools.wraps(view)
        def for_flask(**arguments: str) -> flask.Response:
            return to_flask(direct(current.get(), **arguments))

        operation = Operation(answer, bodies, further or {}, media or {}, produces)
        for_flask.operation = operation  # type: ignore[attr-defined]
        for_flask.direct = direct  # type: ignore[attr-defined]
        return for_flask

    return decorate


def to_flask(response: Response) -> flask.Response:
    """A response of a view or an error, for Flask."""
    made = flask.Response(response.body, response.status, content_type=response.content_type)
    made.headers.extend(response.headers)
    return made
