"""How the application handles every request: the table of routes, the API key (`api/auth.py`), the
limits, compression (`api/compression.py`), errors, headers of every response (`api/headers.py`),
cross-origin requests (`api/cors.py`), the access log and the metrics.

Every route is registered with Flask. The table holds the views that need none of Flask's dispatch,
and calls them directly; everything else passes through Flask. When somebody adds code of their own
to Flask (CORS, an `after_request`, WSGI middleware), the table is left empty, so that it works on
every route and its errors. Not on what is refused before the application sees the request: broken
HTTP, no free thread, no memory.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any
from wsgiref.types import StartResponse

import flask
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException

from api import errors, health
from api.auth import KeyCheck
from api.compression import Bodies, Compression
from api.cors import Cors
from api.endpoint import to_flask
from api.headers import IGNORED, add_headers, quota_headers
from api.logs import RequestLog, request_id
from api.metrics import Metrics
from api.traces import Traces
from api.wsgi import environ_of, request_of
from engine import spans
from engine.errors import CallerGone
from engine.queue import Queue
from engine.quota import Quota
from server.messages import OWN, HttpError, Request, Response, current
from server.tasks import in_thread

log = logging.getLogger(__name__)

# Bodies up to this size are handled in the event loop's own thread: a full one takes 3 ms (Zen 5).
# Larger ones, compressed ones and pictures get a thread.
MAX_INLINE_BODY = 16_384

View = Callable[[Request], Response]
_NO_REQUEST = Request()


class Router:
    """Answers requests. `respond` may wait: the server runs it as a task."""

    def __init__(
        self,
        app: flask.Flask,
        key: KeyCheck,
        max_body: int,
        queue: Queue,
        metrics: Metrics,
        requests: RequestLog,
        bodies: Bodies,
        compression: Compression,
        quotas: Mapping[str | None, Quota],
        bytes_per_token: int,
        cors: Cors | None = None,
        traces: Traces | None = None,
    ) -> None:
        """Args:
        max_body: bytes, as sent.
        quotas: of keys that have limits, by name.
        bytes_per_token: of a body, at most.
        """
        self._app, self._key = app, key
        self._quotas, self._bytes_per_token = quotas, bytes_per_token
        self._bodies, self._compression, self._cors = bodies, compression, cors
        self._traces = traces
        self._max_body, self._queue = max_body, queue
        self._metrics, self._log = metrics, requests
        self._table: dict[tuple[str, str], View] | None = None

    # -- what the server calls

    def respond(self, request: Request) -> Response:
        """Answer a request. Raises nothing."""
        self._begin(request)
        try:
            asked = self._cors.preflight(request) if self._cors else None
            response = asked or self._compression.apply(self._dispatch(request), request)
        except Exception as error:
            response = errors.response(error, request)
        if quota := self._quotas.get(request.caller):
            request.notes.update(quota_headers(quota))
        current.set(_NO_REQUEST)  # else an idle task keeps the last body
        spans.recording.set(None)
        return add_headers(response, request, self._cors)

    def refuse(self, request: Request, error: HttpError) -> Response:
        """Write an error of the server's own; the request may be incomplete."""
        request.id = request.id or request_id(request)
        return add_headers(errors.response(error, request), request, self._cors)

    def sent(self, request: Request, response: Response, error: HttpError | None) -> None:
        """Count and log a response that has been handed to its connection."""
        if request.client == OWN:
            return
        if self._traces:
            self._traces.end(request, self._metrics.route(request.path), response.status)
        path, size = request.path, len(response.body)
        if error:
            self._metrics.refused(path, response.status, request.refused)
            self._log.write(request, response.status, size, None, why=error.error_type)
            return
        seconds = time.perf_counter() - request.arrived
        ignored = IGNORED in request.notes
        self._metrics.end(
            path, response.status, seconds, request.caller, request.refused, ignored=ignored
        )
        level = logging.DEBUG if path in health.PATHS else logging.INFO
        self._log.write(request, response.status, size, seconds, level=level)

    def dropped(self, request: Request) -> None:
        """The request was refused while it was worked on."""
        self._metrics.dropped()

    # -- the way of a request

    def _begin(self, request: Request) -> None:
        current.set(request)
        request.id = request_id(request)
        if self._traces:
            self._traces.begin(request)
        if request.client != OWN:
            self._metrics.begin()

    def _in_thread(self, view: View, request: Request) -> Response:
        if request.gone():
            raise CallerGone("the client closed before its request had a thread")
        return view(request)

    def _decoded(self, view: View, request: Request) -> Response:
        with self._bodies.decoded(request):
            return view(request)

    def _dispatch(self, request: Request) -> Response:
        if self._table is None:
            self._table = {} if has_hooks(self._app) else direct_views(self._app)
        # The server sends no body after HEAD.
        method = "GET" if request.method == "HEAD" else request.method
        view = self._table.get((method, request.path))
        encoded = request.length > 0 and "content-encoding" in request.headers
        if view:
            self.check(request)
            if encoded:
                view = partial(self._decoded, view)
        else:
            self._find_caller(request)
            if request.caller is None:
                request.body = b""
        view = view or self._through_flask
        large = encoded or MAX_INLINE_BODY < request.length
        # Routes that are open to all read no body.
        if large and request.length <= self._max_body and request.caller is not None:
            return in_thread(lambda: self._in_thread(view, request), request.caller)
        return view(request)

    def _find_caller(self, request: Request) -> None:
        """Set `caller` if the key is valid. If not, `check` answers 401 later, within Flask, whose
        hooks see no body then.
        """
        with suppress(HttpError):
            self._key.check(request)

    def check(self, request: Request) -> None:
        """What every request has to pass before its view, by either way.

        Raises: HttpError 401 and 413; QueueFull and OverQuota, before any work is spent on a body.
        """
        self._key.check(request)
        if request.client == OWN:
            request.caller = None  # a worker's own requests are nobody's
        if request.length > self._max_body:
            raise HttpError(
                *(413, "too_large"),
                f"the body has more than {self._max_body} bytes, the limit (MAX_BODY_SIZE)",
            )
        if (quota := self._quotas.get(request.caller)) and request.method == "POST":
            quota.request()
        if request.length:
            tokens = max(1, request.length // self._bytes_per_token)
            if full := self._queue.full(request.caller, tokens):
                raise full

    def _through_flask(self, request: Request) -> Response:
        """Flask's whole dispatch, with whatever has been added to it."""
        body: list[bytes] = []
        begun = "500", Headers()

        def start(status: str, fields: list[tuple[str, str]], _: object = None) -> Any:
            nonlocal begun
            begun = status, Headers(fields)
            return body.append

        parts = self._app.wsgi_app(environ_of(request), start)
        try:
            body.extend(parts)
        finally:
            getattr(parts, "close", lambda: None)()
        status, headers = begun
        content_type = headers.pop("Content-Type", "application/json")
        headers.pop("Content-Length", None)
        return Response(b"".join(body), int(status[:3]), content_type, [*headers])

    # -- other servers and tests

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """The same as WSGI."""
        request = request_of(environ)
        response = self.respond(request)
        self.sent(request, response, None)
        return to_flask(response)(environ, start_response)


class CheckedFlask(flask.Flask):
    """Flask that calls `check` before the view of every request, and lets the view run within
    `decoded`; `before_request` functions run before that."""

    check: Callable[[Request], None]
    decoded: Callable[[Request], AbstractContextManager[None]]

    def dispatch_request(self) -> Any:
        request = current.get()
        self.check(request)
        with self.decoded(request):
            return super().dispatch_request()


def register_errors(app: flask.Flask) -> None:
    """Answer every error of Flask's dispatch in the dialect's form."""

    def handle(error: Exception) -> flask.Response:
        return to_flask(errors.response(error, current.get()))

    app.register_error_handler(Exception, handle)
    app.register_error_handler(HTTPException, handle)


def has_hooks(app: flask.Flask) -> bool:
    """Whether somebody has added code that Flask would run around requests."""
    hooks = (
        app.before_request_funcs,
        app.after_request_funcs,
        app.teardown_request_funcs,
        app.teardown_appcontext_funcs,
        app.url_value_preprocessors,
    )
    return any(hooks) or "wsgi_app" in vars(app)


def direct_views(app: flask.Flask) -> dict[tuple[str, str], View]:
    """The views that can be called without Flask: those of api.endpoint.endpoint whose route has no
    parameters."""
    table: dict[tuple[str, str], View] = {}
    for rule in app.url_map.iter_rules():
        view = getattr(app.view_functions[rule.endpoint], "direct", None)
        if view and not rule.arguments:
            for method in (rule.methods or set()) - {"OPTIONS", "HEAD"}:
                table[method, rule.rule] = view
    return table
