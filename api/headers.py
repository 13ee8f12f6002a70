"""The headers that the application adds to every response, errors too. (`server/connection.py` adds
Server, Date, Connection and Content-Length.)
"""

import math

from api.cors import Cors
from engine.quota import Quota
from server.messages import Request, Response

IGNORED = "X-Ignored-Fields"  # names the fields of the request that had no effect


def add_headers(response: Response, request: Request, cors: Cors | None) -> Response:
    """Returns: the response, with the headers that every one has, those that the request's view
    noted, and with `cors` those that let web pages read it.
    """
    response.headers.append(("X-Request-Id", request.id))
    response.headers.extend(request.notes.items())
    if cors:
        response.headers.extend(cors.headers(request, response.headers))
    return response


def quota_headers(quota: Quota) -> dict[str, str]:
    """What is left of a key's limits, as OpenAI says it."""
    headers = {}
    for kind, left in quota.left().items():
        headers[f"x-ratelimit-limit-{kind}"] = str(left.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(left.remaining)
        headers[f"x-ratelimit-reset-{kind}"] = duration(left.reset)
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: `20ms`, `1.5s`, `6m0s`."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds / 1000, 60)
    return f"{minutes:.0f}m{rest:g}s" if minutes else f"{rest:g}s"
