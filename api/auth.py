"""The check of the API key: which one a request has decides whose it is."""

import hmac
from collections.abc import Collection, Iterable, Mapping

from keys import sent_forms
from server.messages import HttpError, Request

_WHERE = "send the key as X-API-Key, or as Authorization: Bearer"


class KeyCheck:
    """Refuses requests without a valid key, and sets `caller` on the rest."""

    def __init__(self, keys: Iterable[tuple[str, str]], open_paths: Collection[str]) -> None:
        """Args:
        keys: names and keys; a request needs one of them. `name:key` is taken for the key too.
        open_paths: need none.
        """
        taken = sent_forms(keys)
        self._names = [name for name, _ in taken]
        self._keys = [sent.encode() for _, sent in taken]
        self._open = frozenset(open_paths)

    def check(self, request: Request) -> None:
        """X-API-Key decides when it is not empty, else Authorization. The request's `caller` gets
        the key's name.

        Raises: HttpError 401.
        """
        if request.path in self._open or is_preflight(request) or is_probe(request):
            return
        given = _sent_key(request.headers).encode()
        # Every key is compared, so that the time taken does not tell which one matched.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if True not in matches:
            raise _unauthorized("wrong API key")
        request.caller = self._names[matches.index(True)]


def _sent_key(headers: Mapping[str, str]) -> str:
    """The key of a request. In Authorization it may come alone, after `Bearer`, or after two of
    them: some clients add the word to a key that has it already.

    Raises: HttpError 401 if there is none, or one of another scheme.
    """
    if key := headers.get("x-api-key", "").strip():
        return key
    words = headers.get("authorization", "").split()
    while words and words[0].lower() == "bearer":
        del words[0]
    if not words:
        raise _unauthorized(f"no API key; {_WHERE}")
    if len(words) > 1:  # what was sent is not repeated: it may be a key
        basic = words[0].lower() == "basic"
        what = "Basic (user and password)" if basic else "with a scheme other than Bearer"
        raise _unauthorized(f"Authorization {what} is not taken; {_WHERE}")
    return words[0]


def is_preflight(request: Request) -> bool:
    """Whether a browser asks if it may send a request from another origin; it sends no key then."""
    return request.method == "OPTIONS" and "access-control-request-method" in request.headers


def is_probe(request: Request) -> bool:
    """Whether a client of Ollama asks if there is a server; it sends no key then."""
    return request.path == "/" and request.method in ("GET", "HEAD")


def _unauthorized(message: str) -> HttpError:
    return HttpError(401, "authentication", message, headers={"WWW-Authenticate": "Bearer"})
