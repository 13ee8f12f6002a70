"""The headers that the application adds to every response, errors too. (`server/connection.py` adds
Server, Date, Connection and Content-Length.)
"""

from api.cors import Cors
from server.messages import Request, Response


def add_headers(response: Response, request: Request, cors: Cors | None) -> Response:
    """Returns: the response, with the headers that every one has, those that the request's view
    noted, and with `cors` those that let web pages read it.
    """
    response.headers.append(("X-Request-Id", request.id))
    response.headers.extend(request.notes.items())
    if cors:
        response.headers.extend(cors.headers(request, response.headers))
    return response
