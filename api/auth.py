"""The check of the API key: which one a request has decides whose it is."""

import hmac
from collections.abc import Collection, Iterable

from server.messages import HttpError, Request


class KeyCheck:
    """Refuses requests without a valid key, and notes on others whose they are."""

    def __init__(self, keys: Iterable[tuple[str, str]], open_paths: Collection[str]) -> None:
        """Args:
        keys: names and keys; a request needs one of them. `name:key` is taken for the key too.
        open_paths: need none.
        """
        taken = [(name, sent) for name, key in keys for sent in (key, f"{name}:{key}")]
        self._names = [name for name, _ in taken]
        self._keys = [sent.encode() for _, sent in taken]
        self._open = frozenset(open_paths)

    def check(self, request: Request) -> None:
        """X-API-Key decides when it is not empty, else Authorization, with or without Bearer. Sets
        the request's `caller` to the key's name.

        Raises: HttpError 401.
        """
        if request.path in self._open or is_preflight(request):
            return
        sent = request.headers.get("x-api-key", "").strip() or _of_authorization(request)
        given = sent.encode()
        # Every key is compared, so that the time taken does not tell which one matched.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if True not in matches:
            raise _unauthorized("wrong API key")
        request.caller = self._names[matches.index(True)]


def _of_authorization(request: Request) -> str:
    """Raises: HttpError 401 where it holds no key."""
    sent = request.headers.get("authorization", "").strip()
    # Some clients put Bearer before a key that their users gave with it.
    while sent[:7].lower() == "bearer ":
        sent = sent[7:].lstrip()
    if not sent or " " in sent or sent.lower() == "bearer":  # another scheme has a space
        raise _unauthorized("no API key; send it as X-API-Key, or as Authorization: Bearer")
    return sent


def is_preflight(request: Request) -> bool:
    """Whether a browser asks if it may send a request from another origin; it sends no key then."""
    return request.method == "OPTIONS" and "access-control-request-method" in request.headers


def _unauthorized(message: str) -> HttpError:
    return HttpError(401, "authentication", message, headers={"WWW-Authenticate": "Bearer"})
