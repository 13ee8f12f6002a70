"""API keys: X-API-Key decides when present, else Authorization: Bearer."""

import hmac
from collections.abc import Collection, Sequence

from flask import Flask, Response, request

from api.errors import respond


def register(app: Flask, keys: Sequence[str], open_paths: Collection[str]) -> None:
    """Require one of `keys` for every request, unknown routes too; `open_paths` need none."""
    expected = [key.encode() for key in keys]
    public = frozenset(open_paths)

    def check() -> Response | None:
        environ = request.environ
        if environ["PATH_INFO"] in public:
            return None
        sent = environ.get("HTTP_X_API_KEY")
        if sent is None:
            scheme, _, sent = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
            if scheme.lower() != "bearer":
                return _refuse("no API key; send it as X-API-Key, or as Authorization: Bearer")
        given = sent.strip().encode()
        # Every key is compared, so that the time taken says nothing of which one matched.
        if sum([hmac.compare_digest(given, key) for key in expected]):
            return None
        return _refuse("wrong API key")

    app.before_request(check)


def _refuse(message: str) -> Response:
    return respond(401, "authentication", message, {"WWW-Authenticate": "Bearer"})
