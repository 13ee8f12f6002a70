"""The headers that the application adds to every response, errors too. (`server/connection.py` adds
Server, Date, Connection and Content-Length.)
"""

from server.messages import Request, Response

IGNORED = "X-Ignored-Fields"  # names the fields of the request that had no effect


def add_headers(response: Response, request: Request) -> Response:
    """Returns: the response, with the headers that every one has and those that the request's view
    noted.
    """
    response.headers.append(("X-Request-Id", request.id))
    response.headers.extend(request.notes.items())
    return response
