"""Requests as WSGI's environ (PEP 3333), for Flask and for other servers than our own."""

import io
import time
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from werkzeug.datastructures import EnvironHeaders

from server.messages import Request


def environ_of(request: Request) -> dict[str, Any]:
    """WSGI's environ of a request."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "GET" if request.method == "HEAD" else request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(request.target.partition("?")[0]).decode("latin-1"),
        "QUERY_STRING": request.query,
        "CONTENT_TYPE": request.headers.get("content-type", ""),
        "CONTENT_LENGTH": str(len(request.body)),
        "SERVER_NAME": "localhost",  # HTTP_HOST has what the client sent
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": f"HTTP/{request.version}",
        "REMOTE_ADDR": request.client,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(request.body),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for name, value in request.headers.items():
        # A name with an underscore could be taken for one with a dash.
        if "_" not in name and name not in ("content-type", "content-length"):
            environ[f"HTTP_{name.upper().replace('-', '_')}"] = value
    return environ


def request_of(environ: dict[str, Any]) -> Request:
    """A request from WSGI's environ."""
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    query = environ.get("QUERY_STRING", "")
    return Request(
        method=environ["REQUEST_METHOD"],
        target=quote(environ["PATH_INFO"].encode("latin-1")) + (f"?{query}" if query else ""),
        path=environ["PATH_INFO"].encode("latin-1").decode(errors="replace"),
        headers={name.lower(): value for name, value in EnvironHeaders(environ)},
        body=body,
        length=len(body),
        client=environ.get("REMOTE_ADDR", "-"),
        arrived=time.perf_counter(),
    )
