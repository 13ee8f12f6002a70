"""The limits of HTTP: what a connection may take of the server. gunicorn.conf.py sets `max_body`,
`max_fields`, `max_field` and `keepalive` from the settings and from gunicorn's options.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Times are seconds, sizes are bytes."""

    max_body: int = 33_554_432
    max_head: int = 32_768  # request line and header fields together
    max_fields: int = 64
    max_field: int = 8_190  # one header field, and the request target
    head_timeout: float = 10.0  # for a whole head, from its first byte
    body_timeout: float = 120.0  # for a whole body, from the end of the head
    receive_timeout: float = 3.0  # without a byte in the middle of a request
    send_timeout: float = 30.0  # in which a client takes nothing of its response
    close_timeout: float = 2.0  # for a client to close its side after the last response
    # For an idle connection: longer than the 60 s after which load balancers let go of theirs.
    keepalive: float = 75.0
    held_bodies: int = 4  # memory for requests that are not answered, in bodies of `max_body`
