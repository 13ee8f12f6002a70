"""Cross-origin requests: which web pages may read responses (CORS, CORS_ORIGINS). Off by default.

The key comes in a header that the page sets, so credentials (cookies) are neither needed nor
allowed.
"""

from collections.abc import Sequence

from api.auth import is_preflight
from server.messages import HttpError, Request, Response

MAX_AGE = 7200  # seconds a browser may remember a preflight; Chrome's own upper limit


class Cors:
    """Allows pages of some origins, or of all with `*`."""

    def __init__(self, origins: Sequence[str]) -> None:
        """`origins`: as browsers send them; `*` alone allows all."""
        self._origins = tuple(origins)

    def _allowed(self, request: Request) -> str | None:
        """The value of Access-Control-Allow-Origin. A head that broke off before its Origin came
        gets the origin where there is only one, so that the page can read the refusal.
        """
        if self._origins == ("*",):
            return "*"
        origin = request.headers.get("origin")
        if origin is None and len(self._origins) == 1:
            return self._origins[0]
        return origin if origin in self._origins else None

    def preflight(self, request: Request) -> Response | None:
        """The response to a browser's question before a request; None for any other request.

        Raises: HttpError 403 for a page of another origin.
        """
        if not is_preflight(request) or "origin" not in request.headers:
            return None
        if not self._allowed(request):
            raise HttpError(
                *(403, "origin"),
                "pages of this origin may not use the service; CORS_ORIGINS lists those that may",
            )
        asked = request.headers
        headers = [
            ("Access-Control-Allow-Methods", asked["access-control-request-method"]),
            ("Access-Control-Max-Age", str(MAX_AGE)),
            ("Vary", "Access-Control-Request-Method, Access-Control-Request-Headers"),
        ]
        if names := asked.get("access-control-request-headers"):
            headers.append(("Access-Control-Allow-Headers", names))
        return Response(content_type="text/plain", headers=headers)

    def headers(self, request: Request, others: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """What is added to a response that has the headers `others`: the page may read all of
        them."""
        origin = self._allowed(request)
        made = [] if origin == "*" else [("Vary", "Origin")]
        if origin:
            read = [name for name, _ in others if not name.startswith(("Vary", "Access-Control"))]
            names = ", ".join(dict.fromkeys(read))
            made.append(("Access-Control-Allow-Origin", origin))
            made.append(("Access-Control-Expose-Headers", names))
        return made
