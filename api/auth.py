"""The check of the API key."""

import hmac
from collections.abc import Collection, Sequence

from server.messages import HttpError, Request


class KeyCheck:
    """Refuses requests without a valid key."""

    def __init__(self, keys: Sequence[str], open_paths: Collection[str]) -> None:
        """Args:
        keys: a request needs one of them.
        open_paths: need none.
        """
        self._keys = [key.encode() for key in keys]
        self._open = frozenset(open_paths)

    def check(self, request: Request) -> None:
        """X-API-Key decides when it is not empty, else Authorization: Bearer.

        Raises: HttpError 401.
        """
        if request.path in self._open or is_preflight(request) or is_probe(request):
            return
        sent = request.headers.get("x-api-key")
        if not sent:
            scheme, _, sent = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                raise _unauthorized("no API key; send it as X-API-Key, or as Authorization: Bearer")
        given = sent.strip().encode()
        # Every key is compared, so that the time taken does not tell which one matched.
        if not sum([hmac.compare_digest(given, key) for key in self._keys]):
            raise _unauthorized("wrong API key")


def is_preflight(request: Request) -> bool:
    """Whether a browser asks if it may send a request from another origin; it sends no key then."""
    return request.method == "OPTIONS" and "access-control-request-method" in request.headers


def is_probe(request: Request) -> bool:
    """Whether a client of Ollama asks if there is a server; it sends no key then."""
    return request.path == "/" and request.method in ("GET", "HEAD")


def _unauthorized(message: str) -> HttpError:
    return HttpError(401, "authentication", message, headers={"WWW-Authenticate": "Bearer"})
